"""RoPE, rotary position embedding, in the half-split layout of the Llama family, alone or after Qwen3's RMSNorm of q
and k.

Each pair (x[i], x[i + D/2]) is rotated by the angle position * inv_freq[i]. Angles are computed in fp32: at position
100,000 a bf16 angle would be off by hundreds of radians. Norm and rotation together read a head once and write it once,
2 * T * heads * D * itemsize bytes; two separate operations would move twice that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_number, check_tensor
from thinksafe.kernels.dispatch import jit, on_triton, tl, triton
from thinksafe.kernels.rms_norm import reference as rms_norm_reference

PAIRS_PER_PROGRAM = 2048  # pairs that a program holds at once: rows * D/2


def inverse_frequencies(head_dim: int, theta: float, llama3_scaling: dict | None = None) -> Tensor:
    """Return the rotation angle per position of each of the D/2 pairs, theta ** (-2 i / D) for pair i, in radians.

    Args:
        head_dim: D, elements of an attention head, even.
        theta: the base, 1e4 to 1e6 in practice.
        llama3_scaling: Llama 3.1's context extension, or None for none. With C = `original_max_position_embeddings`,
            the frequencies of wavelengths from C / `low_freq_factor` on are divided by `factor`, those of wavelengths
            up to C / `high_freq_factor` are kept, and between the two the share that is kept grows linearly in the
            frequency.

    Returns:
        [D/2] fp32.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if llama3_scaling is None:
        return inv_freq
    factor = llama3_scaling["factor"]
    low_freq_factor, high_freq_factor = llama3_scaling["low_freq_factor"], llama3_scaling["high_freq_factor"]
    original_context = llama3_scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    unscaled_share = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    unscaled_share = unscaled_share.clamp(0, 1)
    return (1 - unscaled_share) * inv_freq / factor + unscaled_share * inv_freq


