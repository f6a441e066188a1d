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

from thinksafe.data.atomic import install, sha256
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
    """A record file that all workers append to line by line; it is final once `finish` has renamed it. After a kill,
    the next process that creates the same journal finds every record that was appended.

    Attributes:
        final: the file's final name.
        partial: this worker's part, to which `append` writes.
    """

    def __init__(self, final: Path, kind: type[Record], workers: Workers = SINGLE_PROCESS):
        """Gather the records of earlier processes. All workers call this together. The file's folder is created."""
        self.final, self._kind, self._workers = final, kind, workers
        self._gathered = final.with_name(final.name + ".partial")
        write_on_leader(self._gathered, workers, self._gather)
        self.partial = final.with_name(f"{final.name}.partial-{workers.rank}")
        self._file = self.partial.open("a", encoding="utf-8")

    def records(self) -> Iterator[Record]:
        """Return an iterator over the records that earlier processes wrote, the same on all workers. Some may occur
        twice."""
        return iter(RecordFile(self._gathered, self._kind))

    def append(self, record: Record) -> None:
        """Write one line to this worker's part and flush it to the operating system, where it outlives this process."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def finish(self, keys: Iterable[str]) -> None:
        """Wait for the other workers, then give the file its final name, with the records of these keys in this order.
        Others are dropped. All workers call this together, once.

        Raises:
            UserError: a key has no record, or another worker's records do not become visible here within a minute.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._workers.barrier()
        write_on_leader(self.final, self._workers, lambda: self._finish(keys))

    def _gather(self) -> None:
        """Move all parts, and the final file if there is one, into NAME.partial. A kill during this leaves some records
        twice."""
        self._gathered.parent.mkdir(parents=True, exist_ok=True)
        if self.final.exists():  # a process was killed between `finish` and the manifest
            os.replace(self.final, self._gathered)
        self._gathered.touch()
        _drop_torn_line(self._gathered)
        parts = sorted(self.final.parent.glob(f"{self.final.name}.partial-*"))
        with self._gathered.open("ab") as gathered:
            for part in parts:
                _drop_torn_line(part)
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, gathered)
            gathered.flush()
            os.fsync(gathered.fileno())
        for part in parts:
            part.unlink()

    def _finish(self, keys: Iterable[str]) -> None:
        """Do the leader's part of `finish`."""
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
        install(ordered, self.final)
        self._gathered.unlink()

    def _line_offsets(self) -> dict[str, int]:
        """Return key -> offset in bytes of the record's line in NAME.partial; the last line counts."""
        records = RecordFile(self._gathered, self._kind)
        return {record.key: start for record, start in zip(records, records.starts, strict=True)}


def _drop_torn_line(file: Path) -> None:
    """Cut off everything after the last newline of a file."""
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
    """Let the leader call `write`, which writes a file, wait until this worker sees the same contents, and return the
    file. All workers call this together. Raise a UserError if the contents are not visible here within a minute."""

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
