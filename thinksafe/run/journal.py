"""Files that a kill cannot tear: written whole or not at all, or a line at a time.

A shard is JSONL. While a stage writes it, every worker appends to a part of its own, NAME.partial-RANK, a line at a
time; a line torn by a kill is cut off when the stage goes on. What an earlier launch left lies in NAME.partial. When
the stage is done the records are put in the order of what was asked, so that the shard is the same whoever wrote which
part of it and when; it is fsynced and renamed.

Whatever one worker wrote and another is to read is looked at before it is used: a shared file system may show it late,
and a folder that is not shared never does.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from thinksafe.data.atomic import sha256
from thinksafe.data.jsonl import Shard, to_json
from thinksafe.data.records import Record
from thinksafe.distributed.workers import ALONE, Workers
from thinksafe.errors import UserError

_TAIL = 2**16
"""Bytes read at once in search of a shard's last whole line."""
_SEEN_WITHIN = 60.0
"""Seconds after which a network file system shows one machine what another has written."""
_NOT_SHARED = "with several machines, --out must lie on a file system that all of them share"


class Journal:
    """A shard being written by all workers: appended to line by line, final once `finish` has renamed it."""

    def __init__(self, final: Path, kind: type[Record], workers: Workers = ALONE):
        self.final, self._kind, self._workers = final, kind, workers
        self._earlier = final.with_name(final.name + ".partial")
        write_for_all(self._earlier, workers, self._gather)
        self.partial = final.with_name(f"{final.name}.partial-{workers.rank}")
        self._file = self.partial.open("a", encoding="utf-8")

    def records(self) -> Iterator[Record]:
        """What earlier processes wrote: the same for all workers."""
        return iter(Shard(self._earlier, self._kind))

    def append(self, record: Record) -> None:
        """Write one line and hand it to the system, where it outlives this process."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def finish(self, keys: Iterable[str]) -> None:
        """Wait for the others, and make the shard final.

        Args:
            keys: of all the records that were asked for, in the order in which they are to stand.

        Raises:
            UserError: another worker's records do not come to be seen here.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._workers.meet()
        write_for_all(self.final, self._workers, lambda: self._finish(keys))

    def _parts(self) -> list[Path]:
        return sorted(self.final.parent.glob(f"{self.final.name}.partial-*"))

    def _gather(self) -> None:
        """Move all that is there into one file. A kill in the midst of it leaves a record there twice, and the same."""
        self._earlier.parent.mkdir(parents=True, exist_ok=True)
        if self.final.exists():  # whole, but killed before the manifest knew
            os.replace(self.final, self._earlier)
        self._earlier.touch()
        _drop_torn_line(self._earlier)
        with self._earlier.open("ab") as earlier:
            for part in self._parts():
                _drop_torn_line(part)
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, earlier)
            earlier.flush()
            os.fsync(earlier.fileno())
        for part in self._parts():
            part.unlink()

    def _finish(self, keys: Iterable[str]) -> None:
        self._gather()
        places, wanted = self._places(), list(keys)
        until = time.monotonic() + _SEEN_WITHIN
        while not places.keys() >= set(wanted):
            if self._workers.count == 1 or time.monotonic() > until:
                raise UserError(f"{self.final}: not every worker's records are to be seen here; {_NOT_SHARED}")
            time.sleep(1)
            self._gather()
            places = self._places()
        ordered = self.final.with_name(self.final.name + ".ordered")
        with self._earlier.open("rb") as earlier, ordered.open("wb") as stream:
            for key in wanted:
                earlier.seek(places[key])
                stream.write(earlier.readline())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(ordered, self.final)
        self._earlier.unlink()

    def _places(self) -> dict[str, int]:
        """Where each record's line begins."""
        shard = Shard(self._earlier, self._kind)
        return {record.key: start for record, start in zip(shard, shard.starts, strict=True)}


def _drop_torn_line(file: Path) -> None:
    with file.open("r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _TAIL)
            stream.seek(start)
            if newline := stream.read(end - start).rfind(b"\n") + 1:
                end = start + newline
                break
            end = start
        stream.truncate(end)


def write_for_all(file: Path, workers: Workers, write: Callable[[], Any] = lambda: None) -> Path:
    """Let the first worker write a file, and wait until this one sees it as it is.

    Args:
        write: does it; by default it is there already.

    Raises:
        UserError: it never comes to be seen.
    """

    def written() -> str:
        write()
        return sha256(file) if workers.count > 1 else ""

    digest = workers.once(written)
    until = time.monotonic() + _SEEN_WITHIN
    while not workers.leads and not (file.exists() and sha256(file) == digest):
        if time.monotonic() > until:
            raise UserError(f"{file}: is not what the first worker wrote there; {_NOT_SHARED}")
        time.sleep(0.2)
    return file
