"""Continuous batching, whole: plan, compute, draw, commit, until every request is answered.

engine = Engine(decoder, EngineConfig())
for completion in engine.generate(requests): ...

On a GPU the next pass is planned and launched while the last one still runs, and its results are fetched one pass
late, so that neither waits for the other. On a CPU the two are one processor, and nothing is gained by running ahead.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from thinksafe.errors import UserError
from thinksafe.hardware import hardware_of
from thinksafe.kernels.fp8 import supported
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import WeightDtype
from thinksafe.sampler.batch_invariance import prove_row_invariance
from thinksafe.sampler.kv_cache import CacheDtype, CacheFormat
from thinksafe.sampler.model_runner import Results, Runner
from thinksafe.sampler.request import Completion, Request, SamplingConfig, Scores
from thinksafe.sampler.roofline import Sizes, pass_seconds
from thinksafe.sampler.scheduler import Scheduler, StepPlan

_QUEUED = 64
"""Requests that wait in line: enough to fill a pass over prompts, few enough to leave other workers their share."""


@dataclass(frozen=True)
class EngineConfig:
    """How much runs at once.

    Attributes:
        max_running: sequences in a step.
        max_step_tokens: tokens of prompts in a pass; longer prompts are read in chunks.
        page_size: tokens a cache page; prefixes are shared in whole pages. 0 takes 64 on a GPU, where a page of one
            head is a tile of the kernels, and 16 on a CPU.
        kv_cache_gib: size of the page pool; 0 takes 85% of a GPU's free memory, or 1 GiB of a CPU's.
        kv_cache_dtype: `fp8` keeps keys and values in e4m3, half the bytes; `auto` in the model's dtype. Keys of models
            with biases on q, k and v (Qwen2, R1-Distill-Qwen) stay in it either way.
        tensor_parallel: GPUs that hold the model together, where one has no room for it; as many workers are one.
        weights: `fp8` keeps the layers' projections in e4m3, quantised when they are loaded, and multiplies in it: half
            the bytes and twice the rate; `auto` in the model's dtype. Training never uses it.
        batch_invariant: a response has the same tokens and log-probabilities, bit for bit, whatever else is in the
            batch, in which order and on how many workers of one kind of device; each `tensor_parallel` has its own
            last digits. Looked at before anything is answered; products take longer.
    """

    __pydantic_config__ = {"extra": "forbid"}

    max_running: int = 256
    max_step_tokens: int = 8192
    page_size: int = 0
    kv_cache_gib: float = 0.0
    kv_cache_dtype: CacheDtype = "auto"
    tensor_parallel: int = 1
    weights: WeightDtype = "auto"
    batch_invariant: bool = False

    def __post_init__(self):
        for name in ("max_running", "max_step_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("page_size", "kv_cache_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")


OF_MEMORY = ("max_running", "max_step_tokens", "kv_cache_gib", "tensor_parallel")
"""Settings that change what fits and how it is held, and nothing of a response but the last digits of its
log-probabilities: they may change in the middle of a run, but for `tensor_parallel` in batch-invariant mode."""


class Engine:
    """A decoder ready to answer requests. Create it when it is needed: the page pool is allocated at once.

    Attributes:
        hardware: what the device can do, or None where that is not known.
        sizes: what a pass reads; None likewise.
        limit_seconds: the least time that all passes so far could have taken on it.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig, most_at_once: int | None = None):
        """most_at_once: requests that run or wait in line here; what more there is, other workers may take."""
        device, dtype = decoder.embedding.device, decoder.embedding.dtype
        page_size = config.page_size or (64 if device.type == "cuda" else 16)
        if config.kv_cache_dtype == "fp8" and not supported(device):
            raise UserError("sampler.kv_cache_dtype: fp8 needs a GPU of compute capability 8.9 or more; use auto")
        cache_format = CacheFormat.of(decoder.config, dtype, config.kv_cache_dtype)
        page_bytes = cache_format.bytes_per_token(decoder.config) * page_size
        # More than every slot at full context could never be used.
        most = config.max_running * -(-decoder.config.max_seq_len // page_size)
        num_pages = decoder.shard.least(min(_cache_bytes(config, device) // page_bytes, most), device)
        if num_pages * page_size < 2:
            raise UserError("sampler.kv_cache_gib: too little memory for even one page of the cache; give more")
        self.scheduler = Scheduler(
            config.max_running,
            num_pages,
            page_size,
            decoder.config.max_seq_len,
            config.max_step_tokens,
            replay=config.batch_invariant,
        )
        self.runner = Runner(decoder, self.scheduler, cache_format, config.batch_invariant)
        if config.batch_invariant:
            prove_row_invariance(self.runner, config.max_step_tokens)
        self.most_at_once = most_at_once or config.max_running + _QUEUED
        self.hardware, self.limit_seconds = hardware_of(device), 0.0
        self.sizes = Sizes.of(decoder, cache_format) if self.hardware else None
        self.passes_ahead = 1 if device.type == "cuda" else 0

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that still leaves room for one response token."""
        return self.scheduler.max_seq_len - 1

    @property
    def cache_is_shorter(self) -> bool:
        """Whether all pages together hold less than the model's context."""
        return self.scheduler.max_seq_len < self.runner.decoder.config.max_seq_len

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, each yielded as soon as it is finished, in no particular order.

        They are taken when there is room for them, a few ahead, so that several engines can share one source.

        Raises:
            ValueError: a request that can never fit, holds a token that the model has not, or has the id of another,
                when its turn comes. Other requests under way are dropped, as they are where the caller stops early.
            RuntimeError: another call has not come to its end.
        """
        for plan, results in self._run(requests, self.runner.draw):
            yield from self.scheduler.commit(plan, *results)

    def score(self, prompts: Iterable[tuple[str, tuple[int, ...]]], token_ids: Sequence[int]) -> Iterator[Scores]:
        """Log-probabilities of `token_ids` as the next token after each (id, prompt), in no particular order."""
        only_prompt = SamplingConfig(temperature=0, max_tokens=1)
        requests = (Request(id_, prompt, only_prompt, 0, ()) for id_, prompt in prompts)
        columns = torch.tensor(token_ids, device=self.runner.device)
        for plan, (logprobs,) in self._run(requests, lambda plan: self.runner.score(plan, columns)):
            for row, request in self.scheduler.commit_scored(plan, np.isnan(logprobs).any(-1)):
                yield Scores(request.id, logprobs[row])

    def _run(
        self, requests: Iterable[Request], launch: Callable[[StepPlan], Results]
    ) -> Iterator[tuple[StepPlan, list[np.ndarray]]]:
        """Every pass with its results, in order, until no work is left; each must be committed before the next."""
        if self.scheduler.has_work:
            raise RuntimeError("the engine is still answering another call; read that to its end, or close it, first")
        scheduler, in_flight, to_come = self.scheduler, deque[tuple[StepPlan, Results]](), self._checked(requests)
        try:
            while True:
                waiting, running = len(scheduler.waiting), len(scheduler.running)
                scheduler.submit(islice(to_come, max(0, min(_QUEUED - waiting, self.most_at_once - waiting - running))))
                if not scheduler.has_work and not in_flight:
                    return
                plan = scheduler.plan()
                if plan is not None:
                    in_flight.append((plan, launch(plan)))
                    self._count_limit(plan)
                if plan is None or len(in_flight) > self.passes_ahead:
                    plan, results = in_flight.popleft()
                    yield plan, results.fetch()
        finally:  # whoever stops early, or fails, leaves nothing to the next call
            scheduler.abandon()

    def _checked(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests of a call: no id twice, and no token that the model has not, after which a GPU is lost to the
        whole process."""
        vocab_size, ids = self.runner.decoder.config.vocab_size, set()
        for request in requests:
            if request.id in ids:
                raise ValueError(f"request {request.id}: another request of this call has the same id")
            if request.prompt and not (min(request.prompt) >= 0 and max(request.prompt) < vocab_size):
                raise ValueError(f"request {request.id}: the prompt holds a token id outside [0, {vocab_size})")
            ids.add(request.id)
            yield request

    def _count_limit(self, plan: StepPlan) -> None:
        if self.hardware:
            self.limit_seconds += pass_seconds(plan, self.runner.decoder.config, self.sizes, self.hardware)


def _cache_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.kv_cache_gib:
        return int(config.kv_cache_gib * 2**30)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an earlier engine's pool may still be held by torch's allocator
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    return 2**30
