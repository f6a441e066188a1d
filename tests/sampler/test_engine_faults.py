"""What cannot be answered is refused by name or ends as NaN, and is nobody else's loss."""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.engines import (
    GREEDY,
    SAMPLED,
    SHARED,
    answers,
    engine_of,
    make_requests,
    models,
    random_prompts,
    scores_of,
)
from thinksafe.errors import UserError
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Completion, Request, SamplingConfig


@pytest.mark.parametrize("length, message", [(0, "empty"), (40, "40 tokens"), (512, "512 tokens")])
def test_a_prompt_that_can_never_fit_is_refused_before_anything_is_answered(length, message):
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    assert engine.max_prompt_tokens == 39
    with pytest.raises(ValueError, match=message):
        next(engine.generate(make_requests(random_prompts([3, length], seed=10))))
    assert not engine.scheduler.has_work, "nothing of the refused batch is left in the queue"


def test_longest_allowed_prompt_is_answered():
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    (completion,) = engine.generate(make_requests(random_prompts([engine.max_prompt_tokens], seed=11), stop_ids=()))
    assert len(completion.tokens) == 1


def test_an_engine_without_memory_for_a_page_is_a_user_error():
    decoder, _ = models("qwen3")
    with pytest.raises(UserError, match="kv_cache_gib"):
        Engine(decoder, EngineConfig(kv_cache_gib=1e-9))


@pytest.mark.parametrize("passes_ahead", [0, 1])
def test_a_call_that_is_broken_off_leaves_nothing_to_the_next(passes_ahead):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 9, 33, 21], seed=31), replace(SAMPLED, max_tokens=40), stop_ids=())
    requests[1] = replace(requests[1], sampling=replace(SAMPLED, max_tokens=3))
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder)
    engine.passes_ahead = passes_ahead
    assert next(iter(engine.generate(requests))).request_id == requests[1].id
    assert answers(engine, requests) == expected


def test_an_engine_answers_one_call_at_a_time():
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 9], seed=31), replace(SAMPLED, max_tokens=9), stop_ids=())
    engine, expected = engine_of(decoder), answers(engine_of(decoder), requests)
    requests[0] = replace(requests[0], sampling=replace(SAMPLED, max_tokens=3))
    first = engine.generate(requests)
    next(first)
    with pytest.raises(RuntimeError, match="another call"):
        next(engine.generate(requests))
    assert [tuple(one.tokens) for one in first] == [tuple(expected[requests[1].id].tokens)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": (3, -1)}, "request last: the prompt holds a token id outside"),
        ({"prompt": (10**6, 3)}, "request last: the prompt holds a token id outside"),
        ({"seed": 1 << 63}, "request last: the seed"),
        ({"seed": -1}, "request last: the seed"),
    ],
)
def test_a_request_that_would_break_the_device_is_refused_by_name(change, message):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([5, 9], seed=32))
    with pytest.raises(ValueError, match=message):
        list(engine_of(decoder).generate([*requests, replace(requests[0], id="last", **change)]))


def test_an_id_may_come_once_a_call():
    """Also where the first of that id has been answered; whoever asks again may use it again."""
    engine, requests = engine_of(models("qwen3")[0], max_running=2), make_requests(random_prompts([3] * 150, seed=34))
    for twice in (1, 149):
        with pytest.raises(ValueError, match="request r0: another request of this call has the same id"):
            list(engine.generate([*requests[:twice], requests[0]]))
    with pytest.raises(ValueError, match="request s: another"):
        list(engine.score([("s", SHARED), ("s", SHARED)], (1, 2)))
    assert len(answers(engine, requests)) == 150


def test_a_pass_that_fails_leaves_no_page_that_was_never_filled():
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 40], seed=33))
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder)
    draw, engine.runner.draw = engine.runner.draw, lambda plan: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(engine.generate(requests))
    engine.runner.draw = draw
    assert answers(engine, requests) == expected


