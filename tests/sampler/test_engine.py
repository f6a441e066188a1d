"""The sampler answers as transformers would, one request alone, whatever the cache, the batch and the order."""

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
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.engine import _QUEUED, Engine, EngineConfig
from thinksafe.sampler.model_runner import bucket
from thinksafe.sampler.repetition import CHECK_EVERY, ends_in_a_loop
from thinksafe.sampler.request import Completion, Request, SamplingConfig


def expected_completion(model: PreTrainedModel, request: Request) -> Completion:
    """What `generate` writes greedily, its stop token left out."""
    prompt = torch.tensor([request.prompt])
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else ids equal to the padding id would be taken for padding
        do_sample=False,
        max_new_tokens=request.sampling.max_tokens,
        eos_token_id=list(request.stop_ids) or None,
        pad_token_id=0,
    )[0, prompt.shape[1] :].tolist()
    stopped = written[-1] in request.stop_ids
    return Completion(request.id, tuple(written[:-1] if stopped else written), "stop" if stopped else "length")


def assert_same_greedy(model: PreTrainedModel, request: Request, got: Completion, expected: Completion) -> None:
    """Equal, or parted where the reference itself was undecided between its two best tokens."""
    if got == expected:
        return
    pairs = zip((*got.tokens, None), (*expected.tokens, None), strict=False)
    agreed = next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt, *expected.tokens[:agreed]]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    assert first - second < 1e-5, f"{request.id} departs at response token {agreed}, gap {first - second:.2e}"


# page size, tokens a step, rows at once, pages, whether the pool must have run out
SWEEP = {
    "roomy": (16, 256, 16, 64, False),
    "pages of one token": (1, 256, 16, 1200, False),
    "prompts in chunks of a few tokens": (4, 5, 5, 300, False),
    "one row at a time": (16, 8, 1, 64, False),
    "small pool": (4, 64, 16, 40, True),
    "small pool, pages of one token, chunks": (1, 9, 9, 150, True),
    "a pool for the longest request alone": (16, 32, 16, 6, True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_equal_those_of_transformers(crowded, family):
    decoder, model = models(family)
    requests = make_requests(PROMPTS)
    expected = {request.id: expected_completion(model, request) for request in requests}
    assert {completion.finish_reason for completion in expected.values()} >= {"length"}
    for page_size, max_step_tokens, max_running, num_pages, runs_out in SWEEP.values():
        engine = engine_of(
            decoder,
            page_size=page_size,
            num_pages=num_pages,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
        )
        got = answers(engine, requests)
        assert (engine.scheduler.preemptions > 0) == runs_out
        for request in requests:
            assert_same_greedy(model, request, got[request.id], expected[request.id])


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_do_not_repeat_themselves(family):
    """Or the comparison above would prove little."""
    decoder, _ = models(family)
    got = answers(engine_of(decoder), make_requests(PROMPTS, stop_ids=()))
    assert all(len(set(completion.tokens)) > 4 for completion in got.values())


def test_stop_token_ends_a_response_and_is_left_out():
    decoder, _ = models("qwen3")
    (request,) = make_requests([SHARED], stop_ids=())
    unstopped = answers(engine_of(decoder), [request])["r0"]
    assert len(unstopped.tokens) == 24 and unstopped.finish_reason == "length"
    for index in (0, 1, 10, 23):
        stop = unstopped.tokens[index]
        first = unstopped.tokens.index(stop)
        stopped = answers(engine_of(decoder), [replace(request, stop_ids=(stop, 399))])["r0"]
        assert stopped == Completion("r0", unstopped.tokens[:first], "stop")


def test_each_request_has_its_own_limits():
    decoder, _ = models("llama")
    whole = answers(engine_of(decoder), make_requests(PROMPTS, stop_ids=()))
    requests = [
        replace(request, sampling=replace(GREEDY, max_tokens=1 + index), stop_ids=(whole[request.id].tokens[5],))
        for index, request in enumerate(make_requests(PROMPTS))
    ]
    for index, request in enumerate(requests):
        expected = whole[request.id].tokens[: 1 + index]
        stop = request.stop_ids[0]
        got = answers(engine_of(decoder), requests)[request.id]
        if stop in expected:
            assert got == Completion(request.id, expected[: expected.index(stop)], "stop")
        else:
            assert got == Completion(request.id, expected, "length")


def test_a_full_context_ends_a_response_as_length(tmp_path):
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path, max_position_embeddings=48), torch.float32, "cpu")
    long = SamplingConfig(temperature=0, max_tokens=1000)
    got = answers(engine_of(decoder), make_requests(random_prompts([1, 30, 47], seed=8), long, stop_ids=()))
    assert [len(got[id_].tokens) for id_ in ("r0", "r1", "r2")] == [47, 18, 1]
    assert {completion.finish_reason for completion in got.values()} == {"length"}


