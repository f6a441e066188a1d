"""Continuous batching: schedule, forward, sample, commit, until every request is answered.

    engine = Engine(decoder, EngineConfig())
    for completion in engine.generate(requests): ...

On a GPU the next pass is scheduled and launched while the previous one still runs, and results are fetched one pass
late, so that host and GPU do not wait for each other. On a CPU both are the same processor, and running ahead would
gain nothing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from thinksafe.errors import UserError
from thinksafe.hardware import hardware_of
from thinksafe.kernels.fp8 import supports_fp8
from thinksafe.model.decoder import Decoder
from thinksafe.model.transfer import PendingOutput
from thinksafe.sampler.batch_invariance import check_batch_invariance
from thinksafe.sampler.config import KV_CACHE_SHARE, EngineConfig, SamplingConfig
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.model_runner import ModelRunner
from thinksafe.sampler.request import Completion, Request, Scores
from thinksafe.sampler.roofline import ByteCounts, roofline_seconds
from thinksafe.sampler.scheduler import ScheduledBatch, Scheduler

T = TypeVar("T")

_MAX_QUEUED = 64
"""Number of queued requests up to which the engine reads more: enough to fill a prefill pass, few enough to leave work
for the other workers."""


class Engine:
    """A decoder with a scheduler and a page cache. It samples responses (`generate`) or scores next tokens (`score`).

    The stages that sample, and every guard that is a model, use it. The cache is allocated at construction, so create
    the engine when needed and drop it afterwards.

    Attributes:
        scheduler: the queue, the slots and the pages.
        runner: the decoder with its page cache and the state on the device.
        max_requests: largest number of requests that this engine holds, running and queued.
        hardware: rates of the device; None on a CPU and on a GPU whose rates are unknown.
        byte_counts: bytes of a weight and of a cached token; None if `hardware` is None.
        roofline_seconds: shortest time in which this hardware could have computed all passes so far; 0 if `hardware` is
            None.
        max_batches_in_flight: number of passes that are launched before the engine waits for the oldest one.
    """

    def __init__(
        self, decoder: Decoder, config: EngineConfig, max_requests: int | None = None, config_key: str = "sampler"
    ):
        """Allocate the cache and, in batch-invariant mode, check the device.

        Args:
            decoder: model with loaded weights; its device and dtype are those of the engine.
            max_requests: largest number of requests that this engine holds, running and queued. The others stay in the
                shared source, where other workers can claim them. None for `max_num_seqs` + 64.
            config_key: recipe key that holds `config`, for error messages.

        Raises:
            UserError: the device does not support an fp8 cache, the memory does not hold one page, or in
                batch-invariant mode the device's results depend on the batch.
        """
        device, dtype = decoder.embedding.device, decoder.embedding.dtype
        page_size = config.page_size or (64 if device.type == "cuda" else 16)
        if config.kv_cache_dtype == "fp8" and not supports_fp8(device):
            raise UserError(
                f"{config_key}.kv_cache_dtype: fp8 needs a GPU of compute capability 8.9 or higher; use auto"
            )
        cache_format = CacheFormat.of(decoder.config, dtype, config.kv_cache_dtype)
        page_bytes = cache_format.bytes_per_token(decoder.config) * page_size
        # Pages beyond a full context in every slot could never be used.
        max_pages = config.max_num_seqs * -(-decoder.config.max_seq_len // page_size)
        num_pages = decoder.shard.all_reduce_min(min(_cache_bytes(config, device) // page_bytes, max_pages), device)
        if num_pages * page_size < 2:
            raise UserError(
                f"{config_key}.kv_cache_gib: too little memory for one page of the cache; use a larger value"
            )
        self.scheduler = Scheduler(
            config.max_num_seqs,
            num_pages,
            page_size,
            decoder.config.max_seq_len,
            config.max_prefill_tokens,
            replay=config.batch_invariant,
        )
        self.runner = ModelRunner(decoder, self.scheduler, cache_format, config.batch_invariant)
        if config.batch_invariant:
            check_batch_invariance(self.runner, config.max_prefill_tokens, f"{config_key}.batch_invariant")
        self.max_requests = max_requests or config.max_num_seqs + _MAX_QUEUED
        self.hardware, self.roofline_seconds = hardware_of(device), 0.0
        self.byte_counts = ByteCounts.of(decoder, cache_format) if self.hardware else None
        self.max_batches_in_flight = 2 if device.type == "cuda" else 1
        self._in_flight: deque[tuple[ScheduledBatch, PendingOutput]] = deque()

    @property
    def max_prompt_tokens(self) -> int:
        """Largest number of tokens of a prompt that leaves room for one response token."""
        return self.scheduler.max_seq_len - 1

    @property
    def cache_limits_context(self) -> bool:
        """Whether all pages together hold fewer tokens than the model's context, so that the cache limits the length
        of a sequence."""
        return self.scheduler.max_seq_len < self.runner.decoder.config.max_seq_len

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, because the weights have changed. The engine must not be answering a call."""
        self.scheduler.pool.forget_prefixes()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completion of each request as soon as it is finished, in no particular order.

        The engine computes while the caller iterates. It reads requests from the iterable when it has room for them,
        and keeps a few more in its queue, so that several engines can share one source.

        Raises:
            ValueError: a request can never fit, contains a token id or a seed that is out of range, or has the id of
                another request. The error comes when the engine reads that request. It drops all running requests, as
                does a caller that stops early.
            RuntimeError: an earlier call of `generate` or `score` has not ended.
        """
        yield from self._answer(requests, self.runner.forward, self.scheduler.commit)

    def score(self, prompts: Iterable[tuple[str, tuple[int, ...]]], token_ids: Sequence[int]) -> Iterator[Scores]:
        """Yield the log-probability of each id in `token_ids` as the next token after each prompt, as soon as it is
        computed, in no particular order of the prompts.

        Args:
            prompts: (request id, token ids of the prompt).
            token_ids: K token ids in the vocabulary, which is not checked; `Scores.logprobs` has their order.

        Raises:
            ValueError, RuntimeError: as `generate`.
        """
        prompt_only = SamplingConfig(temperature=0, max_tokens=1)
        requests = (Request(id_, prompt, prompt_only, 0, ()) for id_, prompt in prompts)
        token_ids = torch.tensor(token_ids, device=self.runner.device)

        def forward(batch: ScheduledBatch) -> PendingOutput:
            return self.runner.score(batch, token_ids)

        def commit(batch: ScheduledBatch, logprobs: np.ndarray) -> list[Scores]:
            finished = self.scheduler.commit_scored(batch, np.isnan(logprobs).any(-1))
            return [Scores(request.id, logprobs[row]) for row, request in finished]

        yield from self._answer(requests, forward, commit)

    def step(self, forward: Callable[[ScheduledBatch], PendingOutput], commit: Callable[..., list[T]]) -> list[T]:
        """Schedule a batch, compute it, and commit the oldest batch in flight. Return what its commit returned.

        On a GPU `forward` only launches the pass, and the batch that is committed is the one before it. The first step
        therefore commits nothing and returns an empty list, and the last one schedules nothing.

        Args:
            forward: computes a batch: `ModelRunner.forward`, which samples too, or `ModelRunner.score`.
            commit: stores the results of a batch and returns the finished ones, such as `Scheduler.commit`.
        """
        batch = self.scheduler.schedule()
        if batch is not None:
            self._in_flight.append((batch, forward(batch)))
            if self.hardware:
                config = self.runner.decoder.config
                self.roofline_seconds += roofline_seconds(batch, config, self.byte_counts, self.hardware)
            if len(self._in_flight) < self.max_batches_in_flight:
                return []
        oldest, output = self._in_flight.popleft()
        return commit(oldest, *output.wait())

    def _answer(
        self,
        requests: Iterable[Request],
        forward: Callable[[ScheduledBatch], PendingOutput],
        commit: Callable[..., list[T]],
    ) -> Iterator[T]:
        """Yield the results of all requests; `forward` and `commit` are those of `step`."""
        if self.scheduler.has_work:
            raise RuntimeError("the engine is still answering another call; read its results to the end or close it")
        source = self._check_requests(requests)
        try:
            self._submit(source)
            while self.scheduler.has_work or self._in_flight:
                yield from self.step(forward, commit)
                self._submit(source)
        finally:  # a caller that stops early, or an error, leaves nothing behind for the next call
            self.scheduler.abort_all()
            self._in_flight.clear()

    def _submit(self, source: Iterator[Request]) -> None:
        """Queue requests of the source, up to the number that the engine has room for."""
        num_waiting, num_running = len(self.scheduler.waiting), len(self.scheduler.table.running)
        num_free = min(_MAX_QUEUED - num_waiting, self.max_requests - num_waiting - num_running)
        self.scheduler.submit(islice(source, max(0, num_free)))

    def _check_requests(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests of a call; raise a ValueError if an id is not unique or a token id is not in the
        vocabulary. On a GPU, an index outside the embedding would end all CUDA work of the process."""
        vocab_size, ids = self.runner.decoder.config.vocab_size, set()
        for request in requests:
            if request.id in ids:
                raise ValueError(f"request {request.id}: another request of this call has the same id")
            if request.prompt and not (min(request.prompt) >= 0 and max(request.prompt) < vocab_size):
                raise ValueError(f"request {request.id}: the prompt holds a token id outside [0, {vocab_size})")
            ids.add(request.id)
            yield request


def _cache_bytes(config: EngineConfig, device: torch.device) -> int:
    """Return the bytes for the page cache: `kv_cache_gib`, or else KV_CACHE_SHARE of a GPU's free memory, or 1 GiB on a
    CPU."""
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * 2**30)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an earlier engine's pool may still be held by torch's allocator
        return int(KV_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return 2**30
