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
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TextIO

import torch

import thinksafe
from thinksafe.data.atomic import sha256, write_atomically
from thinksafe.distributed.workers import SINGLE_PROCESS, Workers, leader_only
from thinksafe.errors import UserError
from thinksafe.recipe.schema import Recipe
from thinksafe.run.journal import write_on_leader
from thinksafe.run.resume import check_same_recipe, is_recipe_replaceable, read_recipe

FORMAT = 2
"""Format of a run directory. It rises when names of files, fields of records or their values change."""
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pyarrow")


def check_format(path: Path, remedy: str = "use a new --out folder") -> None:
    """Raise a UserError, with a remedy, if another version of ThinkSafe made a run directory in another format.

    A missing or damaged manifest passes; `RunDir.manifest` reports a damaged one.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and "stages" in manifest and manifest.get("format") != FORMAT:
        age = "an earlier" if manifest.get("format", 1) in range(FORMAT) else "a later"
        raise UserError(f"{path}: made by {age} version of ThinkSafe; finish it with that version or {remedy}")


class StageClock:
    """The seconds that a stage has worked, over all processes that worked on it one after another.

    They are kept in a file, which only the leader writes, so that a killed stage loses at most about one second.
    """

    def __init__(self, file: Path, is_leader: bool = True):
        self._file, self._is_leader = file, is_leader
        self._earlier_seconds = float(file.read_text() or 0) if file.exists() else 0.0
        self._started = self._saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time so far, in seconds."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def tick(self) -> None:
        """Save the seconds, at most once a second."""
        if self._is_leader and time.perf_counter() - self._saved > 1:
            self._saved = time.perf_counter()
            write_atomically(self._file, f"{self.seconds:.3f}")

    def remove(self) -> None:
        """Delete the file: the manifest now holds the seconds."""
        self._file.unlink(missing_ok=True)


class RunDir:
    """The folder of one run: its recipe, manifest and record files.

    All workers of a launch open the folder with `RunDir.open` and share a lock that keeps other launches out; then they
    go through the same stages. `RunDir(...)` itself checks and locks nothing, and is for reading.

    Attributes:
        workers: this process and its relation to the other workers. The leader alone writes the files that are written
            once.
    """

    def __init__(self, path: Path, recipe: Recipe, workers: Workers = SINGLE_PROCESS):
        self.path, self.recipe, self.workers = path, recipe, workers
        self._opened = datetime.now().astimezone()

    @classmethod
    @contextmanager
    def open(cls, path: Path, recipe: Recipe, workers: Workers = SINGLE_PROCESS) -> Iterator["RunDir"]:
        """Create the folder, or open it to resume its run, and hold the workers' common lock during the body. All
        workers call this together.

        Raises:
            UserError: the folder belongs to another recipe or version, or is not a run directory; another launch works
                in it; or not all workers see it.
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
        """The content of manifest.json, read from the file each time; a manifest without stages if there is no file.

        Keys: `stages` (name -> `seconds`, further figures, and `files` with their hashes), `inputs` (name -> hash), and
        `format`, `created` and `environment` of the run's beginning.

        Raises:
            UserError: the file is damaged, or another version of ThinkSafe made it.
        """
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
        created = self._opened.isoformat(timespec="seconds")
        return {"format": FORMAT, "created": created, "environment": environment(), "stages": {}}

    @cached_property
    def created(self) -> datetime:
        """Wall time at which the run began, in the time zone of the leader at that time. Chat templates write this
        date, so prompts have the same ids on every day and machine. All workers call this together.

        Raises:
            UserError: manifest.json is damaged.
        """
        created = self.workers.on_leader(lambda: self.manifest.get("created"))
        try:
            return datetime.fromisoformat(created).replace(tzinfo=None)
        except (TypeError, ValueError):
            raise UserError(
                f"{self.path / 'manifest.json'}: damaged (created: {created!r} is no time); restore it or use a new "
                "--out folder"
            ) from None

    @leader_only
    def is_done(self, stage: str) -> bool:
        """Return whether the stage is in the manifest; all workers call this together. Raise a UserError if it is, but
        one of its files is missing or was changed."""
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
        """Remove a stage from the manifest, before its files are written again. Only the leader may call this."""
        manifest = self.manifest
        if manifest["stages"].pop(stage, None) is not None:
            self._write_manifest(manifest)

    @property
    def student_folder(self) -> Path:
        """Folder of the trained student: an adapter, or a whole checkpoint after full fine-tuning."""
        return self.path / ("adapter" if self.recipe.training.method == "lora" else "model")

    @property
    def training_has_begun(self) -> bool:
        """Whether training has started, after which the accepted examples can no longer change."""
        return (self.path / "training").exists()

    def attempt_paths(self, number: int) -> tuple[Path, Path]:
        """Return the paths of the responses and of the verdicts of one round of attempts, whether or not they exist.

        Round 0 is the first attempt, and the next ones are the rungs of the steering ladder. Retries after a person
        rejected a response have the numbers from `len(recipe.generation.rungs)`.
        """
        names = ("responses.jsonl", "verdicts.jsonl")
        folder, prefix = (self.path / "rungs", f"{number}.") if number else (self.path, "")
        return tuple(folder / f"{prefix}{name}" for name in names)

    def attempt_files(self) -> list[tuple[Path, Path]]:
        """Return (responses, verdicts), the paths of each round of attempts whose verdicts are finished, in order. A
        rung that had no task has no file."""
        num_rungs = len(self.recipe.generation.rungs)
        ladder = [files for files in map(self.attempt_paths, range(num_rungs)) if files[1].exists()]
        beyond_ladder = takewhile(lambda files: files[1].exists(), map(self.attempt_paths, count(num_rungs)))
        return [*ladder, *beyond_ladder]

    def pin_input(self, name: str, digest: str) -> None:
        """Record the hash of an input in the manifest, at its first use. All workers call this together.

        Args:
            name: name of the input in the manifest and in errors, such as `model`.
            digest: hash of the input as this worker sees it.

        Raises:
            UserError: the input changed since the hash was recorded, or differs between machines.
        """

        def pin() -> str:
            manifest = self.manifest
            if manifest.setdefault("inputs", {}).setdefault(name, digest) != digest:
                raise UserError(f"{name}: was changed since this run began; restore it or use a new --out folder")
            self._write_manifest(manifest)
            return digest

        if self.workers.on_leader(pin) != digest:
            raise UserError(f"{name}: differs between this machine and the leader's; use the same on all machines")

    @leader_only
    def finish_stage(self, stage: str, files: list[Path], clock: StageClock, **figures: Any) -> None:
        """Enter a stage in the manifest as done, with its seconds, figures (JSON values) and the hashes of its files;
        on a GPU also with the leader's `peak_bytes`. All workers call this together."""
        manifest = self.manifest
        hashes = {str(file.relative_to(self.path)): sha256(file) for file in files}
        if torch.cuda.is_available():
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        manifest["stages"][stage] = {"seconds": round(clock.seconds, 3), **figures, "files": hashes}
        self._write_manifest(manifest)
        clock.remove()

    def clock(self, stage: str) -> StageClock:
        """Return the stage's clock, which continues after a kill, and set the GPU's record of peak memory to zero."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return StageClock(self.path / f".{stage}.seconds", self.workers.is_leader)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")


@contextmanager
def _locked(path: Path, workers: Workers) -> Iterator[None]:
    """Create the folder, and hold a lock during the body that all workers share: while one of them lives, no other
    launch can open the folder. Raise a UserError if it is not usable."""
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
    """Take a lock on an open file, or change its kind: `fcntl.LOCK_EX` (for one process) or `fcntl.LOCK_SH`
    (shared)."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {Path(lock.name).parent}: another process is working in this run directory") from None


def environment() -> dict[str, str]:
    """Return name -> text: the versions of ThinkSafe, Python and the installed ones of `_PACKAGES`, the processor's
    architecture, and `cpu_count`."""
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
