"""What the losses on a language-model head share: rows in chunks, gradients in the forward pass, and a backward that
scales them.

A chunk's [rows, V] arrays are the only large ones, so they are held for some rows at a time, and for half as many where
memory runs out. The gradients for an upstream gradient of 1 are formed while those arrays exist; a row's dX scales with
its upstream gradient, and dW, a sum over rows, with that of a scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MIN_CHUNK = 128
"""Rows below which halving a chunk again frees next to nothing."""


def empty_gradients(x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """(dX in the dtype of x, dW in fp32), each of no elements where it is not needed."""
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else weight.new_empty(0)
    return grad_x, grad_weight


def as_given(operator: Callable) -> Callable:
    """An operator's body with autocast off: it rounds products to 16 bits, and logits are never rounded."""

    @wraps(operator)
    def run(x: Tensor, *others):
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *others)

    return run


def in_chunks(num_rows: int, chunk: int, run: Callable[[slice], T]) -> list[T]:
    """What `run` makes of one slice of rows after another, half as many in each from where memory runs out.

    Args:
        run: may be called again for rows that it has seen.

    Raises:
        torch.OutOfMemoryError: not even MIN_CHUNK rows fit.
    """
    done, start = [], 0
    while start < num_rows:
        rows = slice(start, min(start + chunk, num_rows))
        try:
            done.append(run(rows))
        except torch.OutOfMemoryError:
            if chunk <= MIN_CHUNK:
                raise
            chunk //= 2
            continue
        start = rows.stop
    return done


def over_chunks(
    rows: Tensor | range,
    chunk: int,
    grad_x: Tensor,
    grad_weight: Tensor,
    run: Callable[[Tensor | slice], tuple[Any, Tensor | None, Tensor | None]],
) -> list[Any]:
    """Run every chunk of rows and gather their gradients; see `in_chunks`.

    Args:
        rows: which ones, ascending: int64 indices on the device, or `range(T)` for all.
        grad_x, grad_weight: overwritten, with 0 where no chunk writes; dW is the sum over chunks.
        run: takes an index of rows and returns (anything, their dX or None, their part of dW or None).

    Returns:
        What `run` returned first, for one chunk after another.
    """
    grad_weight.zero_()
    if isinstance(rows, Tensor):
        grad_x.zero_()

    def gathered(part: slice) -> Any:
        index = rows[part] if isinstance(rows, Tensor) else part
        result, dx, dw = run(index)
        if dx is not None:
            grad_x[index] = dx
        if dw is not None:
            grad_weight.add_(dw)  # last, and in place, so that it cannot fail half done
        return result

    return in_chunks(len(rows), chunk, gathered)


def scaled_gradients(
    upstream: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, again: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """(dX, dW in fp32) for the upstream gradient [T] from those for 1, None from None.

    `again` computes dW anew from rows weighted by the upstream gradient.
    """
    dx = None if grad_x is None else (grad_x.float() * upstream[:, None]).to(grad_x.dtype)
    if grad_weight is None:
        return dx, None
    # A scalar loss arrives as one expanded number and scales the sum; anything else needs the rows again.
    is_scalar = upstream.stride() == (0,) or len(upstream) < 2
    return dx, grad_weight * upstream[:1].sum() if is_scalar else again()


def reduced(loss: Tensor, normaliser: Tensor, reduction: str) -> Tensor:
    """Weighted row losses [T] as they are (`none`), summed, or divided by the weights' sum (0 for no rows)."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / normaliser.clamp(min=torch.finfo(torch.float32).tiny)


def first_bad_row(loss: Tensor) -> Tensor:
    """The first row of [T] that is NaN or infinite, or -1; int64 scalar, without a wait for the device."""
    rows = torch.arange(len(loss) + 1, device=loss.device)
    bad = torch.cat((~torch.isfinite(loss.detach()), rows.new_ones(1, dtype=torch.bool)))
    row = torch.where(bad, rows, len(loss)).amin()
    return torch.where(row < len(loss), row, -1)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A product of bf16 or fp32 with fp32 accumulation and result: nothing is rounded but the inputs."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()
