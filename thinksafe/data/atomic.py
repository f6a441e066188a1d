"""Write files atomically: a reader or a crash sees the old contents or the new ones, never a part."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from thinksafe.data.jsonl import to_json
from thinksafe.data.records import Record
from thinksafe.errors import UserError


@contextmanager
def replacing(file: Path) -> Iterator[TextIO]:
    """A stream whose contents take a file's place in the end: a reader or a crash sees the old or the new, never a
    part."""
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def fresh(folder: Path) -> Path:
    """Where to make the contents of a folder that the user names, to be renamed to it once they are whole.

    Raises:
        UserError: something else is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: {'is not empty' if folder.is_dir() else 'is a file'}; give a new folder")
    partial = folder.resolve().with_name(f".{folder.resolve().name}.thinksafe-partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier attempt: nobody else gives such a name
    return partial


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's contents by a text."""
    with replacing(file) as stream:
        stream.write(text)


def write_shard(file: Path, records: Iterable[Record]) -> None:
    """Write records as JSONL, all of them or none."""
    with replacing(file) as stream:
        stream.writelines(to_json(record) + "\n" for record in records)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
