"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight, alone or after a residual addition.

Forward reads x once and writes y once, 2 * T * H * itemsize bytes; with the residual it reads two and writes two.
Backward reads dy and x and writes dx:
    x̂ = x * rstd,  g = dy * weight,  dx = rstd * (g - x̂ * mean(g * x̂)),  dweight = sum over rows of dy * x̂.
Means are taken in fp32 whatever the dtype of x, since a bf16 sum over H = 4096 squares keeps only two digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_number, check_tensor
from thinksafe.kernels.dispatch import jit, on_triton, tl, triton

_TILE = 4096  # elements a program holds at once: 16 to 32 a thread, which leaves registers for the backward's five


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch; the gain is applied after rounding to the dtype of x, as Hugging Face's models do."""
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    H,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    inside = (rows < num_rows)[:, None] & (columns < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]  # T * H passes 2^31 at T = 1M, H = 2048
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / H + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0)
    normalised = (x * rstd[:, None]).to(weight.dtype)
    tl.store(y_ptr + offsets, weight[None, :] * normalised, mask=inside)


@jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_sum_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    num_rows,
    H,
    num_blocks,
    HAS_GRAD_SUM: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_H,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < H)[None, :]
        offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * normalised, axis=1) / H
        grad_x = rstd[:, None] * (scaled - normalised * mean[:, None])
        if HAS_GRAD_SUM:
            grad_x += tl.load(grad_sum_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, grad_x, mask=inside)
        if NEEDS_WEIGHT:
            grad_weight += tl.sum(grad * normalised, axis=0)
    if NEEDS_WEIGHT:  # one row a program, summed by torch: no atomics, so the same bits every time
        tl.store(grad_weight_ptr + tl.program_id(0).to(tl.int64) * H + columns, grad_weight, mask=columns < H)


@torch.library.custom_op("thinksafe::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or nothing, rstd)."""
    rows, H = x.numel() // x.shape[-1], x.shape[-1]
    y = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows:
        tile, warps = _tile(H)
        _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x,
            residual,
            total,
            weight,
            y,
            rstd,
            rows,
            H,
            eps,
            HAS_RESIDUAL=residual is not None,
            **tile,
            num_warps=warps,
        )
    return y, total, rstd


@_rms_norm.register_fake
def _(x, residual, weight, eps):
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    return torch.empty_like(x), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("thinksafe::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight or nothing)."""
    rows, H = x.numel() // x.shape[-1], x.shape[-1]
    tile, warps = _tile(H)
    num_blocks = triton.cdiv(rows, tile["ROWS"])
    programs = min(num_blocks, 1024)
    grad_x = torch.empty_like(x)
    partials = x.new_empty((programs, H) if needs_weight else 0, dtype=torch.float32)
    if rows:
        _backward_kernel[(programs,)](
            grad.contiguous(),
            x,
            weight,
            rstd,
            grad_total,
            grad_x,
            partials,
            rows,
            H,
            num_blocks,
            HAS_GRAD_SUM=grad_total is not None,
            NEEDS_WEIGHT=needs_weight,
            **tile,
            num_warps=warps,
        )
    return grad_x, partials.sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)


@_rms_norm_backward.register_fake
def _(grad, grad_total, x, weight, rstd, needs_weight):
    return torch.empty_like(x), torch.empty_like(weight) if needs_weight else weight.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_total, _):
    x, weight, rstd = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_total = grad_total.contiguous() if ctx.has_residual and grad_total is not None else None
    needs_weight = ctx.needs_input_grad[2]
    grad_x, grad_weight = _rms_norm_backward(grad_y, grad_total, x, weight, rstd, needs_weight)
    return grad_x, grad_x if ctx.has_residual else None, grad_weight if needs_weight else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def _tile(H: int) -> tuple[dict[str, int], int]:
    block = triton.next_power_of_2(H)
    return {"ROWS": max(1, _TILE // block), "BLOCK_H": block}, 4 if block <= 1024 else 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [..., H], floating point.
        weight: [H], the learned gain, contiguous, in the dtype of x.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name.
    """
    _check(x, weight, eps)
    return _rms_norm(x.contiguous(), None, weight, eps)[0] if on_triton(x) else reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass; residual like x, the others as for `rms_norm`."""
    _check(x, weight, eps)
    check_tensor("residual", residual, x.shape, x.dtype, x.device)
    if on_triton(x):
        return _rms_norm(x.contiguous(), residual.contiguous(), weight, eps)[:2]
    total = x + residual
    return reference(total, weight, eps), total


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_number("eps", eps, 0)
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., H] with H at least 1; found {list(x.shape)}")
    check_tensor("weight", weight, x.shape[-1:], x.dtype, x.device, strided=False)
