"""Sampling: our engine against transformers, with static batches of `generate` or, on a GPU, its continuous batching.

All engines use the same weights, the same prompts and the same forced response lengths. A static batch runs until its
longest response ends, so with skewed lengths most of its rows are idle. Continuous batching fills a row as soon as it
is free. A separate row of the table shows the cost of the batch-invariant mode, and on a GPU more rows show the gain of
e4m3.

On a GPU, a whole run of every shape is compared with the limit of thinksafe/sampler/roofline.py. Prompts have 64
tokens. Responses have 442 tokens on average, as Qwen3-0.6B's refusals have, and at most 1,024. The host gap is the
share of time that the GPU waits for the host: between two passes, and while a decode pass is launched to an idle GPU.

Decode passes measure contexts of 1.5k tokens. They are scheduled, launched ahead and committed as in a run, but their
keys and values are random numbers, because reading the prompts first would take longer than all passes. The parts of a
decode pass are also timed alone, on a GPU as one CUDA graph each, and need not add up to the whole.
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

from benchmarks.harness import Row, Sections, add_speedups, as_cuda_graph, attempt, measure, time_call
from benchmarks.models import fp8_copy, random_decoder, transformers_copy
from benchmarks.shapes import response_lengths
from thinksafe.kernels.chunked_loss import matmul_fp32
from thinksafe.kernels.sampling import sample
from thinksafe.model.attention import Rotation
from thinksafe.model.config import PROJECTION_GROUPS
from thinksafe.model.projection import project
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.model_runner import DecodeAttention, ModelRunner
from thinksafe.sampler.request import Request
from thinksafe.sampler.roofline import roofline_seconds
from thinksafe.sampler.scheduler import ScheduledBatch

CLAIM = "Continuous batching gains the time that a static batch loses while it waits for its longest response."
_PROMPT = 64
_DECODE_PASSES = 20
_WARM_UP_DIVISOR = 16
"""Divisor of the lengths in a GPU's first call, which compiles kernels and captures a graph for every batch size."""
_GENERATION_SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "pad_token_id": 0}


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections that fit this machine's device.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    if not torch.cuda.is_available():
        size = {"count": 96, "mean": 80, "longest": 400, "rows": 32}
        return {
            "cpu-6m, end to end": partial(
                _measure_end_to_end, "cpu-6m", notes, **size, all_modes=True, with_transformers=True
            ),
            "cpu-6m, a decode pass": partial(_measure_decode_pass, "cpu-6m", rows=32, context=200),
        }
    rows = 256 if torch.cuda.get_device_properties(0).total_memory > 100 * 2**30 else 128
    size = {"count": 384, "mean": 442, "longest": 1024, "rows": rows}

    def model_sections(name: str) -> Sections:
        return {
            f"{name}, decode passes": partial(_measure_decode_pass, name, rows, 1500),
            f"{name}, end to end": partial(_measure_end_to_end, name, notes, **size, all_modes=name == "qwen3-0.6b"),
        }

    # At long contexts attention takes nearly all of the time; the goal for attention is stated for this shape.
    long_context_sections = {"qwen3-0.6b, decode passes at 4k": partial(_measure_decode_pass, "qwen3-0.6b", 128, 4096)}
    # Half the size, because transformers may need a minute; if it needs longer, only this section is lost.
    half_size = {"count": 192, "mean": 221, "longest": 512, "rows": rows}
    transformers_sections = {
        "qwen3-0.6b, transformers": partial(
            _measure_end_to_end, "qwen3-0.6b", notes, **half_size, with_transformers=True
        )
    }
    return (
        model_sections("qwen3-0.6b")
        | long_context_sections
        | model_sections("qwen3-8b")
        | transformers_sections
        | model_sections("llama-3-8b")
        | model_sections("qwen3-4b")
        | model_sections("qwen3-1.7b")
    )