POISON = 390
"""A token whose embedding some tests make NaN."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("poisoned"), seed=12)
    decoder = load_decoder(folder, torch.float32, "cpu")
    decoder.embedding[POISON] = torch.nan
    return decoder


def test_a_request_that_breaks_the_model_ends_as_nan_and_no_other_does(poisoned, crowded):
    """Also when a healthy sequence takes over pages that hold NaN, or lies beside such a page in the batch."""
    healthy = make_requests(random_prompts([3, 9, 20, 33, 6, 14], seed=13), stop_ids=(POISON,))
    expected = answers(engine_of(poisoned), healthy)
    assert all(completion.finish_reason == "length" for completion in expected.values())
    prompts = random_prompts([1, 2, 7, 19, 40, 23], seed=14)
    broken = [Request(f"broken {i}", (*prompt, POISON, 5), GREEDY, 1, ()) for i, prompt in enumerate(prompts)]
    mixed = [request for pair in zip(broken, healthy, strict=True) for request in pair]
    for num_pages, page_size in [(200, 4), (16, 4), (8, 16), (64, 1)]:
        engine = engine_of(poisoned, page_size=page_size, num_pages=num_pages, max_running=4)
        for _ in range(2):
            got = answers(engine, mixed)
            assert {got[request.id] for request in broken} == {Completion(r.id, (), "nan") for r in broken}
            assert {request.id: got[request.id] for request in healthy} == expected


@pytest.mark.parametrize("max_step_tokens", [16, 256])
def test_a_broken_request_does_not_break_those_that_share_its_prefix(poisoned, max_step_tokens):
    """Attention computes the prefix and the broken token in one go, and a masked NaN is still NaN."""
    healthy = make_requests(random_prompts([1, 5, 9], seed=15, prefix=SHARED), stop_ids=(POISON,))
    expected = answers(engine_of(poisoned, page_size=4), healthy)
    broken = [Request(f"broken {i}", (*SHARED, POISON, i), GREEDY, 1, ()) for i in range(2)]
    engine = engine_of(poisoned, page_size=4, max_step_tokens=max_step_tokens)
    for requests in ([*broken, *healthy], healthy, [healthy[0], *broken, *healthy[1:]], healthy):
        before = engine.scheduler.computed_tokens
        got = answers(engine, requests)
        for request in requests:
            assert got[request.id] == expected.get(request.id, Completion(request.id, (), "nan"))
    alone = sum(len(request.prompt) + 23 for request in healthy)
    assert engine.scheduler.computed_tokens - before <= alone - 2 * 20, "the prefix was not shared again"


def test_a_model_that_breaks_later_keeps_what_it_wrote_before(tmp_path):
    decoder = load_decoder(make_checkpoint("llama", tmp_path), torch.float32, "cpu")
    (request,) = make_requests([SHARED], stop_ids=())
    whole = answers(engine_of(decoder), [request])["r0"].tokens
    last = next(i for i, token in enumerate(whole) if i >= 4 and token not in (*SHARED, *whole[:i]))
    decoder.embedding[whole[last]] = torch.nan
    assert answers(engine_of(decoder), [request])["r0"] == Completion("r0", whole[: last + 1], "nan")


def test_scores_of_a_broken_prompt_are_nan_and_no_others_are(poisoned):
    engine = engine_of(poisoned, page_size=4)
    prompts = [("bad", (*SHARED, POISON)), ("good", (*SHARED, 5)), ("bad too", (POISON,)), ("good too", (3,))]
    for _ in range(2):
        scores = scores_of(engine, prompts, (5, 6))
        assert all(math.isnan(value) for id_ in ("bad", "bad too") for value in scores[id_])
        assert all(value < 0 for id_ in ("good", "good too") for value in scores[id_])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_running": 0},
        {"page_size": -1},
        {"max_step_tokens": 0},
        {"kv_cache_gib": -1.0},
    ],
)
def test_engine_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
    ],
)
def test_sampling_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingConfig(**settings)
