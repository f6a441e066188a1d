"""A guard that is broken, says something else or does not fit its checkpoint: never a "safe" that it did not say."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.tiny_guards import (
    EXCHANGES,
    LLAMA,
    SAMPLER,
    TEAMS_OWN,
    WILD,
    RiggedHead,
    answer_ids,
    config,
    judgements,
)
from thinksafe.errors import UserError
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.model.weights import load_decoder
from thinksafe.text.tokenizer import SafeTokenizer

pytest_plugins = ["tests.support.tiny_guards"]


# What a guard that is broken, or says something else, is taken for


def rigged(decoder, tokenizer, safe, unsafe, other=None, **keys):
    ids = answer_ids(tokenizer, LLAMA, ["safe", "unsafe"])
    logits = {ids[0]: safe, ids[1]: unsafe}
    if other is not None:
        logits[max(ids) + 1] = other
    return ModelGuard(RiggedHead(decoder, logits), tokenizer, GuardConfig(sampler=SAMPLER, **keys))


NAN, INF, NEVER = math.nan, math.inf, -1e30


@pytest.mark.parametrize(
    "logits, decision, reason",
    [
        ((5.0, 1.0), "safe", ""),
        ((1.0, 5.0), "unsafe", ""),
        ((2.0, 2.0), "unsafe", ""),
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
        ((NEVER, 3.0), "unsafe", ""),
        ((3.0, NEVER), "safe", ""),
    ],
)
def test_a_guard_that_says_something_else_is_unknown_and_never_safe(decoder, tokenizer, logits, decision, reason):
    judgement = judgements(rigged(decoder, tokenizer, *logits), EXCHANGES[:1])["a"]
    assert (judgement.decision, judgement.reason) == (decision, reason)
    assert judgement.refusal is None and (judgement.category != "") == (decision == "unsafe")
    assert (judgement.p_safe is None) == (reason == "guard_nan")


@pytest.mark.parametrize(
    "logits", [(NEVER, NEVER, 0.0), (-INF, -INF, 0.0), (0.0, 0.0, 60.0), (NAN, NAN), (-90.0, -90.0, 90.0)]
)
def test_without_a_least_mass_a_guard_that_says_nothing_is_still_not_safe(decoder, tokenizer, logits):
    guard = rigged(decoder, tokenizer, *logits, min_mass=0.0)
    assert judgements(guard, EXCHANGES[:1])["a"].decision != "safe"


def reference_record(top: dict[str, float]) -> str:
    """The paper's code: of the two likeliest first tokens, a word that is missing has log-probability -1e5."""
    two = dict(sorted(top.items(), key=lambda item: -item[1])[:2])
    return ("safe", "unsafe")[int(np.argmax([two.get("safe", -1e5), two.get("unsafe", -1e5)]))]


@pytest.mark.parametrize("gap", [0.1, 2.0])
@pytest.mark.parametrize("order", list(permutations(("safe", "unsafe", "S", "\n"))), ids=repr)
def test_the_reference_preset_is_the_papers_code_to_the_record(decoder, tokenizer, order, gap):
    """Where the guard has no verdict, neither word being among its two likeliest, that code calls it safe: the record
    says so, and no other guard does that."""
    logits = {word: -gap * place for place, word in enumerate(order)}
    ids = answer_ids(tokenizer, LLAMA, ["safe", "unsafe", "S", "\n"])
    head = RiggedHead(decoder, dict(zip(ids, (logits[word] for word in ("safe", "unsafe", "S", "\n")), strict=True)))
    guard = ModelGuard(head, tokenizer, GuardConfig(kind="llama_guard_reference", sampler=SAMPLER))
    judgement = judgements(guard, EXCHANGES[:1])["a"]
    assert judgement.decision == reference_record(logits)
    assert (judgement.reason == "no_verdict") == ({*order[:2]} == {"S", "\n"})


def test_an_untrained_guard_has_no_verdict(decoder, tokenizer):
    guard = ModelGuard(decoder, tokenizer, GuardConfig(sampler=SAMPLER))
    for judgement in judgements(guard).values():
        assert judgement.decision == "unknown" and judgement.reason == "no_verdict"
        assert judgement.p_safe + judgement.p_unsafe < 0.5


@pytest.mark.parametrize(
    "says, decision", [(" yes", "unsafe"), (" no", "safe"), (" n/a", "unknown"), ("\n", "unknown")]
)
def test_wildguard_that_always_says_the_same(decoders, tokenizers, says, decision):
    (word,) = answer_ids(tokenizers["wildguard"], WILD + "Harmful request:", [says])
    head = RiggedHead(decoders["wildguard"], {word: 5.0})
    guard = ModelGuard(head, tokenizers["wildguard"], GuardConfig(kind="wildguard", model="tiny", sampler=SAMPLER))
    judgement = judgements(guard, EXCHANGES[:1])["a"]
    assert judgement.decision == decision and judgement.reason == ("no_verdict" if decision == "unknown" else "")
    assert judgement.refusal is {"unsafe": True, "safe": False, "unknown": None}[decision]


# Checkpoints and formats that do not fit


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "mistral"])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, family):
    folder = make_checkpoint(family, tmp_path)
    with pytest.raises(UserError, match=r"guard.model: tiny is no llama_guard: .*<\|begin_of_text\|>"):
        ModelGuard(load_decoder(folder, torch.float32, "cpu"), SafeTokenizer(folder), config("llama_guard"))


def test_answers_that_begin_alike_are_refused(tmp_path, decoder):
    folder = make_checkpoint("llama", tmp_path)  # its tokens are too small for the numbers of categories
    with pytest.raises(UserError, match=r"is no llama_guard: it writes '1' and '10'.* with the same first token"):
        ModelGuard(decoder, SafeTokenizer(folder), config("llama_guard"))


def test_answers_that_join_the_words_before_them_are_refused(decoders, tokenizers):
    joined = GuardFormat((Question("harm", {"afe": "safe", "unafe": "unsafe"}, lead="s"),), template=TEAMS_OWN.template)
    with pytest.raises(UserError, match="join an answer with 's'"):
        ModelGuard(
            decoders["llama_guard"],
            tokenizers["llama_guard"],
            GuardConfig(kind="template", model="tiny", format=joined),
        )


HARM = Question("harm", {"a": "safe", "b": "unsafe"})


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: GuardFormat((HARM,), template="{prompt}"), "exactly once"),
        (lambda: GuardFormat((HARM,), template="{prompt} {response} {response}"), "exactly once"),
        (lambda: GuardFormat((), template="{prompt} {response}"), "ask about harm"),
        (lambda: GuardFormat((HARM, HARM)), "about nothing twice"),
        (lambda: GuardFormat((Question("category", {"a": "A"}, if_unsafe=True), HARM)), "after the one about harm"),
        (lambda: GuardFormat((HARM,), raw=True), "a template of its own"),
        (lambda: GuardFormat((HARM,), frame=("",)), "empty phrase"),
        (lambda: Question("harm", {"a": "safe"}), "safe and unsafe"),
        (lambda: Question("refusal", {"a": "refusal", "b": "compliance", "c": "maybe"}), "compliance and refusal"),
        (lambda: Question("category", {}), "must be words"),
        (lambda: Question("harm", {"": "safe", "b": "unsafe"}), "must be words"),
    ],
)
def test_a_format_that_cannot_be_asked_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
