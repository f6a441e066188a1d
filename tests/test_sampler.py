"""The sampler answers as transformers would, one request alone, whatever the cache, the batch and the order."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from thinksafe.errors import UserError
from thinksafe.kernels.sampling import sample
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach
from thinksafe.model.weights import load_decoder
from thinksafe.sampler import scheduler as scheduler_module
from thinksafe.sampler.cache import CacheFormat
from thinksafe.sampler.engine import _QUEUED, Engine, EngineConfig
from thinksafe.sampler.loops import CHECK_EVERY, ends_in_a_loop
from thinksafe.sampler.request import Completion, Request, SamplingConfig
from thinksafe.sampler.runner import bucket

GREEDY = SamplingConfig(temperature=0, max_tokens=24)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=24)
STOP_IDS = (7, 210, 333)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> (our decoder, theirs), loaded once, fp32."""
    loaded = {}

    def load(family: str) -> tuple[Decoder, PreTrainedModel]:
        if family not in loaded:
            folder = make_checkpoint(family, tmp_path_factory.mktemp(family), seed=11)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            loaded[family] = load_decoder(folder, torch.float32, "cpu"), theirs
        return loaded[family]

    return load


@pytest.fixture
def crowded(monkeypatch):
    """Admit on the prompt alone, so that a small pool runs out and sequences are preempted."""
    monkeypatch.setattr(scheduler_module, "_GROWTH_TOKENS", 1)


def pool_of(decoder: Decoder, num_pages: int, page_size: int, cache="auto") -> float:
    """GiB that hold this many pages."""
    cached_token = CacheFormat.of(decoder.config, decoder.embedding.dtype, cache).bytes_per_token(decoder.config)
    return num_pages * page_size * cached_token / 2**30


