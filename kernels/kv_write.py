"""RMSNorm and RoPE of q and k, and the write of k and v into the paged KV cache, in one launch.

Separate operations would launch four kernels per layer of a decode step and move k three times. One launch reads q, k
and v once and writes each of them to the memory that attention reads: 2 * T * (num_heads + 2 * num_kv_heads) * D *
itemsize bytes. For a cache in e4m3 (see fp8.py) the kernel rounds keys and values once, from fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import amax_to_e8m0, power_of_two
from thinksafe.kernels.paged_cache import KvScales, cache_row, write_kv
from thinksafe.kernels.rope import reference as rope_reference


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor,
    sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, scales_e8m0: KvScales = (None, None),
) -> Tensor:  # fmt: skip
    """Return normalized and rotated q, and store k (likewise) and v in the cache.

    This is `norm_rope_write_kv` in plain torch, with the same arguments; q and k may have any strides.
    """
    write_kv(key_cache, value_cache, rope_reference(k, k_weight, eps, cos, sin), v, slots, scales_e8m0)
    return rope_reference(q, q_weight, eps, cos, sin)


@jit
def _load_and_rotate(
    x_ptr, weight_ptr, start, num_heads, cos, sin, eps, NORM: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr
):
    """Return both rotated halves of every head of the token at x_ptr + start, [BLOCK_H, HALF] fp32 each.

    With NORM, the heads are normalized and multiplied by the gain at weight_ptr first. Rows from num_heads on are 0.
    The halves are two tiles, so that one thread holds both elements of a pair."""
    heads, pairs = tl.arange(0, BLOCK_H), tl.arange(0, HALF)
    mask = (heads < num_heads)[:, None]
    offsets = start + heads[:, None] * (2 * HALF) + pairs[None, :]
    x1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        rstd = 1 / tl.sqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)
        x1 *= rstd[:, None] * tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
        x2 *= rstd[:, None] * tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@jit
def _quantize_heads(x, abs_max, scales_ptr, rows, mask):
    """Return fp32 heads x [BLOCK_H, ...] as the cache stores them, and store their scales.

    Without scales_ptr the cache is not in e4m3: return x unchanged and store nothing. Otherwise divide each head by its
    scale, which follows from abs_max [BLOCK_H], and store scale_e8m0 at scales_ptr + rows where `mask` [BLOCK_H, 1] is
    True."""
    if scales_ptr is not None:
        scale_e8m0 = amax_to_e8m0(abs_max)
        tl.store(scales_ptr + rows[:, None], scale_e8m0[:, None], mask=mask)
        x = x * power_of_two(254 - scale_e8m0)[:, None]
    return x


@jit
def _norm_rope_write_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr, out_ptr, key_ptr, value_ptr,
    key_scales_ptr, value_scales_ptr, q_stride, k_stride, v_stride, num_heads, num_kv_heads, eps,
    NORM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate q and k of one token per program; store q in out_ptr, k and v in the token's cache slot."""
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + pairs)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pairs)[None, :]
    heads = tl.arange(0, BLOCK_Q)
    x1, x2 = _load_and_rotate(q_ptr, q_weight_ptr, token * q_stride, num_heads, cos, sin, eps, NORM, BLOCK_Q, HALF)
    offsets = (token * num_heads + heads)[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(out_ptr + offsets, x1, mask=(heads < num_heads)[:, None])
    tl.store(out_ptr + offsets + HALF, x2, mask=(heads < num_heads)[:, None])

    slot, heads = tl.load(slots_ptr + token), tl.arange(0, BLOCK_KV)
    kv_mask = (heads < num_kv_heads)[:, None]
    rows = cache_row(slot // PAGE_SIZE, heads, slot % PAGE_SIZE, num_kv_heads, PAGE_SIZE)
    start = token * k_stride
    x1, x2 = _load_and_rotate(k_ptr, k_weight_ptr, start, num_kv_heads, cos, sin, eps, NORM, BLOCK_KV, HALF)
    abs_max = tl.maximum(tl.max(tl.abs(x1), axis=1), tl.max(tl.abs(x2), axis=1))
    offsets = rows[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(key_ptr + offsets, _quantize_heads(x1, abs_max, key_scales_ptr, rows, kv_mask), mask=kv_mask)
    tl.store(key_ptr + offsets + HALF, _quantize_heads(x2, abs_max, key_scales_ptr, rows, kv_mask), mask=kv_mask)

    columns = tl.arange(0, 2 * HALF)
    v_offsets = token * v_stride + heads[:, None] * (2 * HALF) + columns[None, :]
    v = tl.load(v_ptr + v_offsets, mask=kv_mask, other=0.0).to(tl.float32)
    v = _quantize_heads(v, tl.max(tl.abs(v), axis=1), value_scales_ptr, rows, kv_mask)
    tl.store(value_ptr + rows[:, None] * (2 * HALF) + columns[None, :], v, mask=kv_mask)


def norm_rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    scales_e8m0: KvScales = (None, None),
) -> Tensor:
    """Normalize and rotate the heads of q and k, store k and v in the cache, and return q. Not differentiable.

    Args:
        q: [T, num_heads, D]. k, v: [T, num_kv_heads, D]. All three are the outputs of the projections. The heads of a
            token are contiguous, the stride between tokens is free: q, k and v may be column slices of one matmul. On
            a GPU D is a power of two.
        q_weight, k_weight: [D], gains of RMSNorm; both None for models without this norm, whose q and k are rotated
            only.
        eps: added to the mean square of the norm.
        cos, sin: [T, D/2] fp32, of the angles position * inverse frequency.
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], changed in place.
        slots: [T] int64, page * page_size + offset of each token; all different.
        scales_e8m0: (scales of keys, scales of values), each [num_pages, num_kv_heads, page_size] uint8 and changed in
            place, or None if that cache is in the dtype of q and not in e4m3.

    Returns:
        Normalized and rotated q, [T, num_heads, D] in its dtype, contiguous.

    Raises:
        ValueError: the shapes of q, k, v, cos, slots and the key cache do not fit together. Nothing else is checked.
    """
    (T, num_heads, D), (_, num_kv_heads, page_size, _) = q.shape, key_cache.shape
    if not (k.shape == v.shape == (T, num_kv_heads, D)) or cos.shape != (T, D // 2) or slots.shape != (T,):
        raise ValueError(
            "expected q [T, num_heads, D], k and v [T, num_kv_heads, D], cos [T, D/2] and slots [T]; found q "
            f"{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, cos {list(cos.shape)}, slots {list(slots.shape)}"
        )
    if not on_triton(q):
        return reference(q, k, v, q_weight, k_weight, eps, cos, sin, key_cache, value_cache, slots, scales_e8m0)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if T:
        q, k, v = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q, k, v))
        block_q, block_kv = triton.next_power_of_2(num_heads), triton.next_power_of_2(num_kv_heads)
        _norm_rope_write_kernel[(T,)](
            q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous(), slots.contiguous(), out, key_cache,
            value_cache, *scales_e8m0, q.stride(0), k.stride(0), v.stride(0), num_heads, num_kv_heads, eps,
            NORM=q_weight is not None, PAGE_SIZE=page_size, BLOCK_Q=block_q, BLOCK_KV=block_kv, HALF=D // 2,
            num_warps=4,
        )  # fmt: skip
    return out
