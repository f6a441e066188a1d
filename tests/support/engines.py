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
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.request import Completion, Request, SamplingConfig

GREEDY = SamplingConfig(temperature=0, max_tokens=24)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=24)
STOP_IDS = (7, 210, 333)


@cache
def models(family: str) -> tuple[Decoder, PreTrainedModel]:
    """(our decoder, theirs), loaded once, fp32."""
    with TemporaryDirectory() as folder:
        folder = make_checkpoint(family, Path(folder), seed=11)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return load_decoder(folder, torch.float32, "cpu"), theirs


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


SHARED = random_prompts([21], seed=5)[0]
PROMPTS = [
    *random_prompts([1, 2, 3, 16, 17, 40, 64], seed=6),
    *random_prompts([1, 11, 30], seed=7, prefix=SHARED),
    *[SHARED] * 3,
]
