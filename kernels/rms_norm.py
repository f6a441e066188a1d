"""RMSNorm, root-mean-square normalization: y = x / sqrt(mean(x^2) + eps) * weight, alone or after a residual addition.

Forward reads x once and writes y once, 2 * T * H * itemsize bytes. With the residual it reads two tensors and writes
two. Backward reads dy and x and writes dx:
    x̂ = x * rstd,  g = dy * weight,  dx = rstd * (g - x̂ * mean(g * x̂)),  dweight = sum over rows of dy * x̂.
Means are computed in fp32 for every dtype of x: a bf16 sum of H = 4096 squares has only two correct digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_number, check_tensor
from thinksafe.kernels.dispatch import jit, on_triton, tl, triton

ELEMENTS_PER_PROGRAM = 4096  # 16 to 32 per thread: the backward pass holds five such tiles in registers


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last dimension, [..., H], in plain torch.

    As in Hugging Face models, the normalized x is rounded to the dtype of x before it is multiplied by weight [H]."""
    x32 = x.float()
    x_hat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


@jit
def _forward_kernel(
    x_ptr, residual_ptr, residual_out_ptr, weight_ptr, y_ptr, rstd_ptr, num_rows, H, eps,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_H)
    mask = (rows < num_rows)[:, None] & (columns < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]  # T * H exceeds 2^31 at T = 1M, H = 2048
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        residual_out = x.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + offsets, residual_out, mask=mask)
        x = residual_out.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / H + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0)
    tl.store(y_ptr + offsets, weight[None, :] * (x * rstd[:, None]).to(weight.dtype), mask=mask)


@jit
def _backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, rstd_ptr, grad_residual_out_ptr, grad_x_ptr, grad_weight_ptr, num_rows, H,
    num_blocks, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_H,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < H)[None, :]
        offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
        grad_x_hat = grad_y * weight[None, :]
        mean = tl.sum(grad_x_hat * x_hat, axis=1) / H
        grad_x = rstd[:, None] * (grad_x_hat - x_hat * mean[:, None])
        if grad_residual_out_ptr is not None:
            grad_x += tl.load(grad_residual_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, grad_x, mask=mask)
        if grad_weight_ptr is not None:
            grad_weight += tl.sum(grad_y * x_hat, axis=0)
    if grad_weight_ptr is not None:  # one row per program, which torch sums: no atomics, so the bits never change
        tl.store(grad_weight_ptr + tl.program_id(0).to(tl.int64) * H + columns, grad_weight, mask=columns < H)


@torch.library.custom_op("thinksafe::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (norm of x, no elements, rstd), or with a residual (norm of x + residual, x + residual, rstd).

    The norm and the sum are [..., H], rstd is [...] fp32."""
    num_rows, H = x.numel() // x.shape[-1], x.shape[-1]
    (y, residual_out, rstd), config = _empty_outputs(x, residual), launch_config(H)
    if num_rows:
        _forward_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
            x, residual, residual_out, weight, y, rstd, num_rows, H, eps, **config
        )
    return y, residual_out, rstd


@_rms_norm.register_fake
def _empty_outputs(x, residual, *_):
    residual_out = torch.empty_like(x) if residual is not None else x.new_empty(0)
    return torch.empty_like(x), residual_out, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("thinksafe::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad_y: Tensor, grad_residual_out: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx [..., H], dweight [H]); dweight has no elements unless it is needed.

    x is the tensor that was normalized. grad_residual_out, the gradient that x gets elsewhere, is added to dx."""
    num_rows, H = x.numel() // x.shape[-1], x.shape[-1]
    config = launch_config(H)
    num_blocks = triton.cdiv(num_rows, config["ROWS"])
    num_programs = min(num_blocks, 1024)
    grad_x = torch.empty_like(x)
    partial_grad_weight = x.new_empty(num_programs, H, dtype=torch.float32) if needs_weight else None
    if num_rows:
        _backward_kernel[(num_programs,)](
            grad_y.contiguous(), x, weight, rstd, grad_residual_out, grad_x, partial_grad_weight, num_rows, H,
            num_blocks, **config,
        )  # fmt: skip
    return grad_x, partial_grad_weight.sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)


@_rms_norm_backward.register_fake
def _(grad_y, grad_residual_out, x, weight, rstd, needs_weight):
    return torch.empty_like(x), torch.empty_like(weight) if needs_weight else weight.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, residual_out, rstd = output
    ctx.save_for_backward(x if residual is None else residual_out, weight, rstd)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_residual_out, _):
    x, weight, rstd = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_residual_out = grad_residual_out.contiguous() if ctx.has_residual and grad_residual_out is not None else None
    needs_weight = ctx.needs_input_grad[2]
    grad_x, grad_weight = _rms_norm_backward(grad_y, grad_residual_out, x, weight, rstd, needs_weight)
    return grad_x, grad_x if ctx.has_residual else None, grad_weight if needs_weight else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def launch_config(H: int) -> dict[str, int]:
    """Return constants and number of warps of the kernels for rows of H elements; ROWS is the rows of a tile."""
    block = triton.next_power_of_2(H)
    return {"ROWS": max(1, ELEMENTS_PER_PROGRAM // block), "BLOCK_H": block, "num_warps": 4 if block <= 1024 else 8}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last dimension; differentiable in x and weight.

    x is [..., H], floating point; weight [H], the learned gain, is contiguous and in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    _check(x, weight, eps)
    return _rms_norm(x.contiguous(), None, weight, eps)[0] if on_triton(x) else reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual, weight, eps), x + residual), in one pass on a GPU; differentiable.

    The norm is that of the rounded sum. `residual` has the shape, dtype and device of x.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    _check(x, weight, eps)
    check_tensor("residual", residual, x.shape, x.dtype, x.device)
    if on_triton(x):
        return _rms_norm(x.contiguous(), residual.contiguous(), weight, eps)[:2]
    residual_out = x + residual
    return reference(residual_out, weight, eps), residual_out


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_number("eps", eps, 0)
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., H] with H at least 1; found {list(x.shape)}")
    check_tensor("weight", weight, x.shape[-1:], x.dtype, x.device, allow_strided=False)
