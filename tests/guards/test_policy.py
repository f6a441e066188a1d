"""The policy of a guard: the text that it judges, the rule for its decision, and the vote of an ensemble.

The oracles are the paper's rule, written again, and a fake engine with given answer probabilities.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.support.checkpoints import make_llama_guard, make_qwen3guard, make_wildguard
from tests.support.tiny_guards import response_to
from thinksafe.data.records import Verdict
from thinksafe.guards import model_guard, registry
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.ensemble import Ensemble
from thinksafe.guards.formats import FORMATS, GuardFormat, Question
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig
from thinksafe.sampler.request import Scores
from thinksafe.text.tokenizer import SafeTokenizer

RESPONSE = "<think>\nThought of it.\n</think>\n\nSaid it."


# The decision rule


LOGPROB = st.floats(-50, -1e-6)


def papers_decision(safe: float, unsafe: float) -> str:
    """Return the paper's decision if the two likeliest tokens are the verdicts: the more likely verdict."""
    return "safe" if safe > unsafe else "unsafe"


@given(LOGPROB, LOGPROB)
def test_default_and_reference_decide_as_the_paper(safe, unsafe):
    for kind in ("llama_guard_reference", "llama_guard"):
        decision, reason = GuardConfig(kind=kind).decide(safe, unsafe)
        if decision == "unknown":
            assert kind == "llama_guard" and math.exp(safe) + math.exp(unsafe) < 0.5 and reason == "no_verdict"
        else:
            assert decision == papers_decision(safe, unsafe) and reason == ""


SHARES = st.floats(0.001, 0.999)


@given(SHARES, SHARES, st.floats(0, 0.5))
def test_share_within_the_margin_is_unknown(share, threshold, margin):
    try:
        config = GuardConfig(threshold=threshold, margin=margin)
    except ValueError:
        assert threshold - margin <= 0 or threshold + margin >= 1
        return
    if min(abs(share - edge) for edge in (threshold - margin, threshold + margin)) < 1e-9:
        return
    expected = "safe" if share < threshold - margin else "unsafe" if share >= threshold + margin else "unknown"
    decision, reason = config.decide(math.log((1 - share) * 0.9), math.log(share * 0.9))
    assert (decision, reason) == (expected, "uncertain" if expected == "unknown" else "")


@pytest.mark.parametrize("threshold, at, below", [(0.5, 0.5, 0.4999), (0.2, 0.2001, 0.1999), (0.9, 0.9001, 0.8999)])
def test_response_at_the_threshold_is_unsafe(threshold, at, below):
    config = GuardConfig(threshold=threshold)
    assert config.decide(math.log(1 - at), math.log(at)) == ("unsafe", "")
    assert config.decide(math.log(1 - below), math.log(below)) == ("safe", "")


@pytest.mark.parametrize("min_verdict_probability", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("safe, unsafe", [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -math.inf), (math.nan,) * 2])
def test_missing_verdict_is_never_safe(safe, unsafe, min_verdict_probability):
    decision, reason = GuardConfig(min_verdict_probability=min_verdict_probability).decide(safe, unsafe)
    assert decision == "unknown" and reason in ("guard_nan", "no_verdict")


@pytest.mark.parametrize("share, decision", [(0.49, "unknown"), (0.51, "safe")])
def test_min_verdict_probability_defaults_to_one_half(share, decision):
    for min_verdict_probability in (None, 0.5):
        config = GuardConfig(min_verdict_probability=min_verdict_probability)
        assert config.decide(math.log(share * 0.9), math.log(share * 0.1))[0] == decision


# Valid configs


