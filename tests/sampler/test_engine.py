"""The engine: responses equal those of transformers for each request alone, in every batch, order and cache size.

The oracles are transformers' `generate` and logits, and the engine with a single request.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests.support.checkpoints import FAMILIES, make_checkpoint
from tests.support.engines import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    SHARED,
    answers,
    engine_of,
    make_requests,
    models,
    pool_of,
    random_prompts,
)
from thinksafe.kernels.sampling import sample
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import adapter_parameters, attach
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import _MAX_QUEUED, Engine
from thinksafe.sampler.model_runner import graph_batch_size
from thinksafe.sampler.repetition import CHECK_INTERVAL, ends_in_repetition
from thinksafe.sampler.request import Completion, Request


def expected_completion(model: PreTrainedModel, request: Request) -> Completion:
    """Return the greedy response of transformers' `generate`, without its stop token."""
    prompt = torch.tensor([request.prompt])
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # otherwise ids equal to the padding id would count as padding
        do_sample=False,
        max_new_tokens=request.sampling.max_tokens,
        eos_token_id=list(request.stop_ids) or None,
        pad_token_id=0,
    )[0, prompt.shape[1] :].tolist()
    stopped = generated[-1] in request.stop_ids
    return Completion(request.id, tuple(generated[:-1] if stopped else generated), "stop" if stopped else "length")


def assert_same_greedy(model: PreTrainedModel, request: Request, actual: Completion, expected: Completion) -> None:
    """Check that two responses are equal, or first differ where the reference's two best logits are nearly equal."""
    if actual == expected:
        return
    pairs = zip((*actual.tokens, None), (*expected.tokens, None), strict=False)
    num_equal = next(index for index, (got_token, expected_token) in enumerate(pairs) if got_token != expected_token)
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt, *expected.tokens[:num_equal]]])).logits[0, -1]
    best_logit, second_logit = logits.topk(2).values.tolist()
    gap = best_logit - second_logit
    assert gap < 1e-5, f"{request.id} differs at response token {num_equal}, gap {gap:.2e}"


# page_size, max_prefill_tokens, max_num_seqs, number of pages, whether the pool must run out
SWEEP = {
    "large pool": (16, 256, 16, 64, False),
    "pages of one token": (1, 256, 16, 1200, False),
    "prompts in chunks of a few tokens": (4, 5, 5, 300, False),
    "one row at a time": (16, 8, 1, 64, False),
    "small pool": (4, 64, 16, 40, True),
    "small pool, pages of one token, chunks": (1, 9, 9, 150, True),
    "a pool for the longest request only": (16, 32, 16, 6, True),
}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "qwen3" else pytest.mark.slow) for family in FAMILIES]
)
def test_greedy_responses_equal_those_of_transformers(overcommit, family):
    decoder, model = models(family)
    requests = make_requests(PROMPTS)
    expected = {request.id: expected_completion(model, request) for request in requests}
    assert {completion.finish_reason for completion in expected.values()} >= {"length"}
    for page_size, max_prefill_tokens, max_num_seqs, num_pages, runs_out in SWEEP.values():
        engine = engine_of(
            decoder,
            page_size=page_size,
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            max_prefill_tokens=max_prefill_tokens,
        )
        actual = answers(engine, requests)
        assert (engine.scheduler.preemptions > 0) == runs_out
        for request in requests:
            assert_same_greedy(model, request, actual[request.id], expected[request.id])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_do_not_repeat_tokens(family):
    """Otherwise the comparison above would prove little."""
    decoder, _ = models(family)
    actual = answers(engine_of(decoder), make_requests(PROMPTS, stop_ids=()))
    assert all(len(set(completion.tokens)) > 4 for completion in actual.values())


def test_stop_token_ends_response_and_is_not_returned():
    decoder, _ = models("qwen3")
    (request,) = make_requests([SHARED], stop_ids=())
    unstopped = answers(engine_of(decoder), [request])["r0"]
    assert len(unstopped.tokens) == 24 and unstopped.finish_reason == "length"
    for index in (0, 1, 10, 23):
        stop_id = unstopped.tokens[index]
        stop_index = unstopped.tokens.index(stop_id)
        actual = answers(engine_of(decoder), [replace(request, stop_ids=(stop_id, 399))])["r0"]
        assert actual == Completion("r0", unstopped.tokens[:stop_index], "stop")


def test_each_request_has_separate_limits():
    decoder, _ = models("llama")
    unstopped = answers(engine_of(decoder), make_requests(PROMPTS, stop_ids=()))
    requests = [
        replace(request, sampling=replace(GREEDY, max_tokens=1 + index), stop_ids=(unstopped[request.id].tokens[5],))
        for index, request in enumerate(make_requests(PROMPTS))
    ]
    for index, request in enumerate(requests):
        expected = unstopped[request.id].tokens[: 1 + index]
        stop_id = request.stop_ids[0]
        actual = answers(engine_of(decoder), requests)[request.id]
        if stop_id in expected:
            assert actual == Completion(request.id, expected[: expected.index(stop_id)], "stop")
        else:
            assert actual == Completion(request.id, expected, "length")


