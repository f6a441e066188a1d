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
    """Return the rotation angle per position of each of the D/2 pairs, theta ** (-2 i / D) for pair i, [D/2] fp32.

    `llama3_scaling` is Llama 3.1's context extension. With C = `original_max_position_embeddings`, the frequencies of
    wavelengths from C / `low_freq_factor` on are divided by `factor`, those of wavelengths up to C / `high_freq_factor`
    are kept, and between the two the share that is kept grows linearly in the frequency."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if llama3_scaling is None:
        return inv_freq
    low, high = llama3_scaling["low_freq_factor"], llama3_scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    kept_share = (llama3_scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    kept_share = kept_share.clamp(0, 1)
    return (1 - kept_share) * inv_freq / llama3_scaling["factor"] + kept_share * inv_freq


def reference(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [T, num_heads, D] with every head normalized and rotated, in plain torch; only rotated without weight.

    weight is [D], the gain of RMSNorm; cos and sin are [T, D/2] fp32, of the angles of each token."""
    if weight is not None:
        x = rms_norm_reference(x, weight, eps)
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


@jit
def load_halves(x_ptr, offsets, mask, HALF: tl.constexpr):
    """Return both halves of the heads at `offsets`, [rows, HALF] fp32 each, so that one thread holds both elements of a
    pair."""
    x1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return x1, tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)


@jit
def norm_and_rotate(x1, x2, weight_ptr, cos, sin, eps, HALF: tl.constexpr):
    """Return both rotated halves of heads, and the 1 / rms that normalized them first; 0, and no norm, without gain."""
    pairs, rstd = tl.arange(0, HALF), 0.0
    if weight_ptr is not None:
        rstd = 1 / tl.sqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)
        x1 *= rstd[:, None] * tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
        x2 *= rstd[:, None] * tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin, rstd


