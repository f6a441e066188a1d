"""What goes into the sampler and what comes out: token ids only. It knows nothing of text, prompts or guards."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "loop", "nan"]


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. The defaults are the paper's for Qwen3.

    Attributes:
        temperature: 0 is greedy.
        top_p: probability mass of the nucleus, after top_k; 1 is off.
        top_k: candidates kept; 0 is off.
        max_tokens: response tokens at most.
        stop_loops: end a response that only repeats itself, a block of up to 256 tokens eight times back to back.
    """

    __pydantic_config__ = {"extra": "forbid"}

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 16_384
    stop_loops: bool = False

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError("temperature must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError("top_k must not be negative")
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        id: returned with the completion; no other request of a call has the same.
        prompt: token ids, at least one.
        sampling: how to draw.
        seed: 63 bits; with the position it fixes the noise, so the response does not depend on the batch.
        stop_ids: tokens that end the response.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """A finished response.

    Attributes:
        tokens: response ids, the stop token left out.
        finish_reason: `stop`, `length` (max_tokens or the context is full), `loop` (see `SamplingConfig.stop_loops`) or
            `nan` (the model's logits broke).
        logprobs: of each token under the model, before temperature and truncation. Their last digits depend on the
            batch, so equality does not ask for them.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities of chosen tokens right after a prompt.

    Attributes:
        logprobs: [K] fp32, exact (full log-sum-exp), NaN where the model's logits broke.
    """

    request_id: str
    logprobs: np.ndarray
