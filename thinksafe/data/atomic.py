"""Write files and folders atomically: a reader or a crash sees the old contents or the new ones, never a part."""

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
def atomic_path(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path, at which the body writes a file or a folder that then gets the name `path`.

    A file at `path` is replaced; a folder there must be empty when the body ends. If the body raises, `path` is
    unchanged and the temporary path is removed. The parent folder must exist.

    Args:
        partial: the temporary path, on the same file system; by default `path` with the suffix `.partial`. What an
            earlier attempt left there is removed.
    """
    partial = partial or path.with_name(path.name + ".partial")
    _remove(partial)
    try:
        yield partial
        install(partial, path)
    except BaseException:
        _remove(partial)
        raise


def install(partial: Path, path: Path) -> None:
    """Give a finished file or folder its final name, after its contents are on the disk; see `atomic_path`."""
    for written in (*partial.rglob("*"), partial):
        fsync(written)
    os.replace(partial, path)


def fsync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_writer(file: Path) -> Iterator[TextIO]:
    """Yield a UTF-8 text stream; what the body writes to it replaces the file, see `atomic_path`."""
    with atomic_path(file) as partial, partial.open("w", encoding="utf-8") as stream:
        yield stream


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's contents by a text, or create the file; its folder must exist."""
    with atomic_writer(file) as stream:
        stream.write(text)


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Replace a file by records as JSONL, one a line; if writing fails, the file is unchanged."""
    with atomic_writer(file) as stream:
        stream.writelines(to_json(record) + "\n" for record in records)


@contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which becomes the folder that the user named with `--to` when the body ends.

    Raises:
        UserError: `folder` is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: {'is not empty' if folder.is_dir() else 'is a file'}; use a new folder")
    folder = folder.resolve()
    # No other folder has such a name, so what is there is an earlier attempt.
    with atomic_path(folder, folder.with_name(f".{folder.name}.thinksafe-partial")) as staging:
        staging.mkdir(parents=True)
        yield staging


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