def test_a_response_that_outgrows_the_whole_cache_ends_as_length():
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    long = SamplingConfig(temperature=0, max_tokens=1000)
    got = answers(engine, make_requests(random_prompts([5, 38, 1], seed=9), long, stop_ids=()))
    assert [len(got[id_].tokens) for id_ in ("r0", "r1", "r2")] == [35, 2, 39]
    assert {completion.finish_reason for completion in got.values()} == {"length"}


def test_a_shared_prefix_is_computed_once():
    decoder, _ = models("qwen3")
    page_size, prefix_length, one_token = 4, 41, replace(GREEDY, max_tokens=1)
    prefix = random_prompts([prefix_length], seed=12)[0]
    requests = make_requests([(*prefix, 100 + i, 200 + i) for i in range(8)], one_token)
    engine = engine_of(decoder, page_size=page_size)
    answers(engine, requests)
    shared = prefix_length // page_size * page_size
    assert engine.scheduler.computed_tokens == 8 * (prefix_length + 2) - 7 * shared

    # It stays in the cache for later requests, also when its last page is the prompt's own end.
    before = engine.scheduler.computed_tokens
    answers(engine, make_requests([(*prefix, 100, 200)], one_token))
    assert engine.scheduler.computed_tokens - before == prefix_length + 2 - shared
    before = engine.scheduler.computed_tokens
    answers(engine, make_requests([prefix[:shared]], one_token))
    assert engine.scheduler.computed_tokens - before == page_size


def test_a_prompt_asked_n_times_is_computed_once():
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4)
    answers(engine, make_requests([SHARED] * 8, replace(SAMPLED, max_tokens=1)))
    assert engine.scheduler.computed_tokens == 21 + 7  # 20 of the 21 tokens lie in full pages


def test_sampled_response_does_not_depend_on_batch_order_or_cache(crowded):
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    together = answers(engine_of(decoder), requests)
    assert len({together[f"r{i}"].tokens for i in (10, 11, 12)}) == 3, "equal prompts, other seeds: other responses"
    alone = {}
    for request in requests:
        alone |= answers(engine_of(decoder), [request])
    assert alone == together
    assert answers(engine_of(decoder), requests[::-1]) == together
    small = engine_of(decoder, page_size=4, num_pages=40, max_step_tokens=20)
    assert answers(small, requests) == together
    assert small.scheduler.preemptions > 0
    assert answers(small, requests[3:] + requests[:3]) == together, "an engine that has worked before"


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_are_drawn_from_the_logits_of_transformers_at_their_own_position(family):
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


