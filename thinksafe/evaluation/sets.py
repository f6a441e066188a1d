"""Reader of an evaluation set's prompts."""

from collections.abc import Iterator
from typing import Any

from thinksafe.data.jsonl import prompts_from_rows
from thinksafe.data.records import Prompt
from thinksafe.data.sources import load_rows
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet


def evaluation_prompts(evaluation_set: EvaluationSet) -> list[Prompt]:
    """Return the prompts of an evaluation set without duplicates, from the columns and rows that its keys select.

    Raises:
        UserError: the source cannot be read, no row is selected, a column or an answer marker is missing, a row has no
            text or a wrong label, or a row of a reasoning set has no answer.
    """
    prompts = list(prompts_from_rows(_rows(evaluation_set), evaluation_set.name))
    if not prompts:
        raise UserError(
            f"{evaluation_set.source}: evaluation set {evaluation_set.name} keeps no row; check its `filter`"
        )
    if evaluation_set.kind == "reasoning" and any(prompt.answer is None for prompt in prompts):
        raise UserError(f"{evaluation_set.source}: a reasoning set needs 'answer' in every record")
    return prompts


def _rows(evaluation_set: EvaluationSet) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of the selected rows, with columns renamed to `text`, `answer` and `label`.

    Without `columns` a row keeps all its columns. A row without a label gets the label of the set's kind. With
    `answer_marker` the answer is the text after its last marker.

    Raises:
        UserError: a row has no such column, or no marker in its answer.
    """
    columns, wanted_values = evaluation_set.columns or {}, evaluation_set.filter or {}
    for location, row in load_rows(evaluation_set.source, evaluation_set.config, evaluation_set.split):
        if missing := sorted({*columns.values(), *wanted_values} - row.keys()):
            raise UserError(f"{location}: no column {', '.join(missing)}; there are {', '.join(sorted(row))}")
        if any(str(row[column]) != value for column, value in wanted_values.items()):
            continue
        fields = {name: row[column] for name, column in columns.items()} or dict(row)
        fields.setdefault("label", "harmful" if evaluation_set.kind == "harmful" else "benign")
        if evaluation_set.answer_marker is not None:
            _, marker, fields["answer"] = str(fields.get("answer")).rpartition(evaluation_set.answer_marker)
            if not marker:
                raise UserError(f"{location}: no {evaluation_set.answer_marker!r} in the answer; check `answer_marker`")
        yield location, fields
