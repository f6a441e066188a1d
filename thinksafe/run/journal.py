"""Journals: record files that all workers write line by line, and that stay readable after a kill at any moment.

While a stage writes a record file (JSONL), every worker appends to its own part, NAME.partial-RANK. When the stage
resumes after a kill, incomplete last lines are cut off and all parts are gathered in NAME.partial. When the stage is
done, the records are put in the order of the tasks, so the file does not depend on which worker wrote which record and
when; then it is fsynced and renamed.

Before reading a file that another worker wrote, a worker waits until its hash matches: network file systems may lag,
and a folder that is not shared will never match.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from thinksafe.data.atomic import sha256
from thinksafe.data.jsonl import RecordFile, to_json
from thinksafe.data.records import Record
from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.errors import UserError

_TAIL_BYTES = 2**16
"""Bytes read at once in the search for the last complete line."""
_VISIBILITY_TIMEOUT = 60.0
"""Seconds within which a network file system shows a file to other machines."""
_NOT_SHARED = "with several machines, --out must lie on a file system that all of them share"


class Journal:
    """A record file that all workers append to line by line; it is final once `finish` has renamed it."""

    def __init__(self, final: Path, kind: type[Record], workers: Workers = SINGLE_PROCESS):
        self.final, self._kind, self._workers = final, kind, workers
        self._gathered = final.with_name(final.name + ".partial")
        write_on_leader(self._gathered, workers, self._gather)
        self.partial = final.with_name(f"{final.name}.partial-{workers.rank}")
        self._file = self.partial.open("a", encoding="utf-8")

    def records(self) -> Iterator[Record]:
        """Return an iterator over the records of earlier processes, which are the same for all workers."""
        return iter(RecordFile(self._gathered, self._kind))

    def append(self, record: Record) -> None:
        """Write one line and flush it to the operating system, where it outlives this process."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def finish(self, keys: Iterable[str]) -> None:
        """Wait for the other workers, then order the records and give the file its final name.

        Args:
            keys: keys of all records of the stage, in the order of the final file.

        Raises:
            UserError: another worker's records do not become visible here.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._workers.barrier()
        write_on_leader(self.final, self._workers, lambda: self._finish(keys))

    def _parts(self) -> list[Path]:
        return sorted(self.final.parent.glob(f"{self.final.name}.partial-*"))

    def _gather(self) -> None:
        """Move all parts into one file. After a kill in between, the file holds some records twice."""
        self._gathered.parent.mkdir(parents=True, exist_ok=True)
        if self.final.exists():  # a process was killed between `finish` and the manifest
            os.replace(self.final, self._gathered)
        self._gathered.touch()
        _drop_torn_line(self._gathered)
        with self._gathered.open("ab") as gathered:
            for part in self._parts():
                _drop_torn_line(part)
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, gathered)
            gathered.flush()
            os.fsync(gathered.fileno())
        for part in self._parts():
            part.unlink()

    def _finish(self, keys: Iterable[str]) -> None:
        self._gather()
        offsets, ordered_keys = self._line_offsets(), list(keys)
        deadline = time.monotonic() + _VISIBILITY_TIMEOUT
        while not offsets.keys() >= set(ordered_keys):
            if self._workers.world_size == 1 or time.monotonic() > deadline:
                raise UserError(f"{self.final}: the records of some workers are not visible here; {_NOT_SHARED}")
            time.sleep(1)
            self._gather()
            offsets = self._line_offsets()
        ordered = self.final.with_name(self.final.name + ".ordered")
        with self._gathered.open("rb") as gathered, ordered.open("wb") as stream:
            for key in ordered_keys:
                gathered.seek(offsets[key])
                stream.write(gathered.readline())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(ordered, self.final)
        self._gathered.unlink()

    def _line_offsets(self) -> dict[str, int]:
        """Return the byte at which each record's line begins, by the record's key."""
        records = RecordFile(self._gathered, self._kind)
        return {record.key: start for record, start in zip(records, records.starts, strict=True)}


def _drop_torn_line(file: Path) -> None:
    with file.open("r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _TAIL_BYTES)
            stream.seek(start)
            if newline := stream.read(end - start).rfind(b"\n") + 1:
                end = start + newline
                break
            end = start
        stream.truncate(end)


def write_on_leader(file: Path, workers: Workers, write: Callable[[], Any] = lambda: None) -> Path:
    """Let the leader write a file, and wait until this worker sees the same contents.

    Args:
        write: writes the file; by default the file exists already.

    Raises:
        UserError: the contents do not become visible here.
    """

    def write_and_hash() -> str:
        write()
        return sha256(file) if workers.world_size > 1 else ""

    digest = workers.on_leader(write_and_hash)
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT
    while not workers.is_leader and not (file.exists() and sha256(file) == digest):
        if time.monotonic() > deadline:
            raise UserError(f"{file}: differs from the leader's file; {_NOT_SHARED}")
        time.sleep(0.2)
    return file
