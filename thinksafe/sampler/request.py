"""Inputs and outputs of the sampler: token ids only. It knows nothing of text, prompt files or guards."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from thinksafe.sampler.config import SamplingConfig

FinishReason = Literal["stop", "length", "repetition", "nan"]
"""Reason why a response ended, see `Completion.finish_reason`."""


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        id: unique within a call; returned as `Completion.request_id`.
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
        logprobs: [K] fp32, in nats, normalized over the whole vocabulary, in the order of the token ids in the call.
            NaN if the model's output is not finite.
    """

    request_id: str
    logprobs: np.ndarray
