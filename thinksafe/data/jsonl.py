"""Read rows of JSONL, JSON and parquet files, and make records of them."""

import codecs
import json
import math
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from thinksafe.data.records import Example, Label, Prompt, Record, Response, content_id
from thinksafe.errors import UserError, validation_message

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of the files that `read_rows` can read; upper or lower case."""
PROMPT_COLUMNS = ("text", "prompt", "instruction", "input", "label", "answer", "source")
"""Columns that `prompts_from_rows` uses."""
_ROWS_PER_BATCH = 1024
"""Rows of a parquet file that are in memory at a time."""
_LABEL = re.compile(r"(?:vanilla_|adversarial_)?(harmful|benign)")
_CONTENT_ID = re.compile("[0-9a-f]{16}")
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


def read_rows(file: Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a .parquet file, or of a .jsonl or .json file: the objects on its lines or in its JSON array.

    Args:
        columns: names of the columns that the caller uses, or None for all. Other columns of a parquet file are not
            read, so damage in them does no harm; each row has None for them.

    Raises:
        UserError: the file is missing, damaged, without rows, not in UTF-8 or of another kind; a row is not a JSON
            object, names a key twice or contains half a surrogate pair; or a value of a parquet file has no equivalent
            in Python.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: only .jsonl, .json and .parquet files are read; convert or rename it")
    is_empty = True
    for where, values in _parquet_rows(file, columns) if file.suffix.lower() == ".parquet" else _json_rows(file):
        is_empty = False
        yield Row(where, values, file.stem)
    if is_empty:
        raise UserError(f"{file}: empty; it needs at least one record")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        head = stream.read(4096)
        if not (encoding := json.detect_encoding(head)).startswith("utf-8"):
            raise UserError(f"{file}: is in {encoding.upper()}; save it in UTF-8")
        is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        stream.seek(0)
        if is_array:
            values = _parse(f"{file}:", stream.read())
            rows = ((f"{file}: record {number}", value) for number, value in enumerate(values, start=1))
        else:
            lines = ((f"{file}: line {number}", line) for number, line in enumerate(stream, start=1) if line.strip())
            rows = ((where, _parse(where, line, "; each line must be a JSON object")) for where, line in lines)
        for where, value in rows:
            _check_object(where, value)
            if _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
                raise UserError(f"{where}: contains half a surrogate pair, which is not a character")
            yield where, value


def _parse(where: str, text: bytes | str, expected: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    # Text that is not JSON or not UTF-8, a key that is given twice and a number of 5,000 digits raise ValueError;
    # brackets that are nested too deep raise RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}){expected}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object with these keys and values; raise ValueError if a key is given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _check_object(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")


def _parquet_rows(file: Path, columns: Collection[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        read_names = names if columns is None else [name for name in names if name in columns]
        if repeated := [name for name in read_names if names.count(name) > 1]:
            raise UserError(f"{file}: has two columns {repeated[0]!r}; rename one")
        number = 0
        for batch in parquet.iter_batches(_ROWS_PER_BATCH, columns=read_names):
            for index in range(batch.num_rows):
                number += 1
                where = f"{file}: row {number}"
                values = {name: _python_value(where, name, batch[name][index]) for name in read_names}
                yield where, dict.fromkeys(names) | values
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({' '.join(str(error).split())})") from None


def _python_value(where: str, name: str, scalar: Any) -> Any:
    """Return a value of a parquet file. A value of Arrow's type JSON, as which `datasets` stores a column of mixed
    types, is parsed, as `datasets` does."""
    import pyarrow

    try:
        value = scalar.as_py()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, or a date after the year 9999
        raise UserError(f"{where}: the value of {name!r} cannot be read ({error}); correct or remove it") from None
    is_json = isinstance(scalar.type, pyarrow.JsonType) and value is not None
    return _parse(f"{where}: the value of {name!r}", value) if is_json else value


def prompts_from_rows(
    rows: Iterable[Row], on_duplicate: Callable[[str], None] = lambda where: None
) -> Iterator[Prompt]:
    """Yield the prompts of rows in order, without duplicates.

    A row needs a text in `text`, `prompt` or SafeChain's `instruction`, and a `label`: `harmful` or `benign`, also with
    SafeChain's prefix `vanilla_` or `adversarial_`. `answer` and `source` may be missing, other columns are ignored
    (see `PROMPT_COLUMNS`). `on_duplicate` is called with `where` of each row that repeats an earlier text and label.

    Raises:
        UserError: a row has no text or two different ones, no label, or an answer or source that is not text or a
            number.
    """
    seen: set[str] = set()
    for where, row, origin in rows:
        text, label = _prompt_text(where, row, ("text", "prompt", "instruction")), label_of(where, row)
        answer, source = (_plain_text(where, row, column) for column in ("answer", "source"))
        id_ = content_id(label, text)
        if id_ in seen:
            on_duplicate(where)
            continue
        seen.add(id_)
        yield Prompt(id_, text, label, source or origin, answer)


def label_of(where: str, values: dict[str, Any]) -> Label:
    """Return a row's `label` without SafeChain's prefix; raise a UserError, which names `where`, if it is no label."""
    label = values.get("label")
    match = _LABEL.fullmatch(label) if isinstance(label, str) else None
    if match is None:
        expected = "harmful or benign (or vanilla_..., adversarial_...)"
        raise UserError(f"{where}: 'label' must be {expected}, found {label!r}")
    return match[1]


def _prompt_text(where: str, row: dict[str, Any], columns: Sequence[str]) -> str:
    """Return the text of a row's prompt, which is in one of the columns; raise a UserError if it is blank."""
    text = _single_value(where, row, columns)
    if not isinstance(text, str) or not text.strip():
        names = " or ".join(map(repr, columns))
        raise UserError(f"{where}: needs a text in {names} that is not blank; there are {', '.join(sorted(row))}")
    if text == row.get("instruction") and (row.get("input") or "") != "":
        raise UserError(f"{where}: 'instruction' and 'input' are both parts of the prompt; join them in {columns[0]!r}")
    return text


