"""Checkpoints that survive `kill -9`: written under a temporary name, fsynced, renamed; the newest whole one wins.

Each rank writes a part, and the first one renames them all at once. Which rank reads which part later is free.
The random state is not stored: every step seeds itself from (seed, step), so the step number is all there is to it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from thinksafe.distributed.ranks import barrier, gather, rank, world_size

_KEEP = 2


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Write `folder/step-XXXXXXXX` and delete all others but the one before it.

    Later ones go too: this run has come to pass where they stand, so they are torn or another run's.

    Args:
        folder: the same for all ranks, which save together.
        step: optimiser steps done.
        tensors: this rank's part; no two ranks use one name.
        fingerprint: identifies data and settings; see `load_newest`.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    part = _part(partial, rank())
    save_file(on_host, part)
    _fsync(part)
    seal = {"step": step, "fingerprint": fingerprint, "sha256": gather(_sha256(part))}
    if rank() != 0:
        return
    (partial / "state.json").write_text(json.dumps(seal))
    for path in (partial / "state.json", partial):
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for path in (folder, folder.parent):
        _fsync(path)
    present = sorted(folder.glob("step-????????"))
    newest = present.index(final)
    for stale in present[: max(0, newest + 1 - _KEEP)] + present[newest + 1 :]:
        shutil.rmtree(stale)


def load_newest(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """(step, tensors) of the newest checkpoint that is whole and of this fingerprint, or None.

    Each rank gets the tensors of some parts, and all ranks the same step.
    """
    for candidate in gather(sorted(folder.glob("step-????????"), reverse=True))[0]:
        found = _read(candidate, fingerprint)
        if all(gather(found is not None)):
            return found
    return None


def _read(checkpoint: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """The step and this rank's share of the parts, if they are whole."""
    try:
        seal = json.loads((checkpoint / "state.json").read_text())
        if seal != {"step": seal["step"], "fingerprint": fingerprint, "sha256": seal["sha256"]}:
            return None
        tensors = {}
        for number, digest in enumerate(seal["sha256"]):
            if number % world_size() == rank():
                part = _part(checkpoint, number)
                if _sha256(part) != digest:
                    return None
                tensors |= load_file(part)
        return seal["step"], tensors
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _part(checkpoint: Path, number: int) -> Path:
    return checkpoint / f"state-{number}.safetensors"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
