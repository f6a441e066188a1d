"""Rotary position embedding in the half-split layout of the Llama family, alone or after Qwen3's norm of q and k.

Pairs (x[i], x[i + D/2]) are rotated by position * inv_freq[i]. Angles are formed in fp32: at position 100,000 a bf16
angle would be off by hundreds of radians. Norm and rotation read a head once and write it once, 2 * T * heads * D *
itemsize bytes, where two operations would move twice that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_number, check_tensor
from thinksafe.kernels.dispatch import jit, on_triton, tl, triton
from thinksafe.kernels.rms_norm import reference as rms_norm_reference

TILE = 2048  # pairs a program holds at once: rows * D/2


def inverse_frequencies(head_dim: int, theta: float, llama3_scaling: dict | None = None) -> Tensor:
    """Angular step a position, for each of the D/2 pairs.

    Args:
        head_dim: D.
        theta: the base, 1e4 to 1e6 in practice.
        llama3_scaling: `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`, or
            None. Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly
            (Llama 3.1's context extension).

    Returns:
        [D/2] fp32.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if llama3_scaling is None:
        return inv_freq
    factor = llama3_scaling["factor"]
    low, high = llama3_scaling["low_freq_factor"], llama3_scaling["high_freq_factor"]
    original_context = llama3_scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    blend = ((original_context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inv_freq / factor + blend * inv_freq


def reference(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`qk_norm_rope` of one tensor in plain torch; `rope` where weight is None."""
    if weight is not None:
        x = rms_norm_reference(x, weight, eps)
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    num_heads,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    # A row is one head of one token; its two halves are two tiles, so that a pair lies in one thread.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, HALF)
    inside = (rows < num_rows)[:, None]
    first_half = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs[None, :]
    angle = (rows // num_heads).to(tl.int64)[:, None] * HALF + pairs[None, :]
    first = tl.load(x_ptr + first_half, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + first_half + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    if NORM:
        rstd = 1 / tl.sqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        first *= rstd[:, None] * tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
        second *= rstd[:, None] * tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
    tl.store(y_ptr + first_half, first * cos - second * sin, mask=inside)
    tl.store(y_ptr + first_half + HALF, second * cos + first * sin, mask=inside)


@jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    num_rows,
    num_heads,
    num_blocks,
    NORM: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    pairs = tl.arange(0, HALF)
    grad_weight_first = tl.zeros((HALF,), tl.float32)
    grad_weight_second = tl.zeros((HALF,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None]
        first_half = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs[None, :]
        angle = (rows // num_heads).to(tl.int64)[:, None] * HALF + pairs[None, :]
        grad_first = tl.load(grad_ptr + first_half, mask=inside, other=0.0).to(tl.float32)
        grad_second = tl.load(grad_ptr + first_half + HALF, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
        # The inverse rotation.
        turned_first = grad_first * cos + grad_second * sin
        turned_second = grad_second * cos - grad_first * sin
        if NORM:
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            first = tl.load(x_ptr + first_half, mask=inside, other=0.0).to(tl.float32) * rstd
            second = tl.load(x_ptr + first_half + HALF, mask=inside, other=0.0).to(tl.float32) * rstd
            if NEEDS_WEIGHT:
                grad_weight_first += tl.sum(turned_first * first, axis=0)
                grad_weight_second += tl.sum(turned_second * second, axis=0)
            turned_first *= tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
            turned_second *= tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
            mean = (tl.sum(turned_first * first, axis=1) + tl.sum(turned_second * second, axis=1)) / (2 * HALF)
            turned_first = rstd * (turned_first - first * mean[:, None])
            turned_second = rstd * (turned_second - second * mean[:, None])
        tl.store(grad_x_ptr + first_half, turned_first, mask=inside)
        tl.store(grad_x_ptr + first_half + HALF, turned_second, mask=inside)
    if NEEDS_WEIGHT:  # one row a program, summed by torch: no atomics, so the same bits every time
        out = grad_weight_ptr + tl.program_id(0).to(tl.int64) * (2 * HALF) + pairs
        tl.store(out, grad_weight_first)
        tl.store(out + HALF, grad_weight_second)


@torch.library.custom_op("thinksafe::norm_rope", mutates_args=())
def _norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(y, rstd or nothing)."""
    rows, half = x.shape[0] * x.shape[1], x.shape[2] // 2
    y = torch.empty_like(x)
    rstd = x.new_empty(rows if weight is not None else 0, dtype=torch.float32)
    if rows:
        _forward_kernel[(triton.cdiv(rows, TILE // half),)](
            x, weight, cos, sin, y, rstd, rows, x.shape[1], eps,
            NORM=weight is not None, ROWS=TILE // half, HALF=half, num_warps=4,
        )  # fmt: skip
    return y, rstd


@_norm_rope.register_fake
def _(x, weight, eps, cos, sin):
    rows = x.shape[0] * x.shape[1] if weight is not None else 0
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("thinksafe::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight or nothing)."""
    rows, half = grad.shape[0] * grad.shape[1], grad.shape[2] // 2
    num_blocks = triton.cdiv(rows, TILE // half)
    programs = min(num_blocks, 1024)
    grad_x = torch.empty_like(grad)
    partials = grad.new_empty((programs, 2 * half) if needs_weight else 0, dtype=torch.float32)
    if rows:
        _backward_kernel[(programs,)](
            grad, x, weight, cos, sin, rstd, grad_x, partials, rows, grad.shape[1], num_blocks,
            NORM=weight is not None, NEEDS_WEIGHT=needs_weight, ROWS=TILE // half, HALF=half, num_warps=4,
        )  # fmt: skip
    return grad_x, partials.sum(0).to(grad.dtype) if needs_weight else grad.new_empty(0)


@_norm_rope_backward.register_fake
def _(grad, x, weight, cos, sin, rstd, needs_weight):
    return torch.empty_like(grad), grad.new_empty(grad.shape[2] if needs_weight else 0)


def _setup_context(ctx, inputs, output):
    x, weight, _, cos, sin = inputs
    # Without the norm the rotation alone is undone: x is not needed.
    ctx.save_for_backward(x if weight is not None else None, weight, cos, sin, output[1])


def _backward(ctx, grad, _):
    x, weight, cos, sin, rstd = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x, grad_weight = _norm_rope_backward(
        grad, grad if x is None else x, weight, cos, sin, rstd, weight is not None and ctx.needs_input_grad[1]
    )
    return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None, None


_norm_rope.register_autograd(_backward, setup_context=_setup_context)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of x.

    Args:
        x: [T, num_heads, D], floating point; D even, and a power of two on a GPU.
        cos, sin: [T, D/2] fp32, of the tokens' positions.

    Returns:
        [T, num_heads, D] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name.
    """
    return _rotate("x", x, None, 0.0, cos, sin)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Qwen3's normalisation of every head of q and k, then the rotation, in one pass over each.

    Args:
        q: [T, num_heads, D]; k: [T, num_kv_heads, D]; as for `rope`.
        q_weight, k_weight: [D], gains, contiguous, in the dtypes of q and k.
        eps: added to the mean square.
        cos, sin: [T, D/2] fp32.

    Returns:
        q and k, same shapes and dtypes.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name.
    """
    check_number("eps", eps, 0)
    for name, gain in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_floating(name, gain)
    return _rotate("q", q, q_weight, eps, cos, sin), _rotate("k", k, k_weight, eps, cos, sin)


def _rotate(name: str, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    check_floating(name, x)
    if x.dim() != 3 or x.shape[2] % 2 or x.shape[2] == 0:
        raise ValueError(f"{name} must be [T, heads, D] with D even; found {list(x.shape)}")
    half = x.shape[2] // 2
    if on_triton(x) and (half & (half - 1) or half > TILE):
        raise ValueError(f"{name} has heads of {x.shape[2]} elements; a GPU takes powers of two up to {2 * TILE}")
    for table, angles in (("cos", cos), ("sin", sin)):
        check_tensor(table, angles, (x.shape[0], half), torch.float32, x.device)
    if weight is not None:
        check_tensor(f"{name}_weight", weight, x.shape[2:], x.dtype, x.device, strided=False)
    if on_triton(x):
        return _norm_rope(x.contiguous(), weight, eps, cos.contiguous(), sin.contiguous())[0]
    return reference(x, weight, eps, cos.detach(), sin.detach())
