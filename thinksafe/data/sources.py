"""Prompts and rows from the sources that a recipe names: a file, a folder, or a data set on the Hugging Face hub."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from thinksafe.data.jsonl import SUFFIXES, Row, prompts_from_rows, read_rows
from thinksafe.data.records import Prompt
from thinksafe.errors import UserError
from thinksafe.paths import expand_path


def load_prompts(source: str, on_duplicate: Callable[[str], None] = lambda where: None) -> Iterator[Prompt]:
    """Yield the prompts of a source in order and without duplicates, of a data set on the hub those of split `train`;
    see `rows_of` and `prompts_from_rows`."""
    return prompts_from_rows(rows_of(source, "prompts", default_split="train"), on_duplicate)


def rows_of(
    source: str, key: str, config: str | None = None, split: str | None = None, default_split: str = "test"
) -> Iterator[Row]:
    """Yield the rows of a source with all their columns.

    Args:
        source: a .jsonl, .json or .parquet file; a folder, whose files of these kinds are read in order of their paths,
            those in its subfolders too; or `owner/name` on the Hugging Face hub.
        key: recipe key that names the source, for error messages.
        config, split: configuration and split of a data set on the hub, or None. If one of them is given, a folder is
            read as a copy of such a data set.

    Raises:
        UserError: the source does not exist or cannot be read, or it is a file and `config` or `split` is given.
    """
    path = expand_path(source)
    if path.is_file() and (config or split):
        raise UserError(f"{source}: is a file, which has no config and no split; remove them from the recipe")
    if not path.exists() or config or split:
        yield from _dataset_rows(source, key, config, split or default_split)
        return
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{source}: no .jsonl, .json or .parquet file in this folder")
    for file in files:
        yield from read_rows(file)


def _dataset_rows(source: str, key: str, config: str | None, split: str) -> Iterator[Row]:
    """Yield the rows of a data set that the library `datasets` loads from a folder or from the hub."""
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
        if path.is_dir():
            raise UserError(f"{key}: {source!r} cannot be read: {reason}") from None
        gated = f"accept its conditions on huggingface.co/datasets/{source} and log in"
        remedy = gated if "gated" in reason else "check name and network, or use a file"
        not_on_hub = "is not a local file or folder, and it could not be read from the hub"
        raise UserError(f"{key}: {source!r} {not_on_hub}: {reason}; {remedy}") from None
    for number, row in enumerate(rows, start=1):
        yield Row(f"{source}: row {number}", row, source)


@contextmanager
def _without_logging() -> Iterator[None]:
    """Silence the hub's client, which logs every retry, and `datasets`, which logs and shows every file, during the
    body."""
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
