"""Training checkpoints that survive `kill -9`.

A checkpoint is written under a temporary name, synchronized to the disk and renamed; the newest complete checkpoint is
loaded. Each rank writes one part, and rank 0 renames all parts at once. Any rank may read any part later, so a run can
resume on another number of ranks. Random state is not stored: every step seeds the generators from (seed, step).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from thinksafe.data.atomic import fsync, install, sha256
from thinksafe.distributed.workers import SINGLE_PROCESS, Workers

_NUM_KEPT = 2


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str, workers: Workers = SINGLE_PROCESS
) -> None:
    """Write `folder/step-XXXXXXXX`, keep the checkpoint before it and delete all others.

    Checkpoints of later steps are deleted too: this run did not resume from them, so they are torn or belong to another
    run. All ranks must call this function together.

    Args:
        folder: parent of all checkpoints, the same on every rank.
        step: number of optimizer steps done, those left out included.
        tensors: this rank's part of the state; each name occurs on one rank only.
        fingerprint: hash of data and settings (`training_fingerprint`), which `load_newest` compares.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")

    def make_empty() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    workers.on_leader(make_empty)
    part_file = _part_file(partial, workers.rank)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part_file)
    fsync(part_file)
    state = {"step": step, "fingerprint": fingerprint, "sha256": workers.all_gather(sha256(part_file))}
    if not workers.is_leader:
        return
    (partial / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    install(partial, final)
    for path in (folder, folder.parent):
        fsync(path)
    checkpoints = sorted(folder.glob("step-????????"))
    newest = checkpoints.index(final)
    for stale in checkpoints[: max(0, newest + 1 - _NUM_KEPT)] + checkpoints[newest + 1 :]:
        shutil.rmtree(stale)


def load_newest(
    folder: Path,
    fingerprint: str,
    workers: Workers = SINGLE_PROCESS,
    on_unusable: Callable[[str], None] = lambda problem: None,
) -> tuple[int, dict[str, Tensor]] | None:
    """Return (step, tensors) of the newest complete checkpoint with this fingerprint; None if there is none. All ranks
    must call this together. They get the same step, and each gets the tensors of some parts, which no other rank gets.

    Args:
        on_unusable: called on every rank with the name of each newer checkpoint and the reason why it is passed over.
    """
    for name in workers.on_leader(lambda: sorted((path.name for path in folder.glob("step-????????")), reverse=True)):
        checkpoint = _read(folder / name, fingerprint, workers)
        problems = workers.all_gather(checkpoint if isinstance(checkpoint, str) else "")
        if not any(problems):
            return checkpoint
        on_unusable(f"{folder / name}: {next(filter(None, problems))}")
    return None


def _read(checkpoint: Path, fingerprint: str, workers: Workers) -> tuple[int, dict[str, Tensor]] | str:
    """Return the step and the tensors of this rank's parts (number % world size = rank), on the host; or the reason why
    the checkpoint cannot be used."""
    file = checkpoint / "state.json"
    try:
        state = json.loads(file.read_text())
        step, found, digests = state["step"], state["fingerprint"], state["sha256"]
        if found != fingerprint:
            return "belongs to other examples or other settings"
        tensors = {}
        for number, digest in list(enumerate(digests))[workers.rank :: workers.world_size]:
            file = _part_file(checkpoint, number)
            if sha256(file) != digest:
                return f"{file.name} is damaged"
            tensors |= load_file(file)
        return step, tensors
    except FileNotFoundError:
        return f"{file.name} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{file.name} is damaged"


def _part_file(checkpoint: Path, number: int) -> Path:
    return checkpoint / f"state-{number}.safetensors"
