"""Log-probabilities computed from hidden states, without [T, V] logits.

    log p_t = x_t·w_{y_t} - logsumexp(x_t Wᵀ) = -log1p(S),    S = Σ exp(z - z_y) over all other tokens

The second form is exact to fp32, even if the model is very confident. A guard's verdict needs the log-probabilities of
a few tokens at one position; they share one log-sum-exp.

Cost: one pass over the vocabulary, 2 * T * V * H FLOP, no logits in memory.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_head, check_tensor, check_tma_alignment, check_token_id_range
from thinksafe.kernels.chunked_loss import map_chunks, without_autocast
from thinksafe.kernels.exp_gemm import exp_gemm, gather_dot, on_tensor_cores

_CHUNK_ROWS, _REFERENCE_CHUNK_ROWS = 65_536, 1024
"""Rows of a chunk, on Triton and in the reference. On Triton the sums of the tiles take 9 KB per row for Qwen3."""


class Logprobs(NamedTuple):
    """Result of `linear_logprob`.

    Attributes:
        logprob: [T] fp32, log-probability of each row's token in nats.
        entropy: [T] fp32, entropy of each row's distribution in nats.
        top1: [T] int64, the most likely token (the smallest id among equals).
    """

    logprob: Tensor
    entropy: Tensor
    top1: Tensor


def reference(x: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probabilities of token_ids [T, K], entropy [T], most likely token [T] int64), in nats.

    The logits are computed in fp32, or in fp64 for x in fp64. An infinite or NaN logit makes the floating-point results
    of its row NaN.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weight.to(dtype).T
    # An infinite weight can make a logit -inf: 0 * (sum of logits) turns that row into NaN.
    logprobs = logits.log_softmax(-1) + 0 * logits.sum(-1, keepdim=True)
    return logprobs.gather(-1, token_ids), -(logprobs.exp() * logprobs).sum(-1), logprobs.argmax(-1)


def _score_on_triton(x: Tensor, weight: Tensor, token_ids: Tensor, with_entropy_and_top1: bool) -> tuple[Tensor, ...]:
    """Return the log-probabilities of a chunk of rows and, if asked for, entropy and top-1, with Triton kernels."""
    logits = gather_dot(x, weight, token_ids)
    # The shift is the largest of these logits, so that an unlikely id does not cost the others precision.
    max_logit, column = logits.max(-1)
    target = token_ids.gather(-1, column[:, None])[:, 0]
    sums = exp_gemm(x, weight, target, max_logit, with_entropy_and_top1=with_entropy_and_top1)
    logprobs = logits - sums.shift[:, None] - sums.log_sum[:, None]
    return (logprobs, sums.entropy, sums.top1) if with_entropy_and_top1 else (logprobs,)


@torch.library.custom_op("thinksafe::linear_logprob", mutates_args=())
@without_autocast
def _linear_logprob(
    x: Tensor, weight: Tensor, token_ids: Tensor, with_entropy_and_top1: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `reference`; entropy and top-1 have no elements without `with_entropy_and_top1`."""
    check_token_id_range("token_ids", token_ids, len(weight))
    score, chunk_rows = reference, _REFERENCE_CHUNK_ROWS
    if on_tensor_cores(x) and len(x):
        check_tma_alignment(x=x, weight=weight)
        score, chunk_rows = partial(_score_on_triton, with_entropy_and_top1=with_entropy_and_top1), _CHUNK_ROWS
    chunks = map_chunks(len(x), chunk_rows, lambda rows: score(x[rows], weight, token_ids[rows]))
    results = tuple(torch.cat(parts) for parts in zip(*chunks or [reference(x, weight, token_ids)], strict=True))
    return results if with_entropy_and_top1 else (results[0], x.new_empty(0).float(), token_ids.new_empty(0))


@_linear_logprob.register_fake
def _(x, weight, token_ids, with_entropy_and_top1):
    rows = len(x) if with_entropy_and_top1 else 0
    logprobs, entropy = (x.new_empty(shape, dtype=torch.float32) for shape in (token_ids.shape, rows))
    return logprobs, entropy, token_ids.new_empty(rows)


@torch.no_grad()
def linear_logprob(x: Tensor, weight: Tensor, token_ids: Tensor) -> Logprobs:
    """Return the log-probability of one token per row, and each row's entropy and most likely token.

    Not differentiable; for a gradient, negate `linear_cross_entropy` with reduction="none".

    Args:
        x: [T, H] hidden states, bf16 or fp32; a GPU computes fp32 in plain torch.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x.
        token_ids: [T] int64 in [0, V), the token of each row.

    Returns:
        Log-probability and entropy are NaN in a row whose hidden state is not finite, and in all rows if the weight
        matrix is not finite; the most likely token of such a row has no meaning.

    Raises:
        TypeError, ValueError: an argument is invalid. On a GPU a device-side assert checks the elements of tensors.
    """
    check_head(x, weight)
    check_tensor("token_ids", token_ids, x.shape[:1], torch.int64, x.device)
    logprobs, entropy, top1 = _linear_logprob(x.contiguous(), weight, token_ids[:, None].contiguous(), True)
    return Logprobs(logprobs[:, 0], entropy, top1)


@torch.no_grad()
def linear_logprob_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities of K tokens per row, [T, K] fp32 in nats, faster than `linear_logprob`.

    token_ids is [T, K] int64 in [0, V), K at least 1. Other arguments, NaN and errors are those of `linear_logprob`.
    """
    check_head(x, weight)
    num_tokens = token_ids.shape[1] if isinstance(token_ids, Tensor) and token_ids.dim() == 2 else 1
    check_tensor("token_ids", token_ids, (len(x), num_tokens), torch.int64, x.device)
    if num_tokens == 0:
        raise ValueError(f"token_ids must hold at least one token id per row; found {list(token_ids.shape)}")
    return _linear_logprob(x.contiguous(), weight, token_ids.contiguous(), False)[0]
