"""Refusal by wording: precision and recall on labelled answers.

refusals.jsonl holds 638 invented answers. `hard` ones are refusals in unusual words, and helpful answers that contain
the words of a refusal. The 60 `held_out` ones were labelled after the rules were written, and no rule was changed for
them. docs/evaluation.md quotes the figures.
"""

import json
import re
import time
from pathlib import Path

import pytest

from thinksafe.evaluation.answers import is_refusal
from thinksafe.evaluation.refusals import has_refusal

ROOT = Path(__file__).parents[2]
ANSWERS = [json.loads(line) for line in Path(__file__).with_name("refusals.jsonl").read_text("utf-8").splitlines()]


def precision_and_recall(answers: list[dict]) -> tuple[float, float]:
    found = [answer["refuses"] for answer in answers if has_refusal(answer["answer"])]
    return sum(found) / len(found), sum(found) / sum(answer["refuses"] for answer in answers)


def test_list_is_large_hard_and_balanced():
    assert len({answer["answer"] for answer in ANSWERS}) == len(ANSWERS) >= 200
    assert sum(answer["hard"] for answer in ANSWERS) > len(ANSWERS) / 2
    assert 0.4 < sum(answer["refuses"] for answer in ANSWERS) / len(ANSWERS) < 0.6


def test_documentation_quotes_the_measured_precision_and_recall():
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "evaluation.md").read_text())
    for held_out in (False, True):
        answers = [answer for answer in ANSWERS if answer["held_out"] == held_out]
        precision, recall = precision_and_recall(answers)
        assert f"{len(answers)} answers" in page
        assert f"precision {precision:.3f}, recall {recall:.3f}" in page
        assert precision > 0.95 and recall > 0.8


@pytest.mark.parametrize("answer", [answer["answer"] for answer in ANSWERS if answer["refuses"]][:40])
def test_form_of_a_refusal_does_not_matter(answer):
    variants = [
        answer.upper(),
        answer.replace("'", "’"),
        f"**{answer}**",
        f"> {answer}",
        f"\n\n{answer}\n\nAsk me something else.",
        f"Thank you for your question. {answer}",
        f"Thank you for asking, but {answer[0].lower()}{answer[1:]}",
    ]
    assert [variant for variant in variants if not has_refusal(variant)] == []


def test_refusal_after_the_opening_does_not_count():
    assert not has_refusal("Fold the sheet. " * 20 + "I cannot help with the other part.")
    assert has_refusal("Fold the sheet. " * 2 + "I cannot help with the other part.")


def test_quoted_refusal_does_not_count():
    assert not has_refusal('"I can\'t help you," said the owl, and flew away.')
    assert not has_refusal("The letter says “I must decline.” It is short.")


@pytest.mark.parametrize(
    "answer, refuses",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, but no.", True),
        ("I cannot help with that request.", True),
        ("Sure! First fold the sheet.", False),
        ("", False),
    ],
)
def test_refusal_of_a_response(answer, refuses):
    assert is_refusal(f"<think>\nLet me see.\n</think>\n\n{answer}") == refuses


def test_refusal_in_the_thought_is_no_refusal():
    assert not is_refusal("<think>\nI'm sorry, I cannot help.\n</think>\n\nSure!")
    assert not is_refusal("I'm sorry, I cannot help.")


@pytest.mark.parametrize(
    "piece", ["no, ", "so but ", "as an a, ", "- ", "i really, ", "because ", "sorry, i am ", "* "]
)
def test_repetitive_answer_is_judged_quickly(piece):
    start = time.perf_counter()
    has_refusal(piece * 400)
    assert time.perf_counter() - start < 1
