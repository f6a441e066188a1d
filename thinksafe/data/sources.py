"""Prompts and rows from the sources that a recipe names: a file, a folder, or a data set on the Hugging Face hub."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinksafe.data.jsonl import SUFFIXES, prompts_from_rows, read_rows
from thinksafe.data.records import Prompt
from thinksafe.errors import UserError
from thinksafe.paths import expand_path


def load_prompts(source: str, on_duplicate: Callable[[str], None] = lambda where: None) -> Iterator[Prompt]:
    """Return an iterator over the prompts of a source, in order and without duplicates.

    Args:
        source: a .jsonl, .json or .parquet file; a folder, which is searched with all its subfolders for such files in
            order of their paths; or `owner/name` on the Hugging Face hub, of which the split `train` is read.
        on_duplicate: called with the file and line of each row that repeats an earlier text and label.

    Raises:
        UserError: the source does not exist, or (possibly during iteration) it cannot be read or a row is not a prompt.
    """
    path = expand_path(source)
    if path.is_file():
        return prompts_from_rows(read_rows(path), path.stem, on_duplicate)
    if path.is_dir():
        rows = ((where, {"source": file.stem} | row) for file in _files_in(source) for where, row in read_rows(file))
        return prompts_from_rows(rows, source, on_duplicate)
    return prompts_from_rows(_dataset_rows("prompts", source, None, "train"), source, on_duplicate)


def load_rows(source: str, config: str | None, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for every row of an evaluation set, with all its columns.

    `where` names the source and the line, record or row, for error messages.

    Args:
        source: a .jsonl, .json or .parquet file; a folder of such files; or `owner/name` on the Hugging Face hub.
        config: name of a configuration of a data set on the hub, or None.
        split: split of a data set on the hub; None for `test`. With `config` or `split`, a folder is read as a copy of
            such a data set; without both, all its files are read.

    Raises:
        UserError: the source does not exist or cannot be read, or it is a file and `config` or `split` is given.
    """
    path = expand_path(source)
    if path.is_file():
        if config or split:
            raise UserError(f"{source}: is a file, which has no config and no split; remove them from the recipe")
        yield from read_rows(path)
    elif path.is_dir() and not (config or split):
        for file in _files_in(source):
            yield from read_rows(file)
    else:
        yield from _dataset_rows("evaluation.sets", source, config, split or "test")


def _files_in(source: str) -> list[Path]:
    """Return the readable files of a folder and its subfolders, sorted by path.

    Raises:
        UserError: there is none.
    """
    files = sorted(file for file in expand_path(source).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{source}: no .jsonl, .json or .parquet file in this folder")
    return files


def _dataset_rows(key: str, source: str, config: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a data set that the library `datasets` loads.

    Args:
        key: recipe key that names the source, for error messages.

    Raises:
        UserError: the source is not a folder and not a hub name, or it cannot be loaded.
    """
    path = expand_path(source)
    is_hub_name = source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix not in SUFFIXES
    if not path.is_dir() and not is_hub_name:
        raise UserError(f"{key}: no file or folder {source!r}")
    from datasets import load_dataset

    try:
        with _without_logging():
            rows = load_dataset(str(path) if path.is_dir() else source, config, split=split)
    except Exception as error:  # datasets and its hub client raise dozens of exception types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = f"; accept its conditions on huggingface.co/datasets/{source} and log in" if "gated" in reason else ""
        problem = (
            "cannot be read"
            if path.is_dir()
            else "is not a local file or folder, and it could not be read from the hub"
        )
        raise UserError(f"{key}: {source!r} {problem}: {reason}{remedy}") from None
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))


@contextmanager
def _without_logging() -> Iterator[None]:
    """Silence the hub's client, which logs every retry, and `datasets`, which logs every file, during the body. The
    progress bars of `datasets` are off during the body and on after it."""
    import datasets

    loggers = [logging.getLogger("huggingface_hub"), logging.getLogger("datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