def exactly(completions: dict[str, Completion]) -> dict:
    """With log-probabilities, which equality leaves out."""
    return {id_: (c.tokens, c.finish_reason, c.logprobs) for id_, c in completions.items()}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),
        ("qwen2", {"adapter": True}),
        ("qwen2", {"kv_cache_dtype": "fp8"}),
        ("llama", {"weights": "fp8"}),
    ],
)
def test_batch_invariant_log_probabilities_have_the_same_bits_in_every_batch(tmp_path, crowded, family, settings):
    """Whatever else is in the batch, its order, how prompts are cut, what is in the cache, and after preemption."""
    kind, adapted = settings.get("weights", "auto"), settings.get("adapter", False)
    decoder = load_decoder(make_checkpoint(family, tmp_path, seed=11), torch.float32, "cpu", weights=kind)
    if adapted:
        attach(decoder, LoraConfig(4, 8.0, 0.0, tuple(decoder.config.projections)), seed=0)
        for parameter in adapter_parameters(decoder).values():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    cache = settings.get("kv_cache_dtype", "auto")
    requests = make_requests(PROMPTS, SAMPLED)

    def invariant(**limits) -> Engine:
        return engine_of(decoder, kv_cache_dtype=cache, batch_invariant=True, **limits)

    together = exactly(answers(invariant(), requests))
    alone = {}
    for request in requests:
        alone |= exactly(answers(invariant(), [request]))
    assert alone == together
    assert exactly(answers(invariant(), requests[::-1])) == together
    for page_size, max_step_tokens, max_running, num_pages in [(16, 3, 5, 60), (4, 20, 16, 24), (1, 9, 9, 95)]:
        limits = {"page_size": page_size, "max_step_tokens": max_step_tokens, "max_running": max_running}
        engine = invariant(**limits, num_pages=num_pages)
        assert exactly(answers(engine, requests)) == together
        assert exactly(answers(engine, requests[3:] + requests[:3])) == together, "with prefixes in the cache"
        assert (engine.scheduler.preemptions > 0) == (num_pages != 60)


def test_without_the_mode_last_digits_depend_on_the_batch():
    """Or the test above would prove nothing."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    together = exactly(answers(engine_of(decoder), requests))
    assert any(exactly(answers(engine_of(decoder), [r]))[r.id] != together[r.id] for r in requests)


@pytest.mark.parametrize("passes_ahead", [1, 2, 3])
def test_running_ahead_of_the_results_changes_nothing(crowded, passes_ahead):
    """As on a GPU: the next passes are planned before it is known whether a response has ended."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    expected = answers(engine_of(decoder), requests)
    assert {completion.finish_reason for completion in expected.values()} == {"stop", "length"}
    for page_size, max_step_tokens, max_running, num_pages, runs_out in SWEEP.values():
        settings = {"page_size": page_size, "max_step_tokens": max_step_tokens, "max_running": max_running}
        engine = engine_of(decoder, **settings, num_pages=num_pages)
        engine.passes_ahead = passes_ahead
        assert answers(engine, requests) == expected
        assert not runs_out or engine.scheduler.preemptions > 0


def test_padding_rows_are_inert():
    """A CUDA graph decodes a fixed number of rows; those left over name a slot and a page that nobody ever has."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder, page_size=4, num_pages=100)
    inputs, widths = engine.runner.decode_inputs, []

    def padded(plan, num_rows):
        widths.append((num_rows, bucket(num_rows)))
        return inputs(plan, bucket(num_rows))

    engine.runner.decode_inputs = padded
    draw = engine.runner.draw
    engine.runner.draw = lambda plan: cut(draw(plan), plan.completes.sum())
    assert answers(engine, requests) == expected
    assert any(rows < wide for rows, wide in widths)
    assert (engine.runner.page_table[-1] == engine.runner.spare_page).all()


def cut(results, num_rows):
    results._tensors = [tensor[:num_rows] for tensor in results._tensors]
    return results


def test_graphs_come_in_few_sizes():
    sizes = [bucket(rows) for rows in range(1, 513)]
    assert all(size >= rows for rows, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, *range(32, 513, 32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family):
    """Of the model's own distribution, also where tokens are drawn from a truncated one, and after a preemption."""
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


