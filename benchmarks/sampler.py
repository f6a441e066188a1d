"""Sampling: our engine against transformers, its `generate` with static batches or, on a GPU, its continuous batching.

Same weights, same prompts, lengths drawn once and forced on all sides. A static batch runs until its longest response
is done, so with skewed lengths most of its rows idle; continuous batching fills a row as soon as it is free. What the
batch-invariant mode costs has a row of its own, and on a GPU what e4m3 gains.

On a GPU a whole run of every shape stands beside the limit of thinksafe/sampler/limits.py: prompts of 64 tokens and
responses of 442 in the mean, as Qwen3-0.6B's refusals are, the longest cut at 1,024. Its host gap is the share of the
time between two passes, and of launching a decode pass where the device had nothing else to do.

What it does at contexts of 1.5k is told by decode passes, planned, launched ahead and committed as in a run, over rows
whose keys and values are random numbers: reading prompts first would take longer than all passes. They are also taken
apart. Parts are timed alone, on a GPU each as a CUDA graph, and need not add up to the whole.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingManager, GenerationConfig, PreTrainedModel

from benchmarks.harness import Row, Sections, attempt, compare, measure, recorded, seconds
from benchmarks.models import in_e4m3, in_transformers, random_decoder
from benchmarks.shapes import response_lengths
from thinksafe.kernels.chunked_loss import matmul_fp32
from thinksafe.kernels.sampling import sample
from thinksafe.model.attention import Rotation
from thinksafe.model.decoder import PRODUCTS
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.model_runner import DecodeAttention, Runner
from thinksafe.sampler.request import Request, SamplingConfig
from thinksafe.sampler.roofline import pass_seconds
from thinksafe.sampler.scheduler import StepPlan

CLAIM = "Continuous batching wins what static batches lose to their longest response."
_PROMPT = 64
_DECODE_PASSES = 20
_SHORTER = 16
"""What lengths are divided by in a GPU's first call, which compiles, and records a graph for every number of rows."""
_SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "pad_token_id": 0}


def sections(notes: list[str]) -> Sections:
    """For whatever device there is."""
    if not torch.cuda.is_available():
        size = {"count": 96, "mean": 80, "longest": 400, "rows": 32}
        return {
            "cpu-6m, end to end": partial(_end_to_end, "cpu-6m", notes, **size, modes=True, theirs=True),
            "cpu-6m, a decode pass": partial(_decode_pass, "cpu-6m", rows=32, context=200),
        }
    rows = 256 if torch.cuda.get_device_properties(0).total_memory > 100 * 2**30 else 128
    size = {"count": 384, "mean": 442, "longest": 1024, "rows": rows}

    def of(name: str) -> Sections:
        return {
            f"{name}, decode passes": partial(_decode_pass, name, rows, 1500),
            f"{name}, end to end": partial(_end_to_end, name, notes, **size, modes=name == "qwen3-0.6b"),
        }

    # Long contexts, where attention is nearly all: the shape that its target is stated for.
    long = {"qwen3-0.6b, decode passes at 4k": partial(_decode_pass, "qwen3-0.6b", 128, 4096)}
    # Half of it: theirs may take a minute, and if it takes longer, nothing else is lost.
    half = {"count": 192, "mean": 221, "longest": 512, "rows": rows}
    theirs = {"qwen3-0.6b, transformers": partial(_end_to_end, "qwen3-0.6b", notes, **half, theirs=True)}
    return of("qwen3-0.6b") | long | of("qwen3-8b") | theirs | of("llama-3-8b") | of("qwen3-4b") | of("qwen3-1.7b")