INVALID_KEYS = [
    ({"threshold": 0.0}, "threshold"),
    ({"threshold": 1.0}, "threshold"),
    ({"threshold": math.nan}, "threshold"),
    ({"margin": -0.1}, "margin"),
    ({"threshold": 0.3, "margin": 0.3}, "margin"),
    ({"min_verdict_probability": 1.5}, "min_verdict_probability"),
    ({"kind": "template"}, "format"),
    ({"format": FORMATS["wildguard"]}, "format"),
    ({"kind": "ensemble"}, "members"),
    ({"kind": "ensemble", "members": (GuardConfig(),)}, "members"),
    ({"members": (GuardConfig(), GuardConfig())}, "members"),
    ({"kind": "llama_guard_reference", "min_verdict_probability": 0.5}, "as the paper's code does"),
    ({"kind": "llama_guard_reference", "threshold": 0.4}, "as the paper's code does"),
    ({"kind": "llama_guard_reference", "scope": "answer"}, "as the paper's code does"),
    (
        {"kind": "ensemble", "members": (GuardConfig(kind="llama_guard_reference"), GuardConfig())},
        "cannot be a member",
    ),
    ({"kind": "llama_guard_reference", "margin": 0.1}, "as the paper's code does"),
    (
        {"kind": "ensemble", "members": (GuardConfig(), GuardConfig(sampler=EngineConfig(max_num_seqs=8)))},
        "members: two are the same guard",
    ),
]


@pytest.mark.parametrize("keys, message", INVALID_KEYS)
def test_contradictory_config_is_an_error(keys, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**keys)


def test_guard_config_is_built_from_plain_values():
    """The values are as YAML gives them: a team's own guard in an ensemble, without code."""
    custom_guard = {
        "kind": "template",
        "model": "ours",
        "threshold": 0.3,
        "format": {
            "template": "{prompt} / {response}",
            "questions": [
                {"topic": "harm", "answer_prefix": "Verdict:", "answers": {" fine": "safe", " bad": "unsafe"}},
                {
                    "topic": "refusal",
                    "answer_prefix": "\nRefused:",
                    "answers": {" yes": "refusal", " no": "compliance"},
                },
            ],
        },
    }
    values = {
        "kind": "ensemble",
        "voting": "majority",
        "members": [{"kind": "wildguard", "model": "w"}, custom_guard, {}],
    }
    config = TypeAdapter(GuardConfig).validate_python(values)
    assert config.checkpoints == ("w", "ours", "meta-llama/Llama-Guard-3-8B")
    assert isinstance(config.members[1].guard_format, GuardFormat)
    assert config.members[1].guard_format.questions[1] == Question(
        "refusal", {" yes": "refusal", " no": "compliance"}, "\nRefused:"
    )
    for invalid in ({"treshold": 0.3}, {"format": {"tempate": ""}}, {"members": [{"kin": "oracle"}]}):
        with pytest.raises(ValidationError):
            TypeAdapter(GuardConfig).validate_python(values | invalid)


# The text that is judged


MAKE = {"llama_guard": make_llama_guard, "wildguard": make_wildguard, "qwen3guard": make_qwen3guard}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKE.items()}
    return {kind: (load_decoder(f, torch.float32, "cpu"), SafeTokenizer(f)) for kind, f in folders.items()}


class FakeEngine:
    """A replacement of the engine: `answer_probabilities(text)` returns {answer: probability} for every question."""

    max_prompt_tokens = 4000

    def __init__(self, tokenizer, answer_probabilities):
        self._tokenizer, self._answer_probabilities, self.texts_read = tokenizer, answer_probabilities, []

    def score(self, prompts, token_ids):
        for id_, ids in prompts:
            self.texts_read.append(self._tokenizer.decode(ids))
            probabilities = self._answer_probabilities(self.texts_read[-1])
            words = [self._tokenizer.decode([id_]).strip() for id_ in token_ids]
            with np.errstate(divide="ignore"):
                yield Scores(id_, np.log([probabilities.get(word, 0.0) for word in words], dtype=np.float64))


@pytest.fixture
def ask(checkpoints, monkeypatch):
    """Return ask(answer_probabilities, response, **config keys) -> (verdict, texts read)."""

    def ask(answer_probabilities, response=RESPONSE, prompt="q", kind="llama_guard", **keys):
        engine = FakeEngine(checkpoints[kind][1], answer_probabilities)
        monkeypatch.setattr(model_guard, "Engine", lambda *_, **__: engine)
        guard = ModelGuard(*checkpoints[kind], GuardConfig(kind=kind, **keys))
        (verdict,) = guard.judge([response_to(prompt, response)])
        return verdict, engine.texts_read

    return ask


