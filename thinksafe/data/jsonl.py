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
from thinksafe.errors import UserError, in_words

SUFFIXES = (".jsonl", ".json", ".parquet")
_LABEL = re.compile(r"(?:vanilla_|adversarial_)?(harmful|benign)")
# JSONDecodeError, UnicodeDecodeError and a number of 5,000 digits are ValueErrors; brackets can be nested too deep.
_BAD_JSON = (ValueError, RecursionError)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


def to_json(record: Any) -> str:
    """One line of JSONL, without the newline."""
    return json.dumps(vars(record), ensure_ascii=False)  # its fields are plain values: nothing to take apart further


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every object in a .jsonl, .json (array) or .parquet file.

    Raises:
        UserError: a missing or empty file or one of another kind, a line that is not a JSON object (with its number), a
            torn parquet file.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: only .jsonl, .json and .parquet files are read; convert or rename it")
    rows = _parquet_rows(file) if file.suffix.lower() == ".parquet" else _json_rows(file)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
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
            if _HALF_PAIR.search(json.dumps(row, ensure_ascii=False)):
                raise UserError(f"{where}: holds half a surrogate pair, which is no character")
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
    rows: Iterable[tuple[str, dict[str, Any]]], source: str, on_repeat: Callable[[str], None] = lambda where: None
) -> Iterator[Prompt]:
    """Prompts from (where, row) pairs, duplicates removed.

    A row needs `text` (or `prompt`, or SafeChain's `instruction`) and `label`: `harmful` or `benign`, also as
    SafeChain writes them (`vanilla_harmful`, `adversarial_benign`).

    Args:
        on_repeat: told where a row is left out, since its text and label came before.

    Raises:
        UserError: a row without text or with another label, naming its place.
    """
    seen: set[str] = set()
    for where, row in rows:
        text = next((row[key] for key in ("text", "prompt", "instruction") if key in row), None)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: needs a non-empty string 'text' (or 'prompt', or 'instruction')")
        kind = _label(where, row)
        answer = row.get("answer")
        id_ = content_id(kind, text)
        origin = str(row.get("source") or source)
        if id_ in seen:
            on_repeat(where)
        else:
            seen.add(id_)
            yield Prompt(id_, text, kind, origin, None if answer is None else str(answer))


def _label(where: str, row: dict[str, Any]) -> Label:
    label = row.get("label")
    match = _LABEL.fullmatch(label) if isinstance(label, str) else None
    if match is None:
        raise UserError(
            f"{where}: 'label' must be harmful or benign (or vanilla_..., adversarial_...), found {label!r}"
        )
    return match[1]


def take_in(file: Path, kind: type[Response] | type[Example]) -> Iterator[Response] | Iterator[Example]:
    """Records from elsewhere: other columns are left aside, prompts and labels may be spelled as SafeChain does.

    Raises:
        UserError: a row without a prompt, a label or a response, naming its place.
    """
    names = {field.name for field in fields(kind)}
    needed = "text" if kind is Response else "response"

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, row in read_rows(file):
            for sources in (("prompt", "instruction"), (needed,)):
                if not any(isinstance(row.get(source), str) for source in sources):
                    raise UserError(f"{where}: needs a string {' or '.join(map(repr, sources))}")
            prompt = row["prompt"] if isinstance(row.get("prompt"), str) else row["instruction"]
            known = {name: value for name, value in row.items() if name in names and value is not None}
            yield where, known | {"prompt": prompt, "label": _label(where, row)}

    return _validated(rows(), kind)


def read_records(file: Path, kind: type[Record]) -> Iterator[Record]:
    """Records of one kind; fields with a default may be left out.

    Raises:
        UserError: a row with missing, unknown or mistyped fields, naming its place.
    """
    return _validated(read_rows(file), kind)


class Shard(Sequence[Record]):
    """The records of a JSONL file by their number, read when they are asked for.

    In memory is only where each line begins: a stage can go through a hundred thousand long responses, or pick a few.

    Attributes:
        starts: byte at which each record's line begins.
    """

    def __init__(self, file: Path, kind: type[Record]):
        self._kind, self._file = kind, file
        self._lines = file.open("rb")
        self.starts, position = array("q"), 0
        for line in self._lines:
            if line.strip():
                self.starts.append(position)
            position += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Record:
        """The record, read anew.

        Raises:
            UserError: the line is no such record.
        """
        self._lines.seek(self.starts[number])
        where = f"{self._file}: record {number + 1}"
        try:
            row = json.loads(self._lines.readline())
        except _BAD_JSON as error:
            raise UserError(f"{where} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        (record,) = _validated([(where, row)], self._kind)
        return record


class Mapped(Sequence[T]):
    """`function` of each of `items`, computed when it is asked for, and kept nowhere."""

    def __init__(self, function: Callable[[int], T], items: Sequence[int]):
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> T:
        return self._function(self._items[number])


@cache
def _schema(kind: type) -> tuple[Any, frozenset[str]]:
    """What checks records of a kind, and the names of their fields."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind), frozenset(field.name for field in fields(kind))


def _validated(rows: Iterable[tuple[str, dict[str, Any]]], kind: type[Record]) -> Iterator[Record]:
    from pydantic import ValidationError

    adapter, names = _schema(kind)
    for where, row in rows:
        if unknown := sorted(row.keys() - names):
            raise UserError(f"{where}: no {kind.__name__} record: unknown field {', '.join(unknown)}")
        try:
            yield adapter.validate_python(row)
        except ValidationError as error:
            problem = error.errors()[0]
            what = " ".join([*map(str, problem["loc"]), in_words(problem)])
            raise UserError(f"{where}: no {kind.__name__} record: {what}") from None
