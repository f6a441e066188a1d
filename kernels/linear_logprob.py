"""Log-probabilities computed from hidden states, without [T, V] logits.

    log p_t = x_t·w_{y_t} - logsumexp(x_t Wᵀ) = -log1p(S),    S = Σ exp(z - z_y) over all other tokens

The second form is exact to fp32, even if the model is very confident. A guard's verdict needs the log-probabilities of
a few tokens at one position. The margin between two tokens needs no sum over the vocabulary, only a dot product per
row.

Cost: one pass over the vocabulary, 2 * T * V * H FLOP, no logits in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.checks import (
    check_choice,
    check_head,
    check_number,
    check_tma_alignment,
    check_token_id_range,
    check_token_ids,
)
from thinksafe.kernels.chunked_loss import map_chunks, without_autocast
from thinksafe.kernels.exp_gemm import exp_gemm, gather_dot, on_tensor_cores

_CHUNK_ROWS, _REFERENCE_CHUNK_ROWS = 65_536, 1024
"""Rows of a chunk, on Triton and in the reference. On Triton the sums of the tiles take 9 KB per row for Qwen3."""


@dataclass(frozen=True)
class Logprobs:
    """Result of `linear_logprob`.

    Attributes:
        logprob: [T] fp32, log-probability of each row's target in nats.
        entropy: [T] fp32, entropy of each row's distribution in nats; None without `with_entropy_and_top1`.
        top1: [T] int64, the most likely token (the smallest id among equals); None without `with_entropy_and_top1`.
    """

    logprob: Tensor
    entropy: Tensor | None
    top1: Tensor | None


def reference(x: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probabilities of token_ids [T, K], entropy [T], most likely token [T] int64), in nats.

    This is the plain torch form. The logits are computed in fp32, or in fp64 for x in fp64, in chunks of rows. An
    infinite or NaN logit makes the floating-point results of its row NaN.

    Args:
        x: [T, H] hidden states.
        weight: [V, H], weight matrix of the language-model head.
        token_ids: [T, K] int64 in [0, V).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)

    def score_chunk(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        logits = x[rows] @ weight.T
        # An infinite weight can make a logit -inf: 0 * (sum of logits) turns that row into NaN.
        logprobs = logits.log_softmax(-1) + 0 * logits.sum(-1, keepdim=True)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, token_ids[rows]), entropy, logprobs.argmax(-1)

    return _concatenate(map_chunks(len(x), _REFERENCE_CHUNK_ROWS, score_chunk) or [score_chunk(slice(0, 0))])


def _concatenate(chunks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


@torch.library.custom_op("thinksafe::linear_logprob", mutates_args=())
@without_autocast
def _linear_logprob(
    x: Tensor, weight: Tensor, target: Tensor, with_entropy_and_top1: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probability [T] fp32, entropy [T] fp32, most likely token [T] int64).

    Entropy and most likely token have no elements without `with_entropy_and_top1`.
    """
    check_token_id_range("target", target, len(weight))
    if not on_tensor_cores(x) or len(x) == 0:
        logprob, *entropy_and_top1 = reference(x, weight, target[:, None])
        return logprob[:, 0], *(entropy_and_top1 if with_entropy_and_top1 else _no_entropy_or_top1(x, target))
    check_tma_alignment(x=x, weight=weight)
    return _concatenate(
        map_chunks(
            len(x), _CHUNK_ROWS, lambda rows: _logprob_on_triton(x[rows], weight, target[rows], with_entropy_and_top1)
        )
    )


def _no_entropy_or_top1(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float32), target.new_empty(0)


