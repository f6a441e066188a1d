"""Evaluation: right answers, refusals, harm, and the confidence intervals of the figures.

The oracles are examples written by hand, published values of Wilson's interval, and the textbook's standard error.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinksafe.data.records import Prompt, Response, Verdict
from thinksafe.evaluation.answers import is_correct
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.metrics import measure
from thinksafe.evaluation.statistics import mean_with_interval


def response_with(answer: str, thought: str = "Let me see.") -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("the answer is 4 7 2 .", "4 7 2", True),
        ("The answer is: 4 7 2", "4  7 2", True),
        ("the answer is 4 7 2 . ", "4 7", False),
        ("the answer is 4 7 2 .", "4 7 2 1", False),
        ("the answer is 1 .\nno , the answer is 2 .", "2", True),
        ("the answer is 1 . no , the answer is 2 .", "2", True),
        ("the answer is 2 . no , the answer is 1 .", "2", False),
        ("4 7 2", "4 7 2", False),
        ("the answer is", "", False),
        ("The answer is **4 7 2**.", "4 7 2", True),
        ("**The answer is: 4 7 2.**", "4 7 2", True),
        ("**The answer is:** 4 7 2", "4 7 2", True),
        ("The answer is “4 7 2”.", "4 7 2", True),
        ("The answer is [4 7 2].", "4 7 2", True),
        ("The answer is `4 7 2`!", "4 7 2.", True),
        ("The answer is 4 7 2.\nI hope that the answer is", "4 7 2", True),
        ("The answer is ...", "", False),
    ],
)
def test_phrase_follows_the_last_answer_is(answer, gold, right):
    assert is_correct(response_with(answer), gold, "phrase") == right


@pytest.mark.parametrize(
    "kind, right", [("phrase", "the answer is 4"), ("choice", r"\boxed{B}"), ("math", r"\boxed{4}")]
)
def test_only_the_answer_of_a_whole_response_counts(kind, right):
    gold = "B" if kind == "choice" else "4"
    assert is_correct(response_with(right), gold, kind)
    for response in (
        right,
        response_with("I am done.", thought=right),
        f"<think>\n{right}",
        response_with(""),
        "",
        f"<think>{right}</think>",
    ):
        assert not is_correct(response, gold, kind), response


@pytest.mark.parametrize("kind", ["phrase", "choice", "math"])
@given(answer=st.text(max_size=30), gold=st.text(max_size=10))
def test_any_answer_gives_a_result(kind, answer, gold):
    assert is_correct(response_with(answer), gold, kind) in (True, False)


# Figures


PROMPTS = [Prompt(str(n), f"prompt {n}", "harmful", answer=str(n)) for n in range(3)]


def responses(texts: dict[str, list[str]], finish: str = "stop") -> list[Response]:
    return [
        Response(f"prompt {id_}", "harmful", text, id_, sample=sample, finish_reason=finish)
        for id_, given_texts in texts.items()
        for sample, text in enumerate(given_texts)
    ]


def verdicts(decisions: dict[str, list[str]], refusal=None) -> list[Verdict]:
    return [
        Verdict(id_, sample, "harmful", None, decision, "", None, None, refusal, "guard")
        for id_, given_decisions in decisions.items()
        for sample, decision in enumerate(given_decisions)
    ]


def evaluation_set(kind: str, samples: int = 1, answer_matcher: str = "math") -> EvaluationSet:
    return EvaluationSet("set", "file", kind, samples=samples, answer_matcher=answer_matcher)


def test_harm_is_the_mean_over_prompts_of_sample_means():
    given_responses = responses({"0": ["a", "a"], "1": ["a", "a"], "2": ["a", "a"]})
    decisions = {"0": ["unsafe", "unsafe"], "1": ["unsafe", "safe"], "2": ["safe", "safe"]}
    figures = measure(evaluation_set("harmful", 2), PROMPTS, given_responses, verdicts(decisions))
    assert figures.value == pytest.approx(0.5) and figures.values == [1.0, 0.5, 0.0]
    assert (figures.n, figures.samples, figures.responses, figures.unknown) == (3, 2, 6, 0)
    assert figures.judge == "guard"
    low, high = figures.interval
    assert 0 <= low <= 0.5 <= high <= 1


def test_response_without_verdict_counts_as_unknown_only():
    given_responses = responses({"0": ["a", "a"], "1": ["a", "a"], "2": ["a", "a"]})
    decisions = {"0": ["unsafe", "unknown"], "1": ["safe", "safe"], "2": ["unknown", "dropped"]}
    figures = measure(evaluation_set("harmful", 2), PROMPTS, given_responses, verdicts(decisions))
    assert figures.values == [1.0, 0.0] and figures.unknown == 3
    assert figures.n == 3 and figures.value == 0.5


def test_missing_verdict_is_unknown():
    figures = measure(
        evaluation_set("harmful"), PROMPTS, responses({"0": ["a"], "1": ["a"]}), verdicts({"0": ["safe"]})
    )
    assert figures.unknown == 1 and figures.values == [0.0]


def test_set_without_a_judged_response_has_no_figure():
    figures = measure(evaluation_set("harmful"), PROMPTS, responses({"0": ["a"]}), verdicts({"0": ["unknown"]}))
    assert figures.value is None and figures.interval is None and figures.unknown == 1


def test_guards_refusal_overrides_the_wording():
    sorry = response_with("I'm sorry, but no.")
    given_responses = responses({"0": [sorry], "1": ["a"], "2": [sorry]})
    by_wording = measure(
        evaluation_set("over_refusal"),
        PROMPTS,
        given_responses,
        verdicts({"0": ["safe"], "1": ["safe"], "2": ["safe"]}),
    )
    assert by_wording.values == [1.0, 0.0, 1.0] and by_wording.judge == "wording"
    guard_verdicts = verdicts({"0": ["safe"], "1": ["safe"]}, refusal=False) + verdicts({"2": ["unsafe"]}, refusal=True)
    figures = measure(evaluation_set("over_refusal"), PROMPTS, given_responses, guard_verdicts)
    assert figures.values == [0.0, 0.0, 1.0] and figures.judge == "guard"


@pytest.mark.parametrize("finish", ["length", "repetition"])
def test_unfinished_response_is_truncated_and_its_refusal_unknown(finish):
    unfinished_responses = responses({"0": [response_with("I'm sorry")]}, finish=finish)
    figures = measure(evaluation_set("over_refusal"), PROMPTS, unfinished_responses, [])
    assert figures.value is None and figures.unknown == 1 and figures.truncated == 1.0


def test_reasoning_is_mean_pass_at_one():
    given_responses = responses(
        {
            "0": [response_with(r"\boxed{0}"), response_with(r"\boxed{9}")],
            "1": [response_with(r"\boxed{1}"), ""],
            "2": ["", ""],
        }
    )
    figures = measure(evaluation_set("reasoning", 2), PROMPTS, given_responses, [])
    assert figures.values == [0.5, 0.5, 0.0] and figures.unknown == 0
    assert figures.judge == "answer (math)"


@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
def test_interval_contains_its_mean_and_is_never_a_point(values):
    mean, (low, high) = mean_with_interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1
    assert len(set(values)) > 1 or high - low > 0.1, "thirty equal values do not make the mean certain"


@pytest.mark.parametrize(
    "count, total, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_interval_of_zeros_and_ones_is_wilsons_as_published(count, total, low, high):
    """The values are from Table I of Newcombe, Statistics in Medicine 17 (1998); the last row mirrors the third row."""
    mean, interval = mean_with_interval([1.0] * count + [0.0] * (total - count))
    assert mean == pytest.approx(count / total) and interval == pytest.approx([low, high], abs=5e-5)


def test_bootstrap_interval_matches_the_normal_approximation(fresh_seed):
    """Shares of four samples vary less than zeros and ones, so the interval must be narrower."""
    values = np.random.default_rng(fresh_seed).binomial(4, 0.3, 400) / 4
    mean, (low, high) = mean_with_interval(values.tolist())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(len(values)), rel=0.15)
    assert mean_with_interval(values.tolist()) == (mean, [low, high])
