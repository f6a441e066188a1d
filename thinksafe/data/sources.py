"""Prompts and rows from the sources that a recipe names: a file, a folder, or a data set on the Hugging Face hub.

The library `datasets` decides which files belong to a split. Files that `jsonl.py` can read are read by it, also in a
split, because `datasets` guesses one type for each column of a JSON file: it turns texts into dates, and 1 into 1.0.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from thinksafe.data.jsonl import PROMPT_COLUMNS, SUFFIXES, Row, prompts_from_rows, read_rows
from thinksafe.data.records import Prompt
from thinksafe.errors import UserError
from thinksafe.paths import expand_path

_OTHER_FORMATS = re.compile(
    r"\.(ndjson|[ct]sv|xlsx?|ods|arrow|feather|orc|avro|lance|h5|hdf5|pkl|pickle|db|sqlite"
    r"|gz|bz2|xz|zst|lz4|zip|7z|tar|tgz|partial|incomplete)",
    re.IGNORECASE,
)
"""Suffixes of files that may hold rows and cannot be read, so that they may not be skipped silently."""
_METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""JSON files in the folder of a data set that hold no rows."""


def load_prompts(source: str, on_duplicate: Callable[[str], None] = lambda where: None) -> Iterator[Prompt]:
    """Yield the prompts of a source in order and without duplicates, of a data set with splits those of `train`; see
    `rows_of` and `prompts_from_rows`."""
    return prompts_from_rows(rows_of(source, "prompts", default_split="train", columns=PROMPT_COLUMNS), on_duplicate)


