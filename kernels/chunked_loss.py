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
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MIN_CHUNK_ROWS = 128
"""Smallest chunk: halving it again would free almost no memory."""


def allocate_gradients(x: Tensor, weight: Tensor, needs_grad_x: bool, needs_grad_weight: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialized (dX in the dtype of x, dW in fp32); a tensor without elements if one is not needed."""
    grad_x = torch.empty_like(x) if needs_grad_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_grad_weight else weight.new_empty(0)
    return grad_x, grad_weight


def without_autocast(operator: Callable) -> Callable:
    """Return the operator with autocast disabled inside: autocast would round logits to 16 bits."""

    @wraps(operator)
    def with_autocast_off(x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *args)

    return with_autocast_off


def map_chunks(num_rows: int, chunk_rows: int, compute_chunk: Callable[[slice], T]) -> list[T]:
    """Call `compute_chunk` on consecutive slices of rows and return its results; halve the slices if memory runs out.

    Args:
        chunk_rows: rows of a slice at the start.
        compute_chunk: is called again for the same rows after a call that ran out of memory.

    Raises:
        torch.OutOfMemoryError: not even MIN_CHUNK_ROWS rows fit.
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


def map_chunks_with_gradients(
    rows: Tensor | range,
    chunk_rows: int,
    grad_x: Tensor,
    grad_weight: Tensor,
    compute_chunk: Callable[[Tensor | slice], tuple[Any, Tensor | None, Tensor | None]],
) -> list[Any]:
    """Compute every chunk of rows and collect the gradients; see `map_chunks`.

    Args:
        rows: rows to compute, ascending: int64 indices on the device, or `range(T)` for all.
        grad_x, grad_weight: overwritten, with 0 where no chunk writes; dW is the sum over chunks.
        compute_chunk: takes an index of rows and returns (result, their dX or None, their part of dW or None).

    Returns:
        The result of each chunk, in order.
    """
    grad_weight.zero_()
    if isinstance(rows, Tensor):
        grad_x.zero_()

    def accumulate_gradients(chunk: slice) -> Any:
        row_index = rows[chunk] if isinstance(rows, Tensor) else chunk
        result, dx, dw = compute_chunk(row_index)
        if dx is not None:
            grad_x[row_index] = dx
        if dw is not None:
            grad_weight.add_(dw)  # last and in place: an error leaves no chunk half added
        return result

    return map_chunks(len(rows), chunk_rows, accumulate_gradients)


def scale_gradients(
    grad_output: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, recompute_grad_weight: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dX, dW in fp32) for an upstream gradient, from the gradients for an upstream gradient of 1.

    Args:
        grad_output: [T], the upstream gradient.
        grad_x, grad_weight: gradients for an upstream gradient of 1; None gives None.
        recompute_grad_weight: recomputes dW from rows that are weighted by the upstream gradient.
    """
    dx = None if grad_x is None else (grad_x.float() * grad_output[:, None]).to(grad_x.dtype)
    if grad_weight is None:
        return dx, None
    # The gradient of a scalar loss is one expanded element and scales the sum; any other one needs the rows again.
    is_scalar = grad_output.stride() == (0,) or len(grad_output) < 2
    return dx, grad_weight * grad_output[:1].sum() if is_scalar else recompute_grad_weight()


def reduce_loss(row_losses: Tensor, normalizer: Tensor, reduction: str) -> Tensor:
    """Return weighted row losses [T] unchanged (`none`), their sum, or the sum over the normalizer (0 for no rows)."""
    if reduction == "none":
        return row_losses
    loss_sum = row_losses.sum()
    return loss_sum if reduction == "sum" else loss_sum / normalizer.clamp(min=torch.finfo(torch.float32).tiny)


def first_bad_row(row_losses: Tensor) -> Tensor:
    """Return the index of the first NaN or infinite row of [T], or -1: an int64 scalar, without a device sync."""
    rows = torch.arange(len(row_losses) + 1, device=row_losses.device)
    is_bad = torch.cat((~torch.isfinite(row_losses.detach()), rows.new_ones(1, dtype=torch.bool)))
    bad_row = torch.where(is_bad, rows, len(row_losses)).amin()
    return torch.where(bad_row < len(row_losses), bad_row, -1)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return the matmul of bf16 or fp32 operands with fp32 accumulation and result, so that only inputs are rounded."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()
