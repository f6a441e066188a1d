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
"""Number of rows up to which a chunk is not halved again: that would free almost no memory."""


def allocate_gradients(x: Tensor, weight: Tensor, needs_grad_x: bool, needs_grad_weight: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialized memory for (dX [T, H] in the dtype of x, dW [V, H] in fp32).

    A gradient that is not needed is a tensor without elements.

    Args:
        x: [T, H] hidden states.
        weight: [V, H], weight matrix of the language-model head.
    """
    grad_x = torch.empty_like(x) if needs_grad_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_grad_weight else weight.new_empty(0)
    return grad_x, grad_weight


def without_autocast(operator: Callable) -> Callable:
    """Return the operator with autocast disabled inside: autocast would round logits to 16 bits.

    Args:
        operator: function whose first argument is a tensor; it is called with positional arguments only.
    """

    @wraps(operator)
    def with_autocast_off(x: Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *args)

    return with_autocast_off


def map_chunks(num_rows: int, chunk_rows: int, compute_chunk: Callable[[slice], T]) -> list[T]:
    """Call `compute_chunk` on consecutive slices that cover `num_rows` rows; return its results in order.

    If a call runs out of memory, this slice and all later ones have half the rows.

    Args:
        num_rows: rows in total; 0 gives an empty list.
        chunk_rows: rows of a slice at the start.
        compute_chunk: takes a slice of rows; after a call that ran out of memory it is called for the same first row.

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


def map_chunks_with_gradients(
    rows: Tensor | range,
    chunk_rows: int,
    grad_x: Tensor,
    grad_weight: Tensor,
    compute_chunk: Callable[[Tensor | slice], tuple[Any, Tensor | None, Tensor | None]],
) -> list[Any]:
    """Call `compute_chunk` on chunks of rows, and collect the gradients that it returns in `grad_x` and `grad_weight`.

    If memory runs out, the chunks are halved as in `map_chunks`.

    Args:
        rows: rows to compute, ascending: [R] int64 indices on the device, or `range(T)` for all.
        chunk_rows: rows of a chunk at the start.
        grad_x: [T, H], overwritten with the dX of each chunk, and with 0 in rows that are not in `rows`.
        grad_weight: [V, H] fp32, overwritten with the sum of the dW of all chunks.
        compute_chunk: takes an index of rows (a slice if `rows` is a range, else int64 indices) and returns (result, dX
            of these rows or None, their part of dW or None). None leaves grad_x or grad_weight alone; these then have
            no elements.

    Returns:
        The result of each chunk, in order; empty without rows.

    Raises:
        torch.OutOfMemoryError: a call with chunks of at most MIN_CHUNK_ROWS rows ran out of memory.
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
        grad_output: [T], the upstream gradient of each row's loss.
        grad_x: [T, H], dX for an upstream gradient of 1; None if dX is not needed, which gives None.
        grad_weight: [V, H] fp32, dW for an upstream gradient of 1 in every row; None if dW is not needed, which gives
            None.
        recompute_grad_weight: returns dW [V, H] of rows that are weighted by grad_output. It is called only if dW is
            needed and two or more rows have separate upstream gradients (grad_output is no expanded scalar).

    Returns:
        dX in the dtype of grad_x, and dW.
    """
    dx = None if grad_x is None else (grad_x.float() * grad_output[:, None]).to(grad_x.dtype)
    if grad_weight is None:
        return dx, None
    # The gradient of a scalar loss is one expanded element and scales the sum; any other one needs the rows again.
    is_scalar = grad_output.stride() == (0,) or len(grad_output) < 2
    return dx, grad_weight * grad_output[:1].sum() if is_scalar else recompute_grad_weight()


def reduce_loss(row_losses: Tensor, normalizer: Tensor, reduction: str) -> Tensor:
    """Return the loss in fp32 from the losses of rows: [T] for `none`, else a scalar.

    Args:
        row_losses: [T] fp32, already multiplied by their loss weights.
        normalizer: fp32 scalar, the sum of the loss weights.
        reduction: `none` returns row_losses, `sum` their sum, and `mean` the sum divided by the normalizer (0 if there
            are no rows or all weights are 0).
    """
    if reduction == "none":
        return row_losses
    loss_sum = row_losses.sum()
    return loss_sum if reduction == "sum" else loss_sum / normalizer.clamp(min=torch.finfo(torch.float32).tiny)


def first_bad_row(row_losses: Tensor) -> Tensor:
    """Return the index of the first NaN or infinite element of row_losses [T], or -1 if all are finite.

    The index is an int64 scalar on the device, for which the host does not wait.
    """
    rows = torch.arange(len(row_losses) + 1, device=row_losses.device)
    is_bad = torch.cat((~torch.isfinite(row_losses.detach()), rows.new_ones(1, dtype=torch.bool)))
    bad_row = torch.where(is_bad, rows, len(row_losses)).amin()
    return torch.where(bad_row < len(row_losses), bad_row, -1)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, [M, N] fp32, from a [M, K] and b [K, N] in bf16 or fp32, accumulated in fp32.

    The result is not rounded to the dtype of the operands.
    """
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()