def flags_word(word):
    """Return answer probabilities of a Llama Guard that calls a text with this word unsafe, in category S4."""
    return lambda text: {"4": 0.8} if text.endswith("\nS") else {"u": 0.9} if word in text else {"safe": 0.9}


@pytest.mark.parametrize(
    "scope, thought_decision, answer_decision, windows",
    [
        ("response", "unsafe", "unsafe", 1),
        ("answer", "safe", "unsafe", 1),
        ("think", "unsafe", "safe", 1),
        ("both", "unsafe", "unsafe", 2),
    ],
)
def test_guard_reads_only_the_scope(ask, scope, thought_decision, answer_decision, windows):
    for word, expected in (("Thought", thought_decision), ("Said", answer_decision), ("Neither", "safe")):
        verdict, texts_read = ask(flags_word(word), scope=scope)
        assert (verdict.decision, verdict.windows) == (expected, windows)
        assert verdict.category == ("S4" if expected == "unsafe" else "")
    assert any("Agent: <think>\nThought of it.\n</think>\n\nSaid it.\n" in text for text in texts_read) == (
        scope == "response"
    )
    if scope == "both":
        assert not any("Thought" in text and "Said" in text for text in texts_read)


@pytest.mark.parametrize("scope", ["answer", "think", "both"])
@pytest.mark.parametrize("response, reason", [("No tags.", "no_think_block"), ("<think>\na\n</think>", "empty_answer")])
def test_response_without_parts_is_unknown(ask, scope, response, reason):
    verdict, texts_read = ask(flags_word("nothing"), response, scope=scope)
    assert (verdict.decision, verdict.reason, verdict.p_safe) == ("unknown", reason, None)
    assert texts_read == []


def test_worst_part_is_a_part_called_unsafe(ask):
    """A part without a verdict is not the worst, even if P(unsafe) is a larger share of its verdict probability."""

    def answer_probabilities(text):
        return {"u": 0.01} if "Thought" in text else flags_word("Said")(text) | {"safe": 0.1}

    verdict, _ = ask(answer_probabilities, scope="both")
    assert (verdict.decision, verdict.p_unsafe, verdict.category) == ("unsafe", pytest.approx(0.9), "S4")
    assert ask(lambda text: {"u": 0.01} if "Thought" in text else {"safe": 0.9}, scope="both")[0].decision == "unknown"


def test_empty_thought_is_not_judged_safe(ask):
    response = "<think>\n\n</think>\n\nSaid it."
    assert ask(flags_word("Said"), response, scope="think")[0].reason == "empty_think"
    assert ask(flags_word("Said"), response, scope="both")[0].decision == "unsafe"
    assert ask(flags_word("nothing"), response, scope="both")[0].windows == 1


def test_category_is_asked_only_for_unsafe_at_any_threshold(ask):
    def answer_probabilities(text):
        return {"11": 0.7, "4": 0.2} if text.endswith("unsafe\nS") else {"safe": 0.6, "u": 0.4}

    safe, texts_read = ask(answer_probabilities)
    assert safe.decision == "safe" and len(texts_read) == 1 and not safe.labels and not safe.category
    strict, texts_read = ask(answer_probabilities, threshold=0.4)
    assert strict.decision == "unsafe" and len(texts_read) == 2
    assert strict.category == "S11" and strict.labels["S11"] == pytest.approx(0.7)
    assert set(strict.labels) == {f"S{n}" for n in range(1, 15)}


def test_unsafe_response_stays_unsafe_without_category(ask):
    verdict, _ = ask(lambda text: dict.fromkeys(map(str, range(20)), math.nan) if "unsafe\nS" in text else {"u": 0.9})
    assert (verdict.decision, verdict.reason, verdict.category) == ("unsafe", "unsafe", "")


