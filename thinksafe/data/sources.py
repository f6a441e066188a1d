"""Prompts from wherever a recipe names them: a file, a folder, or a data set on the Hugging Face hub."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinksafe.data.jsonl import SUFFIXES, prompts_from_rows, read_rows
from thinksafe.data.records import Prompt
from thinksafe.errors import UserError
from thinksafe.paths import expand


def load_prompts(source: str, on_repeat: Callable[[str], None] = lambda where: None) -> Iterator[Prompt]:
    """Prompts in order, duplicates removed, one at a time.

    Args:
        source: a .jsonl, .json or .parquet file; a folder of such files; or `owner/name` on the hub, split `train`.
        on_repeat: told where a duplicate is.

    Raises:
        UserError: nothing there, or a row that is no prompt.
    """
    path = expand(source)
    if path.is_file():
        return prompts_from_rows(read_rows(path), path.stem, on_repeat)
    if path.is_dir():
        rows = ((where, {"source": file.stem} | row) for file in _files_in(source) for where, row in read_rows(file))
        return prompts_from_rows(rows, source, on_repeat)
    return prompts_from_rows(_dataset("prompts", source, None, "train"), source, on_repeat)


def load_rows(source: str, config: str | None, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of an evaluation set, with whatever columns it has.

    Args:
        source: as for `load_prompts`.
        config, split: of a data set on the hub, or of its copy in a folder; without a split a folder is read whole,
            and the hub gives `test`.

    Raises:
        UserError: nothing there.
    """
    path = expand(source)
    if path.is_file():
        if config or split:
            raise UserError(f"{source}: is a file, which has no config and no split; leave them out")
        yield from read_rows(path)
    elif path.is_dir() and not (config or split):
        for file in _files_in(source):
            yield from read_rows(file)
    else:
        yield from _dataset("evaluation.sets", source, config, split or "test")


def _files_in(source: str) -> list[Path]:
    files = sorted(file for file in expand(source).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{source}: no .jsonl, .json or .parquet file in this folder")
    return files


def _dataset(key: str, source: str, config: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = expand(source)
    named = source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix not in SUFFIXES
    if not path.is_dir() and not named:
        raise UserError(f"{key}: no file or folder {source!r}")
    from datasets import load_dataset

    try:
        with _quietly():
            rows = load_dataset(str(path) if path.is_dir() else source, config, split=split)
    except Exception as error:  # datasets and its hub client raise dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        gated = f"; accept its conditions on huggingface.co/datasets/{source} and log in" if "gated" in reason else ""
        tried = "cannot be read" if path.is_dir() else "is no file here and the hub did not give it"
        raise UserError(f"{key}: {source!r} {tried}: {reason}{gated}") from None
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))


@contextmanager
def _quietly() -> Iterator[None]:
    """The hub's client tells of every attempt, and datasets of every file; what matters is the error in the end."""
    import datasets

    logs = [logging.getLogger("huggingface_hub"), logging.getLogger("datasets")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
