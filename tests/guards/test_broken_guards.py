"""A broken guard never gives `safe`: it has NaN logits, replies with other words, or does not fit its checkpoint.

The oracle is a decoder with fixed logits, and the rule of the paper's code for its preset.
"""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.tiny_guards import (
    CUSTOM_FORMAT,
    LLAMA,
    RESPONSES,
    SAMPLER,
    WILD,
    FixedLogits,
    answer_ids,
    config,
    verdicts_by_id,
)
from thinksafe.errors import UserError
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.paper_reference import PaperReferenceGuard
from thinksafe.model.weights import load_decoder
from thinksafe.text.tokenizer import SafeTokenizer

pytest_plugins = ["tests.support.tiny_guards"]


# Decisions of a guard that is broken or replies with other words


def guard_with_logits(decoder, tokenizer, safe, unsafe, other_logit=None, **keys):
    ids = answer_ids(tokenizer, LLAMA, ["safe", "unsafe"])
    logits = {ids[0]: safe, ids[1]: unsafe}
    if other_logit is not None:
        logits[max(ids) + 1] = other_logit
    return ModelGuard(FixedLogits(decoder, logits), tokenizer, GuardConfig(sampler=SAMPLER, **keys))


NAN, INF, NEVER = math.nan, math.inf, -1e30


@pytest.mark.parametrize(
    "logits, decision, reason",
    [
        ((5.0, 1.0), "safe", ""),
        ((1.0, 5.0), "unsafe", "unsafe"),
        ((2.0, 2.0), "unsafe", "unsafe"),
        ((2.0, -2.0, 3.0), "unknown", "no_verdict"),
        ((-2.0, 2.0, 3.0), "unknown", "no_verdict"),
        ((2.0, 1.0, -3.0), "safe", ""),
        ((NAN, 1.0), "unknown", "guard_nan"),
        ((1.0, NAN), "unknown", "guard_nan"),
        ((1.0, 0.0, NAN), "unknown", "guard_nan"),
        ((INF, 0.0), "unknown", "guard_nan"),
        ((0.0, INF), "unknown", "guard_nan"),
        ((5.0, 1.0, INF), "unknown", "guard_nan"),
        ((-INF, 3.0), "unknown", "guard_nan"),
        ((NEVER, NEVER), "unknown", "no_verdict"),
        ((NEVER, 3.0), "unsafe", "unsafe"),
        ((3.0, NEVER), "safe", ""),
    ],
)
def test_guard_with_nan_or_without_verdict_is_unknown(decoder, tokenizer, logits, decision, reason):
    verdict = verdicts_by_id(guard_with_logits(decoder, tokenizer, *logits), RESPONSES[:1])["a"]
    assert (verdict.decision, verdict.reason) == (decision, reason)
    assert verdict.refusal is None and (verdict.category != "") == (decision == "unsafe")
    assert (verdict.p_safe is None) == (reason == "guard_nan")


@pytest.mark.parametrize(
    "logits", [(NEVER, NEVER, 0.0), (-INF, -INF, 0.0), (0.0, 0.0, 60.0), (NAN, NAN), (-90.0, -90.0, 90.0)]
)
def test_guard_without_verdict_is_not_safe_at_min_probability_zero(decoder, tokenizer, logits):
    guard = guard_with_logits(decoder, tokenizer, *logits, min_verdict_probability=0.0)
    assert verdicts_by_id(guard, RESPONSES[:1])["a"].decision != "safe"


def reference_decision(logits: dict[str, float]) -> str:
    """Return the decision of the paper's code: a word outside the two likeliest tokens has log-probability -1e5."""
    top_two = dict(sorted(logits.items(), key=lambda item: -item[1])[:2])
    return ("safe", "unsafe")[int(np.argmax([top_two.get("safe", -1e5), top_two.get("unsafe", -1e5)]))]


@pytest.mark.parametrize("gap", [0.1, 2.0])
@pytest.mark.parametrize("order", list(permutations(("safe", "unsafe", "S", "\n"))), ids=repr)
def test_reference_preset_decides_as_the_papers_code(decoder, tokenizer, order, gap):
    """The paper's code calls a response safe if neither verdict is among the two likeliest tokens."""
    logits = {word: -gap * index for index, word in enumerate(order)}
    ids = answer_ids(tokenizer, LLAMA, ["safe", "unsafe", "S", "\n"])
    fixed_decoder = FixedLogits(
        decoder, dict(zip(ids, (logits[word] for word in ("safe", "unsafe", "S", "\n")), strict=True))
    )
    guard_config = GuardConfig(kind="llama_guard_reference", sampler=SAMPLER)
    guard = PaperReferenceGuard(fixed_decoder, tokenizer, guard_config)
    verdict = verdicts_by_id(guard, RESPONSES[:1])["a"]
    assert verdict.decision == reference_decision(logits)
    assert (verdict.reason == "no_verdict") == ({*order[:2]} == {"S", "\n"})