def _logprob_on_triton(
    x: Tensor, weight: Tensor, target: Tensor, with_entropy_and_top1: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `_linear_logprob` for a chunk of rows, with Triton kernels."""
    target_logit = gather_dot(x, weight, target[:, None])[:, 0]
    exp_pass = exp_gemm(x, weight, target, target_logit, with_entropy_and_top1=with_entropy_and_top1)
    other_sum = exp_pass.sums.sum(0)
    target_exp = torch.exp(target_logit - exp_pass.shift)
    # If the shift is the target's logit, target_exp is 1, and log1p keeps small S, which 1 + S would round away.
    logprob = torch.where(
        target_exp == 1, -torch.log1p(other_sum), target_logit - exp_pass.shift - torch.log(target_exp + other_sum)
    )
    if not with_entropy_and_top1:
        return logprob, *_no_entropy_or_top1(x, target)
    lse = target_logit - logprob
    mean_logit = (exp_pass.weighted_sums.sum(0) + target_exp * target_logit) / (target_exp + other_sum)
    argmax_tile = exp_pass.tile_max.argmax(0, keepdim=True)
    return logprob, lse - mean_logit, exp_pass.tile_argmax.gather(0, argmax_tile)[0].long()


@_linear_logprob.register_fake
def _(x, weight, target, with_entropy_and_top1):
    rows = len(x) if with_entropy_and_top1 else 0
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(rows, dtype=torch.float32), target.new_empty(rows)


@torch.library.custom_op("thinksafe::linear_logprob_of", mutates_args=())
@without_autocast
def _linear_logprob_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    check_token_id_range("token_ids", token_ids, len(weight))
    if not on_tensor_cores(x) or len(x) == 0:
        return reference(x, weight, token_ids)[0]
    check_tma_alignment(x=x, weight=weight)
    return torch.cat(
        map_chunks(len(x), _CHUNK_ROWS, lambda rows: _logprob_of_on_triton(x[rows], weight, token_ids[rows]))
    )


def _logprob_of_on_triton(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities of token_ids, [T, K] fp32, for a chunk of rows, with Triton kernels."""
    logits = gather_dot(x, weight, token_ids)
    # The shift is the largest of these logits, so that an unlikely id does not cost the others precision.
    max_logit, column = logits.max(-1)
    exp_pass = exp_gemm(x, weight, token_ids.gather(-1, column[:, None])[:, 0], max_logit)
    lse = exp_pass.shift + torch.log(torch.exp(max_logit - exp_pass.shift) + exp_pass.sums.sum(0))
    return logits - lse[:, None]


@_linear_logprob_of.register_fake
def _(x, weight, token_ids):
    return x.new_empty(token_ids.shape, dtype=torch.float32)


@torch.no_grad()
def linear_logprob(x: Tensor, weight: Tensor, target: Tensor, *, with_entropy_and_top1: bool = False) -> Logprobs:
    """Return the log-probability of one token per row, in nats. Not differentiable.

    For a gradient, negate `linear_cross_entropy` with reduction="none".

    Args:
        x: [T, H] hidden states, bf16 or fp32; a GPU computes fp32 in plain torch.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x.
        target: [T] int64 in [0, V), the token of each row.
        with_entropy_and_top1: also return each row's entropy and most likely token, which are None otherwise.

    Returns:
        Log-probability and entropy are NaN in a row whose hidden state is not finite, and in all rows if the weight
        matrix is not finite; the most likely token of such a row has no meaning.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. On a GPU a device-side assert checks the
            elements of target instead.
    """
    check_head(x, weight)
    check_token_ids("target", target, x, (len(x),))
    check_choice("with_entropy_and_top1", with_entropy_and_top1, True, False)
    logprob, entropy, top1 = _linear_logprob(x.contiguous(), weight, target.contiguous(), with_entropy_and_top1)
    return Logprobs(logprob, entropy, top1) if with_entropy_and_top1 else Logprobs(logprob, None, None)


@torch.no_grad()
def linear_logprob_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities of K tokens per row, in nats, with one exact log-sum-exp. Not differentiable.

    Args:
        x: [T, H] hidden states, bf16 or fp32; a GPU computes fp32 in plain torch.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x.
        token_ids: [T, K] int64 in [0, V), K at least 1.

    Returns:
        [T, K] fp32; NaN in a row whose hidden state is not finite, and everywhere if the weight matrix is not finite.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. On a GPU a device-side assert checks the
            elements of token_ids instead.
    """
    check_head(x, weight)
    num_tokens = token_ids.shape[1] if isinstance(token_ids, Tensor) and token_ids.dim() == 2 else 1
    check_token_ids("token_ids", token_ids, x, (len(x), num_tokens))
    return _linear_logprob_of(x.contiguous(), weight, token_ids.contiguous())


@torch.no_grad()
def linear_margin(x: Tensor, weight: Tensor, token: int, other_token: int) -> Tensor:
    """Return log p(token) - log p(other_token) for each row, [T] fp32, in nats. Not differentiable.

    This is x · (weight[token] - weight[other_token]), without a sum over the vocabulary.

    Args:
        x: [T, H] hidden states, bf16 or fp32.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x.
        token, other_token: token ids in [0, V).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_head(x, weight)
    for name, value in (("token", token), ("other_token", other_token)):
        check_number(name, value, 0, len(weight), integer=True)
    return (x.float() * (weight[token].float() - weight[other_token].float())).sum(-1)
