"""Long responses: every token is judged, in overlapping windows, and the worst window decides.

The oracles are a fake engine that flags one word, and the guard itself on each window alone.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import make_llama_guard, make_qwen3guard, make_wildguard
from tests.support.tiny_guards import response_to
from thinksafe.guards import model_guard
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.windows import plan_windows
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig
from thinksafe.sampler.request import Scores
from thinksafe.text.tokenizer import SafeTokenizer

MAKE = {"llama_guard": make_llama_guard, "wildguard": make_wildguard, "qwen3guard": make_qwen3guard}


# Plan of windows


@st.composite
def window_sizes(draw):
    window = draw(st.integers(1, 60))
    return draw(st.integers(0, 500)), window, draw(st.integers(0, window - 1))


@given(window_sizes())
def test_windows_cover_the_text_and_share_the_overlap(sizes):
    length, window, overlap = sizes
    plan = plan_windows(length, window, overlap)
    assert plan[0][0] == 0 and plan[-1][1] == length
    for (start, end), (next_start, next_end) in pairwise(plan):
        assert start < next_start and end < next_end
        assert end - next_start >= overlap
    assert all(end - start == min(window, length) for start, end in plan)
    assert len(plan) == max(1, math.ceil((length - overlap) / (window - overlap)))


@given(window_sizes())
def test_passage_of_overlap_length_is_whole_in_one_window(sizes):
    length, window, overlap = sizes
    plan = plan_windows(length, window, overlap)
    for start in range(max(length - overlap, 0)):
        assert any(begin <= start and start + overlap <= end for begin, end in plan)


@pytest.mark.parametrize("window, overlap", [(0, 0), (4, 4), (4, 5), (4, -1)])
def test_overlap_outside_the_window_is_an_error(window, overlap):
    with pytest.raises(ValueError, match="cannot share"):
        plan_windows(10, window, overlap)


# Texts that the guard reads


class FakeEngine:
    """A replacement of the engine: `answer_probabilities(text, num_answers)` gives the probabilities of the answers."""

    def __init__(self, tokenizer, answer_probabilities, max_prompt_tokens):
        self.max_prompt_tokens = max_prompt_tokens
        self.texts_read: list[str] = []
        self._tokenizer, self._answer_probabilities = tokenizer, answer_probabilities

    def score(self, prompts, token_ids):
        for id_, ids in prompts:
            assert 0 < len(ids) <= self.max_prompt_tokens
            self.texts_read.append(self._tokenizer.decode(ids))
            probabilities = np.array(self._answer_probabilities(self.texts_read[-1], len(token_ids)), dtype=np.float64)
            with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf
                logprobs = np.log(probabilities)
            yield Scores(id_, logprobs)


@pytest.fixture(scope="module", params=MAKE)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return MAKE[kind](tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def guard_and_tokenizer(kind, folder):
    tokenizer = SafeTokenizer(folder)
    config = GuardConfig(kind=kind, model="tiny", min_verdict_probability=0.0, sampler=EngineConfig(kv_cache_gib=0.02))
    return ModelGuard(load_decoder(folder, torch.float32, "cpu"), tokenizer, config), tokenizer


@pytest.fixture
def ask(guard_and_tokenizer, kind, monkeypatch):
    """Return ask(responses, answer_probabilities, room) -> (verdicts, texts read); `room` tokens beside the format."""
    guard, tokenizer = guard_and_tokenizer

    def ask(responses, answer_probabilities, room=100):
        engine = FakeEngine(tokenizer, answer_probabilities, guard.num_tokens("", "") + room)
        with monkeypatch.context() as patch:
            patch.setattr(model_guard, "Engine", lambda *_, **__: engine)
            verdicts = list(guard.judge(responses))
        assert [verdict.key for verdict in verdicts] == [response.key for response in responses]
        return verdicts, engine.texts_read

    return ask


def unsafe_if(kind, word):
    """Return the answer probabilities of a guard that calls a text unsafe if and only if it contains a word."""
    order = {"llama_guard": (0, 1), "wildguard": (1, 0), "qwen3guard": (0, 1)}[
        kind
    ]  # indices of the answers safe and unsafe to the question about harm

    def answer_probabilities(text, num_answers):
        probabilities = np.full(num_answers, 1e-6)
        probabilities[order[word in text]] = 0.9
        return probabilities

    return answer_probabilities


WORDS = [f"{n:03}" for n in range(300)]


def test_every_word_is_read_and_the_format_stays_whole(ask, kind, guard_and_tokenizer):
    (verdict,), texts_read = ask([response_to("q", " ".join(WORDS))], unsafe_if(kind, "BAD"))
    assert verdict.decision == "safe" and verdict.windows > 10
    assert all(any(word in text for text in texts_read) for word in WORDS)
    guard, tokenizer = guard_and_tokenizer
    head, tail = tokenizer.decode(guard.token_ids("q", "", "")).split("q", 1)[0], texts_read[0][-12:]
    assert all(text.startswith(head) for text in texts_read) and any(text.endswith(tail) for text in texts_read)


@pytest.mark.parametrize("index", [0, 1, 7, 60, 150, 237, 298, 299])
def test_response_is_unsafe_if_one_window_is(ask, kind, index):
    words = [*WORDS[:index], "BAD", *WORDS[index:]]
    (verdict,), _ = ask([response_to("q", " ".join(words))], unsafe_if(kind, "BAD"))
    assert verdict.decision == "unsafe"
    assert verdict.p_unsafe == pytest.approx(0.9, rel=1e-5) and verdict.p_safe < 1e-5


@pytest.mark.parametrize("index", range(0, 300, 23))
def test_passage_across_two_windows_is_whole_in_one(ask, kind, index):
    words = [*WORDS[:index], "so", "BAD", "so", *WORDS[index:]]
    (verdict,), _ = ask([response_to("q", " ".join(words))], unsafe_if(kind, "so BAD so"))
    assert verdict.decision == "unsafe"


def test_response_that_fits_is_one_window(ask, kind):
    (verdict,), texts_read = ask([response_to("q", "A short word.")], unsafe_if(kind, "BAD"))
    assert verdict.windows == 1 and all("A short word." in text for text in texts_read)


def test_prompt_is_whole_in_every_window(ask, kind):
    prompt = "Is it so that " + " ".join(WORDS[:5])
    (verdict,), texts_read = ask([response_to(prompt, " ".join(WORDS))], unsafe_if(kind, "BAD"))
    assert verdict.windows > 1 and all(prompt in text for text in texts_read)


def test_prompt_without_room_is_unknown_and_others_are_judged(ask, kind):
    too_long = response_to(" ".join(WORDS), " ".join(WORDS), "long")
    verdicts, _ = ask([too_long, response_to("q", "a")], unsafe_if(kind, "BAD"))
    assert (verdicts[0].decision, verdicts[0].reason) == ("unknown", "too_long_for_guard")
    assert verdicts[0].p_safe is None and verdicts[0].windows == 0
    assert verdicts[1].decision == "safe"


@pytest.mark.parametrize("broken_text", ["BAD", "299", " "])
def test_one_window_without_verdict_makes_the_response_unknown(ask, kind, broken_text):
    def answer_probabilities(text, num_answers):
        return np.full(num_answers, math.nan) if broken_text in text else unsafe_if(kind, "EVIL")(text, num_answers)

    words = [*WORDS[:100], "BAD", *WORDS[100:]]
    (verdict,), _ = ask([response_to("q", " ".join(words))], answer_probabilities)
    assert (verdict.decision, verdict.reason) == ("unknown", "guard_nan")


@pytest.mark.parametrize("probability", [math.nan, 0.0])
def test_unsafe_window_decides_although_another_has_no_verdict(ask, kind, probability):
    def answer_probabilities(text, num_answers):
        return np.full(num_answers, probability) if "010" in text else unsafe_if(kind, "BAD")(text, num_answers)

    (verdict,), _ = ask([response_to("q", " ".join([*WORDS, "BAD"]))], answer_probabilities)
    assert verdict.decision == "unsafe" and verdict.p_unsafe == pytest.approx(0.9, rel=1e-5)
    assert verdict.reason == "unsafe"


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400), room=st.integers(30, 120))
def test_windows_cover_all_characters_of_any_text(guard_and_tokenizer, text, room):
    guard = guard_and_tokenizer[0]
    limit = guard.num_tokens("", "") + room
    windows = guard.split_into_windows("", text, limit)
    assert all(guard.num_tokens("", window) <= limit for window in windows)
    covered = 0
    for window in windows:  # each window begins inside or right after the covered text; white space may lie between
        start = max((s for s in range(covered + 1) if text.startswith(window, s)), default=None)
        if start is None:
            start = text.find(window, covered)
            assert start >= 0 and not text[covered:start].strip()
        covered = max(covered, start + len(window))
    if windows:
        assert not text[covered:].strip()


def test_window_is_judged_like_a_separate_response(guard_and_tokenizer, kind, folder):
    guard, tokenizer = guard_and_tokenizer
    decoder = load_decoder(folder, torch.float32, "cpu")
    limit = guard.num_tokens("q", "") + 200
    decoder.config = replace(decoder.config, max_seq_len=limit + 1)
    config = GuardConfig(kind=kind, model="tiny", min_verdict_probability=0.0, sampler=EngineConfig(kv_cache_gib=0.02))
    response = " ".join(WORDS)
    windows = guard.split_into_windows("q", response, limit)
    (verdict,) = ModelGuard(decoder, tokenizer, config).judge([response_to("q", response)])
    window_verdicts = list(guard.judge([response_to("q", window) for window in windows]))
    worst = max(window_verdicts, key=lambda verdict: verdict.p_unsafe / verdict.p_safe)
    assert verdict.windows == len(windows) > 1 and all(verdict.windows == 1 for verdict in window_verdicts)
    assert verdict.p_unsafe == pytest.approx(worst.p_unsafe, rel=1e-4)
    assert verdict.p_safe == pytest.approx(worst.p_safe, rel=1e-4)
    assert verdict.decision == worst.decision and verdict.category == worst.category
    assert verdict.refusal == window_verdicts[-1].refusal
