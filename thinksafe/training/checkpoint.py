"""Checkpoints that survive `kill -9`: written under a temporary name, fsynced, renamed; the newest whole one wins.

The random state is not stored: every step seeds itself from (seed, step), so the step number is all there is to it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_KEEP = 2


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str) -> None:
    """Write `folder/step-XXXXXXXX` and delete all others but the one before it.

    Later ones go too: this run has come to pass where they stand, so they are torn or another run's.

    Args:
        step: optimiser steps done.
        fingerprint: identifies data and settings; see `load_newest`.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_host, partial / "state.safetensors")
    seal = {"step": step, "fingerprint": fingerprint, "sha256": _sha256(partial / "state.safetensors")}
    (partial / "state.json").write_text(json.dumps(seal))
    for file in (partial / "state.safetensors", partial / "state.json", partial):
        _fsync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _fsync(folder)
    present = sorted(folder.glob("step-????????"))
    newest = present.index(final)
    for stale in present[: max(0, newest + 1 - _KEEP)] + present[newest + 1 :]:
        shutil.rmtree(stale)


def load_newest(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """(step, tensors) of the newest checkpoint that is whole and of this fingerprint, or None."""
    for candidate in sorted(folder.glob("step-????????"), reverse=True):
        tensors = candidate / "state.safetensors"
        try:
            seal = json.loads((candidate / "state.json").read_text())
            if seal == {"step": seal["step"], "fingerprint": fingerprint, "sha256": _sha256(tensors)}:
                return seal["step"], load_file(tensors)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