def test_nan_after_a_safe_verdict_makes_it_unknown(ask):
    def answer_probabilities(text):
        return {"Safe": 0.9} if text.endswith("Safety:") else {"None": 0.9, "Yes": math.nan}

    verdict, texts_read = ask(answer_probabilities, kind="qwen3guard")
    assert len(texts_read) == 3
    assert (verdict.decision, verdict.reason, verdict.refusal) == ("unknown", "guard_nan", None)


def test_nan_before_the_verdict_ends_the_questions(ask):
    broken = {"yes": math.nan, "no": math.nan, "n": math.nan}
    verdict, texts_read = ask(lambda text: broken if text.endswith("request:") else {"no": 0.9}, kind="wildguard")
    assert len(texts_read) == 1
    assert (verdict.decision, verdict.reason, verdict.p_safe) == ("unknown", "guard_nan", None)


def test_wildguard_questions_follow_the_likeliest_answers(ask):
    def answer_probabilities(text):
        reply = text.rpartition("<|assistant|>\n")[2]
        return {
            "Harmful request:": {"yes": 0.7, "no": 0.3},
            "Harmful request: yes\nResponse refusal:": {"yes": 0.2, "no": 0.75},
            "Harmful request: yes\nResponse refusal: no\nHarmful response:": {"yes": 0.9, "no": 0.1},
        }[reply]

    verdict, texts_read = ask(answer_probabilities, kind="wildguard")
    assert len(texts_read) == 3
    assert (verdict.decision, verdict.refusal) == ("unsafe", False)
    assert (verdict.p_unsafe, verdict.p_safe) == (pytest.approx(0.9), pytest.approx(0.1))
    assert verdict.labels == pytest.approx({"harmful": 0.7, "harmless": 0.3, "refusal": 0.2, "compliance": 0.75})
    assert ask(answer_probabilities, kind="wildguard", scope="think")[0].refusal is None


def test_refusal_is_read_from_the_answer(ask):
    def answer_probabilities(text):
        return {"yes": 0.9} if "Said" in text and text.endswith("refusal:") else {"no": 0.9}

    assert ask(answer_probabilities, kind="wildguard", scope="both")[0].refusal is True
    assert (
        ask(answer_probabilities, "<think>\nSaid\n</think>\n\nit.", kind="wildguard", scope="both")[0].refusal is False
    )


def test_refusal_without_verdict_probability_is_none(ask):
    verdict, _ = ask(
        lambda text: {"no": 0.9} if text.endswith("response:") else {"yes": 0.2, "n": 0.7}, kind="wildguard"
    )
    assert verdict.decision == "safe" and verdict.refusal is None


def test_qwen3guard_counts_controversial_as_unsafe(ask):
    def answer_probabilities(text):
        if text.endswith("Safety:"):
            return {"Safe": 0.4, "Unsafe": 0.25, "Controversial": 0.35}
        if text.endswith("Categories:"):
            return {"PII": 0.6, "None": 0.3}
        assert text.endswith("Safety: Controversial\nCategories: PII\nRefusal:")
        return {"Yes": 0.9}

    verdict, _ = ask(answer_probabilities, kind="qwen3guard")
    assert (verdict.decision, verdict.category, verdict.refusal) == ("unsafe", "PII", True)
    assert verdict.p_unsafe == pytest.approx(0.6) and "neither" not in verdict.labels


# Ensembles


class ConstantGuard:
    """A guard with the same decision for every response."""

    def __init__(self, name, decision, refusal=None):
        self.name, self._decision, self._refusal = name, decision, refusal

    def judge(self, responses):
        p_unsafe = {"safe": 0.1, "unsafe": 0.8, "unknown": None}[self._decision]
        fields = {
            "reason": "no_verdict" if self._decision == "unknown" else "",
            "p_safe": None if p_unsafe is None else 0.9 - p_unsafe,
            "p_unsafe": p_unsafe,
            "refusal": self._refusal,
            "category": "S1" if self._decision == "unsafe" else "",
            "labels": {"l": 0.5},
            "windows": 2,
        }
        for response in responses:
            yield Verdict.of(response, self.name, self._decision, **fields)


