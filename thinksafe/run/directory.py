"""The run directory is the database: recipe, manifest, shards. `kill -9` at any moment loses nothing finished.

The manifest, itself replaced atomically, lists every stage that is done, with the hashes of the files that it wrote. A
stage is done once it stands there, and never before all its files have their final names; files.py writes them.
"""

import fcntl
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TextIO

import torch

import thinksafe
from thinksafe.data.atomic import sha256, write_atomically
from thinksafe.distributed.workers import ALONE, Workers
from thinksafe.errors import UserError
from thinksafe.recipe.schema import Recipe
from thinksafe.run.journal import write_for_all
from thinksafe.run.resume import check_same_recipe, may_be_corrected, recipe_in

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pyarrow")


class StageClock:
    """Seconds a stage has worked, kept in a file so that a killed stage does not lose them."""

    def __init__(self, file: Path, saves: bool = True):
        self._file, self._saves = file, saves
        self._before = float(file.read_text() or 0) if file.exists() else 0.0
        self._started = self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def tick(self) -> None:
        """Save the time, at most once a second."""
        if self._saves and time.perf_counter() - self._saved > 1:
            self._saved = time.perf_counter()
            write_atomically(self._file, f"{self.seconds:.3f}")

    def remove(self) -> None:
        """Forget the file: the stage is in the manifest now."""
        self._file.unlink(missing_ok=True)


class RunDir:
    """One run's folder, locked while it is open. All workers open it and go through the same stages.

    Attributes:
        path: the folder.
        recipe: what the run is.
        workers: the processes at work in it; the first one alone writes what is written once.
    """

    def __init__(self, path: Path, recipe: Recipe, workers: Workers = ALONE):
        self.path = path
        self.recipe = recipe
        self.workers = workers

    @classmethod
    @contextmanager
    def open(cls, path: Path, recipe: Recipe, workers: Workers = ALONE) -> Iterator["RunDir"]:
        """Create the folder or go on with it.

        Raises:
            UserError: the folder belongs to another recipe, holds something else, another process works in it, or not
                all workers see it.
        """
        recipe_file = path / "recipe.yaml"

        def write_recipe() -> None:
            if recipe_file.exists() and not may_be_corrected(recipe_file):
                check_same_recipe(recipe_file, recipe)
            if not recipe_file.exists() or recipe_in(recipe_file) != recipe:
                write_atomically(recipe_file, recipe.to_yaml())

        with _locked(path, workers):
            workers.once(write_recipe)
            yield cls(path, recipe, workers)

    @property
    def manifest(self) -> dict[str, Any]:
        """Stages that are done, with their shards' hashes; versions and machine of the first one."""
        file = self.path / "manifest.json"
        if file.exists():
            try:
                manifest = json.loads(file.read_text())
                if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
                    raise ValueError("it lists no stages")
                return manifest
            except ValueError as error:
                raise UserError(f"{file}: damaged ({error}); restore it or give a new --out folder") from None
        return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "stages": {}}

    def is_done(self, stage: str) -> bool:
        """Whether the stage is in the manifest and its files are as it left them.

        Raises:
            UserError: a file is gone or was changed since.
        """
        return self.workers.once(lambda: self._is_done(stage))

    def _is_done(self, stage: str) -> bool:
        entry = self.manifest["stages"].get(stage)
        if entry is None:
            return False
        for name, digest in entry["files"].items():
            file = self.path / name
            if not file.exists() or sha256(file) != digest:
                what = "was changed" if file.exists() else "is missing"
                raise UserError(f"{file}: {what} since stage {stage!r} wrote it; restore it or give a new --out folder")
        return True

    def forget_stage(self, stage: str) -> None:
        """Make a stage undone, before its files are written anew."""
        manifest = self.manifest
        if manifest["stages"].pop(stage, None) is not None:
            write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")

    @property
    def training_has_begun(self) -> bool:
        """Whether what is accepted can no longer change."""
        return (self.path / "training").exists()

    def attempts(self, number: int) -> tuple[Path, Path]:
        """Responses and verdicts: 0 of the first attempt, then those of each rung of the steering ladder, and beyond
        its end those of attempts that people's marks asked for."""
        names = ("responses.jsonl", "verdicts.jsonl")
        folder, prefix = (self.path / "rungs", f"{number}.") if number else (self.path, "")
        return tuple(folder / f"{prefix}{name}" for name in names)

    def rungs(self) -> list[tuple[Path, Path]]:
        """Responses and verdicts of all attempts that were made and judged, in order."""
        ladder = len(self.recipe.generation.rungs)
        further = takewhile(lambda files: files[1].exists(), map(self.attempts, count(ladder)))
        return [files for files in map(self.attempts, range(ladder)) if files[1].exists()] + [*further]

    def remember_input(self, name: str, digest: str) -> None:
        """Record what a run is made from, the first time; later, make sure that it is still the same.

        Raises:
            UserError: it is not, or another machine has another one.
        """

        def remember() -> str:
            manifest = self.manifest
            if manifest.setdefault("inputs", {}).setdefault(name, digest) != digest:
                raise UserError(f"{name}: was changed since this run began; restore it or give a new --out folder")
            write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            return digest

        if self.workers.once(remember) != digest:
            raise UserError(f"{name}: is another one here than on the first worker's machine; give all the same")

    def finish_stage(self, stage: str, files: list[Path], clock: StageClock, **figures: Any) -> None:
        """Record a stage as done.

        Args:
            files: what it wrote, all final.
            figures: `tokens` and whatever else the report wants; JSON values.
        """
        self.workers.once(lambda: self._finish_stage(stage, files, clock, figures))

    def _finish_stage(self, stage: str, files: list[Path], clock: StageClock, figures: dict[str, Any]) -> None:
        manifest = self.manifest
        hashes = {str(file.relative_to(self.path)): sha256(file) for file in files}
        if torch.cuda.is_available():
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        manifest["stages"][stage] = {"seconds": round(clock.seconds, 3), **figures, "files": hashes}
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        clock.remove()

    def clock(self, stage: str) -> StageClock:
        """The stage's clock, going on from where a killed process left it; a GPU's peak of memory is counted anew."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return StageClock(self.path / f".{stage.replace('/', '-')}.seconds", saves=self.workers.leads)


@contextmanager
def _locked(path: Path, workers: Workers) -> Iterator[None]:
    """A lock that all workers hold together: as long as one of them lives, no other launch gets in."""
    lock_file = path / ".lock"

    def claim() -> TextIO:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: is a file; give a folder")
        begun = {".lock", "recipe.yaml.partial"}  # all that a process leaves that was killed right here
        if path.is_dir() and not (path / "recipe.yaml").exists() and any(p.name not in begun for p in path.iterdir()):
            raise UserError(f"--out {path}: is not empty and no run directory; give a new folder")
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("a+")
        _lock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n")  # no other folder holds this line
        lock.flush()
        _lock(lock, fcntl.LOCK_SH)
        return lock

    with ExitStack() as held:
        if workers.leads:
            held.enter_context(claim())
        write_for_all(lock_file, workers)
        if not workers.leads:
            _lock(held.enter_context(lock_file.open()), fcntl.LOCK_SH)
        workers.meet()  # nobody works before all hold it
        yield


def _lock(lock: TextIO, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {Path(lock.name).parent}: another process is working in this run directory") from None


def environment() -> dict[str, str]:
    """Versions and machine, for the manifest."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    versions = {package: found for package in _PACKAGES if (found := installed(package))}
    return {
        "thinksafe": thinksafe.__version__,
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "cpu_count": str(os.cpu_count()),
    }
