"""Continuous batching, whole: plan, forward, sample, commit, until every request is answered.

engine = Engine(decoder, EngineConfig())
for completion in engine.generate(requests): ...
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from thinksafe.errors import UserError
from thinksafe.kernels.linear_cross_entropy import matmul_fp32
from thinksafe.kernels.linear_logprob import linear_logprob_of
from thinksafe.kernels.sampling import sample
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.request import Completion, Request, SamplingConfig, Scores
from thinksafe.sampler.runner import Runner
from thinksafe.sampler.scheduler import Scheduler, StepPlan


@dataclass(frozen=True)
class EngineConfig:
    """How much runs at once.

    Attributes:
        max_running: sequences in a step.
        max_step_tokens: tokens in a step; prompts longer than that are read in chunks.
        page_size: tokens a cache page; prefixes are shared in whole pages.
        kv_cache_gib: size of the page pool; 0 takes 85% of a GPU's free memory, or 1 GiB of a CPU's.
    """

    __pydantic_config__ = {"extra": "forbid"}

    max_running: int = 256
    max_step_tokens: int = 8192
    page_size: int = 16
    kv_cache_gib: float = 0.0

    def __post_init__(self):
        for name in ("max_running", "max_step_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_step_tokens < self.max_running:
            raise ValueError("max_step_tokens must be at least max_running, or running sequences would starve")
        if self.kv_cache_gib < 0:
            raise ValueError("kv_cache_gib must not be negative")


class Engine:
    """A decoder ready to answer requests. Create it when it is needed: the page pool is allocated at once."""

    def __init__(self, decoder: Decoder, config: EngineConfig):
        self.decoder = decoder
        device, dtype = decoder.embedding.device, decoder.embedding.dtype
        page_bytes = decoder.config.kv_elements_per_token * config.page_size * dtype.itemsize
        # More than every slot at full context could never be used.
        most = config.max_running * -(-decoder.config.max_seq_len // config.page_size)
        num_pages = min(_cache_bytes(config, device) // page_bytes, most)
        if num_pages * config.page_size < 2:
            raise UserError("sampler.kv_cache_gib: too little memory for even one page of the cache")
        self.runner = Runner(decoder, num_pages, config.page_size)
        self.scheduler = Scheduler(
            config.max_running, num_pages, config.page_size, decoder.config.max_seq_len, config.max_step_tokens
        )

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that still leaves room for one response token."""
        return min(self.scheduler.max_seq_len, self.scheduler.capacity_tokens) - 1

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, each yielded as soon as it is finished, in no particular order.

        Raises:
            ValueError: a request that can never fit, before any is answered.
        """
        self.scheduler.submit(requests)
        while self.scheduler.has_work:
            plan = self.scheduler.plan()
            hidden = self.runner.forward(plan, self.scheduler)
            yield from self.scheduler.commit(plan, self._sample(plan, hidden))

    def score(self, prompts: Sequence[tuple[str, tuple[int, ...]]], token_ids: Sequence[int]) -> Iterator[Scores]:
        """Log-probabilities of `token_ids` as the next token after each (id, prompt), in no particular order."""
        only_prompt = SamplingConfig(temperature=0, max_tokens=1)
        self.scheduler.submit(Request(id_, prompt, only_prompt, 0, ()) for id_, prompt in prompts)
        columns = torch.tensor(token_ids, device=self.decoder.embedding.device)
        while self.scheduler.has_work:
            plan = self.scheduler.plan()
            hidden = self.runner.forward(plan, self.scheduler)
            token_ids = columns.expand(len(hidden), -1)
            logprobs = linear_logprob_of(hidden, self.decoder.head, token_ids).cpu().numpy()
            for row, request in self.scheduler.commit_scored(plan, np.isnan(logprobs).any(-1)):
                yield Scores(request.id, logprobs[row])

    def _sample(self, plan: StepPlan, hidden: torch.Tensor) -> np.ndarray:
        scheduler, device = self.scheduler, hidden.device
        slots, positions = plan.slots[plan.completes], plan.ends[plan.completes]
        columns = (scheduler.temperature, scheduler.top_k, scheduler.top_p, scheduler.seed)
        columns = (*(column[slots] for column in columns), positions)
        # In fp32: rounded to bf16, logits are off by 0.03 and more, which changes two draws in a hundred.
        logits = matmul_fp32(hidden, self.decoder.head.T)
        tokens, _ = sample(logits, *(torch.from_numpy(column).to(device) for column in columns))
        return tokens.cpu().numpy()


def _cache_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.kv_cache_gib:
        return int(config.kv_cache_gib * 2**30)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an earlier engine's pool may still be held by torch's allocator
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    return 2**30