def engine_of(
    decoder: Decoder, *, page_size=16, num_pages=None, max_running=16, max_step_tokens=256, **settings
) -> Engine:
    cache = settings.get("kv_cache_dtype", "auto")
    gib = pool_of(decoder, num_pages or -(-2048 // page_size), page_size, cache)
    return Engine(decoder, EngineConfig(max_running, max_step_tokens, page_size, gib, **settings))


def answers(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    """Completions by id; every request answered once, and every page free again at the end."""
    completions = list(engine.generate(requests))
    assert sorted(c.request_id for c in completions) == sorted(r.id for r in requests)
    scheduler = engine.scheduler
    assert (scheduler.pool.owners == 0).all()
    assert scheduler.pool.available == len(scheduler.pool.owners)
    assert not scheduler.has_work
    return {completion.request_id: completion for completion in completions}


def scores_of(engine: Engine, prompts, token_ids) -> dict[str, np.ndarray]:
    """Log-probabilities by id; every prompt scored once, and every page free again at the end."""
    scores = list(engine.score(prompts, token_ids))
    assert sorted(score.request_id for score in scores) == sorted(id_ for id_, _ in prompts)
    assert (engine.scheduler.pool.owners == 0).all()
    return {score.request_id: score.logprobs for score in scores}


def random_prompts(lengths, seed: int, prefix=()) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [(*prefix, *torch.randint(0, 380, (n,), generator=generator).tolist()) for n in lengths]


def make_requests(prompts, sampling=GREEDY, stop_ids=STOP_IDS) -> list[Request]:
    return [Request(f"r{i}", prompt, sampling, 1000 + i, stop_ids) for i, prompt in enumerate(prompts)]


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


SHARED = random_prompts([21], seed=5)[0]
PROMPTS = [
    *random_prompts([1, 2, 3, 16, 17, 40, 64], seed=6),
    *random_prompts([1, 11, 30], seed=7, prefix=SHARED),
    *[SHARED] * 3,
]

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
def test_greedy_responses_equal_those_of_transformers(models, crowded, family):
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
def test_random_models_do_not_repeat_themselves(models, family):
    """Or the comparison above would prove little."""
    decoder, _ = models(family)
    got = answers(engine_of(decoder), make_requests(PROMPTS, stop_ids=()))
    assert all(len(set(completion.tokens)) > 4 for completion in got.values())


def test_stop_token_ends_a_response_and_is_left_out(models):
    decoder, _ = models("qwen3")
    (request,) = make_requests([SHARED], stop_ids=())
    unstopped = answers(engine_of(decoder), [request])["r0"]
    assert len(unstopped.tokens) == 24 and unstopped.finish_reason == "length"
    for index in (0, 1, 10, 23):
        stop = unstopped.tokens[index]
        first = unstopped.tokens.index(stop)
        stopped = answers(engine_of(decoder), [replace(request, stop_ids=(stop, 399))])["r0"]
        assert stopped == Completion("r0", unstopped.tokens[:first], "stop")


def test_each_request_has_its_own_limits(models):
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


def test_a_response_that_outgrows_the_whole_cache_ends_as_length(models):
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    long = SamplingConfig(temperature=0, max_tokens=1000)
    got = answers(engine, make_requests(random_prompts([5, 38, 1], seed=9), long, stop_ids=()))
    assert [len(got[id_].tokens) for id_ in ("r0", "r1", "r2")] == [35, 2, 39]
    assert {completion.finish_reason for completion in got.values()} == {"length"}


@pytest.mark.parametrize("length, message", [(0, "empty"), (40, "40 tokens"), (512, "512 tokens")])
def test_a_prompt_that_can_never_fit_is_refused_before_anything_is_answered(models, length, message):
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    assert engine.max_prompt_tokens == 39
    with pytest.raises(ValueError, match=message):
        next(engine.generate(make_requests(random_prompts([3, length], seed=10))))
    assert not engine.scheduler.has_work, "nothing of the refused batch is left in the queue"


def test_longest_allowed_prompt_is_answered(models):
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4, num_pages=10)
    (completion,) = engine.generate(make_requests(random_prompts([engine.max_prompt_tokens], seed=11), stop_ids=()))
    assert len(completion.tokens) == 1


def test_an_engine_without_memory_for_a_page_is_a_user_error(models):
    decoder, _ = models("qwen3")
    with pytest.raises(UserError, match="kv_cache_gib"):
        Engine(decoder, EngineConfig(kv_cache_gib=1e-9))


def test_a_shared_prefix_is_computed_once(models):
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


def test_a_prompt_asked_n_times_is_computed_once(models):
    decoder, _ = models("qwen3")
    engine = engine_of(decoder, page_size=4)
    answers(engine, make_requests([SHARED] * 8, replace(SAMPLED, max_tokens=1)))
    assert engine.scheduler.computed_tokens == 21 + 7  # 20 of the 21 tokens lie in full pages


def test_sampled_response_does_not_depend_on_batch_order_or_cache(models, crowded):
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
def test_sampled_tokens_are_drawn_from_the_logits_of_transformers_at_their_own_position(models, family):
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


def test_without_the_mode_last_digits_depend_on_the_batch(models):
    """Or the test above would prove nothing."""
    decoder, _ = models("qwen3")
    requests = make_requests(PROMPTS, SAMPLED)
    together = exactly(answers(engine_of(decoder), requests))
    assert any(exactly(answers(engine_of(decoder), [r]))[r.id] != together[r.id] for r in requests)


def test_batch_invariant_scores_have_the_same_bits_in_every_batch(models):
    decoder, _ = models("llama")
    prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    engine = engine_of(decoder, batch_invariant=True)
    together = scores_of(engine, prompts, (3, 399, 17))
    usual = scores_of(engine_of(decoder), prompts, (3, 399, 17))
    for id_, prompt in prompts:
        cut = engine_of(decoder, batch_invariant=True, max_step_tokens=5, page_size=4)
        assert np.array_equal(scores_of(cut, [(id_, prompt)], (3, 399, 17))[id_], together[id_])
        np.testing.assert_allclose(usual[id_], together[id_], atol=1e-4)


@pytest.mark.parametrize("passes_ahead", [1, 2, 3])
def test_running_ahead_of_the_results_changes_nothing(models, crowded, passes_ahead):
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


@pytest.mark.parametrize("passes_ahead", [0, 1])
def test_a_call_that_is_broken_off_leaves_nothing_to_the_next(models, passes_ahead):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 9, 33, 21], seed=31), replace(SAMPLED, max_tokens=40), stop_ids=())
    requests[1] = replace(requests[1], sampling=replace(SAMPLED, max_tokens=3))
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder)
    engine.passes_ahead = passes_ahead
    assert next(iter(engine.generate(requests))).request_id == requests[1].id
    assert answers(engine, requests) == expected


def test_an_engine_answers_one_call_at_a_time(models):
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
def test_a_request_that_would_break_the_device_is_refused_by_name(models, change, message):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([5, 9], seed=32))
    with pytest.raises(ValueError, match=message):
        list(engine_of(decoder).generate([*requests, replace(requests[0], id="last", **change)]))


