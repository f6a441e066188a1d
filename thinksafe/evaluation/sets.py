"""Reader of an evaluation set's prompts."""

from collections.abc import Callable, Iterator
from typing import Any

from thinksafe.data.jsonl import PROMPT_COLUMNS, Row, prompts_from_rows
from thinksafe.data.records import Prompt
from thinksafe.data.sources import rows_of
from thinksafe.errors import UserError
from thinksafe.evaluation.choices import option_letter
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.mathematics import is_readable

_NUM_NAMED = 3
"""Number of golds that a note names."""


def evaluation_prompts(evaluation_set: EvaluationSet, note: Callable[[str], None] | None = None) -> list[Prompt]:
    """Return the prompts of an evaluation set without duplicates, from the columns and rows that its keys select.

    Args:
        note: is called with a line that names the gold answers, if there are any, that the answer matcher `math` cannot
            read. None to leave them untried, because it takes milliseconds for each.

    Raises:
        UserError: the source cannot be read, no row is selected, a column or an answer marker is missing, a row has no
            text or a wrong label, a row of a reasoning set has no usable answer, or two rows with the same text differ
            in answer or label.
    """
    rows = list(_without_contradictions(_rows(evaluation_set), evaluation_set.kind == "reasoning"))
    if not rows:
        raise UserError(
            f"{evaluation_set.source}: evaluation set {evaluation_set.name} keeps no row; check its `filter`"
        )
    prompts = list(prompts_from_rows(rows))
    if note is not None and evaluation_set.kind == "reasoning" and evaluation_set.answer_matcher == "math":
        golds = [(row.where, str(row.values["answer"])) for row in rows]
        if unreadable := [f"{where} ({gold})" for where, gold in golds if not is_readable(gold)]:
            further = f" and {len(unreadable) - _NUM_NAMED} more" if len(unreadable) > _NUM_NAMED else ""
            note(
                f"evaluation set {evaluation_set.name}: only an answer that is written in the same way can equal the "
                f"gold answer in {', '.join(unreadable[:_NUM_NAMED])}{further}; math-verify cannot read it"
            )
    return prompts


def _without_contradictions(rows: Iterator[Row], has_golds: bool) -> Iterator[Row]:
    """Yield rows; raise a UserError for two with the same text and different labels or, with `has_golds`, answers."""
    first_of: dict[Any, Row] = {}
    for row in rows:
        text = next((row.values[name] for name in ("text", "prompt", "instruction") if row.values.get(name)), None)
        first = first_of.setdefault(str(text), row)
        for column in ("label", "answer") if has_golds else ("label",):
            if str(row.values.get(column)) != str(first.values.get(column)):
                raise UserError(
                    f"{row.where}: the same text as in {first.where} has another {column}, {row.values.get(column)!r} "
                    f"and not {first.values.get(column)!r}; correct or remove one of the rows"
                )
        yield row


def _rows(evaluation_set: EvaluationSet) -> Iterator[Row]:
    """Yield the selected rows, with columns renamed to `text`, `answer` and `label` as the set's keys say."""
    columns, wanted_values = evaluation_set.columns or {}, evaluation_set.filter or {}
    read_columns = {*(columns.values() or PROMPT_COLUMNS), *wanted_values}
    source, config, split = evaluation_set.source, evaluation_set.config, evaluation_set.split
    rows = rows_of(source, "evaluation.sets", config, split, columns=read_columns)
    for location, row, _ in rows:
        if missing := sorted({*columns.values(), *wanted_values} - row.keys()):
            raise UserError(f"{location}: no column {', '.join(missing)}; there are {', '.join(sorted(row))}")
        if any(str(row[column]) != value for column, value in wanted_values.items()):
            continue
        fields = {name: row[column] for name, column in columns.items()} or dict(row)
        if fields.get("label") is None:
            fields["label"] = "harmful" if evaluation_set.kind == "harmful" else "benign"
        if evaluation_set.kind == "reasoning" or evaluation_set.answer_marker is not None:
            fields["answer"] = _gold(location, fields.get("answer"), evaluation_set)
        yield Row(location, fields, evaluation_set.name)


def _gold(where: str, answer: Any, evaluation_set: EvaluationSet) -> str:
    """Return the gold answer of a row: the only element of a list, the text after the answer marker, and for the
    matcher `choice` a capital letter. Raise a UserError if there is none."""
    if isinstance(answer, (list, tuple)):
        if len(answer) != 1:
            raise UserError(f"{where}: the answer is a list of {len(answer)} values; a row needs one answer")
        answer = answer[0]
    if answer is None or answer != answer or not str(answer).strip():
        raise UserError(f"{where}: a reasoning set needs 'answer' in every record")
    if (mark := evaluation_set.answer_marker) is not None:
        _, marker, answer = str(answer).rpartition(mark)
        if not marker:
            raise UserError(f"{where}: no {mark!r} in the answer; check `answer_marker`")
        if not answer.strip():
            raise UserError(f"{where}: no answer after the last {mark!r}; check `answer_marker`")
    return answer if evaluation_set.answer_matcher != "choice" else _option(where, answer, evaluation_set.choices_from)


def _option(where: str, answer: Any, choices_from: int | None) -> str:
    """Return the capital letter of the option that a gold answer names by letter or number."""
    if letter := option_letter(str(answer)):
        return letter
    try:
        number = None if isinstance(answer, bool) else int(str(answer).strip().removesuffix(".0"))
    except ValueError:
        number = None
    if number is None:
        raise UserError(
            f"{where}: the answer {answer!r} is not the letter of an option; use a letter, or another matcher"
        )
    if choices_from is None:
        raise UserError(
            f"{where}: the answer {answer!r} is a number; set `choices_from` to the number of option A, 0 or 1"
        )
    if not 0 <= number - choices_from < 26:
        raise UserError(f"{where}: the answer {answer!r} is no option, because `choices_from` is {choices_from}")
    return chr(ord("A") + number - choices_from)
