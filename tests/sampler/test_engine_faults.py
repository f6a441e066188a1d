"""Engine faults: an invalid request is an error with its id, a request with NaN logits ends as `nan`, and neither
changes another response.

The oracle is a new engine that answers only the healthy requests.
"""

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
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Completion, Request


@pytest.mark.parametrize("length, message", [(0, "empty"), (40, "40 tokens"), (512, "512 tokens")])
def test_prompt_that_can_never_fit_is_an_error(length, message):
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    assert engine.max_prompt_tokens == 39
    with pytest.raises(ValueError, match=message):
        next(engine.generate(make_requests(random_prompts([3, length], seed=10))))
    assert not engine.scheduler.has_work, "no request of the failed call may stay in the queue"


def test_longest_valid_prompt_is_answered():
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    (completion,) = engine.generate(make_requests(random_prompts([engine.max_prompt_tokens], seed=11), stop_ids=()))
    assert len(completion.tokens) == 1


def test_too_little_memory_for_a_page_is_an_error():
    decoder, _ = models("qwen3")
    with pytest.raises(UserError, match="kv_cache_gib"):
        Engine(decoder, EngineConfig(kv_cache_gib=1e-9))
    with pytest.raises(UserError, match=r"^guard\.sampler\.kv_cache_gib"):
        Engine(decoder, EngineConfig(kv_cache_gib=1e-9), config_key="guard.sampler")


@pytest.mark.parametrize("max_batches_in_flight", [1, 2])
def test_call_that_stops_early_does_not_affect_the_next(max_batches_in_flight):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 9, 33, 21], seed=31), replace(SAMPLED, max_tokens=40), stop_ids=())
    requests[1] = replace(requests[1], sampling=replace(SAMPLED, max_tokens=3))
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder)
    engine.max_batches_in_flight = max_batches_in_flight
    assert next(iter(engine.generate(requests))).request_id == requests[1].id
    assert answers(engine, requests) == expected


def test_engine_answers_one_call_at_a_time():
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 9], seed=31), replace(SAMPLED, max_tokens=9), stop_ids=())
    engine, expected = engine_of(decoder), answers(engine_of(decoder), requests)
    requests[0] = replace(requests[0], sampling=replace(SAMPLED, max_tokens=3))
    completions = engine.generate(requests)
    next(completions)
    with pytest.raises(RuntimeError, match="another call"):
        next(engine.generate(requests))
    assert [tuple(completion.tokens) for completion in completions] == [tuple(expected[requests[1].id].tokens)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": (3, -1)}, "request last: the prompt holds a token id outside"),
        ({"prompt": (10**6, 3)}, "request last: the prompt holds a token id outside"),
        ({"seed": 1 << 63}, "request last: the seed"),
        ({"seed": -1}, "request last: the seed"),
    ],
)
def test_invalid_token_or_seed_is_an_error_with_request_id(change, message):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([5, 9], seed=32))
    with pytest.raises(ValueError, match=message):
        list(engine_of(decoder).generate([*requests, replace(requests[0], id="last", **change)]))


def test_repeated_id_in_one_call_is_an_error():
    """The first request with that id may have been answered already. A later call may use the id again."""
    engine, requests = (
        engine_of(models("qwen3")[0], max_num_seqs=2),
        make_requests(random_prompts([3] * 150, seed=34), replace(GREEDY, max_tokens=2)),
    )
    for num_before_repeat in (1, 149):
        with pytest.raises(ValueError, match="request r0: another request of this call has the same id"):
            list(engine.generate([*requests[:num_before_repeat], requests[0]]))
    with pytest.raises(ValueError, match="request s: another"):
        list(engine.score([("s", SHARED), ("s", SHARED)], (1, 2)))
    assert len(answers(engine, requests)) == 150


def test_failed_pass_shares_no_unfilled_page():
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 40], seed=33))
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder)
    forward, engine.runner.forward = engine.runner.forward, lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(engine.generate(requests))
    engine.runner.forward = forward
    assert answers(engine, requests) == expected


NAN_TOKEN = 390
"""A token whose embedding is NaN in `nan_decoder`."""


@pytest.fixture(scope="module")
def nan_decoder(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("nan_decoder"), seed=12)
    decoder = load_decoder(folder, torch.float32, "cpu")
    decoder.embedding[NAN_TOKEN] = torch.nan
    return decoder