def test_an_id_may_come_once_a_call(models):
    """Also where the first of that id has been answered; whoever asks again may use it again."""
    engine, requests = engine_of(models("qwen3")[0], max_running=2), make_requests(random_prompts([3] * 150, seed=34))
    for twice in (1, 149):
        with pytest.raises(ValueError, match="request r0: another request of this call has the same id"):
            list(engine.generate([*requests[:twice], requests[0]]))
    with pytest.raises(ValueError, match="request s: another"):
        list(engine.score([("s", SHARED), ("s", SHARED)], (1, 2)))
    assert len(answers(engine, requests)) == 150


def test_a_pass_that_fails_leaves_no_page_that_was_never_filled(models):
    decoder, _ = models("qwen3")
    requests = make_requests(random_prompts([40, 40], seed=33))
    expected = answers(engine_of(decoder), requests)
    engine = engine_of(decoder)
    draw, engine.runner.draw = engine.runner.draw, lambda plan: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(engine.generate(requests))
    engine.runner.draw = draw
    assert answers(engine, requests) == expected


def test_padding_rows_are_inert(models):
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
def test_log_probabilities_are_those_of_transformers(models, family):
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


def test_a_response_that_repeats_itself_ends_as_a_loop_if_asked(models):
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


def test_greedy_and_sampled_requests_share_a_batch(models):
    decoder, _ = models("mistral")
    kinds = [GREEDY, SAMPLED, replace(SAMPLED, top_k=0), replace(SAMPLED, top_p=1.0, temperature=0.3)]
    requests = [replace(request, sampling=kinds[i % 4]) for i, request in enumerate(make_requests(PROMPTS))]
    together = answers(engine_of(decoder), requests)
    for kind in kinds:
        of_kind = [request for request in requests if request.sampling == kind]
        assert answers(engine_of(decoder), of_kind) == {request.id: together[request.id] for request in of_kind}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_with_a_cache_in_e4m3_are_near_those_of_transformers(models, crowded, family):
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


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_log_softmax_of_transformers(models, crowded, family):
    decoder, model = models(family)
    token_ids = (3, 399, 17)
    with torch.no_grad():
        expected = [model(torch.tensor([p])).logits[0, -1].log_softmax(-1)[list(token_ids)] for p in PROMPTS]
    for num_pages, max_step_tokens in [(200, 256), (17, 32)]:
        engine = engine_of(decoder, page_size=4, num_pages=num_pages, max_step_tokens=max_step_tokens)
        prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
        scores = scores_of(engine, prompts, token_ids)
        for i, row in enumerate(expected):
            torch.testing.assert_close(torch.from_numpy(scores[str(i)]), row, atol=1e-4, rtol=1e-4)


def test_scores_of_a_broken_prompt_are_nan_and_no_others_are(poisoned):
    engine = engine_of(poisoned, page_size=4)
    prompts = [("bad", (*SHARED, POISON)), ("good", (*SHARED, 5)), ("bad too", (POISON,)), ("good too", (3,))]
    for _ in range(2):
        scores = scores_of(engine, prompts, (5, 6))
        assert all(math.isnan(value) for id_ in ("bad", "bad too") for value in scores[id_])
        assert all(value < 0 for id_ in ("good", "good too") for value in scores[id_])


def test_scores_are_nan_where_an_activation_overflows(models, monkeypatch):
    """Else a verdict would be read out of a distribution that is none."""
    engine = engine_of(models("qwen3")[0])
    read = engine.runner._read

    def overflowing(plan):
        hidden = read(plan).clone()
        hidden[plan.ends[plan.completes] == 3, 50] = torch.inf
        return hidden

    monkeypatch.setattr(engine.runner, "_read", overflowing)
    scores = scores_of(engine, [("bad", (1, 2, 3)), ("good", (4, 5))], (5, 6))
    assert all(math.isnan(value) for value in scores["bad"])
    assert all(math.isfinite(value) for value in scores["good"])


def test_requests_are_taken_when_there_is_room_for_them(models):
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


def test_one_engine_generates_and_scores_in_turn(models):
    decoder, _ = models("qwen3")
    engine, requests = engine_of(decoder, page_size=4), make_requests(PROMPTS)
    first = answers(engine, requests)
    list(engine.score([("s", SHARED)], (1, 2)))
    assert answers(engine, requests) == first


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


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_in_fp32_on_a_gpu_equal_those_on_a_cpu(models, crowded, family, tmp_path):
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
