"""Training checkpoints that survive `kill -9`.

A checkpoint is written under a temporary name, synchronized to the disk and renamed; the newest complete checkpoint is
loaded. Each rank writes one part, and rank 0 renames all parts at once. Any rank may read any part later, so a run can
resume on another number of ranks. Random state is not stored: every step seeds the generators from (seed, step).
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from thinksafe.distributed.ranks import all_gather_objects, barrier, rank, world_size

_NUM_KEPT = 2


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str) -> None:
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
    partial = folder / f"{final.name}.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    host_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    part_file = _part_file(partial, rank())
    save_file(host_tensors, part_file)
    _fsync(part_file)
    state = {"step": step, "fingerprint": fingerprint, "sha256": all_gather_objects(_sha256(part_file))}
    if rank() != 0:
        return
    (partial / "state.json").write_text(json.dumps(state))
    for path in (partial / "state.json", partial):
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for path in (folder, folder.parent):
        _fsync(path)
    checkpoints = sorted(folder.glob("step-????????"))
    newest = checkpoints.index(final)
    for stale in checkpoints[: max(0, newest + 1 - _NUM_KEPT)] + checkpoints[newest + 1 :]:
        shutil.rmtree(stale)


def load_newest(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """Return (step, tensors) of the newest complete checkpoint with this fingerprint; None if there is none.

    All ranks must call this function together. All get the same step, and each rank gets the tensors of some parts;
    together the ranks get all of them.
    """
    for candidate in all_gather_objects(sorted(folder.glob("step-????????"), reverse=True))[0]:
        checkpoint = _read(candidate, fingerprint)
        if all(all_gather_objects(checkpoint is not None)):
            return checkpoint
    return None


def _read(checkpoint: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """Return the step and the tensors of this rank's parts (number % world size = rank), on the host; None if a file is
    missing or torn, or if the fingerprint differs."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if state != {"step": state["step"], "fingerprint": fingerprint, "sha256": state["sha256"]}:
            return None
        tensors = {}
        for number, digest in enumerate(state["sha256"]):
            if number % world_size() == rank():
                part_file = _part_file(checkpoint, number)
                if _sha256(part_file) != digest:
                    return None
                tensors |= load_file(part_file)
        return state["step"], tensors
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _part_file(checkpoint: Path, number: int) -> Path:
    """Return the file that rank `number` wrote."""
    return checkpoint / f"state-{number}.safetensors"


def _sha256(file: Path) -> str:
    """Return the SHA-256 of a file's contents in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
