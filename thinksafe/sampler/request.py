"""Inputs and outputs of the sampler: token ids only. It knows nothing of text, prompt files or guards."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "repetition", "nan"]
"""Reason why a response ended, see `Completion.finish_reason`."""


@dataclass(frozen=True)
class SamplingConfig:
    """How response tokens are sampled. The defaults are the paper's settings for Qwen3.

    Attributes:
        temperature: divisor of the logits; larger values give more varied responses. 0 always takes the most likely
            token.
        top_p: sample only from the smallest set of most likely tokens whose probabilities, after `top_k`, add up to
            this value; 1 turns this off.
        top_k: sample only from this number of most likely tokens; 0 turns this off.
        max_tokens: largest number of response tokens; a longer response is cut off.
        stop_on_repetition: end a response once it repeats a block of up to 256 tokens eight times in a row. This saves
            time, but a useful text may repeat a line that often too.
    """

    __pydantic_config__ = {"extra": "forbid"}

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 16_384
    stop_on_repetition: bool = False

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError("temperature must be finite and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError("top_k must not be negative")
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        id: name of the request, returned as `Completion.request_id`; unique within a call.
        prompt: token ids, at least one.
        sampling: how response tokens are sampled.
        seed: at least 0 and below 2^63. Seed, position and token id determine the random number of a token, so the
            batch affects the response only through rounding errors, and not at all in batch-invariant mode.
        stop_ids: token ids that end the response.
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
        request_id: `Request.id` of the request that it answers.
        tokens: ids of the response tokens, without the stop token.
        finish_reason: `stop` (a token of `stop_ids` was sampled), `length` (`max_tokens` is reached or the context is
            full), `repetition` (see `SamplingConfig.stop_on_repetition`) or `nan` (a logit is not finite).
        logprobs: log-probability in nats of each token under the model, before temperature, top-k and top-p. Their
            rounding may depend on the batch, so `==` ignores them.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities of given tokens as the next token after a prompt.

    Attributes:
        request_id: id that the caller gave the prompt.
        logprobs: [K] fp32, in nats, normalized over the whole vocabulary, in the order of the token ids in the call.
            NaN if the model's output is not finite.
    """

    request_id: str
    logprobs: np.ndarray