def _end_to_end(
    name: str,
    notes: list[str],
    count: int,
    mean: float,
    longest: int,
    rows: int,
    modes: bool = False,
    theirs: bool = False,
) -> list[Row]:
    """modes: our others too; theirs: and transformers."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    decoder = random_decoder(name, device, dtype)
    lengths = response_lengths(count, mean, longest, seed=0)
    prompts = torch.randint(decoder.config.vocab_size, (count, _PROMPT), generator=torch.Generator().manual_seed(0))
    # For the rows at their mean length and room to grow: other engines and transformers hold theirs at the same time.
    pool = rows * (_PROMPT + mean + 256) * decoder.config.kv_elements_per_token * 2 / 2**30 if gpu else 0.25
    makes = {"ThinkSafe": partial(Engine, decoder, EngineConfig(rows, kv_cache_gib=pool))}
    if modes:
        config = EngineConfig(rows, kv_cache_gib=pool, batch_invariant=True)
        makes["ThinkSafe, batch-invariant"] = partial(Engine, decoder, config)
    if modes and gpu:  # which alone computes with e4m3
        small = EngineConfig(rows, kv_cache_gib=pool / 2, kv_cache_dtype="fp8")
        makes["ThinkSafe, cache in e4m3"] = partial(Engine, decoder, small)
        makes["ThinkSafe, weights and cache in e4m3"] = lambda: Engine(in_e4m3(decoder), small)
    engines: dict[str, Engine] = {}
    gaps: dict[str, float] = {}
    calls = itertools.count()

    def continuous(variant: str, lengths: list[int]) -> None:
        if variant not in engines:  # in the first call, where what fails is left out
            engines[variant] = makes[variant]()
        engine = engines[variant]
        engine.limit_seconds = 0.0
        # Other prompts in every call: an engine keeps their pages, and would read the same ones only once.
        fresh = ((prompts + next(calls)) % decoder.config.vocab_size).tolist()
        requests = (
            Request(str(i), tuple(prompt), SamplingConfig(max_tokens=length), i, ())
            for i, (prompt, length) in enumerate(zip(fresh, lengths, strict=True))
        )
        with _watched(engine.runner) as gap:
            for _ in engine.generate(requests):
                pass
        gaps[variant] = sum(gap)

    works = {variant: partial(continuous, variant) for variant in makes}
    held = ExitStack()
    if theirs:
        model = in_transformers(decoder, name)
        if gpu:
            config = GenerationConfig(**_SETTINGS, eos_token_id=-1)
            manager = partial(model.continuous_batching_context_manager, config, timeout=30)
            start = cache(lambda: held.enter_context(manager()))
            works["transformers, continuous batching"] = partial(_their_continuous, start, prompts.tolist())
        else:
            works["transformers generate, static batches"] = partial(_static, model, prompts, rows)
    short = [-(-length // _SHORTER) for length in lengths] if gpu else lengths
    measured = measure(
        {variant: partial(work, lengths) for variant, work in works.items()},
        1 if gpu else 3,
        notes,
        first={variant: partial(work, short) for variant, work in works.items()},
    )
    attempt("transformers, the end of continuous batching", held.close, notes)
    notes.append(
        f"{name}, random weights, {count} prompts of {_PROMPT} tokens, {sum(lengths):,} tokens forced, {rows} rows"
    )
    table = []
    for variant, taken in measured.items():
        row = {"model": name, "variant": variant, "seconds": taken.seconds, "tokens/s": sum(lengths) / taken.seconds}
        if variant in engines and engines[variant].hardware:
            row["share of the limit"] = engines[variant].limit_seconds / taken.seconds
        if gpu and variant in engines:
            row["host gap"] = gaps[variant] / taken.seconds
        table.append(row)
    if len(table) > 1:
        compare(table, "tokens/s")
    return table


@contextmanager
def _watched(runner: Runner) -> Iterator[list[float]]:
    """Gathers the seconds in which a GPU waits for the host: from a pass to the next, and while a decode pass is
    launched that finds it idle."""
    gaps: list[float] = []
    if runner.device.type == "cpu":
        yield gaps
        return
    draw, passes = runner.draw, []

    def watched(plan: StepPlan):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        idle = plan.is_decode and passes[-1][1].query()
        started = time.perf_counter()
        begin.record()
        results = draw(plan)
        end.record()
        passes.append((begin, end))
        if idle:
            gaps.append(time.perf_counter() - started)
        return results

    runner.draw = watched
    try:
        yield gaps
    finally:
        del runner.draw
    torch.cuda.synchronize()
    gaps += [one[1].elapsed_time(other[0]) / 1e3 for one, other in itertools.pairwise(passes)]


def _static(theirs: PreTrainedModel, prompts: Tensor, rows: int, lengths: list[int]) -> None:
    """Batches in order, each until its longest response is done."""
    for start in range(0, len(prompts), rows):
        batch, longest = prompts[start : start + rows], max(lengths[start : start + rows])
        forced = {"min_new_tokens": longest, "max_new_tokens": longest}
        with torch.inference_mode():
            theirs.generate(batch, attention_mask=torch.ones_like(batch), **_SETTINGS, **forced)


def _their_continuous(
    start: Callable[[], ContinuousBatchingManager], prompts: list[list[int]], lengths: list[int]
) -> None:
    """All requests at once to a manager that stays from call to call."""
    manager, call = start(), time.monotonic_ns()
    for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        manager.add_request(prompt, f"{call} {place}", max_new_tokens=length, eos_token_id=-1)
    for _ in prompts:
        result = manager.get_result(timeout=30)
        if result is None or result.error:
            raise RuntimeError(result.error if result else "no response for 30 s")
        found, wanted = len(result.generated_tokens), lengths[int(result.request_id.split()[1])]
        if found != wanted:
            raise RuntimeError(f"{found} tokens where {wanted} were asked for")


def _decode_pass(name: str, rows: int, context: int) -> list[Row]:
    """One shape's decode pass at so many rows of so much context, whole and in parts."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    decoder = random_decoder(name, device, dtype)
    config = decoder.config
    page_bytes = 64 * config.kv_elements_per_token * dtype.itemsize
    pages = rows * -(-(context + 4 * _DECODE_PASSES) // 64)
    engine = Engine(decoder, EngineConfig(rows, 16384, 64, pages * page_bytes / 2**30))
    prompt = tuple(range(context - _DECODE_PASSES - 1))
    # Other first tokens, or all rows would share their pages and read them out of the L2 cache.
    engine.scheduler.submit(
        Request(str(row), (row, *prompt[1:]), SamplingConfig(max_tokens=4 * _DECODE_PASSES), row, ())
        for row in range(rows)
    )
    runner, scheduler = engine.runner, engine.scheduler
    plan = scheduler.plan()
    for layer in range(config.num_layers):
        for pages in runner.cache.layer(layer)[:2]:
            pages.normal_()
    while not plan.is_decode:
        runner._join(plan)
        drawn = np.random.default_rng(0).integers(config.vocab_size, size=plan.completes.sum())
        runner.last_token[torch.from_numpy(plan.slots[plan.completes]).to(device)] = torch.from_numpy(drawn).to(device)
        scheduler.commit(plan, drawn, np.zeros(len(drawn), np.float32))
        plan = scheduler.plan()
    results = runner.draw(plan)  # records the graph

    def passes() -> None:
        nonlocal plan, results
        for _ in range(_DECODE_PASSES):
            following = scheduler.plan()
            coming = runner.draw(following)
            scheduler.commit(plan, *results.fetch())
            plan, results = following, coming

    passes()
    whole = seconds(passes) / _DECODE_PASSES
    slots = torch.arange(rows, device=device)
    positions = torch.full((rows,), context, device=device)
    inputs = torch.from_numpy(runner.decode_inputs(plan, rows)).to(device)
    q = torch.randn(rows, config.num_heads, config.head_dim, device=device, dtype=dtype)
    kv = torch.randn(rows, config.num_kv_heads, config.head_dim, device=device, dtype=dtype)
    attention = DecodeAttention(runner.cache, runner.page_table[slots], positions)
    rotation = Rotation(None, None, config.rms_norm_eps, *decoder.rotation(positions))
    hidden = torch.randn(rows, config.hidden_size, device=device, dtype=dtype)
    logits = matmul_fp32(hidden, decoder.head.T)
    columns = (runner.temperature[slots], runner.top_k[slots], runner.top_p[slots], runner.seed[slots], positions)

    def layers_of_attention() -> None:
        for layer in range(config.num_layers):
            attention(layer, q, kv, kv, rotation)

    taken = partial(_median_seconds, runner._graphs is not None)
    on_device = taken(partial(runner.decode, inputs))
    inputs_of = {
        name: torch.randn(rows, columns, device=device, dtype=dtype)
        for name, (_, columns, _) in config.projections.items()
    }

    def projections() -> None:
        for layer in decoder.layers:
            for names in PRODUCTS:
                layer.project_all(names, inputs_of[names[0]], runner.linear)

    parts = {
        "attention": taken(layers_of_attention),
        "GEMMs": taken(projections),
        "head": taken(lambda: matmul_fp32(hidden, decoder.head.T)),
        "sampling": taken(lambda: sample(logits, *columns)),
    }
    row = {"model": name, "variant": f"decode, {rows} rows of {context}", "tokens/s": rows / whole}
    if engine.hardware:
        row["share of the limit"] = pass_seconds(plan, config, engine.sizes, engine.hardware) / whole
    row |= {"pass ms": 1e3 * whole, "host gap": 1 - on_device / whole}
    row |= {f"{part} ms": 1e3 * alone for part, alone in parts.items()}
    row["rest ms"] = 1e3 * (on_device - sum(parts.values()))
    cache_bytes = rows * (context + 1) * config.kv_elements_per_token * dtype.itemsize
    return [row | {"attention TB/s": cache_bytes / parts["attention"] / 1e12}]


def _median_seconds(as_graph: bool, work: Callable[[], object]) -> float:
    """A call's time on the device, the median of three rounds of five calls: waiting for it after each would cost as
    much as the smallest part."""
    with torch.inference_mode():
        work = recorded(work) if as_graph else work

        def five() -> None:
            for _ in range(5):
                work()

        five()
        return statistics.median(seconds(five) / 5 for _ in range(3))
