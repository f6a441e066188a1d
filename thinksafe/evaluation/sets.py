"""Reader of an evaluation set's prompts."""

from collections.abc import Iterator

from thinksafe.data.jsonl import Row, prompts_from_rows
from thinksafe.data.records import Prompt
from thinksafe.data.sources import rows_of
from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet


def evaluation_prompts(evaluation_set: EvaluationSet) -> list[Prompt]:
    """Return the prompts of an evaluation set without duplicates, from the columns and rows that its keys select.

    Raises:
        UserError: the source cannot be read, no row is selected, a column or an answer marker is missing, a row has no
            text or a wrong label, or a row of a reasoning set has no answer.
    """
    prompts = list(prompts_from_rows(_rows(evaluation_set)))
    if not prompts:
        raise UserError(
            f"{evaluation_set.source}: evaluation set {evaluation_set.name} keeps no row; check its `filter`"
        )
    if evaluation_set.kind == "reasoning" and any(prompt.answer is None for prompt in prompts):
        raise UserError(f"{evaluation_set.source}: a reasoning set needs 'answer' in every record")
    return prompts


def _rows(evaluation_set: EvaluationSet) -> Iterator[Row]:
    """Yield the selected rows, with columns renamed to `text`, `answer` and `label` as the set's keys say."""
    columns, wanted_values = evaluation_set.columns or {}, evaluation_set.filter or {}
    rows = rows_of(evaluation_set.source, "evaluation.sets", evaluation_set.config, evaluation_set.split)
    for location, row, _ in rows:
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
        yield Row(location, fields, evaluation_set.name)