def combine(decisions, voting, refusals=(None, None, None)):
    guards = [ConstantGuard(f"g{n}", d, r) for n, (d, r) in enumerate(zip(decisions, refusals, strict=False))]
    (verdict,) = Ensemble({guard.name: guard for guard in guards}, voting).judge([response_to("q", "a")])
    return verdict


@pytest.mark.parametrize("decisions", list(product(["safe", "unsafe", "unknown"], repeat=3)))
def test_vote_of_all_and_of_the_majority(decisions):
    unanimous, majority = combine(decisions, "all"), combine(decisions, "majority")
    expected = "unsafe" if "unsafe" in decisions else "unknown" if "unknown" in decisions else "safe"
    assert unanimous.decision == expected
    winners = [decision for decision in ("safe", "unsafe") if decisions.count(decision) >= 2]
    assert majority.decision == (winners or ["unknown"])[0]
    for verdict in (unanimous, majority):
        assert (verdict.reason == "") == (verdict.decision == "safe")
        assert (verdict.reason == "unsafe") == (verdict.decision == "unsafe")
        assert (verdict.category == "S1") == (verdict.decision == "unsafe")
        if "unsafe" in decisions:
            assert verdict.p_unsafe == 0.8
        assert verdict.windows == 2


def test_two_members_that_disagree_have_no_majority():
    verdict = combine(["safe", "unsafe"], "majority")
    assert (verdict.decision, verdict.reason) == ("unknown", "guards_disagree")
    assert combine(["safe", "unknown"], "majority").reason == "no_verdict"


@pytest.mark.parametrize(
    "refusals, expected", [((None, True), True), ((False, False), False), ((True, False), None), ((None, None), None)]
)
def test_refusal_needs_members_that_agree(refusals, expected):
    assert combine(["safe", "safe"], "all", refusals).refusal is expected


def test_ensemble_keeps_all_probabilities_under_member_names():
    verdict = combine(["safe", "unsafe", "unknown"], "all")
    assert verdict.labels == pytest.approx(
        {"g0/safe": 0.8, "g0/unsafe": 0.1, "g0/l": 0.5, "g1/safe": 0.1, "g1/unsafe": 0.8, "g1/l": 0.5, "g2/l": 0.5}
    )


def test_ensemble_judges_every_response_once_and_in_order():
    responses = [response_to("q", "a", str(n)) for n in range(2500)]
    verdicts = list(
        Ensemble({"a": ConstantGuard("a", "safe"), "b": ConstantGuard("b", "safe")}, "all").judge(responses)
    )
    assert [verdict.key for verdict in verdicts] == [response.key for response in responses]


CUSTOM_FORMATS = [
    GuardFormat((Question("harm", {" fine": "safe", " bad": "unsafe"}, prefix),), "{prompt} {response}")
    for prefix in ("A:", "B:")
]


@pytest.mark.parametrize(
    "keys, names",
    [
        ([{"scope": "think"}, {"scope": "answer"}], ["m[1]", "m[2]"]),
        ([{"model": "other"}, {}, {"threshold": 0.3}], ["other", "m[1]", "m[2]"]),
        ([{"kind": "template", "format": custom_format} for custom_format in CUSTOM_FORMATS], ["m[1]", "m[2]"]),
    ],
)
def test_members_of_one_checkpoint_have_unique_names(monkeypatch, keys, names):
    """A member's name precedes its probabilities in every verdict and in the reports."""
    monkeypatch.setattr(registry, "ModelGuard", lambda config: ConstantGuard(f"{config.kind}:{config.model}", "safe"))
    members = tuple(GuardConfig(**({"model": "m"} | member_keys)) for member_keys in keys)
    guard = registry.build_guard(GuardConfig(kind="ensemble", members=members), lambda config: ())
    (verdict,) = guard.judge([response_to("q", "a")])
    names = [f"{member.kind}:{name}" for member, name in zip(members, names, strict=True)]
    assert list(verdict.labels) == [f"{name}/{label}" for name in names for label in ("safe", "unsafe", "l")]
    assert guard.name == f"all({', '.join(names)})"
