"""Log-probabilities straight from hidden states: log p_t = x_t·w_{y_t} - logsumexp(x_t Wᵀ), without [T, V] logits.

One pass over the vocabulary, 2 * T * V * H FLOP and nothing stored: exp(z - z_y) summed over all other tokens is S, and
log p = -log1p(S), exact to fp32 however confident the model is. A guard's verdict wants a handful of tokens at one
position; the margin between two of them needs no sum at all, a dot product a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_choice, check_head, check_number, check_range, check_tma, check_token_ids
from thinksafe.kernels.chunked_loss import as_given, in_chunks
from thinksafe.kernels.exp_gemm import exp_gemm, gather_dot, on_tensor_cores

_CHUNK, _REFERENCE_CHUNK = 65_536, 1024
"""Rows at once: of the tables of tiles, 9 KB a row at Qwen3's vocabulary; of the reference's logits."""


@dataclass(frozen=True)
class Logprobs:
    """Per row: `logprob` of the target in nats, and by-products of the same pass.

    Attributes:
        logprob: [T] fp32.
        entropy: [T] fp32, of the whole distribution, in nats; None unless asked for.
        top1: [T] int64, the most likely token (the smallest id of equals); None unless asked for.
    """

    logprob: Tensor
    entropy: Tensor | None
    top1: Tensor | None


def reference(x: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities of token_ids [T, K], entropy [T], most likely token [T]) through logits in fp32 or better,
    some rows at a time."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)

    def scored(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        logits = x[rows] @ weight.T
        # A logit of -inf, which an infinite weight makes, is a NaN.
        logprobs = logits.log_softmax(-1) + 0 * logits.sum(-1, keepdim=True)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, token_ids[rows]), entropy, logprobs.argmax(-1)

    return _joined(in_chunks(len(x), _REFERENCE_CHUNK, scored) or [scored(slice(0, 0))])


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@torch.library.custom_op("thinksafe::linear_logprob", mutates_args=())
@as_given
def _linear_logprob(x: Tensor, weight: Tensor, target: Tensor, by_products: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, most likely token), the last two empty unless asked for."""
    check_range("target", target, len(weight))
    if not on_tensor_cores(x) or len(x) == 0:
        logprob, *rest = reference(x, weight, target[:, None])
        return logprob[:, 0], *(rest if by_products else _nothing(x, target))
    check_tma(x=x, weight=weight)
    return _joined(
        in_chunks(len(x), _CHUNK, lambda rows: _scored_on_triton(x[rows], weight, target[rows], by_products))
    )


def _nothing(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float32), target.new_empty(0)


def _scored_on_triton(x: Tensor, weight: Tensor, target: Tensor, by_products: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`_linear_logprob` of some rows."""
    target_logit = gather_dot(x, weight, target[:, None])[:, 0]
    done = exp_gemm(x, weight, target, target_logit, by_products=by_products)
    others = done.sums.sum(0)
    own = torch.exp(target_logit - done.shift)
    # Where the shift is the target's own logit, own is 1 and log1p keeps what 1 + S would round away.
    logprob = torch.where(own == 1, -torch.log1p(others), target_logit - done.shift - torch.log(own + others))
    if not by_products:
        return logprob, *_nothing(x, target)
    lse = target_logit - logprob
    mean_logit = (done.weighted.sum(0) + own * target_logit) / (own + others)
    tile = done.best.argmax(0, keepdim=True)
    return logprob, lse - mean_logit, done.best_id.gather(0, tile)[0].long()


@_linear_logprob.register_fake
def _(x, weight, target, by_products):
    rows = len(x) if by_products else 0
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(rows, dtype=torch.float32), target.new_empty(rows)


@torch.library.custom_op("thinksafe::linear_logprob_of", mutates_args=())
@as_given
def _linear_logprob_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    check_range("token_ids", token_ids, len(weight))
    if not on_tensor_cores(x) or len(x) == 0:
        return reference(x, weight, token_ids)[0]
    check_tma(x=x, weight=weight)
    return torch.cat(in_chunks(len(x), _CHUNK, lambda rows: _chosen_on_triton(x[rows], weight, token_ids[rows])))


def _chosen_on_triton(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """`_linear_logprob_of` of some rows."""
    logits = gather_dot(x, weight, token_ids)
    # The most likely of them is the shift, so that an id of no chance takes nothing from the others.
    best, column = logits.max(-1)
    done = exp_gemm(x, weight, token_ids.gather(-1, column[:, None])[:, 0], best)
    lse = done.shift + torch.log(torch.exp(best - done.shift) + done.sums.sum(0))
    return logits - lse[:, None]


@_linear_logprob_of.register_fake
def _(x, weight, token_ids):
    return x.new_empty(token_ids.shape, dtype=torch.float32)


@torch.no_grad()
def linear_logprob(x: Tensor, weight: Tensor, target: Tensor, *, by_products: bool = False) -> Logprobs:
    """Log-probability of one token a row, without a gradient: one that trains is a `linear_cross_entropy` of
    reduction="none", negated.

    Args:
        x: [T, H] hidden states, bf16, or fp32, which a GPU computes in plain torch.
        weight: [V, H] head, contiguous, in the dtype of x.
        target: [T] int64 in [0, V).
        by_products: also give entropy and the most likely token.

    Returns:
        See `Logprobs`; NaN where x or the head are not finite.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name; on a GPU values are asserted by the device.
    """
    check_head(x, weight)
    check_token_ids("target", target, x, (len(x),))
    check_choice("by_products", by_products, True, False)
    logprob, entropy, top1 = _linear_logprob(x.contiguous(), weight, target.contiguous(), by_products)
    return Logprobs(logprob, entropy, top1) if by_products else Logprobs(logprob, None, None)


@torch.no_grad()
def linear_logprob_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of a handful of tokens a row, with one exact log-sum-exp.

    Args:
        x: [T, H]; weight: [V, H]; as for `linear_logprob`.
        token_ids: [T, K] int64 in [0, V), K at least 1.

    Returns:
        [T, K] fp32, NaN where x or the head are not finite.

    Raises:
        TypeError, ValueError: as for `linear_logprob`.
    """
    check_head(x, weight)
    width = token_ids.shape[1] if isinstance(token_ids, Tensor) and token_ids.dim() == 2 else 1
    check_token_ids("token_ids", token_ids, x, (len(x), width))
    return _linear_logprob_of(x.contiguous(), weight, token_ids.contiguous())


@torch.no_grad()
def linear_margin(x: Tensor, weight: Tensor, token: int, other: int) -> Tensor:
    """log p(token) - log p(other) for every row, [T] fp32: the rows' product with a difference of two rows of the head,
    no sum over the vocabulary.

    Raises:
        TypeError, ValueError: as for `linear_logprob`.
    """
    check_head(x, weight)
    for name, value in (("token", token), ("other", other)):
        check_number(name, value, 0, len(weight), whole=True)
    return (x.float() * (weight[token].float() - weight[other].float())).sum(-1)
