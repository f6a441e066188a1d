"""Read rows of JSONL, JSON and parquet files, and make records of them."""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from thinksafe.data.records import Example, Label, Prompt, Record, Response, content_id
from thinksafe.errors import UserError, validation_message

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of the files that `read_rows` can read; upper or lower case."""
_LABEL = re.compile(r"(?:vanilla_|adversarial_)?(harmful|benign)")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


class Row(NamedTuple):
    """A row of a file or data set, not yet checked.

    Attributes:
        where: file or data set with the number of line, record or row, from 1; error messages begin with it.
        origin: stem of the file's name, or name of the data set.
    """

    where: str
    values: dict[str, Any]
    origin: str = ""


def to_json(record: Any) -> str:
    """Return a dataclass of JSON values, or of further such dataclasses, as a JSON object on one line."""
    return json.dumps(vars(record), ensure_ascii=False, default=vars)


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a .parquet file, or of a .jsonl or .json file: the objects on its lines or in its JSON array.

    Raises:
        UserError: the file is missing, damaged, without rows or of another kind; or a row is not a JSON object or
            contains half a surrogate pair.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: only .jsonl, .json and .parquet files are read; convert or rename it")
    is_empty = True
    for where, values in _parquet_rows(file) if file.suffix.lower() == ".parquet" else _json_rows(file):
        is_empty = False
        yield Row(where, values, file.stem)
    if is_empty:
        raise UserError(f"{file}: empty; it needs at least one record")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        is_array = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        stream.seek(0)
        if is_array:
            values = _parse(f"{file}:", stream.read())
            rows = ((f"{file}: record {number}", value) for number, value in enumerate(values, start=1))
        else:
            lines = ((f"{file}: line {number}", line) for number, line in enumerate(stream, start=1) if line.strip())
            rows = ((where, _parse(where, line)) for where, line in lines)
        for where, value in rows:
            _check_object(where, value)
            if _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
                raise UserError(f"{where}: contains half a surrogate pair, which is not a character")
            yield where, value


def _parse(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    # Text that is not JSON or not UTF-8 and a number of 5,000 digits raise ValueError; brackets that are nested too
    # deep raise RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error})") from None


def _check_object(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({' '.join(str(error).split())})") from None


def prompts_from_rows(
    rows: Iterable[Row], on_duplicate: Callable[[str], None] = lambda where: None
) -> Iterator[Prompt]:
    """Yield the prompts of rows in order, without duplicates.

    A row needs a text in `text`, else in `prompt`, else in SafeChain's `instruction`; and a `label`: `harmful` or
    `benign`, also with SafeChain's prefix `vanilla_` or `adversarial_`; else a UserError is raised. `answer` and
    `source` may be missing, other columns are ignored. `on_duplicate` is called with `where` of each row that repeats
    an earlier text and label.
    """
    seen: set[str] = set()
    for where, row, origin in rows:
        text = next((row[key] for key in ("text", "prompt", "instruction") if key in row), None)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: needs a non-empty string 'text' (or 'prompt', or 'instruction')")
        label, answer = _label(where, row), row.get("answer")
        id_ = content_id(label, text)
        if id_ in seen:
            on_duplicate(where)
            continue
        seen.add(id_)
        yield Prompt(id_, text, label, str(row.get("source") or origin), None if answer is None else str(answer))


def _label(where: str, row: dict[str, Any]) -> Label:
    """Return a row's label without SafeChain's prefix."""
    label = row.get("label")
    match = _LABEL.fullmatch(label) if isinstance(label, str) else None
    if match is None:
        expected = "harmful or benign (or vanilla_..., adversarial_...)"
        raise UserError(f"{where}: 'label' must be {expected}, found {label!r}")
    return match[1]


def import_records(file: Path, kind: type[Response] | type[Example]) -> Iterator[Response] | Iterator[Example]:
    """Yield the records of a file that another program wrote; raise a UserError as `read_records` does.

    A row needs `prompt` (or SafeChain's `instruction`), a `label` as in `prompts_from_rows`, and the response, in
    column `text` for kind `Response` and `response` for kind `Example`. Columns that are no fields of the kind are
    ignored; a null field gets its default.
    """
    for where, row, _ in read_rows(file):
        for columns in (("prompt", "instruction"), ("text" if kind is Response else "response",)):
            if not any(isinstance(row.get(column), str) for column in columns):
                raise UserError(f"{where}: needs a string {' or '.join(map(repr, columns))}")
        fields = {name: row[name] for name in kind.__dataclass_fields__ if row.get(name) is not None}
        fields["prompt"] = row["prompt"] if isinstance(row.get("prompt"), str) else row["instruction"]
        fields["label"] = _label(where, row)
        yield _make_record(where, fields, kind)


def read_records(file: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield a file's records, which are all of one kind; fields with a default may be missing.

    Raises:
        UserError: the file cannot be read (see `read_rows`), or a row has missing, unknown or invalid fields.
    """
    for where, row, _ in read_rows(file):
        yield _make_record(where, row, kind)


@cache
def _validator(kind: type[Record]) -> Any:
    from pydantic import TypeAdapter  # not at the top: the sampler needs no pydantic, and imports this module

    return TypeAdapter(kind)


def _make_record(where: str, row: dict[str, Any], kind: type[Record]) -> Record:
    from pydantic import ValidationError

    if unknown_fields := sorted(row.keys() - kind.__dataclass_fields__.keys()):
        raise UserError(f"{where}: not a valid {kind.__name__} record: unknown field {', '.join(unknown_fields)}")
    try:
        return _validator(kind).validate_python(row)
    except ValidationError as error:
        problem = error.errors()[0]
        message = " ".join([*map(str, problem["loc"]), validation_message(problem)])
        raise UserError(f"{where}: not a valid {kind.__name__} record: {message}") from None


class RecordFile(Sequence[Record]):
    """The records of a JSONL file as a sequence, each read from the file every time it is indexed.

    Memory holds only `starts`, the offset in bytes of each line that is not blank, so a stage can go through a hundred
    thousand long responses. The file stays open as long as the object lives, and must not change. A missing file is a
    UserError.
    """

    def __init__(self, file: Path, kind: type[Record]):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        self._kind, self._file = kind, file
        self._lines = file.open("rb")
        self.starts, offset = array("q"), 0
        for line in self._lines:
            if line.strip():
                self.starts.append(offset)
            offset += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        """Read and return a record; raise UserError if the line is not one. A slice is not supported."""
        self._lines.seek(self.starts[index])
        where = f"{self._file}: record {index + 1}"
        row = _parse(where, self._lines.readline())
        _check_object(where, row)
        return _make_record(where, row, self._kind)


class LazyMap(Sequence[T]):
    """A sequence whose element i is `function(items[i])`, computed each time it is indexed and not stored."""

    def __init__(self, function: Callable[[int], T], items: Sequence[int]):
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> T:
        return self._function(self._items[index])
