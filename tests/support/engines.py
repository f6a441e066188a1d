"""Engines over tiny checkpoints, and requests for them."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.checkpoints import make_checkpoint
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.request import Completion, Request

GREEDY = SamplingConfig(temperature=0, max_tokens=24)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=24)
STOP_IDS = (7, 210, 333)


@cache
def models(family: str) -> tuple[Decoder, PreTrainedModel]:
    """Return ThinkSafe's decoder and transformers' model of one checkpoint, in fp32. Each family is loaded once."""
    with TemporaryDirectory() as folder:
        folder = make_checkpoint(family, Path(folder), seed=11)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return load_decoder(folder, torch.float32, "cpu"), reference


def pool_of(decoder: Decoder, num_pages: int, page_size: int, cache="auto") -> float:
    """Return the size in GiB of a page pool with `num_pages` pages of `page_size` tokens.

    Args:
        cache: the engine's `kv_cache_dtype`.
    """
    cache_format = CacheFormat.of(decoder.config, decoder.embedding.dtype, cache)
    return num_pages * page_size * cache_format.bytes_per_token(decoder.config) / 2**30


def engine_of(
    decoder: Decoder, *, page_size=16, num_pages=None, max_num_seqs=16, max_prefill_tokens=256, **settings
) -> Engine:
    """Return an engine over a decoder.

    Args:
        num_pages: number of pages in the pool; None for the pages of 2,048 tokens.
        settings: further fields of EngineConfig.
    """
    cache = settings.get("kv_cache_dtype", "auto")
    gib = pool_of(decoder, num_pages or -(-2048 // page_size), page_size, cache)
    return Engine(decoder, EngineConfig(max_num_seqs, max_prefill_tokens, page_size, gib, **settings))


def answers(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    """Return the completions by request id; check that every request is answered once and every page is free again."""
    completions = list(engine.generate(requests))
    assert sorted(c.request_id for c in completions) == sorted(r.id for r in requests)
    scheduler = engine.scheduler
    assert (scheduler.pool.ref_count == 0).all()
    assert scheduler.pool.num_available == len(scheduler.pool.ref_count)
    assert not scheduler.has_work
    return {completion.request_id: completion for completion in completions}


def scores_of(engine: Engine, prompts, token_ids) -> dict[str, np.ndarray]:
    """Return log-probabilities by request id; check that every prompt is scored once and every page is free again.

    Args:
        prompts: pairs (id, token ids).
        token_ids: token ids whose log-probabilities after each prompt are returned.
    """
    scores = list(engine.score(prompts, token_ids))
    assert sorted(score.request_id for score in scores) == sorted(id_ for id_, _ in prompts)
    assert (engine.scheduler.pool.ref_count == 0).all()
    return {score.request_id: score.logprobs for score in scores}


def random_prompts(lengths, seed: int, prefix=()) -> list[tuple[int, ...]]:
    """Return a prompt for each length: `prefix`, then that number of random token ids below 380."""
    generator = torch.Generator().manual_seed(seed)
    return [(*prefix, *torch.randint(0, 380, (n,), generator=generator).tolist()) for n in lengths]


def make_requests(prompts, sampling=GREEDY, stop_ids=STOP_IDS) -> list[Request]:
    """Return a request for each prompt, with ids r0, r1, ... and seeds 1000, 1001, ..."""
    return [Request(f"r{i}", prompt, sampling, 1000 + i, stop_ids) for i, prompt in enumerate(prompts)]


SHARED = random_prompts([21], seed=5)[0]
PROMPTS = [
    *random_prompts([1, 2, 3, 16, 17, 40, 64], seed=6),
    *random_prompts([1, 11, 30], seed=7, prefix=SHARED),
    *[SHARED] * 3,
]
