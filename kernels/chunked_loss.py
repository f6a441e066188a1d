"""Shared parts of the losses on a language-model head: chunks of rows, gradients in the forward pass, a backward that
scales them.

The only large arrays have shape [rows, V], so they exist for one chunk of rows at a time. If memory runs out, the chunk
size is halved. While a chunk's arrays exist, we compute its gradients for an upstream gradient of 1. The backward pass
multiplies each row of dX by its upstream gradient. dW is a sum over rows, so the upstream gradient of a scalar loss can
scale it; if rows have different upstream gradients, dW is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinksafe.kernels.checks import check_floating, check_tensor

MIN_CHUNK_ROWS = 128
"""Number of rows up to which a chunk is not halved again: that would free almost no memory."""


def row_weights(token_weight: Tensor | None, x: Tensor) -> Tensor:
    """Return the loss weight of each row of x, [T] fp32: `token_weight` after a check, or ones if it is None."""
    if token_weight is None:
        return x.new_ones(len(x), dtype=torch.float32)
    check_floating("token_weight", token_weight)
    check_tensor("token_weight", token_weight, x.shape[:1], token_weight.dtype, x.device)
    if token_weight.requires_grad:
        raise ValueError("token_weight is a constant and gets no gradient: detach it, or use reduction='none'")
    return token_weight.float().contiguous()


def without_autocast(operator: Callable) -> Callable:
    """Return the operator, whose first argument is a tensor, with autocast off: it would round logits to 16 bits."""

    @wraps(operator)
    def with_autocast_off(x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *args)

    return with_autocast_off


def map_chunks(num_rows: int, chunk_rows: int, compute_chunk: Callable[[slice], Any]) -> list:
    """Call `compute_chunk` on consecutive slices of chunk_rows that cover num_rows; return its results in order.

    If a call runs out of memory, this slice and all later ones have half the rows.

    Raises:
        torch.OutOfMemoryError: a call with slices of at most MIN_CHUNK_ROWS rows ran out of memory.
    """
    results, start = [], 0
    while start < num_rows:
        rows = slice(start, min(start + chunk_rows, num_rows))
        try:
            results.append(compute_chunk(rows))
        except torch.OutOfMemoryError:
            if chunk_rows <= MIN_CHUNK_ROWS:
                raise
            chunk_rows //= 2
            continue
        start = rows.stop
    return results


def allocate_loss(x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for (losses [T] fp32, dX [T, H], dW [V, H] fp32); an unneeded gradient has no elements."""
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else weight.new_empty(0)
    return x.new_empty(len(x), dtype=torch.float32), grad_x, grad_weight


def loss_in_chunks(
    x: Tensor,
    weight: Tensor,
    needs_x: bool,
    needs_weight: bool,
    chunk_rows: int,
    compute_chunk: Callable[[slice], tuple[Any, ...]],
) -> tuple[Tensor, Tensor, Tensor, list[tuple]]:
    """Return (losses [T] fp32, dX [T, H], dW [V, H] fp32, statistics of each chunk), for upstream gradients of 1.

    `compute_chunk` takes a slice of rows and returns (their losses, their dX, their part of dW, *statistics). An
    unneeded gradient has no elements.
    """
    losses, grad_x, grad_weight = allocate_loss(x, weight, needs_x, needs_weight)
    grad_weight.zero_()

    def collect_chunk(rows: slice) -> tuple:
        losses[rows], dx, dw, *statistics = compute_chunk(rows)
        if needs_x:
            grad_x[rows] = dx
        if needs_weight:
            grad_weight.add_(dw)  # last and in place: an error leaves no chunk half added
        return tuple(statistics)

    return losses, grad_x, grad_weight, map_chunks(len(x), chunk_rows, collect_chunk)


def register_backward(name: str, operator: torch.library.CustomOpDef) -> None:
    """Register the backward pass of a loss operator, which scales the gradients that the operator returned.

    The operator takes (x, weight, row_weight, ..., needs_x, needs_weight) and returns (losses [T], dX, dW, ...) for an
    upstream gradient of 1 in each row; row_weight is a factor of the losses. `name` is for error messages.
    """

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs), *output[1:3])
        ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_losses, *grads_of_other_outputs):
        if any(grad is not None for grad in grads_of_other_outputs):
            raise RuntimeError(f"{name} can be differentiated once: its gradient has no gradient")
        *tensors, grad_x, grad_weight = ctx.saved_tensors
        inputs = [value if tensor is None else tensor for tensor, value in zip(tensors, ctx.settings, strict=True)]
        x, weight, row_weight, *others, needs_x, needs_weight = inputs
        dx = dw = None
        if needs_x and grad_losses is not None:
            dx = (grad_x.float() * grad_losses[:, None]).to(x.dtype)
        if needs_weight and grad_losses is not None:
            # The gradient of a scalar loss is one expanded element and scales dW; any other one needs the rows again.
            if grad_losses.stride() == (0,) or len(grad_losses) < 2:
                dw = grad_weight * grad_losses[:1].sum()
            else:
                dw = operator(x, weight, row_weight * grad_losses, *others, False, True)[2]
            dw = dw.to(weight.dtype)
        return dx, dw, *(None,) * (len(inputs) - 2)

    operator.register_autograd(backward, setup_context=setup_context)


def reduce_loss(losses: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    """Return the weighted losses [T], their sum, or for `mean` the sum divided by that of the absolute weights."""
    if reduction == "none":
        return losses
    weight_sum = row_weight.abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return losses.sum() if reduction == "sum" else losses.sum() / weight_sum


def first_bad_row(losses: Tensor) -> Tensor:
    """Return the index of the first NaN or infinite element of losses [T], or -1 if all are finite.

    The index is an int64 scalar on the device, for which the host does not wait.
    """
    is_bad = pad(~torch.isfinite(losses.detach()), (0, 1))  # argmax needs an element
    return torch.where(is_bad.any(), is_bad.int().argmax(), -1)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, [M, N] fp32, from a [M, K] and b [K, N] in bf16 or fp32, accumulated in fp32 and not rounded."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()