def rows_of(
    source: str,
    key: str,
    config: str | None = None,
    split: str | None = None,
    default_split: str = "test",
    columns: Collection[str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a source.

    Args:
        source: a .jsonl, .json or .parquet file; `owner/name` on the Hugging Face hub; or a folder. A folder is read as
            a data set with splits if `config` or `split` is given, if its README.md declares `configs`, or if
            `datasets` finds several splits by the names of its files. Of any other folder, all files are read in order
            of their paths, those in its subfolders too, hidden ones excepted.
        key: recipe key that names the source, for error messages.
        config, split: configuration and split of a data set, or None. Without a split, `default_split` is read, or the
            only split of a folder.
        columns: as in `read_rows`.

    Raises:
        UserError: the source does not exist or cannot be read, it is a file and `config` or `split` is given, or a
            folder has files with rows that would not be read.
    """
    path = expand_path(source)
    if path.is_file() and (config or split):
        raise UserError(f"{source}: is a file, which has no config and no split; remove them from the recipe")
    files: list[Path] | None = [path] if path.is_file() else None
    if path.is_dir():
        split, files = _files_of_folder(path, key, config, split, default_split)
    if files is None:
        yield from _dataset_rows(source, key, config, split or default_split, columns)
        return
    for file in files:
        yield from read_rows(file, columns)


def _files_of_folder(
    folder: Path, key: str, config: str | None, split: str | None, default_split: str
) -> tuple[str | None, list[Path] | None]:
    """Return the split to read, None for a folder without splits, and the files; None instead of the files if only
    `datasets` can read them."""
    folder = folder.resolve()  # as `datasets` does
    has_configs, splits = _declares_configs(folder), _files_by_split(folder, key, config)
    is_data_set = bool(config or split) or has_configs or len(splits) > 1
    if not is_data_set:
        return None, _all_files(folder)
    if split is None and default_split not in splits and len(splits) > 1:
        names = ", ".join(splits)
        raise UserError(f"{key}: {str(folder)!r} has no split {default_split!r}, but {names}; name a split or a file")
    if not (config or split or has_configs) and (others := set(_all_files(folder)).difference(*splits.values())):
        raise UserError(
            f"{key}: {str(folder)!r} has the splits {', '.join(splits)} by the names of its files, and "
            f"{_list(others, folder)} in none of them; move files away, or name one file"
        )
    split = split or (default_split if default_split in splits or not splits else next(iter(splits)))
    files = splits.get(split, [])
    is_readable = files and all(file.is_file() and file.suffix.lower() in SUFFIXES for file in files)
    return split, files if is_readable else None


def _files_by_split(folder: Path, key: str, config: str | None) -> dict[str, list[Path]]:
    """Return the files of each split that `datasets` finds in a folder; none if it finds no data set or cannot read its
    JSON files row by row."""
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    try:
        with _without_logging(), TemporaryDirectory() as cache_dir:
            found = load_dataset_builder(str(folder), config, cache_dir=cache_dir).config
    except (EmptyDatasetError, DataFilesNotFoundError):  # no file with a suffix that it knows
        return {}
    except Exception as error:  # several configs, a damaged card, ...
        raise UserError(f"{key}: {str(folder)!r} cannot be read: {_reason(error)}") from None
    if getattr(found, "field", None) is not None:  # the rows are in one field of a JSON object
        return {}
    splits = {str(split): [Path(file) for file in files] for split, files in found.data_files.items()}
    splits = {split: [file for file in files if not _is_hidden(file, folder)] for split, files in splits.items()}
    return {split: files for split, files in splits.items() if files}


def _declares_configs(folder: Path) -> bool:
    """Return whether the card of a data set, README.md, lists the files of each configuration in its YAML header."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = folder / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except (ValueError, YAMLError) as error:
        raise UserError(f"{card}: its YAML header cannot be read ({' '.join(str(error).split())})") from None


def _all_files(folder: Path) -> list[Path]:
    """Return the files of a folder that can be read, in order of their paths.

    Raises:
        UserError: there is none, or there are other files that may hold rows.
    """
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    paths = sorted(path for path in paths if not _is_hidden(path, folder) and path.name not in _METADATA_FILES)
    files = [path for path in paths if path.suffix.lower() in SUFFIXES]
    # rglob does not enter a link to a folder.
    if unread := [path for path in paths if _OTHER_FORMATS.fullmatch(path.suffix) or path.is_dir()]:
        names = _list(unread, folder)
        raise UserError(f"{folder}: only .jsonl, .json and .parquet files are read, not {names}; convert or move them")
    if not files:
        raise UserError(f"{folder}: no .jsonl, .json or .parquet file in this folder")
    return files


def _is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a file is skipped: its name begins with `.`, or a folder between it and `folder` has a name that
    begins with `.` or `_` (`.cache`, `__MACOSX`, Spark's `_temporary`)."""
    *folders, name = file.relative_to(folder).parts if file.is_relative_to(folder) else file.parts
    return name.startswith(".") or any(part.startswith((".", "_")) for part in folders)


def _list(files: Collection[Path], folder: Path) -> str:
    """Return the first three names of files in a folder, sorted, and the number of the others."""
    first, others = sorted(str(file.relative_to(folder)) for file in files)[:3], len(files) - 3
    return ", ".join(first) + (f" and {others} more" if others > 0 else "")


def _dataset_rows(
    source: str, key: str, config: str | None, split: str, columns: Collection[str] | None
) -> Iterator[Row]:
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
        reason = _reason(error)
        if path.is_dir():
            raise UserError(f"{key}: {source!r} cannot be read: {reason}") from None
        gated = f"accept its conditions on huggingface.co/datasets/{source} and log in"
        remedy = gated if "gated" in reason else "check name and network, or use a file"
        not_on_hub = "is not a local file or folder, and it could not be read from the hub"
        raise UserError(f"{key}: {source!r} {not_on_hub}: {reason}; {remedy}") from None
    names, number = rows.column_names, 0
    read_names = names if columns is None else [name for name in names if name in columns]
    is_json = rows.info.builder_name == "json"
    if dates := [name for name in read_names if is_json and "timestamp" in str(rows.features[name])]:
        reason = f"`datasets` turns the texts of column {dates[0]} into dates"
        raise UserError(f"{key}: {source!r} cannot be read: {reason}; name its files or their folder, without a slice")
    try:
        for number, row in enumerate(rows.select_columns(read_names), start=1):
            yield Row(f"{source}: row {number}", dict.fromkeys(names) | row, source)
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date after the year 9999
        raise UserError(f"{source}: row {number + 1} cannot be read ({' '.join(str(error).split())})") from None


def _reason(error: Exception) -> str:
    """Return the message of an error of `datasets` or the hub's client on one line."""
    from datasets.exceptions import DatasetGenerationError

    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None  # its own message says nothing
    return " ".join(str(cause or error).split()) or type(error).__name__


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
