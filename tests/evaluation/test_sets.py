"""Evaluation sets: gold answers, contradictions, and the note about golds that cannot be read."""

import json
from dataclasses import replace

import pytest

from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.sets import evaluation_prompts

pytest_plugins = ["tests.support.small_world"]


@pytest.fixture
def evaluation_set(tmp_path):
    """Return a function that writes rows to a file and returns the evaluation set of it, by default of kind
    `reasoning`."""

    def write(rows: list[dict], **keys) -> EvaluationSet:
        file = tmp_path / "set.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return EvaluationSet("mine", str(file), **({"kind": "reasoning"} | keys))

    return write


def rows(*answers) -> list[dict]:
    return [{"text": f"question {number}", "answer": answer} for number, answer in enumerate(answers, start=1)]


@pytest.mark.parametrize(
    "choices_from, answer, letter",
    [
        (None, "C", "C"),
        (None, "c", "C"),
        (None, "(C)", "C"),
        (None, ["c"], "C"),
        (None, r"\text{(C)}", "C"),
        (0, 2, "C"),
        (1, 3, "C"),
        (1, "3", "C"),
        (1, 3.0, "C"),
        (1, [3], "C"),
        (1, "C", "C"),
        (0, 0, "A"),
    ],
)
def test_gold_option_becomes_a_capital_letter(evaluation_set, choices_from, answer, letter):
    entry = evaluation_set(rows(answer), answer_matcher="choice", choices_from=choices_from)
    assert [prompt.answer for prompt in evaluation_prompts(entry)] == [letter]


MISTAKES = {
    "number without choices_from": (
        [2],
        {"answer_matcher": "choice"},
        "line 2: the answer 2 is a number; set `choices_",
    ),
    "number below the first": (
        [0],
        {"answer_matcher": "choice", "choices_from": 1},
        "line 2: the answer 0 is no option",
    ),
    "number after Z": ([26], {"answer_matcher": "choice", "choices_from": 0}, "line 2: the answer 26 is no option"),
    "no letter": (["a dog"], {"answer_matcher": "choice"}, "line 2: the answer 'a dog' is not the letter of an option"),
    "two letters": (["A, B"], {"answer_matcher": "choice"}, "line 2: the answer 'A, B' is not the letter"),
    "truth": ([True], {"answer_matcher": "choice", "choices_from": 0}, "line 2: the answer True is not the letter"),
    "list": ([["A", "B"]], {"answer_matcher": "choice"}, "line 2: the answer is a list of 2 values"),
    "list of mathematics": ([["1", "2"]], {}, "line 2: the answer is a list of 2 values"),
    "empty list": ([[]], {"answer_matcher": "phrase"}, "line 2: the answer is a list of 0 values"),
    "blank": ([" "], {}, "line 2: a reasoning set needs 'answer' in every record"),
    "blank element": ([""], {"answer_matcher": "phrase"}, "line 2: a reasoning set needs 'answer'"),
    "null": ([None], {"answer_matcher": "choice"}, "line 2: a reasoning set needs 'answer'"),
    "nothing after the marker": (["so 5 #### "], {"answer_marker": "####"}, "line 2: no"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_error_names_the_row_of_an_unusable_answer(evaluation_set, mistake):
    answers, keys, message = MISTAKES[mistake]
    good = "5 #### 5" if "answer_marker" in keys else "B" if keys.get("answer_matcher") == "choice" else "5"
    with pytest.raises(UserError) as error:
        evaluation_prompts(evaluation_set(rows(good, *answers), **keys))
    assert message in str(error.value) and "set.jsonl" in str(error.value)


@pytest.mark.parametrize("matcher", ["math", "phrase"])
def test_only_element_of_a_list_is_the_answer(evaluation_set, matcher):
    entry = evaluation_set(rows(["5"], [6], 7), answer_matcher=matcher)
    assert [prompt.answer for prompt in evaluation_prompts(entry)] == ["5", "6", "7"]


def test_choices_from_needs_the_matcher_choice():
    with pytest.raises(ValueError, match="choices_from: needs answer_matcher: choice"):
        EvaluationSet("mine", "file", "reasoning", choices_from=0)


def test_question_with_another_answer_names_both_rows(evaluation_set):
    with pytest.raises(UserError) as error:
        evaluation_prompts(evaluation_set([*rows("5", "6"), {"text": "question 1", "answer": "7"}]))
    assert "line 3: the same text as in" in str(error.value) and "line 1 has another answer" in str(error.value)
    assert "'7' and not '5'" in str(error.value)


def test_question_with_the_same_answer_is_a_duplicate(evaluation_set):
    entry = evaluation_set([*rows("5", "6"), {"text": "question 1", "answer": 5}])
    assert [prompt.answer for prompt in evaluation_prompts(entry)] == ["5", "6"]


def test_text_with_another_label_names_both_rows(evaluation_set):
    labels = [{"text": "p", "label": "harmful"}, {"text": "p", "label": "benign"}]
    with pytest.raises(UserError, match=r"line 2: the same text as in .*line 1 has another label, 'benign'"):
        evaluation_prompts(evaluation_set(labels, kind="harmful"))


def test_answers_of_a_set_without_golds_are_not_compared(evaluation_set):
    repeated = [{"text": "p", "answer": "a"}, {"text": "p", "answer": "b"}]
    assert len(evaluation_prompts(evaluation_set(repeated, kind="over_refusal"))) == 1


def test_note_names_the_first_unreadable_golds(evaluation_set):
    notes = []
    entry = evaluation_set(rows("5", r"\frac{1}{", r"\frac12", "8/0", "(0,1", "x^2 +", "5 ?"))
    assert len(evaluation_prompts(entry, notes.append)) == 7
    (note,) = notes
    assert note.startswith(
        "evaluation set mine: only an answer that is written in the same way can equal the gold answer"
    )
    assert all(f"line {number} ({gold})" in note for number, gold in ((2, r"\frac{1}{"), (4, "8/0"), (5, "(0,1")))
    assert "line 6" not in note and " and 2 more; math-verify cannot read it" in note and "\n" not in note


def test_readable_golds_give_no_note(evaluation_set):
    notes = []
    entry = evaluation_set(rows("5", r"11\sqrt2", r"\text{east}", "2516_8", r"\$18.90"))
    evaluation_prompts(entry, notes.append)
    evaluation_prompts(replace(entry, answer_matcher="phrase"), notes.append)
    assert notes == []


@pytest.mark.slow
def test_evaluation_names_unreadable_golds_once_before_sampling(world, tmp_path, call, evaluation_set):
    source = evaluation_set(rows("5", r"\frac{1}{")).source
    sets = f"evaluation.sets=[{{name: sums, source: {source}, kind: reasoning}}]"
    status, _, lines = call("evaluate", "--set", sets)
    notes = [number for number, line in enumerate(lines) if "gold answers: evaluation set sums: " in line]
    assert status == 0 and len(notes) == 1 and r"line 2 (\frac{1}{)" in lines[notes[0]]
    assert notes[0] < min(number for number, line in enumerate(lines) if "before sums" in line)
