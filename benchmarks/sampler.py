"""Sampling: our engine against transformers' `generate` with static batches and its continuous batching.

Same weights, same prompts, lengths drawn once and forced on all sides. A static batch runs until its longest response
is done, so with skewed lengths most of its rows idle; continuous batching fills a row as soon as it is free. What the
batch-invariant mode costs has a row of its own, and on a GPU what e4m3 gains.

On a GPU every shape's decode pass is also taken apart, at a fixed number of rows and context, and set against the
limit of thinksafe/sampler/limits.py. Parts are timed alone, so that they need not add up to the whole.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.harness import Result, interleaved, seconds
from benchmarks.shapes import MODELS, response_lengths
from thinksafe.kernels.chunked_loss import matmul_fp32
from thinksafe.kernels.sampling import sample
from thinksafe.model.attention import Rotation
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import PRODUCTS, Decoder
from thinksafe.model.weights import hugging_face_name, load_decoder, save_decoder
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.limits import pass_seconds
from thinksafe.sampler.request import Request, SamplingConfig
from thinksafe.sampler.runner import DecodeAttention, bucket

_PROMPT = 64
_DECODE_PASSES = 20


def run() -> Result:
    """Measure on whatever device there is."""
    if not torch.cuda.is_available():
        table, notes = _end_to_end("cpu-6m", count=96, mean=80, longest=400, rows=32)
        table.append(_decode_pass("cpu-6m", rows=32, context=200, device="cpu"))
    else:
        table, notes = _end_to_end("qwen3-0.6b", count=512, mean=442, longest=2048, rows=256)
        for shape in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama-3-8b"):
            torch.cuda.empty_cache()
            table.append(_decode_pass(shape, rows=256, context=1500, device="cuda"))
        torch.cuda.empty_cache()
        # Long contexts, where attention is nearly all: the shape that its target is stated for.
        table.append(_decode_pass("qwen3-0.6b", rows=128, context=4096, device="cuda"))
    claim = "Continuous batching wins what static batches lose to their longest response."
    return Result("sampler", claim, table, notes)


def _end_to_end(name: str, count: int, mean: float, longest: int, rows: int) -> tuple[list[dict], list[str]]:
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    ours, theirs = _models(name, device, dtype)
    lengths = response_lengths(count, mean, longest, seed=0)
    prompts = torch.randint(0, ours.config.vocab_size, (count, _PROMPT), generator=torch.Generator().manual_seed(0))
    requests = [
        Request(str(i), tuple(prompt), SamplingConfig(max_tokens=length), i, ())
        for i, (prompt, length) in enumerate(zip(prompts.tolist(), lengths, strict=True))
    ]
    # A part of the memory each: transformers' engine wants a pool of its own beside.
    pool = 15.0 if gpu else 0.25
    engines = {"ThinkSafe": Engine(ours, EngineConfig(rows, kv_cache_gib=pool))}
    engines["ThinkSafe, batch-invariant"] = Engine(ours, EngineConfig(rows, kv_cache_gib=pool, batch_invariant=True))
    if gpu:  # which alone computes with e4m3
        with TemporaryDirectory() as folder:
            save_decoder(ours, MODELS[name], Path(folder))
            frozen = load_decoder(Path(folder), dtype, device, weights="fp8")
        for variant, decoder in (("cache in e4m3", ours), ("weights and cache in e4m3", frozen)):
            config = EngineConfig(rows, kv_cache_gib=pool / 2, kv_cache_dtype="fp8")
            engines[f"ThinkSafe, {variant}"] = Engine(decoder, config)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "pad_token_id": 0}

    def continuous(engine: Engine) -> None:
        engine.limit_seconds = 0.0
        for _ in engine.generate(requests):
            pass

    def static() -> None:
        for start in range(0, count, rows):
            batch = prompts[start : start + rows].to(device)
            longest_here = max(lengths[start : start + rows])
            forced = {"min_new_tokens": longest_here, "max_new_tokens": longest_here}
            with torch.inference_mode():
                theirs.generate(batch, attention_mask=torch.ones_like(batch), **settings, **forced)

    def their_continuous() -> None:
        config = GenerationConfig(**settings, eos_token_id=-1)
        with torch.inference_mode(), theirs.continuous_batching_context_manager(generation_config=config) as manager:
            for request in requests:
                limit = request.sampling.max_tokens
                manager.add_request(list(request.prompt), request.id, max_new_tokens=limit, eos_token_id=-1)
            for _ in requests:
                result = manager.get_result(timeout=60)
                wanted = lengths[int(result.request_id)]
                if len(result.generated_tokens) != wanted:
                    raise RuntimeError(f"{len(result.generated_tokens)} tokens where {wanted} were asked for")

    variants = {variant: partial(continuous, engine) for variant, engine in engines.items()}
    variants["transformers generate, static batches"] = static
    notes = [
        f"{name}, random weights, {count} prompts of {_PROMPT} tokens, {sum(lengths):,} tokens forced, {rows} rows"
    ]
    if gpu:  # its attention over pages is made for one
        try:
            their_continuous()
            variants["transformers continuous batching"] = their_continuous
        except Exception as error:  # a peer's failure is a finding, not ours
            notes.append(f"transformers continuous batching failed: {type(error).__name__}: {str(error)[:200]}")
    table = []
    for variant, times in interleaved(variants, rounds=2 if gpu else 3).items():
        median = statistics.median(times)
        row = {"model": name, "variant": variant, "seconds": median, "tokens/s": sum(lengths) / median}
        if variant in engines and engines[variant].hardware:
            row["share of the limit"] = engines[variant].limit_seconds / times[-1]
        table.append(row)
    for row in table:
        row["ThinkSafe is faster by"] = table[0]["tokens/s"] / row["tokens/s"]
    return table, notes


def _decode_pass(name: str, rows: int, context: int, device: str) -> dict:
    """One shape's decode pass at so many rows of so much context, whole and in parts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
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
    while not plan.is_decode:
        scheduler.commit(plan, *runner.draw(plan).fetch())
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

    graph = runner._graphs[bucket(rows)].graph.replay if runner._graphs else None
    on_device = _median_seconds(graph or (lambda: runner.decode(inputs)))
    inputs_of = {
        name: torch.randn(rows, columns, device=device, dtype=dtype)
        for name, (_, columns, _) in config.projections.items()
    }

    def projections() -> None:
        for layer in decoder.layers:
            for names in PRODUCTS:
                layer.project_all(names, inputs_of[names[0]], runner.linear)

    parts = {
        "attention": _median_seconds(layers_of_attention),
        "GEMMs": _median_seconds(projections),
        "head": _median_seconds(lambda: matmul_fp32(hidden, decoder.head.T)),
        "sampling": _median_seconds(lambda: sample(logits, *columns)),
    }
    row = {"model": name, "variant": f"decode, {rows} rows of {context}", "tokens/s": rows / whole}
    if engine.hardware:
        row["share of the limit"] = pass_seconds(plan, config, engine.sizes, engine.hardware) / whole
    row |= {"pass ms": 1e3 * whole, "host gap": 1 - on_device / whole}
    row |= {f"{part} ms": 1e3 * taken for part, taken in parts.items()}
    row["rest ms"] = 1e3 * (on_device - sum(parts.values()))
    cache_bytes = rows * (context + 1) * config.kv_elements_per_token * dtype.itemsize
    return row | {"attention TB/s": cache_bytes / parts["attention"] / 1e12}


def _median_seconds(work: Callable[[], object]) -> float:
    """A call's time, the median of three rounds of five calls: waiting for the device after each would cost as much as
    the smallest part."""

    def five() -> None:
        for _ in range(5):
            work()

    with torch.inference_mode():
        five()
        return statistics.median(seconds(five) / 5 for _ in range(3))


def random_decoder(name: str, device: str, dtype: torch.dtype) -> Decoder:
    """A model of this shape with random weights."""
    decoder = Decoder(ModelConfig.from_hugging_face(MODELS[name], name)).to(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            if "norm" in parameter_name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    decoder.stack()
    return decoder.requires_grad_(False).eval()


def _models(name: str, device: str, dtype: torch.dtype):
    """The same random weights in our decoder and in transformers."""
    raw, decoder = MODELS[name], random_decoder(name, device, dtype)
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **settings), dtype=dtype)
    state = {hugging_face_name(parameter): tensor for parameter, tensor in decoder.named_parameters()}
    reference.load_state_dict(state, strict=False)
    reference.tie_weights()
    return decoder, reference.to(device).eval()
