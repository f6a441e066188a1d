"""Sampling: our continuous batching against transformers' `generate` with static batches, same model, same lengths.

A static batch runs until its longest response is done, so with skewed lengths most of its rows idle; continuous
batching fills a row as soon as it is free. Lengths are drawn once and forced on both sides. The bandwidth limit that
the table shows on a GPU is the reading of weights and of every cached key and value once a step.
"""

import statistics

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import Result, interleaved
from benchmarks.shapes import MODELS, response_lengths
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import hugging_face_name
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Request, SamplingConfig

_PROMPT = 64


def run() -> Result:
    """Measure on whatever device there is."""
    gpu = torch.cuda.is_available()
    name, count, mean, longest, rows = ("qwen3-0.6b", 512, 442, 2048, 256) if gpu else ("cpu-6m", 96, 80, 400, 32)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    ours, theirs = _models(name, device, dtype)
    lengths = response_lengths(count, mean, longest, seed=0)
    prompts = torch.randint(0, ours.config.vocab_size, (count, _PROMPT), generator=torch.Generator().manual_seed(0))
    requests = [
        Request(str(i), tuple(prompt), SamplingConfig(max_tokens=length), i, ())
        for i, (prompt, length) in enumerate(zip(prompts.tolist(), lengths, strict=True))
    ]
    config = EngineConfig(max_running=rows)

    def continuous() -> None:
        for _ in Engine(ours, config).generate(requests):
            pass

    def static() -> None:
        for start in range(0, count, rows):
            batch = prompts[start : start + rows].to(device)
            longest_here = max(lengths[start : start + rows])
            with torch.inference_mode():
                theirs.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    do_sample=True,
                    temperature=0.6,
                    top_p=0.95,
                    top_k=20,
                    min_new_tokens=longest_here,
                    max_new_tokens=longest_here,
                    pad_token_id=0,
                )

    times = interleaved({"ThinkSafe": continuous, "transformers generate, static batches": static}, rounds=3)
    tokens = sum(lengths)
    table = []
    for variant, taken in times.items():
        median = statistics.median(taken)
        table.append({"variant": variant, "seconds": median, "tokens/s": tokens / median})
    fastest = table[0]["tokens/s"]
    for row in table:
        row["ThinkSafe is faster by"] = fastest / row["tokens/s"]
    if gpu:
        table[0]["share of the bandwidth limit"] = table[0]["tokens/s"] / _limit(ours, lengths, rows)
    return Result(
        "sampler",
        "Continuous batching wins what static batches lose to their longest response.",
        table,
        [f"{name}, random weights, {count} prompts of {_PROMPT} tokens, {tokens:,} tokens forced, {rows} rows"],
    )


def _models(name: str, device: str, dtype: torch.dtype):
    """The same random weights in our decoder and in transformers."""
    raw = MODELS[name]
    decoder = Decoder(ModelConfig.from_hugging_face(raw, name))
    decoder.initialise(seed=0)
    decoder = decoder.to(device, dtype).requires_grad_(False).eval()
    settings = {key: value for key, value in raw.items() if key != "model_type"}
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **settings), dtype=dtype)
    state = {hugging_face_name(parameter): tensor for parameter, tensor in decoder.named_parameters()}
    reference.load_state_dict(state, strict=False)
    reference.tie_weights()
    return decoder, reference.to(device).eval()


def _limit(decoder: Decoder, lengths: list[int], rows: int, bytes_per_second: float = 4.3e12) -> float:
    """Tokens/s if a step did nothing but read the weights and each row's cache once."""
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    mean_context = _PROMPT + sum(length**2 for length in lengths) / (2 * sum(lengths))
    cache = rows * mean_context * decoder.config.kv_elements_per_token * decoder.embedding.dtype.itemsize
    return rows * bytes_per_second / (weights + cache)