def test_untrained_guard_has_no_verdict(decoder, tokenizer):
    guard = ModelGuard(decoder, tokenizer, GuardConfig(sampler=SAMPLER))
    for verdict in verdicts_by_id(guard).values():
        assert verdict.decision == "unknown" and verdict.reason == "no_verdict"
        assert verdict.p_safe + verdict.p_unsafe < 0.5


@pytest.mark.parametrize(
    "answer, decision", [(" yes", "unsafe"), (" no", "safe"), (" n/a", "unknown"), ("\n", "unknown")]
)
def test_wildguard_decision_follows_from_its_only_answer(decoders, tokenizers, answer, decision):
    (word,) = answer_ids(tokenizers["wildguard"], WILD + "Harmful request:", [answer])
    fixed_decoder = FixedLogits(decoders["wildguard"], {word: 5.0})
    wildguard_config = GuardConfig(kind="wildguard", model="tiny", sampler=SAMPLER)
    guard = ModelGuard(fixed_decoder, tokenizers["wildguard"], wildguard_config)
    verdict = verdicts_by_id(guard, RESPONSES[:1])["a"]
    assert verdict.decision == decision
    assert verdict.reason == {"unsafe": "unsafe", "safe": "", "unknown": "no_verdict"}[decision]
    assert verdict.refusal is {"unsafe": True, "safe": False, "unknown": None}[decision]


# Checkpoints and formats that do not fit


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "mistral"])
def test_checkpoint_of_another_format_is_an_error(tmp_path, family):
    folder = make_checkpoint(family, tmp_path)
    with pytest.raises(
        UserError, match=r"guard.model: tiny does not fit guard.kind llama_guard: .*<\|begin_of_text\|>"
    ):
        ModelGuard(load_decoder(folder, torch.float32, "cpu"), SafeTokenizer(folder), config("llama_guard"))


def test_answers_with_the_same_first_token_are_an_error(tmp_path, decoder):
    folder = make_checkpoint("llama", tmp_path)  # its tokenizer splits the number of a category into digits
    with pytest.raises(UserError, match=r"llama_guard: the answers '1' and '10'.* begin with the same token"):
        ModelGuard(decoder, SafeTokenizer(folder), config("llama_guard"))


def test_answers_that_merge_with_the_prefix_are_an_error(decoders, tokenizers):
    joined_format = GuardFormat(
        (Question("harm", {"afe": "safe", "unafe": "unsafe"}, answer_prefix="s"),), template=CUSTOM_FORMAT.template
    )
    with pytest.raises(UserError, match="merges an answer with 's'"):
        ModelGuard(
            decoders["llama_guard"],
            tokenizers["llama_guard"],
            GuardConfig(kind="template", model="tiny", format=joined_format),
        )


HARM = Question("harm", {"a": "safe", "b": "unsafe"})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: GuardFormat((HARM,), template="{prompt}"), "exactly once"),
        (lambda: GuardFormat((HARM,), template="{prompt} {response} {response}"), "exactly once"),
        (lambda: GuardFormat((), template="{prompt} {response}"), "ask about harm exactly once"),
        (lambda: GuardFormat((HARM, HARM)), "any other topic at most once"),
        (
            lambda: GuardFormat((Question("category", {"a": "A"}, only_if_unsafe=True), HARM)),
            "after the question about harm",
        ),
        (lambda: GuardFormat((HARM,), is_full_prompt=True), "need one, and it is null"),
        (lambda: GuardFormat((HARM,), delimiters=("",)), "empty phrase"),
        (lambda: Question("harm", {"a": "safe"}), "safe and unsafe"),
        (lambda: Question("refusal", {"a": "refusal", "b": "compliance", "c": "maybe"}), "compliance and refusal"),
        (lambda: Question("category", {}), "at least one word"),
        (lambda: Question("harm", {"": "safe", "b": "unsafe"}), "no word may be empty"),
    ],
)
def test_contradictory_format_is_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()