def test_full_context_ends_response_as_length(tmp_path):
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path, max_position_embeddings=48), torch.float32, "cpu")
    long = SamplingConfig(temperature=0, max_tokens=1000)
    actual = answers(engine_of(decoder), make_requests(random_prompts([1, 30, 47], seed=8), long, stop_ids=()))
    assert [len(actual[id_].tokens) for id_ in ("r0", "r1", "r2")] == [47, 18, 1]
    assert {completion.finish_reason for completion in actual.values()} == {"length"}


def test_full_cache_ends_response_as_length():
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    long = SamplingConfig(temperature=0, max_tokens=1000)
    actual = answers(engine, make_requests(random_prompts([5, 38, 1], seed=9), long, stop_ids=()))
    assert [len(actual[id_].tokens) for id_ in ("r0", "r1", "r2")] == [35, 2, 39]
    assert {completion.finish_reason for completion in actual.values()} == {"length"}


def test_shared_prefix_is_computed_once():
    decoder, _ = models("qwen3")
    page_size, prefix_length, one_token_sampling = 4, 41, replace(GREEDY, max_tokens=1)
    prefix = random_prompts([prefix_length], seed=12)[0]
    requests = make_requests([(*prefix, 100 + i, 200 + i) for i in range(8)], one_token_sampling)
    engine = engine_of(decoder, page_size=page_size)
    answers(engine, requests)
    shared = prefix_length // page_size * page_size
    assert engine.scheduler.computed_tokens == 8 * (prefix_length + 2) - 7 * shared

    # It stays in the cache for later requests, also for a prompt that ends with the last shared page.
    num_computed_before = engine.scheduler.computed_tokens
    answers(engine, make_requests([(*prefix, 100, 200)], one_token_sampling))
    assert engine.scheduler.computed_tokens - num_computed_before == prefix_length + 2 - shared
    num_computed_before = engine.scheduler.computed_tokens
    answers(engine, make_requests([prefix[:shared]], one_token_sampling))
    assert engine.scheduler.computed_tokens - num_computed_before == page_size


def test_repeated_prompt_is_computed_once():
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4)
    answers(engine, make_requests([SHARED] * 8, replace(SAMPLED, max_tokens=1)))
    assert engine.scheduler.computed_tokens == 21 + 7  # 20 of the 21 tokens are in full pages


def test_sampled_response_does_not_depend_on_batch_order_or_cache(overcommit):
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    batched = answers(engine_of(decoder), requests)
    assert len({batched[f"r{i}"].tokens for i in (10, 11, 12)}) == 3, (
        "equal prompts with different seeds must have different responses"
    )
    one_by_one = {}
    for request in requests:
        one_by_one |= answers(engine_of(decoder), [request])
    assert one_by_one == batched
    assert answers(engine_of(decoder), requests[::-1]) == batched
    small_engine = engine_of(decoder, page_size=4, num_pages=40, max_prefill_tokens=20)
    assert answers(small_engine, requests) == batched
    assert small_engine.scheduler.preemptions > 0
    assert answers(small_engine, requests[3:] + requests[:3]) == batched, "an engine that answered an earlier call"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_follow_the_logits_of_transformers(family):
    decoder, model = models(family)
    requests = make_requests(PROMPTS[3:9], SAMPLED, stop_ids=())
    for request in requests:
        tokens = answers(engine_of(decoder), requests)[request.id].tokens
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        positions = torch.arange(len(request.prompt), len(request.prompt) + len(tokens))
        settings = (SAMPLED.temperature, SAMPLED.top_k, SAMPLED.top_p, request.seed)
        columns = (torch.full((len(tokens),), value) for value in settings)
        assert tuple(sample(logits, *columns, positions)[0].tolist()) == tokens


