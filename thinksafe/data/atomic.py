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
def atomic_writer(file: Path) -> Iterator[TextIO]:
    """Yield a UTF-8 text stream; what was written to it replaces the file when the body ends without an error.

    If the body raises, the file is unchanged. The folder must exist.
    """
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


def staging_folder(folder: Path) -> Path:
    """Return the path of a temporary folder beside a folder that the user named with `--to`.

    The caller creates it, fills it and renames it to `folder`. A temporary folder of an earlier attempt is deleted.

    Raises:
        UserError: `folder` is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: {'is not empty' if folder.is_dir() else 'is a file'}; use a new folder")
    partial = folder.resolve().with_name(f".{folder.resolve().name}.thinksafe-partial")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier attempt left it; nothing else has such a name
    return partial


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's contents by a text, or create the file; its folder must exist."""
    with atomic_writer(file) as stream:
        stream.write(text)


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Replace a file by records as JSONL, one a line; if writing fails, the file is unchanged."""
    with atomic_writer(file) as stream:
        stream.writelines(to_json(record) + "\n" for record in records)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
