"""Read records from JSONL, JSON and parquet files."""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from thinksafe.data.records import Example, Label, Prompt, Record, Response, content_id
from thinksafe.errors import UserError, validation_message

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of the files that `read_rows` can read; upper or lower case."""
_LABEL = re.compile(r"(?:vanilla_|adversarial_)?(harmful|benign)")
# JSONDecodeError and UnicodeDecodeError are ValueErrors, a number of 5,000 digits raises ValueError, and brackets that
# are nested too deep raise RecursionError.
_BAD_JSON = (ValueError, RecursionError)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


def to_json(record: Any) -> str:
    """Return a record as a JSON object on one line, without a newline.

    Args:
        record: a dataclass whose fields are JSON values.
    """
    return json.dumps(vars(record), ensure_ascii=False)  # all fields are plain values, so `asdict` is not needed


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for every record of a .jsonl, .json or .parquet file.

    `where` names the file and the line, record or row, counted from 1; errors start with it. A .jsonl or .json
    file that begins with [ is one JSON array; any other one has an object on each line, and blank lines are skipped.

    Raises:
        UserError: the file is missing, damaged, without records or of another kind; or a record is not a JSON object
            or contains half a surrogate pair.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: only .jsonl, .json and .parquet files are read; convert or rename it")
    rows = _parquet_rows(file) if file.suffix.lower() == ".parquet" else _json_rows(file)
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise UserError(f"{file}: empty; it needs at least one record")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        start = lines.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        lines.seek(0)
        if start.startswith(b"["):
            try:
                rows = json.load(lines)
            except _BAD_JSON as error:
                raise UserError(f"{file}: not valid JSON ({error})") from None
            numbered = ((f"{file}: record {number}", row) for number, row in enumerate(rows, start=1))
        else:
            numbered = _parsed_lines(file, lines)
        for where, row in numbered:
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
            if _LONE_SURROGATE.search(json.dumps(row, ensure_ascii=False)):
                raise UserError(f"{where}: contains half a surrogate pair, which is not a character")
            yield where, row


def _parsed_lines(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{file}: line {number}", json.loads(line)
            except _BAD_JSON as error:
                raise UserError(f"{file}: line {number} is not valid JSON ({error})") from None


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({' '.join(str(error).split())})") from None


def prompts_from_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], source: str, on_duplicate: Callable[[str], None] = lambda where: None
) -> Iterator[Prompt]:
    """Yield the prompts of (where, row) pairs in order, without duplicates.

    A row needs a text in `text`, else in `prompt`, else in SafeChain's `instruction`; and a `label`: `harmful` or
    `benign`, also with SafeChain's prefix `vanilla_` or `adversarial_`. Other columns except `answer` and `source` are
    ignored.

    Args:
        source: the prompt's `source` if the row has no or an empty `source` column.
        on_duplicate: called with `where` of each row that repeats an earlier text and label; the row is skipped.

    Raises:
        UserError: a row has no text, an empty text or another label.
    """
    seen: set[str] = set()
    for where, row in rows:
        text = next((row[key] for key in ("text", "prompt", "instruction") if key in row), None)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: needs a non-empty string 'text' (or 'prompt', or 'instruction')")
        label = _label(where, row)
        answer = row.get("answer")
        id_ = content_id(label, text)
        row_source = str(row.get("source") or source)
        if id_ in seen:
            on_duplicate(where)
        else:
            seen.add(id_)
            yield Prompt(id_, text, label, row_source, None if answer is None else str(answer))


def _label(where: str, row: dict[str, Any]) -> Label:
    """Return a row's label without SafeChain's prefix.

    Raises:
        UserError: the row has no or another label; the message begins with `where`.
    """
    label = row.get("label")
    match = _LABEL.fullmatch(label) if isinstance(label, str) else None
    if match is None:
        raise UserError(
            f"{where}: 'label' must be harmful or benign (or vanilla_..., adversarial_...), found {label!r}"
        )
    return match[1]


def import_records(file: Path, kind: type[Response] | type[Example]) -> Iterator[Response] | Iterator[Example]:
    """Return an iterator over records that another program wrote.

    A row needs `prompt` (or SafeChain's `instruction`), `label` (also with the prefix `vanilla_` or `adversarial_`) and
    the response, in column `text` for kind `Response` and `response` for kind `Example`. Columns that are no fields of
    the kind are ignored; a null field gets its default.

    Raises:
        UserError: during iteration: the file cannot be read (see `read_rows`), a row lacks one of these columns, or a
            field has the wrong type or value.
    """
    field_names = {field.name for field in fields(kind)}
    text_column = "text" if kind is Response else "response"

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, row in read_rows(file):
            for columns in (("prompt", "instruction"), (text_column,)):
                if not any(isinstance(row.get(column), str) for column in columns):
                    raise UserError(f"{where}: needs a string {' or '.join(map(repr, columns))}")
            prompt = row["prompt"] if isinstance(row.get("prompt"), str) else row["instruction"]
            values = {name: value for name, value in row.items() if name in field_names and value is not None}
            yield where, values | {"prompt": prompt, "label": _label(where, row)}

    return _validated(rows(), kind)


def read_records(file: Path, kind: type[Record]) -> Iterator[Record]:
    """Return an iterator over a file's records, which are all of one kind; fields with a default may be missing.

    Raises:
        UserError: during iteration: the file cannot be read (see `read_rows`), or a row has missing, unknown or
            mistyped fields or a value that the kind forbids.
    """
    return _validated(read_rows(file), kind)


class RecordFile(Sequence[Record]):
    """The records of a JSONL file as a sequence, each read from the file every time it is indexed.

    Memory holds only the offset of each line, so a stage can go through a hundred thousand long responses. The file
    stays open as long as the object lives, and must not change.

    Attributes:
        starts: offset in bytes at which each record's line begins; blank lines are skipped.
    """

    def __init__(self, file: Path, kind: type[Record]):
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
        """Read and return a record; a slice is not supported.

        Raises:
            UserError: the line is not a record of the file's kind.
        """
        self._lines.seek(self.starts[index])
        where = f"{self._file}: record {index + 1}"
        try:
            row = json.loads(self._lines.readline())
        except _BAD_JSON as error:
            raise UserError(f"{where} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        (record,) = _validated([(where, row)], self._kind)
        return record


class LazyMap(Sequence[T]):
    """A sequence whose element i is `function(items[i])`, computed each time it is indexed and not stored."""

    def __init__(self, function: Callable[[int], T], items: Sequence[int]):
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> T:
        return self._function(self._items[index])


@cache
def _schema(kind: type) -> tuple[Any, frozenset[str]]:
    """Return pydantic's validator of a kind of record, and the names of its fields."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind), frozenset(field.name for field in fields(kind))


def _validated(rows: Iterable[tuple[str, dict[str, Any]]], kind: type[Record]) -> Iterator[Record]:
    """Yield a record for each (where, row).

    Raises:
        UserError: a row has an unknown, missing or mistyped field; the message begins with `where`.
    """
    from pydantic import ValidationError

    adapter, field_names = _schema(kind)
    for where, row in rows:
        if unknown_fields := sorted(row.keys() - field_names):
            raise UserError(f"{where}: not a valid {kind.__name__} record: unknown field {', '.join(unknown_fields)}")
        try:
            yield adapter.validate_python(row)
        except ValidationError as error:
            problem = error.errors()[0]
            message = " ".join([*map(str, problem["loc"]), validation_message(problem)])
            raise UserError(f"{where}: not a valid {kind.__name__} record: {message}") from None