def with_logprobs(completions: dict[str, Completion]) -> dict:
    """Return completions in a form whose equality includes log-probabilities."""
    return {id_: (c.tokens, c.finish_reason, c.logprobs) for id_, c in completions.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),
        ("qwen2", {"adapter": True}),
        ("qwen2", {"kv_cache_dtype": "fp8"}),
        ("llama", {"weight_dtype": "fp8"}),
    ],
)
def test_batch_invariant_log_probabilities_do_not_depend_on_the_batch(tmp_path, overcommit, family, settings):
    """The bits are the same in every batch, order, split of prompts into chunks, state of the cache, and after a
    preemption."""
    weight_dtype, has_adapter = settings.get("weight_dtype", "auto"), settings.get("adapter", False)
    decoder = load_decoder(make_checkpoint(family, tmp_path, seed=11), torch.float32, "cpu", weight_dtype=weight_dtype)
    if has_adapter:
        attach(decoder, LoraConfig(4, 8.0, 0.0, tuple(decoder.config.projections)), seed=0)
        for parameter in adapter_parameters(decoder).values():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    cache = settings.get("kv_cache_dtype", "auto")
    requests = make_requests(PROMPTS, replace(SAMPLED, max_tokens=10))

    def invariant_engine(**limits) -> Engine:
        return engine_of(decoder, kv_cache_dtype=cache, batch_invariant=True, **limits)

    batched = with_logprobs(answers(invariant_engine(), requests))
    one_by_one = {}
    for request in requests:
        one_by_one |= with_logprobs(answers(invariant_engine(), [request]))
    assert one_by_one == batched
    assert with_logprobs(answers(invariant_engine(), requests[::-1])) == batched
    for page_size, max_prefill_tokens, max_num_seqs, num_pages in [(16, 3, 5, 60), (4, 20, 16, 20), (1, 9, 9, 80)]:
        limits = {"page_size": page_size, "max_prefill_tokens": max_prefill_tokens, "max_num_seqs": max_num_seqs}
        engine = invariant_engine(**limits, num_pages=num_pages)
        assert with_logprobs(answers(engine, requests)) == batched
        assert with_logprobs(answers(engine, requests[3:] + requests[:3])) == batched, "with prefixes in the cache"
        assert (engine.scheduler.preemptions > 0) == (num_pages != 60)


def test_default_mode_log_probabilities_depend_on_the_batch():
    """Otherwise the test above would prove nothing."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    batched = with_logprobs(answers(engine_of(decoder), requests))
    assert any(with_logprobs(answers(engine_of(decoder), [r]))[r.id] != batched[r.id] for r in requests)


@pytest.mark.slow
@pytest.mark.parametrize("max_batches_in_flight", [2, pytest.param(3, marks=pytest.mark.exhaustive), 4])
def test_running_ahead_of_results_changes_nothing(overcommit, max_batches_in_flight):
    """As on a GPU: the next passes are scheduled before the host knows whether a response has ended."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    expected = answers(engine_of(decoder), requests)
    assert {completion.finish_reason for completion in expected.values()} == {"stop", "length"}
    for page_size, max_prefill_tokens, max_num_seqs, num_pages, runs_out in SWEEP.values():
        settings = {"page_size": page_size, "max_prefill_tokens": max_prefill_tokens, "max_num_seqs": max_num_seqs}
        engine = engine_of(decoder, **settings, num_pages=num_pages)
        engine.max_batches_in_flight = max_batches_in_flight
        assert answers(engine, requests) == expected
        assert not runs_out or engine.scheduler.preemptions > 0


