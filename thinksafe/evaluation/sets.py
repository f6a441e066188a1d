"""Read the prompts of an evaluation set."""

from collections.abc import Iterator
from typing import Any

from thinksafe.data.jsonl import prompts_from_rows
from thinksafe.data.records import Prompt
from thinksafe.data.sources import load_rows
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet


def evaluation_prompts(entry: EvaluationSet) -> list[Prompt]:
    """The questions of a set, from the columns and rows that it names.

    Raises:
        UserError: nothing there, a missing column, or a reasoning set without answers.
    """
    prompts = list(prompts_from_rows(_rows(entry), entry.name))
    if not prompts:
        raise UserError(f"{entry.file}: evaluation set {entry.name} keeps no row; look at its `where`")
    if entry.kind == "reasoning" and any(prompt.answer is None for prompt in prompts):
        raise UserError(f"{entry.file}: a reasoning set needs 'answer' in every record")
    return prompts


def _rows(entry: EvaluationSet) -> Iterator[tuple[str, dict[str, Any]]]:
    columns, wanted = entry.columns or {}, entry.where or {}
    for where, row in load_rows(entry.file, entry.config, entry.split):
        if missing := sorted({*columns.values(), *wanted} - row.keys()):
            raise UserError(f"{where}: no column {', '.join(missing)}; there are {', '.join(sorted(row))}")
        if any(str(row[column]) != value for column, value in wanted.items()):
            continue
        found = {name: row[column] for name, column in columns.items()} or dict(row)
        found.setdefault("label", "harmful" if entry.kind == "harmful" else "benign")
        if entry.answer_after is not None:
            _, mark, found["answer"] = str(found.get("answer")).rpartition(entry.answer_after)
            if not mark:
                raise UserError(f"{where}: no {entry.answer_after!r} in its answer")
        yield where, found