def _single_value(where: str, row: dict[str, Any], columns: Sequence[str]) -> Any:
    """Return the value that a row has in one or more of the columns, None if it has none; raise a UserError if two
    columns differ."""
    values = {column: row[column] for column in columns if not _is_missing(row.get(column))}
    for column, value in values.items():
        first = next(iter(values))
        if value != values[first]:
            raise UserError(f"{where}: {first!r} and {column!r} differ, so either may be meant; remove or rename one")
    return next(iter(values.values()), None)


def _is_missing(value: Any) -> bool:
    """Return whether a value is None or NaN, which pandas writes for a missing value."""
    return value is None or value != value


def _plain_text(where: str, row: dict[str, Any], column: str) -> str | None:
    """Return a value as text, None if it is missing; raise a UserError if it has no usual spelling."""
    if _is_missing(value := row.get(column)):
        return None
    if isinstance(value, (bytes, dict)) or value in (math.inf, -math.inf):
        raise UserError(f"{where}: {column!r} must be text or a finite number, found {type(value).__name__}")
    return str(value)


def import_records(file: Path, kind: type[Response] | type[Example]) -> Iterator[Response] | Iterator[Example]:
    """Yield the records of a file that another program wrote.

    A row needs `prompt` (or SafeChain's `instruction`), a `label` as in `prompts_from_rows`, and the response, in
    column `response` or, for kind `Response`, `text`. Columns that are no fields of the kind are ignored; a null field
    gets its default.

    Raises:
        UserError: the file cannot be read (see `read_rows`), or a row is not a record of the kind or has the
            `prompt_id` of another prompt.
    """
    response_columns = ("text", "response") if kind is Response else ("response",)
    contents: dict[str, str] = {}
    for where, row, _ in read_rows(file, {*kind.__dataclass_fields__, *response_columns, "instruction", "input"}):
        text = _single_value(where, row, response_columns)
        if not isinstance(text, str):
            raise UserError(f"{where}: needs a string {' or '.join(map(repr, response_columns))}")
        fields = {name: row[name] for name in kind.__dataclass_fields__ if row.get(name) is not None}
        fields["prompt"] = _prompt_text(where, row, ("prompt", "instruction"))
        record = _make_record(where, fields | {"label": label_of(where, row), response_columns[0]: text}, kind)
        _check_prompt_id(where, record, contents)
        yield record


def _check_prompt_id(where: str, record: Response | Example, contents: dict[str, str]) -> None:
    """Raise a UserError if a record's `prompt_id` belongs to another label or prompt: it has the form of a `content_id`
    and is not theirs, or an earlier record had it for others. `contents` maps earlier ids of other forms to content
    ids, and is updated."""
    content, id_ = content_id(record.label, record.prompt), record.prompt_id
    if id_ == content:
        return
    if _CONTENT_ID.fullmatch(id_) or contents.setdefault(id_, content) != content:
        raise UserError(f"{where}: prompt_id {id_!r} belongs to another prompt or label; remove it, it is computed")


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