@pytest.mark.slow
def test_only_requests_with_nan_logits_end_as_nan(nan_decoder, overcommit):
    """Healthy sequences also reuse pages that contain NaN, and are in one batch with such pages."""
    healthy = make_requests(random_prompts([3, 9, 20, 33, 6, 14], seed=13), stop_ids=(NAN_TOKEN,))
    expected = answers(engine_of(nan_decoder), healthy)
    assert all(completion.finish_reason == "length" for completion in expected.values())
    prompts = random_prompts([1, 2, 7, 19, 40, 23], seed=14)
    broken = [Request(f"broken {i}", (*prompt, NAN_TOKEN, 5), GREEDY, 1, ()) for i, prompt in enumerate(prompts)]
    mixed = [request for pair in zip(broken, healthy, strict=True) for request in pair]
    for num_pages, page_size in [(200, 4), (16, 4), (8, 16), (64, 1)]:
        engine = engine_of(nan_decoder, page_size=page_size, num_pages=num_pages, max_num_seqs=4)
        for _ in range(2):
            actual = answers(engine, mixed)
            assert {actual[request.id] for request in broken} == {Completion(r.id, (), "nan") for r in broken}
            assert {request.id: actual[request.id] for request in healthy} == expected


@pytest.mark.parametrize("max_prefill_tokens", [16, 256])
def test_nan_does_not_reach_requests_with_the_same_prefix(nan_decoder, max_prefill_tokens):
    """Attention computes the prefix and the NaN token in one matmul, and a masked NaN is still NaN."""
    healthy = make_requests(random_prompts([1, 5, 9], seed=15, prefix=SHARED), stop_ids=(NAN_TOKEN,))
    expected = answers(engine_of(nan_decoder, page_size=4), healthy)
    broken = [Request(f"broken {i}", (*SHARED, NAN_TOKEN, i), GREEDY, 1, ()) for i in range(2)]
    engine = engine_of(nan_decoder, page_size=4, max_prefill_tokens=max_prefill_tokens)
    for requests in ([*broken, *healthy], healthy, [healthy[0], *broken, *healthy[1:]], healthy):
        num_computed_before = engine.scheduler.computed_tokens
        actual = answers(engine, requests)
        for request in requests:
            assert actual[request.id] == expected.get(request.id, Completion(request.id, (), "nan"))
    num_tokens_unshared = sum(len(request.prompt) + 23 for request in healthy)
    num_computed = engine.scheduler.computed_tokens - num_computed_before
    assert num_computed <= num_tokens_unshared - 2 * 20, "the prefix was not shared again"


def test_later_nan_keeps_the_earlier_response_tokens(tmp_path):
    decoder = load_decoder(make_checkpoint("llama", tmp_path), torch.float32, "cpu")
    (request,) = make_requests([SHARED], stop_ids=())
    tokens = answers(engine_of(decoder), [request])["r0"].tokens
    broken_index = next(i for i, token in enumerate(tokens) if i >= 4 and token not in (*SHARED, *tokens[:i]))
    decoder.embedding[tokens[broken_index]] = torch.nan
    assert answers(engine_of(decoder), [request])["r0"] == Completion("r0", tokens[: broken_index + 1], "nan")


def test_only_prompts_with_nan_logits_have_nan_scores(nan_decoder):
    engine = engine_of(nan_decoder, page_size=4)
    prompts = [("bad", (*SHARED, NAN_TOKEN)), ("good", (*SHARED, 5)), ("bad too", (NAN_TOKEN,)), ("good too", (3,))]
    for _ in range(2):
        scores = scores_of(engine, prompts, (5, 6))
        assert all(math.isnan(value) for id_ in ("bad", "bad too") for value in scores[id_])
        assert all(value < 0 for id_ in ("good", "good too") for value in scores[id_])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 0},
        {"page_size": -1},
        {"page_size": 0},
        {"max_prefill_tokens": 0},
        {"kv_cache_gib": -1.0},
        {"kv_cache_gib": 0.0},
    ],
)
def test_invalid_engine_settings_are_errors(settings):
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
def test_invalid_sampling_settings_are_errors(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingConfig(**settings)