def reference(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with every head normalized and rotated, in plain torch; only rotated if weight is None.

    Args:
        x: [T, num_heads, D].
        weight: [D], gain of RMSNorm, or None.
        eps: added to the mean square of the norm.
        cos, sin: [T, D/2] fp32, of the angles of each token.
    """
    if weight is not None:
        x = rms_norm_reference(x, weight, eps)
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


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
    # A row is one head of one token. Its two halves are two tiles, so that one thread holds both elements of a pair.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, HALF)
    mask = (rows < num_rows)[:, None]
    offsets = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs[None, :]
    angle_offsets = (rows // num_heads).to(tl.int64)[:, None] * HALF + pairs[None, :]
    x1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle_offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle_offsets, mask=mask, other=0.0)
    if NORM:
        rstd = 1 / tl.sqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
        x1 *= rstd[:, None] * tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
        x2 *= rstd[:, None] * tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, x1 * cos - x2 * sin, mask=mask)
    tl.store(y_ptr + offsets + HALF, x2 * cos + x1 * sin, mask=mask)


@jit
def _backward_kernel(
    grad_y_ptr,
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
    grad_weight1 = tl.zeros((HALF,), tl.float32)
    grad_weight2 = tl.zeros((HALF,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None]
        offsets = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs[None, :]
        angle_offsets = (rows // num_heads).to(tl.int64)[:, None] * HALF + pairs[None, :]
        grad_y1 = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_y2 = tl.load(grad_y_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + angle_offsets, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle_offsets, mask=mask, other=0.0)
        # The gradient of a rotation is the inverse rotation.
        grad_x1 = grad_y1 * cos + grad_y2 * sin
        grad_x2 = grad_y2 * cos - grad_y1 * sin
        if NORM:
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            x_hat1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
            x_hat2 = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32) * rstd
            if NEEDS_WEIGHT:
                grad_weight1 += tl.sum(grad_x1 * x_hat1, axis=0)
                grad_weight2 += tl.sum(grad_x2 * x_hat2, axis=0)
            grad_x1 *= tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
            grad_x2 *= tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
            mean = (tl.sum(grad_x1 * x_hat1, axis=1) + tl.sum(grad_x2 * x_hat2, axis=1)) / (2 * HALF)
            grad_x1 = rstd * (grad_x1 - x_hat1 * mean[:, None])
            grad_x2 = rstd * (grad_x2 - x_hat2 * mean[:, None])
        tl.store(grad_x_ptr + offsets, grad_x1, mask=mask)
        tl.store(grad_x_ptr + offsets + HALF, grad_x2, mask=mask)
    if NEEDS_WEIGHT:  # one row per program, which torch sums: without atomics the bits are the same every time
        partial_ptr = grad_weight_ptr + tl.program_id(0).to(tl.int64) * (2 * HALF) + pairs
        tl.store(partial_ptr, grad_weight1)
        tl.store(partial_ptr + HALF, grad_weight2)


@torch.library.custom_op("thinksafe::norm_rope", mutates_args=())
def _norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y [T, heads, D], rstd [T * heads] fp32); without weight there is no norm, and rstd has no elements."""
    num_rows, half = x.shape[0] * x.shape[1], x.shape[2] // 2
    y = torch.empty_like(x)
    rstd = x.new_empty(num_rows if weight is not None else 0, dtype=torch.float32)
    if num_rows:
        _forward_kernel[(triton.cdiv(num_rows, PAIRS_PER_PROGRAM // half),)](
            x, weight, cos, sin, y, rstd, num_rows, x.shape[1], eps,
            NORM=weight is not None, ROWS=PAIRS_PER_PROGRAM // half, HALF=half, num_warps=4,
        )  # fmt: skip
    return y, rstd


@_norm_rope.register_fake
def _(x, weight, eps, cos, sin):
    num_rows = x.shape[0] * x.shape[1] if weight is not None else 0
    return torch.empty_like(x), x.new_empty(num_rows, dtype=torch.float32)


@torch.library.custom_op("thinksafe::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx [T, heads, D], dweight [D]); dweight has no elements unless it is needed."""
    num_rows, half = grad_y.shape[0] * grad_y.shape[1], grad_y.shape[2] // 2
    num_blocks = triton.cdiv(num_rows, PAIRS_PER_PROGRAM // half)
    num_programs = min(num_blocks, 1024)
    grad_x = torch.empty_like(grad_y)
    partial_grad_weight = grad_y.new_empty((num_programs, 2 * half) if needs_weight else 0, dtype=torch.float32)
    if num_rows:
        _backward_kernel[(num_programs,)](
            grad_y, x, weight, cos, sin, rstd, grad_x, partial_grad_weight, num_rows, grad_y.shape[1], num_blocks,
            NORM=weight is not None, NEEDS_WEIGHT=needs_weight, ROWS=PAIRS_PER_PROGRAM // half, HALF=half, num_warps=4,
        )  # fmt: skip
    return grad_x, partial_grad_weight.sum(0).to(grad_y.dtype) if needs_weight else grad_y.new_empty(0)


@_norm_rope_backward.register_fake
def _(grad_y, x, weight, cos, sin, rstd, needs_weight):
    return torch.empty_like(grad_y), grad_y.new_empty(grad_y.shape[2] if needs_weight else 0)


def _setup_context(ctx, inputs, output):
    x, weight, _, cos, sin = inputs
    # Without the norm the backward pass only inverts the rotation, so x is not saved.
    ctx.save_for_backward(x if weight is not None else None, weight, cos, sin, output[1])


def _backward(ctx, grad_y, _):
    x, weight, cos, sin, rstd = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    grad_x, grad_weight = _norm_rope_backward(
        grad_y, grad_y if x is None else x, weight, cos, sin, rstd, weight is not None and ctx.needs_input_grad[1]
    )
    return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None, None


_norm_rope.register_autograd(_backward, setup_context=_setup_context)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with every pair (x[i], x[i + D/2]) of each head rotated; differentiable in x.

    With c = cos[t, i] and s = sin[t, i] the pair becomes (x[i] c - x[i + D/2] s, x[i + D/2] c + x[i] s).

    Args:
        x: [T, num_heads, D], floating point; D even, and a power of two on a GPU.
        cos, sin: [T, D/2] fp32, of the angles position * inverse frequency of each token; constants.

    Returns:
        [T, num_heads, D] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    return _rotate_heads("x", x, None, 0.0, cos, sin)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k with Qwen3's RMSNorm applied to every head, then rotated as by `rope`; differentiable.

    On a GPU, norm and rotation together read q and k once and write the results once. q, k and the gains get gradients.

    Args:
        q: [T, num_heads, D], floating point; D even, and a power of two on a GPU.
        k: [T, num_kv_heads, D], floating point.
        q_weight, k_weight: [D], gains, contiguous, in the dtypes of q and k.
        eps: added to the mean square, at least 0.
        cos, sin: [T, D/2] fp32, of the angles position * inverse frequency of each token; constants.

    Returns:
        Two new tensors (q, k), with the shapes and dtypes of the arguments.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_number("eps", eps, 0)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_floating(name, weight)
    return _rotate_heads("q", q, q_weight, eps, cos, sin), _rotate_heads("k", k, k_weight, eps, cos, sin)


def _rotate_heads(name: str, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    check_floating(name, x)
    if x.dim() != 3 or x.shape[2] % 2 or x.shape[2] == 0:
        raise ValueError(f"{name} must be [T, heads, D] with D even; found {list(x.shape)}")
    half = x.shape[2] // 2
    if on_triton(x) and (half & (half - 1) or half > PAIRS_PER_PROGRAM):
        max_head_dim = 2 * PAIRS_PER_PROGRAM
        raise ValueError(f"{name} has heads of {x.shape[2]} elements; a GPU needs a power of two up to {max_head_dim}")
    for table_name, table in (("cos", cos), ("sin", sin)):
        check_tensor(table_name, table, (x.shape[0], half), torch.float32, x.device)
    if weight is not None:
        check_tensor(f"{name}_weight", weight, x.shape[2:], x.dtype, x.device, allow_strided=False)
    if on_triton(x):
        return _norm_rope(x.contiguous(), weight, eps, cos.contiguous(), sin.contiguous())[0]
    return reference(x, weight, eps, cos.detach(), sin.detach())