def _measure_end_to_end(
    name: str,
    notes: list[str],
    count: int,
    mean: float,
    longest: int,
    rows: int,
    all_modes: bool = False,
    with_transformers: bool = False,
) -> list[Row]:
    """Return the tokens per second of whole runs: one row per variant that did not fail.

    Args:
        name: key of MODELS.
        notes: gets sizes and failures.
        count: number of prompts.
        mean, longest: mean and largest number of response tokens, see `response_lengths`.
        rows: sequences that an engine runs at the same time; rows of a static batch.
        all_modes: measure the batch-invariant mode and, on a GPU, e4m3 too.
        with_transformers: measure transformers too.
    """
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    decoder = random_decoder(name, device, dtype)
    lengths = response_lengths(count, mean, longest, seed=0)
    prompts = torch.randint(decoder.config.vocab_size, (count, _PROMPT), generator=torch.Generator().manual_seed(0))
    # Enough for all rows at their mean length and some growth: all engines hold their caches at the same time.
    kv_cache_gib = rows * (_PROMPT + mean + 256) * decoder.config.kv_elements_per_token * 2 / 2**30 if has_gpu else 0.25
    engine_factories = {"ThinkSafe": partial(Engine, decoder, EngineConfig(rows, kv_cache_gib=kv_cache_gib))}
    if all_modes:
        config = EngineConfig(rows, kv_cache_gib=kv_cache_gib, batch_invariant=True)
        engine_factories["ThinkSafe, batch-invariant"] = partial(Engine, decoder, config)
    if all_modes and has_gpu:  # only a GPU computes in e4m3
        fp8_cache_config = EngineConfig(rows, kv_cache_gib=kv_cache_gib / 2, kv_cache_dtype="fp8")
        engine_factories["ThinkSafe, cache in e4m3"] = partial(Engine, decoder, fp8_cache_config)
        engine_factories["ThinkSafe, weights and cache in e4m3"] = lambda: Engine(fp8_copy(decoder), fp8_cache_config)
    engines: dict[str, Engine] = {}
    host_gaps: dict[str, float] = {}
    call_numbers = itertools.count()

    def run_engine(variant: str, lengths: list[int]) -> None:
        if variant not in engines:  # in the first call, because a variant that fails there is left out
            engines[variant] = engine_factories[variant]()
        engine = engines[variant]
        engine.roofline_seconds = 0.0
        # Every call has other prompts, because an engine keeps their pages and would not compute equal prompts again.
        call_prompts = ((prompts + next(call_numbers)) % decoder.config.vocab_size).tolist()
        requests = (
            Request(str(i), tuple(prompt), SamplingConfig(max_tokens=length), i, ())
            for i, (prompt, length) in enumerate(zip(call_prompts, lengths, strict=True))
        )
        with _record_gaps(engine.runner) as call_gaps:
            for _ in engine.generate(requests):
                pass
        host_gaps[variant] = sum(call_gaps)

    runs = {variant: partial(run_engine, variant) for variant in engine_factories}
    open_managers = ExitStack()
    if with_transformers:
        model = transformers_copy(decoder, name)
        if has_gpu:
            config = GenerationConfig(**_GENERATION_SETTINGS, eos_token_id=-1)
            manager = partial(model.continuous_batching_context_manager, config, timeout=30)
            start_manager = cache(lambda: open_managers.enter_context(manager()))
            runs["transformers, continuous batching"] = partial(
                _run_continuous_batching, start_manager, prompts.tolist()
            )
        else:
            runs["transformers generate, static batches"] = partial(_run_static_batches, model, prompts, rows)
    warm_up_lengths = [-(-length // _WARM_UP_DIVISOR) for length in lengths] if has_gpu else lengths
    measurements = measure(
        {variant: partial(run, lengths) for variant, run in runs.items()},
        1 if has_gpu else 3,
        notes,
        warm_up_calls={variant: partial(run, warm_up_lengths) for variant, run in runs.items()},
    )
    attempt("transformers, the end of continuous batching", open_managers.close, notes)
    notes.append(
        f"{name}, random weights, {count} prompts of {_PROMPT} tokens, {sum(lengths):,} tokens forced, {rows} rows"
    )
    table = []
    for variant, measurement in measurements.items():
        row = {
            "model": name,
            "variant": variant,
            "seconds": measurement.seconds,
            "tokens/s": sum(lengths) / measurement.seconds,
        }
        if variant in engines and engines[variant].hardware:
            row["share of the limit"] = engines[variant].roofline_seconds / measurement.seconds
        if has_gpu and variant in engines:
            row["host gap"] = host_gaps[variant] / measurement.seconds
        table.append(row)
    if len(table) > 1:
        add_speedups(table, "tokens/s")
    return table


@contextmanager
def _record_gaps(runner: ModelRunner) -> Iterator[list[float]]:
    """Yield a list that holds, after the `with` block, the seconds of each gap in which the GPU waited for the host.

    Gaps lie between two passes, and while a decode pass is launched to an idle GPU. On a CPU the list stays empty.

    Args:
        runner: its `forward` is replaced within the block.
    """
    gaps: list[float] = []
    if runner.device.type == "cpu":
        yield gaps
        return
    forward, pass_events = runner.forward, []

    def timed_forward(batch: ScheduledBatch):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        is_idle = batch.is_decode and pass_events[-1][1].query()
        start = time.perf_counter()
        start_event.record()
        results = forward(batch)
        end_event.record()
        pass_events.append((start_event, end_event))
        if is_idle:
            gaps.append(time.perf_counter() - start)
        return results

    runner.forward = timed_forward
    try:
        yield gaps
    finally:
        del runner.forward
    torch.cuda.synchronize()
    gaps += [previous[1].elapsed_time(following[0]) / 1e3 for previous, following in itertools.pairwise(pass_events)]


def _run_static_batches(model: PreTrainedModel, prompts: Tensor, rows: int, lengths: list[int]) -> None:
    """Generate responses with transformers in batches, in order, each until its longest response ends.

    Args:
        prompts: [N, prompt tokens] token ids.
        rows: prompts in a batch.
        lengths: number of response tokens of each prompt.
    """
    for start in range(0, len(prompts), rows):
        batch, longest = prompts[start : start + rows], max(lengths[start : start + rows])
        forced = {"min_new_tokens": longest, "max_new_tokens": longest}
        with torch.inference_mode():
            model.generate(batch, attention_mask=torch.ones_like(batch), **_GENERATION_SETTINGS, **forced)


def _run_continuous_batching(
    start_manager: Callable[[], ContinuousBatchingManager], prompts: list[list[int]], lengths: list[int]
) -> None:
    """Send all requests at once to transformers' continuous batching, and wait for all results.

    Args:
        start_manager: returns the manager, the same at every call; the first call starts it.
        prompts: token ids of each prompt.
        lengths: number of response tokens of each prompt.

    Raises:
        RuntimeError: a response failed or has another length, or no response arrived for 30 seconds.
    """
    manager, call_id = start_manager(), time.monotonic_ns()
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        manager.add_request(prompt, f"{call_id} {index}", max_new_tokens=length, eos_token_id=-1)
    for _ in prompts:
        result = manager.get_result(timeout=30)
        if result is None or result.error:
            raise RuntimeError(result.error if result else "no response for 30 s")
        num_tokens, expected_tokens = len(result.generated_tokens), lengths[int(result.request_id.split()[1])]
        if num_tokens != expected_tokens:
            raise RuntimeError(f"{num_tokens} tokens instead of {expected_tokens}")


def _measure_decode_pass(name: str, rows: int, context: int) -> list[Row]:
    """Return one row with the time of a decode pass, as a whole and in parts.

    Args:
        name: key of MODELS.
        rows: sequences of the pass.
        context: tokens of each sequence.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    decoder = random_decoder(name, device, dtype)
    config = decoder.config
    page_bytes = 64 * config.kv_elements_per_token * dtype.itemsize
    pages = rows * -(-(context + 4 * _DECODE_PASSES) // 64)
    engine = Engine(decoder, EngineConfig(rows, 16384, 64, pages * page_bytes / 2**30))
    prompt = tuple(range(context - _DECODE_PASSES - 1))
    # Rows differ in their first token, or they would share all pages and read them from the L2 cache.
    engine.scheduler.submit(
        Request(str(row), (row, *prompt[1:]), SamplingConfig(max_tokens=4 * _DECODE_PASSES), row, ())
        for row in range(rows)
    )
    runner, scheduler = engine.runner, engine.scheduler
    batch = scheduler.schedule()
    for layer in range(config.num_layers):
        for pages in runner.cache.layer(layer)[:2]:
            pages.normal_()
    while not batch.is_decode:
        runner._upload_new_requests(batch)
        random_ids = np.random.default_rng(0).integers(config.vocab_size, size=batch.needs_logits.sum())
        slots = torch.from_numpy(batch.slots[batch.needs_logits]).to(device)
        runner.last_token[slots] = torch.from_numpy(random_ids).to(device)
        scheduler.commit(batch, random_ids, np.zeros(len(random_ids), np.float32))
        batch = scheduler.schedule()
    results = runner.forward(batch)  # captures the graph

    def run_passes() -> None:
        nonlocal batch, results
        for _ in range(_DECODE_PASSES):
            next_batch = scheduler.schedule()
            next_results = runner.forward(next_batch)
            scheduler.commit(batch, *results.wait())
            batch, results = next_batch, next_results

    run_passes()
    seconds_per_pass = time_call(run_passes) / _DECODE_PASSES
    slots = torch.arange(rows, device=device)
    positions = torch.full((rows,), context, device=device)
    inputs = torch.from_numpy(runner.decode_inputs(batch, rows)).to(device)
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

    device_seconds = partial(_median_seconds, runner._graphs is not None)
    decode_seconds = device_seconds(partial(runner.decode, inputs))
    projection_inputs = {
        name: torch.randn(rows, columns, device=device, dtype=dtype)
        for name, (_, columns, _) in config.projections.items()
    }

    def projections() -> None:
        for layer in decoder.layers:
            for names, group in zip(PROJECTION_GROUPS, layer.projection_groups, strict=True):
                project(group, projection_inputs[names[0]], runner.linear)

    parts = {
        "attention": device_seconds(layers_of_attention),
        "GEMMs": device_seconds(projections),
        "head": device_seconds(lambda: matmul_fp32(hidden, decoder.head.T)),
        "sampling": device_seconds(lambda: sample(logits, *columns)),
    }
    row = {"model": name, "variant": f"decode, {rows} rows of {context}", "tokens/s": rows / seconds_per_pass}
    if engine.hardware:
        row["share of the limit"] = (
            roofline_seconds(batch, config, engine.byte_counts, engine.hardware) / seconds_per_pass
        )
    row |= {"pass ms": 1e3 * seconds_per_pass, "host gap": 1 - decode_seconds / seconds_per_pass}
    row |= {f"{part} ms": 1e3 * part_seconds for part, part_seconds in parts.items()}
    row["rest ms"] = 1e3 * (decode_seconds - sum(parts.values()))
    cache_bytes = rows * (context + 1) * config.kv_elements_per_token * dtype.itemsize
    return [row | {"attention TB/s": cache_bytes / parts["attention"] / 1e12}]


def _median_seconds(as_graph: bool, call: Callable[[], object]) -> float:
    """Return the seconds of one call: the median of three rounds of five calls, divided by five.

    Waiting for the device after each call would cost as much as the smallest part.

    Args:
        as_graph: time the call as a CUDA graph.
    """
    with torch.inference_mode():
        call = as_cuda_graph(call) if as_graph else call

        def run_five_times() -> None:
            for _ in range(5):
                call()

        run_five_times()
        return statistics.median(time_call(run_five_times) / 5 for _ in range(3))
