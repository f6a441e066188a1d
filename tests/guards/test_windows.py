"""Long responses: every token is judged, in windows that overlap, and the worst of them counts."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import make_llama_guard, make_qwen3guard, make_wildguard
from thinksafe.guards import model_guard
from thinksafe.guards.base import Exchange
from thinksafe.guards.config import GuardConfig
from thinksafe.guards.model_guard import ModelGuard
from thinksafe.guards.windows import plan_windows
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.engine import EngineConfig
from thinksafe.sampler.request import Scores
from thinksafe.text.tokenizer import SafeTokenizer

MAKE = {"llama_guard": make_llama_guard, "wildguard": make_wildguard, "qwen3guard": make_qwen3guard}


# The plan


@st.composite
def plans(draw):
    window = draw(st.integers(1, 60))
    return draw(st.integers(0, 500)), window, draw(st.integers(0, window - 1))


@given(plans())
def test_windows_cover_everything_and_share_what_they_must(sizes):
    length, window, overlap = sizes
    plan = plan_windows(length, window, overlap)
    assert plan[0][0] == 0 and plan[-1][1] == length
    for (start, end), (next_start, next_end) in pairwise(plan):
        assert start < next_start and end < next_end
        assert end - next_start >= overlap
    assert all(end - start == min(window, length) for start, end in plan)
    assert len(plan) == max(1, math.ceil((length - overlap) / (window - overlap)))


@given(plans())
def test_a_passage_as_long_as_the_overlap_is_whole_in_one_window(sizes):
    length, window, overlap = sizes
    plan = plan_windows(length, window, overlap)
    for start in range(max(length - overlap, 0)):
        assert any(a <= start and start + overlap <= b for a, b in plan)


@pytest.mark.parametrize("window, overlap", [(0, 0), (4, 4), (4, 5), (4, -1)])
def test_windows_that_would_never_end_are_refused(window, overlap):
    with pytest.raises(ValueError, match="cannot share"):
        plan_windows(10, window, overlap)


# What is read


class Reader:
    """In the place of the engine: a guard that says of every text what `says` makes of it."""

    def __init__(self, tokenizer, says, max_prompt_tokens):
        self.max_prompt_tokens = max_prompt_tokens
        self.read: list[str] = []
        self._tokenizer, self._says = tokenizer, says

    def score(self, prompts, token_ids):
        for id_, ids in prompts:
            assert 0 < len(ids) <= self.max_prompt_tokens
            self.read.append(self._tokenizer.decode(ids))
            yield Scores(id_, np.log(np.array(self._says(self.read[-1], len(token_ids)), dtype=np.float64)))


@pytest.fixture(scope="module", params=MAKE)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return MAKE[kind](tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def made(kind, folder):
    tokenizer = SafeTokenizer(folder)
    config = GuardConfig(kind=kind, model="tiny", min_mass=0.0, sampler=EngineConfig(kv_cache_gib=0.02))
    return ModelGuard(load_decoder(folder, torch.float32, "cpu"), tokenizer, config), tokenizer


@pytest.fixture
def ask(made, kind, monkeypatch):
    """ask(exchanges, says, room): the judgements and all that was read with `room` tokens beside the format."""
    guard, tokenizer = made

    def ask(exchanges, says, room=100):
        reader = Reader(tokenizer, says, guard._num_tokens("", "") + room)
        with monkeypatch.context() as patch:
            patch.setattr(model_guard, "Engine", lambda *_: reader)
            found = list(guard.judge(exchanges))
        assert [judgement.id for judgement in found] == [exchange.id for exchange in exchanges]
        return found, reader.read

    return ask


def unsafe_if(kind, word):
    """Probabilities of the answers to any question by a guard that minds one word only."""
    order = {"llama_guard": (0, 1), "wildguard": (1, 0), "qwen3guard": (0, 1)}[kind]  # of safe, unsafe at harm

    def says(text, num_answers):
        probabilities = np.full(num_answers, 1e-6)
        probabilities[order[word in text]] = 0.9
        return probabilities

    return says


WORDS = [f"{n:03}" for n in range(300)]


def test_every_word_of_a_long_response_is_read_and_none_of_the_format_is_cut(ask, kind, made):
    (judgement,), read = ask([Exchange("x", "q", " ".join(WORDS))], unsafe_if(kind, "BAD"))
    assert judgement.decision == "safe" and judgement.windows > 10
    assert all(any(word in text for text in read) for word in WORDS)
    head, tail = made[1].decode(made[0]._ids("q", "", "")).split("q", 1)[0], read[0][-12:]
    assert all(text.startswith(head) for text in read) and any(text.endswith(tail) for text in read)


@pytest.mark.parametrize("place", [0, 1, 7, 60, 150, 237, 298, 299])
def test_a_response_is_unsafe_if_one_window_is(ask, kind, place):
    words = [*WORDS[:place], "BAD", *WORDS[place:]]
    (judgement,), _ = ask([Exchange("x", "q", " ".join(words))], unsafe_if(kind, "BAD"))
    assert judgement.decision == "unsafe"
    assert judgement.p_unsafe == pytest.approx(0.9, rel=1e-5) and judgement.p_safe < 1e-5


@pytest.mark.parametrize("place", range(0, 300, 23))
def test_a_passage_that_straddles_two_windows_is_whole_in_one(ask, kind, place):
    words = [*WORDS[:place], "so", "BAD", "so", *WORDS[place:]]
    (judgement,), _ = ask([Exchange("x", "q", " ".join(words))], unsafe_if(kind, "so BAD so"))
    assert judgement.decision == "unsafe"


def test_a_response_that_fits_is_read_once_and_whole(ask, kind):
    (judgement,), read = ask([Exchange("x", "q", "A short word.")], unsafe_if(kind, "BAD"))
    assert judgement.windows == 1 and all("A short word." in text for text in read)


def test_the_prompt_is_whole_in_every_window(ask, kind):
    prompt = "Is it so that " + " ".join(WORDS[:5])
    (judgement,), read = ask([Exchange("x", prompt, " ".join(WORDS))], unsafe_if(kind, "BAD"))
    assert judgement.windows > 1 and all(prompt in text for text in read)


def test_a_prompt_that_leaves_no_room_is_unknown_and_the_rest_is_judged(ask, kind):
    long = Exchange("long", " ".join(WORDS), " ".join(WORDS))
    found, _ = ask([long, Exchange("x", "q", "a")], unsafe_if(kind, "BAD"))
    assert (found[0].decision, found[0].reason) == ("unknown", "too_long_for_guard")
    assert found[0].p_safe is None and found[0].windows == 0
    assert found[1].decision == "safe"


@pytest.mark.parametrize("broken, decision", [("BAD", "unknown"), ("299", "unknown"), (" ", "unknown")])
def test_one_window_without_a_verdict_is_enough_for_none(ask, kind, broken, decision):
    def says(text, num_answers):
        return np.full(num_answers, math.nan) if broken in text else unsafe_if(kind, "EVIL")(text, num_answers)

    words = [*WORDS[:100], "BAD", *WORDS[100:]]
    (judgement,), _ = ask([Exchange("x", "q", " ".join(words))], says)
    assert (judgement.decision, judgement.reason) == (decision, "guard_nan")


def test_a_window_that_is_unsafe_counts_although_another_has_no_verdict(ask, kind):
    def says(text, num_answers):
        return np.full(num_answers, math.nan) if "010" in text else unsafe_if(kind, "BAD")(text, num_answers)

    (judgement,), _ = ask([Exchange("x", "q", " ".join([*WORDS, "BAD"]))], says)
    assert judgement.decision == "unsafe" and judgement.p_unsafe == pytest.approx(0.9, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400), room=st.integers(30, 120))
def test_whatever_is_written_its_characters_are_all_read(made, text, room):
    guard = made[0]
    limit = guard._num_tokens("", "") + room
    windows = guard._windows("", text, limit)
    assert all(guard._num_tokens("", window) <= limit for window in windows)
    at = 0
    for window in windows:  # each begins within or right behind what the ones before have covered, but for white space
        start = max((s for s in range(at + 1) if text.startswith(window, s)), default=None)
        if start is None:
            start = text.find(window, at)
            assert start >= 0 and not text[at:start].strip()
        at = max(at, start + len(window))
    if windows:
        assert not text[at:].strip()


def test_windows_of_a_real_model_are_judged_like_responses_of_their_own(made, kind, folder):
    guard, tokenizer = made
    decoder = load_decoder(folder, torch.float32, "cpu")
    limit = guard._num_tokens("q", "") + 200
    decoder.config = replace(decoder.config, max_seq_len=limit + 1)
    config = GuardConfig(kind=kind, model="tiny", min_mass=0.0, sampler=EngineConfig(kv_cache_gib=0.02))
    response = " ".join(WORDS)
    windows = guard._windows("q", response, limit)
    (whole,) = ModelGuard(decoder, tokenizer, config).judge([Exchange("x", "q", response)])
    alone = list(guard.judge([Exchange(str(n), "q", window) for n, window in enumerate(windows)]))
    worst = max(alone, key=lambda judgement: judgement.p_unsafe / judgement.p_safe)
    assert whole.windows == len(windows) > 1 and all(judgement.windows == 1 for judgement in alone)
    assert whole.p_unsafe == pytest.approx(worst.p_unsafe, rel=1e-4)
    assert whole.p_safe == pytest.approx(worst.p_safe, rel=1e-4)
    assert whole.decision == worst.decision and whole.category == worst.category
    assert whole.refusal == alone[-1].refusal