@jit
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rstd_ptr, num_rows, num_heads, eps,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # A row is one head of one token.
    rows, pairs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    mask = (rows < num_rows)[:, None]
    offsets = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs[None, :]
    angle_offsets = (rows // num_heads).to(tl.int64)[:, None] * HALF + pairs[None, :]
    x1, x2 = load_halves(x_ptr, offsets, mask, HALF)
    cos = tl.load(cos_ptr + angle_offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle_offsets, mask=mask, other=0.0)
    y1, y2, rstd = norm_and_rotate(x1, x2, weight_ptr, cos, -sin if INVERSE else sin, eps, HALF)
    if weight_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    tl.store(y_ptr + offsets, y1, mask=mask)
    tl.store(y_ptr + offsets + HALF, y2, mask=mask)


@jit
def _backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, grad_x_ptr, grad_weight_ptr, num_rows, num_heads,
    num_blocks, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Compute gradients of norm and rotation, the one of the gain unless grad_weight_ptr is None."""
    pairs = tl.arange(0, HALF)
    grad_weight1, grad_weight2 = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None]
        offsets = rows.to(tl.int64)[:, None] * (2 * HALF) + pairs[None, :]
        angle_offsets = (rows // num_heads).to(tl.int64)[:, None] * HALF + pairs[None, :]
        grad_y1, grad_y2 = load_halves(grad_y_ptr, offsets, mask, HALF)
        cos = tl.load(cos_ptr + angle_offsets, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle_offsets, mask=mask, other=0.0)
        # The gradient of a rotation is the inverse rotation.
        grad_x1, grad_x2 = grad_y1 * cos + grad_y2 * sin, grad_y2 * cos - grad_y1 * sin
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        x1, x2 = load_halves(x_ptr, offsets, mask, HALF)
        x_hat1, x_hat2 = x1 * rstd, x2 * rstd
        if grad_weight_ptr is not None:
            grad_weight1 += tl.sum(grad_x1 * x_hat1, axis=0)
            grad_weight2 += tl.sum(grad_x2 * x_hat2, axis=0)
        grad_x1 *= tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
        grad_x2 *= tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
        mean = (tl.sum(grad_x1 * x_hat1, axis=1) + tl.sum(grad_x2 * x_hat2, axis=1)) / (2 * HALF)
        tl.store(grad_x_ptr + offsets, rstd * (grad_x1 - x_hat1 * mean[:, None]), mask=mask)
        tl.store(grad_x_ptr + offsets + HALF, rstd * (grad_x2 - x_hat2 * mean[:, None]), mask=mask)
    if grad_weight_ptr is not None:  # one row per program, which torch sums: no atomics, so the bits never change
        partial_ptr = grad_weight_ptr + tl.program_id(0).to(tl.int64) * (2 * HALF) + pairs
        tl.store(partial_ptr, grad_weight1)
        tl.store(partial_ptr + HALF, grad_weight2)


@torch.library.custom_op("thinksafe::norm_rope", mutates_args=())
def _norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return (y [T, heads, D], rstd [T * heads] fp32); without weight there is no norm, and rstd has no elements.

    `inverse`, only without weight, rotates by the negative angles: the gradient of the rotation."""
    (T, num_heads, D), (y, rstd) = x.shape, _empty_outputs(x, weight)
    rows_per_program = PAIRS_PER_PROGRAM // (D // 2)
    if T * num_heads:
        _forward_kernel[(triton.cdiv(T * num_heads, rows_per_program),)](
            x, weight, cos, sin, y, rstd, T * num_heads, num_heads, eps, INVERSE=inverse, ROWS=rows_per_program,
            HALF=D // 2, num_warps=4,
        )  # fmt: skip
    return y, rstd


@_norm_rope.register_fake
def _empty_outputs(x, weight, *_):
    num_rows = x.shape[0] * x.shape[1] if weight is not None else 0
    return torch.empty_like(x), x.new_empty(num_rows, dtype=torch.float32)


@torch.library.custom_op("thinksafe::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx [T, heads, D], dweight [D]); dweight has no elements unless it is needed."""
    T, num_heads, D = x.shape
    rows_per_program = PAIRS_PER_PROGRAM // (D // 2)
    num_blocks = triton.cdiv(T * num_heads, rows_per_program)
    num_programs = min(num_blocks, 1024)
    grad_x = torch.empty_like(x)
    partial_grad_weight = x.new_empty(num_programs, D, dtype=torch.float32) if needs_weight else None
    if T * num_heads:
        _backward_kernel[(num_programs,)](
            grad_y, x, weight, cos, sin, rstd, grad_x, partial_grad_weight, T * num_heads, num_heads, num_blocks,
            ROWS=rows_per_program, HALF=D // 2, num_warps=4,
        )  # fmt: skip
    return grad_x, partial_grad_weight.sum(0).to(x.dtype) if needs_weight else x.new_empty(0)


@_norm_rope_backward.register_fake
def _(grad_y, x, weight, cos, sin, rstd, needs_weight):
    return torch.empty_like(x), torch.empty_like(weight) if needs_weight else x.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, weight, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(x if weight is not None else None, weight, cos, sin, output[1])


def _backward(ctx, grad_y, _):
    x, weight, cos, sin, rstd = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    if weight is None:
        return _norm_rope(grad_y, None, 0.0, cos, sin, not ctx.inverse)[0], None, None, None, None, None
    needs_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight = _norm_rope_backward(grad_y, x, weight, cos, sin, rstd, needs_weight)
    return grad_x, grad_weight if needs_weight else None, None, None, None, None


_norm_rope.register_autograd(_backward, setup_context=_setup_context)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with every pair (x[i], x[i + D/2]) of each head rotated; differentiable in x.

    With c = cos[t, i] and s = sin[t, i] the pair becomes (x[i] c - x[i + D/2] s, x[i + D/2] c + x[i] s). x is
    [T, num_heads, D], floating point, with D even, and a power of two on a GPU. cos and sin, [T, D/2] fp32 constants,
    belong to the angles position * inverse frequency of each token.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    return _rotate_heads("x", x, None, 0.0, cos, sin)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k with Qwen3's RMSNorm applied to every head, then rotated as by `rope`.

    Differentiable in q, k and the gains. q is [T, num_heads, D] and k [T, num_kv_heads, D], like x of `rope`. The gains
    q_weight and k_weight are [D], contiguous, in the dtypes of q and k; eps is added to the mean square.

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
        limit = 2 * PAIRS_PER_PROGRAM
        raise ValueError(f"{name} has heads of {x.shape[2]} elements; a GPU needs a power of two up to {limit}")
    for table_name, table in (("cos", cos), ("sin", sin)):
        check_tensor(table_name, table, (x.shape[0], half), torch.float32, x.device)
    if weight is not None:
        check_tensor(f"{name}_weight", weight, x.shape[2:], x.dtype, x.device, allow_strided=False)
    if on_triton(x):
        return _norm_rope(x.contiguous(), weight, eps, cos.contiguous(), sin.contiguous(), False)[0]
    return reference(x, weight, eps, cos.detach(), sin.detach())
