"""The run directory is the database: recipe, manifest, record files. `kill -9` at any moment loses no finished work.

The manifest, itself replaced atomically, lists every finished stage with the hashes of the files that it wrote. A stage
enters the manifest only after all its files have their final names; journal.py and data/atomic.py write them.
"""

import fcntl
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TextIO

import torch

import thinksafe
from thinksafe.data.atomic import sha256, write_atomically
from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.errors import UserError
from thinksafe.recipe.schema import Recipe
from thinksafe.run.journal import write_on_leader
from thinksafe.run.resume import check_same_recipe, is_recipe_replaceable, read_recipe

FORMAT = 2
"""Format of a run directory. It rises when names of files, fields of records or their values change."""
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pyarrow")


def check_format(path: Path) -> None:
    """Check that this version of ThinkSafe can read a run directory. Without a manifest there is nothing to check.

    Raises:
        UserError: another version made it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return  # `RunDir.manifest` reports a damaged manifest
    if isinstance(manifest, dict) and "stages" in manifest and manifest.get("format") != FORMAT:
        age = "an earlier" if manifest.get("format", 1) in range(FORMAT) else "a later"
        raise UserError(
            f"{path}: made by {age} version of ThinkSafe; finish it with that version or use a new --out folder"
        )


class StageClock:
    """Seconds that a stage has worked, kept in a file so that a killed stage does not lose them."""

    def __init__(self, file: Path, saves: bool = True):
        self._file, self._saves = file, saves
        self._earlier_seconds = float(file.read_text() or 0) if file.exists() else 0.0
        self._started = self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started

    def tick(self) -> None:
        """Save the time, at most once a second."""
        if self._saves and time.perf_counter() - self._saved > 1:
            self._saved = time.perf_counter()
            write_atomically(self._file, f"{self.seconds:.3f}")

    def remove(self) -> None:
        """Delete the file: the manifest now holds the stage's seconds."""
        self._file.unlink(missing_ok=True)