def test_padding_rows_change_nothing():
    """A CUDA graph decodes a fixed number of rows; unused rows name a slot and a page that no sequence ever has."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder, page_size=4, num_pages=100)
    inputs, widths = engine.runner.decode_inputs, []

    def padded(batch, num_rows):
        widths.append((num_rows, graph_batch_size(num_rows)))
        return inputs(batch, graph_batch_size(num_rows))

    engine.runner.decode_inputs = padded
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: drop_padding(forward(batch), batch.needs_logits.sum())
    assert answers(engine, requests) == expected
    assert any(rows < padded_rows for rows, padded_rows in widths)
    assert (engine.runner.page_table[-1] == engine.runner.padding_page).all()


def drop_padding(results, num_rows):
    results._tensors = [tensor[:num_rows] for tensor in results._tensors]
    return results


def test_graphs_have_few_sizes():
    sizes = [graph_batch_size(rows) for rows in range(1, 513)]
    assert all(size >= rows for rows, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, *range(32, 513, 32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_those_of_transformers(family):
    """They belong to the model's full distribution, also if tokens are sampled from a truncated one, and after a
    preemption."""
    decoder, model = models(family)
    requests = make_requests(PROMPTS[3:9], SAMPLED, stop_ids=())
    engine = engine_of(decoder, page_size=4, num_pages=40)
    for completion in answers(engine, requests).values():
        request = next(request for request in requests if request.id == completion.request_id)
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *completion.tokens]])).logits[
                0, len(request.prompt) - 1 : -1
            ]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_repeating_response_ends_as_repetition_if_enabled():
    """The model has zero attention and MLP outputs, so its greedy response repeats itself at once."""
    decoder, _ = models("qwen3")
    repeating_decoder = copy.deepcopy(decoder)
    for layer in repeating_decoder.layers:
        layer.o_proj.weight.zero_()
        layer.down_proj.weight.zero_()
    sampling = SamplingConfig(temperature=0, max_tokens=200)
    requests = make_requests([SHARED], sampling, stop_ids=())
    (unstopped,) = answers(engine_of(repeating_decoder), requests).values()
    assert (unstopped.finish_reason, len(unstopped.tokens)) == ("length", 200)
    requests = make_requests([SHARED], replace(sampling, stop_on_repetition=True), ())
    (actual,) = answers(engine_of(repeating_decoder), requests).values()
    assert (actual.finish_reason, actual.tokens) == ("repetition", unstopped.tokens[:CHECK_INTERVAL])
    long_requests = make_requests(PROMPTS, replace(SAMPLED, max_tokens=200, stop_on_repetition=True), ())
    assert {c.finish_reason for c in answers(engine_of(decoder), long_requests).values()} == {"length"}


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 10), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_repetition_is_eight_equal_blocks_at_the_end(seed, period, repeats, num_earlier):
    generator = np.random.default_rng(seed)
    block = generator.permutation(10_000)[:period]  # no token twice, so no shorter period
    tokens = np.concatenate((generator.integers(10_000, 20_000, num_earlier), np.tile(block, repeats)))
    fits = any(multiple % period == 0 and repeats * period >= 8 * multiple for multiple in range(8, 257))
    assert ends_in_repetition(tokens) == fits
    assert not ends_in_repetition(np.append(tokens, 20_000))


def test_greedy_and_sampled_requests_share_a_batch():
    decoder, _ = models("mistral")
    sampling_configs = [GREEDY, SAMPLED, replace(SAMPLED, top_k=0), replace(SAMPLED, top_p=1.0, temperature=0.3)]
    requests = [replace(request, sampling=sampling_configs[i % 4]) for i, request in enumerate(make_requests(PROMPTS))]
    batched = answers(engine_of(decoder), requests)
    for sampling in sampling_configs:
        same_sampling = [request for request in requests if request.sampling == sampling]
        expected = {request.id: batched[request.id] for request in same_sampling}
        assert answers(engine_of(decoder), same_sampling) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_with_e4m3_cache_are_near_transformers(overcommit, family):
    """A mantissa of three bits has an error of 2.7% per element, so log-probabilities differ by little. This also holds
    after a preemption."""
    decoder, model = models(family)
    requests = make_requests(PROMPTS, SAMPLED, stop_ids=())
    engine = Engine(decoder, EngineConfig(16, 256, 4, pool_of(decoder, 14, 4), kv_cache_dtype="fp8"))
    num_pages = len(engine.scheduler.pool.ref_count)
    assert num_pages == {"qwen3": 54, "qwen2": 22}.get(family, 52), "the pool has the memory of 14 pages in fp32"
    actual, differences = answers(engine, requests), []
    assert engine.scheduler.preemptions > 0
    for request in requests:
        tokens = actual[request.id].tokens
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        differences.append((exact - torch.tensor(actual[request.id].logprobs)).abs())
    assert 1e-4 < torch.cat(differences).mean() < 0.2


def test_requests_are_read_when_there_is_room():
    """The engine does not empty a source at once, which may be larger than memory or shared with other workers."""
    decoder, _ = models("qwen3")
    prompts = random_prompts([3] * 300, seed=21)
    read_ids = []

    def source():
        for request in make_requests(prompts, replace(GREEDY, max_tokens=2)):
            read_ids.append(request.id)
            yield request

    completions = engine_of(decoder).generate(source())
    for num_done, _ in enumerate(completions, start=1):
        assert len(read_ids) <= min(300, num_done + 16 + _MAX_QUEUED + 16)
    assert (num_done, len(read_ids)) == (300, 300)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_fp32_responses_on_gpu_equal_those_on_cpu(overcommit, family, tmp_path):
    decoder, model = models(family)
    requests = make_requests(PROMPTS)
    expected = answers(engine_of(decoder), requests)
    on_gpu = load_decoder(make_checkpoint(family, tmp_path, seed=11), torch.float32, "cuda")
    for page_size, num_pages, runs_out in [(16, 64, False), (4, 40, True)]:
        engine = engine_of(on_gpu, page_size=page_size, num_pages=num_pages)
        actual = answers(engine, requests)
        assert (engine.scheduler.preemptions > 0) == runs_out
        for request in requests:
            assert_same_greedy(model, request, actual[request.id], expected[request.id])


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_host_waits_only_for_results(tmp_path, cache):
    """The second call is checked; the first one compiles kernels and captures graphs."""
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path, seed=11), torch.bfloat16, "cuda")
    engine, requests = engine_of(decoder, kv_cache_dtype=cache, max_prefill_tokens=64), make_requests(PROMPTS, SAMPLED)
    answers(engine, requests)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers(engine, requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