def test_a_response_that_repeats_itself_ends_as_a_loop_if_asked():
    """A model without context repeats itself at once: greedy decoding of one whose attention adds nothing."""
    decoder, _ = models("qwen3")
    looping = copy.deepcopy(decoder)
    for layer in looping.layers:
        layer.o_proj.zero_()
        layer.down_proj.zero_()
    sampling = SamplingConfig(temperature=0, max_tokens=200)
    requests = make_requests([SHARED], sampling, stop_ids=())
    (free,) = answers(engine_of(looping), requests).values()
    assert (free.finish_reason, len(free.tokens)) == ("length", 200)
    (stopped,) = answers(engine_of(looping), make_requests([SHARED], replace(sampling, stop_loops=True), ())).values()
    assert (stopped.finish_reason, stopped.tokens) == ("loop", free.tokens[:CHECK_EVERY])
    long_ones = make_requests(PROMPTS, replace(SAMPLED, max_tokens=200, stop_loops=True), ())
    assert {c.finish_reason for c in answers(engine_of(decoder), long_ones).values()} == {"length"}


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 10), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_a_loop_is_eight_equal_blocks_at_the_end(seed, period, repeats, before):
    generator = np.random.default_rng(seed)
    block = generator.permutation(10_000)[:period]  # no token twice, so no shorter period
    tokens = np.concatenate((generator.integers(10_000, 20_000, before), np.tile(block, repeats)))
    fits = any(multiple % period == 0 and repeats * period >= 8 * multiple for multiple in range(8, 257))
    assert ends_in_a_loop(tokens) == fits
    assert not ends_in_a_loop(np.append(tokens, 20_000))


def test_greedy_and_sampled_requests_share_a_batch():
    decoder, _ = models("mistral")
    kinds = [GREEDY, SAMPLED, replace(SAMPLED, top_k=0), replace(SAMPLED, top_p=1.0, temperature=0.3)]
    requests = [replace(request, sampling=kinds[i % 4]) for i, request in enumerate(make_requests(PROMPTS))]
    together = answers(engine_of(decoder), requests)
    for kind in kinds:
        of_kind = [request for request in requests if request.sampling == kind]
        assert answers(engine_of(decoder), of_kind) == {request.id: together[request.id] for request in of_kind}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_with_a_cache_in_e4m3_are_near_those_of_transformers(crowded, family):
    """Three bits behind the point are an error of 2.7% a number: these differ, by little. So it is after preemption."""
    decoder, model = models(family)
    requests = make_requests(PROMPTS, SAMPLED, stop_ids=())
    engine = Engine(decoder, EngineConfig(16, 256, 4, pool_of(decoder, 14, 4), kv_cache_dtype="fp8"))
    assert len(engine.scheduler.pool.owners) == {"qwen3": 54, "qwen2": 22}.get(family, 52), "in the memory of 14 pages"
    got, apart = answers(engine, requests), []
    assert engine.scheduler.preemptions > 0
    for request in requests:
        tokens = got[request.id].tokens
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        apart.append((exact - torch.tensor(got[request.id].logprobs)).abs())
    assert 1e-4 < torch.cat(apart).mean() < 0.2


def test_requests_are_taken_when_there_is_room_for_them():
    """A source that is larger than memory, or shared with other workers, is not emptied at once."""
    decoder, _ = models("qwen3")
    prompts = random_prompts([3] * 300, seed=21)
    taken = []

    def source():
        for request in make_requests(prompts, replace(GREEDY, max_tokens=2)):
            taken.append(request.id)
            yield request

    completions = engine_of(decoder).generate(source())
    for done, _ in enumerate(completions, start=1):
        assert len(taken) <= min(300, done + 16 + _QUEUED + 16)
    assert (done, len(taken)) == (300, 300)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_in_fp32_on_a_gpu_equal_those_on_a_cpu(crowded, family, tmp_path):
    decoder, model = models(family)
    requests = make_requests(PROMPTS)
    expected = answers(engine_of(decoder), requests)
    on_gpu = load_decoder(make_checkpoint(family, tmp_path, seed=11), torch.float32, "cuda")
    for page_size, num_pages, runs_out in [(16, 64, False), (4, 40, True)]:
        engine = engine_of(on_gpu, page_size=page_size, num_pages=num_pages)
        got = answers(engine, requests)
        assert (engine.scheduler.preemptions > 0) == runs_out
        for request in requests:
            assert_same_greedy(model, request, got[request.id], expected[request.id])


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_the_host_waits_for_nothing_but_results(tmp_path, cache):
    """Of a call after the first, in which kernels are compiled and graphs recorded."""
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path, seed=11), torch.bfloat16, "cuda")
    engine, requests = engine_of(decoder, kv_cache_dtype=cache, max_step_tokens=64), make_requests(PROMPTS, SAMPLED)
    answers(engine, requests)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers(engine, requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