class RunDir:
    """One run's folder, locked while it is open. All workers open it and go through the same stages.

    Attributes:
        path: the folder.
        recipe: the settings of the run.
        workers: the processes that work in it. The leader alone writes the files that are written once.
    """

    def __init__(self, path: Path, recipe: Recipe, workers: Workers = SINGLE_PROCESS):
        self.path = path
        self.recipe = recipe
        self.workers = workers

    @classmethod
    @contextmanager
    def open(cls, path: Path, recipe: Recipe, workers: Workers = SINGLE_PROCESS) -> Iterator["RunDir"]:
        """Create the folder, or open it to resume its run.

        Raises:
            UserError: the folder belongs to another recipe or version, or is not a run directory; another process
                works in it; or not all workers see it.
        """
        recipe_file = path / "recipe.yaml"

        def write_recipe() -> None:
            check_format(path)
            if recipe_file.exists() and not is_recipe_replaceable(recipe_file):
                check_same_recipe(recipe_file, recipe)
            if not recipe_file.exists() or read_recipe(recipe_file) != recipe:
                write_atomically(recipe_file, recipe.to_yaml())

        with _locked(path, workers):
            workers.on_leader(write_recipe)
            yield cls(path, recipe, workers)

    @property
    def manifest(self) -> dict[str, Any]:
        """The finished stages with the hashes of their files, and the versions and machine with which the run began."""
        file = self.path / "manifest.json"
        if file.exists():
            check_format(self.path)
            try:
                manifest = json.loads(file.read_text())
                if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
                    raise ValueError("it lists no stages")
                return manifest
            except ValueError as error:
                raise UserError(f"{file}: damaged ({error}); restore it or use a new --out folder") from None
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return {"format": FORMAT, "created": created, "environment": environment(), "stages": {}}

    def is_done(self, stage: str) -> bool:
        """Return whether the stage is in the manifest, after a check that its files are unchanged.

        Raises:
            UserError: a file is missing or was changed.
        """
        return self.workers.on_leader(lambda: self._is_done(stage))

    def _is_done(self, stage: str) -> bool:
        entry = self.manifest["stages"].get(stage)
        if entry is None:
            return False
        for name, digest in entry["files"].items():
            file = self.path / name
            if not file.exists() or sha256(file) != digest:
                problem = "was changed" if file.exists() else "is missing"
                remedy = "restore it or use a new --out folder"
                raise UserError(f"{file}: {problem} since stage {stage!r} wrote it; {remedy}")
        return True

    def invalidate_stage(self, stage: str) -> None:
        """Remove a stage from the manifest, before its files are written again."""
        manifest = self.manifest
        if manifest["stages"].pop(stage, None) is not None:
            write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")

    @property
    def training_has_begun(self) -> bool:
        """Whether training has started, after which the accepted examples can no longer change."""
        return (self.path / "training").exists()

    def attempt_paths(self, number: int) -> tuple[Path, Path]:
        """Return the paths of an attempt's responses and verdicts, whether or not they exist.

        Args:
            number: 0 for the first attempt, then the rung of the steering ladder. Retries after a person rejected
                a response have numbers above the ladder's.
        """
        names = ("responses.jsonl", "verdicts.jsonl")
        folder, prefix = (self.path / "rungs", f"{number}.") if number else (self.path, "")
        return tuple(folder / f"{prefix}{name}" for name in names)

    def attempt_files(self) -> list[tuple[Path, Path]]:
        """Return the files of responses and verdicts of all judged attempts, in order."""
        num_rungs = len(self.recipe.generation.rungs)
        ladder = [files for files in map(self.attempt_paths, range(num_rungs)) if files[1].exists()]
        beyond_ladder = takewhile(lambda files: files[1].exists(), map(self.attempt_paths, count(num_rungs)))
        return [*ladder, *beyond_ladder]

    def pin_input(self, name: str, digest: str) -> None:
        """Record the hash of an input the first time; later, check that the input is still the same.

        Raises:
            UserError: the input changed, or differs between machines.
        """

        def pin() -> str:
            manifest = self.manifest
            if manifest.setdefault("inputs", {}).setdefault(name, digest) != digest:
                raise UserError(f"{name}: was changed since this run began; restore it or use a new --out folder")
            write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            return digest

        if self.workers.on_leader(pin) != digest:
            raise UserError(f"{name}: differs between this machine and the leader's; use the same on all machines")

    def finish_stage(self, stage: str, files: list[Path], clock: StageClock, **figures: Any) -> None:
        """Record a stage as done.

        Args:
            files: the files that it wrote, under their final names.
            figures: `tokens` and other figures for the report; JSON values.
        """
        self.workers.on_leader(lambda: self._finish_stage(stage, files, clock, figures))

    def _finish_stage(self, stage: str, files: list[Path], clock: StageClock, figures: dict[str, Any]) -> None:
        manifest = self.manifest
        hashes = {str(file.relative_to(self.path)): sha256(file) for file in files}
        if torch.cuda.is_available():
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        manifest["stages"][stage] = {"seconds": round(clock.seconds, 3), **figures, "files": hashes}
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        clock.remove()

    def clock(self, stage: str) -> StageClock:
        """Return the stage's clock, which continues after a kill, and reset the GPU's peak memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return StageClock(self.path / f".{stage.replace('/', '-')}.seconds", saves=self.workers.is_leader)


@contextmanager
def _locked(path: Path, workers: Workers) -> Iterator[None]:
    """Hold a lock that all workers share: while one of them lives, no other launch can open the folder."""
    lock_file = path / ".lock"

    def claim() -> TextIO:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: is a file; use a folder")
        left_by_kill = {".lock", "recipe.yaml.partial"}  # by a process that was killed before it wrote a recipe
        is_foreign = not (path / "recipe.yaml").exists() and path.is_dir()
        if is_foreign and any(file.name not in left_by_kill for file in path.iterdir()):
            raise UserError(f"--out {path}: is not empty and not a run directory; use a new folder")
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("a+")
        _lock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}\n")  # no other folder holds this line
        lock.flush()
        _lock(lock, fcntl.LOCK_SH)
        return lock

    with ExitStack() as open_files:
        if workers.is_leader:
            open_files.enter_context(claim())
        write_on_leader(lock_file, workers)
        if not workers.is_leader:
            _lock(open_files.enter_context(lock_file.open()), fcntl.LOCK_SH)
        workers.barrier()  # no worker starts before all of them hold the lock
        yield


def _lock(lock: TextIO, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {Path(lock.name).parent}: another process is working in this run directory") from None


def environment() -> dict[str, str]:
    """Return the versions and the machine, for the manifest."""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "thinksafe": thinksafe.__version__,
        "python": platform.python_version(),
        **versions,
        "machine": platform.machine(),
        "cpu_count": str(os.cpu_count()),
    }
