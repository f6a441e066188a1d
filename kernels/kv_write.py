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
from thinksafe.kernels.paged_cache import KvCache, cache_row, write_kv
from thinksafe.kernels.rope import load_halves, norm_and_rotate
from thinksafe.kernels.rope import reference as rope_reference


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor,
    sin: Tensor, cache: KvCache, slots: Tensor,
) -> Tensor:  # fmt: skip
    """Do what `norm_rope_write_kv` does, in plain torch."""
    write_kv(cache, rope_reference(k, k_weight, eps, cos, sin), v, slots)
    return rope_reference(q, q_weight, eps, cos, sin)


@jit
def _quantize_heads(x, abs_max, scales_ptr, rows, mask):
    """Return fp32 heads x [BLOCK_H, ...] divided by their scales, and store the scales, which follow from abs_max.

    Without scales_ptr the cache is not in e4m3: return x unchanged and store nothing."""
    if scales_ptr is not None:
        scale_e8m0 = amax_to_e8m0(abs_max)
        tl.store(scales_ptr + rows[:, None], scale_e8m0[:, None], mask=mask)
        x = x * power_of_two(254 - scale_e8m0)[:, None]
    return x


@jit
def _norm_rope_write_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr, out_ptr, key_ptr, value_ptr,
    key_scales_ptr, value_scales_ptr, q_stride, k_stride, v_stride, num_heads, num_kv_heads, eps,
    PAGE_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate q and k of one token per program; store q in out_ptr, k and v in the token's cache slot."""
    token, pairs, columns = tl.program_id(0).to(tl.int64), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    cos = tl.load(cos_ptr + token * HALF + pairs)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pairs)[None, :]
    heads = tl.arange(0, BLOCK_Q)
    q_mask = (heads < num_heads)[:, None]
    offsets = token * q_stride + heads[:, None] * (2 * HALF) + pairs[None, :]
    x1, x2 = load_halves(q_ptr, offsets, q_mask, HALF)
    x1, x2, _ = norm_and_rotate(x1, x2, q_weight_ptr, cos, sin, eps, HALF)
    offsets = (token * num_heads + heads)[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(out_ptr + offsets, x1, mask=q_mask)
    tl.store(out_ptr + offsets + HALF, x2, mask=q_mask)

    slot, heads = tl.load(slots_ptr + token), tl.arange(0, BLOCK_KV)
    kv_mask = (heads < num_kv_heads)[:, None]
    rows = cache_row(slot // PAGE_SIZE, heads, slot % PAGE_SIZE, num_kv_heads, PAGE_SIZE)
    offsets = token * k_stride + heads[:, None] * (2 * HALF) + pairs[None, :]
    x1, x2 = load_halves(k_ptr, offsets, kv_mask, HALF)
    x1, x2, _ = norm_and_rotate(x1, x2, k_weight_ptr, cos, sin, eps, HALF)
    abs_max = tl.maximum(tl.max(tl.abs(x1), axis=1), tl.max(tl.abs(x2), axis=1))
    offsets = rows[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(key_ptr + offsets, _quantize_heads(x1, abs_max, key_scales_ptr, rows, kv_mask), mask=kv_mask)
    tl.store(key_ptr + offsets + HALF, _quantize_heads(x2, abs_max, key_scales_ptr, rows, kv_mask), mask=kv_mask)

    v_offsets = token * v_stride + heads[:, None] * (2 * HALF) + columns[None, :]
    v = tl.load(v_ptr + v_offsets, mask=kv_mask, other=0.0).to(tl.float32)
    v = _quantize_heads(v, tl.max(tl.abs(v), axis=1), value_scales_ptr, rows, kv_mask)
    tl.store(value_ptr + rows[:, None] * (2 * HALF) + columns[None, :], v, mask=kv_mask)


def norm_rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor,
    sin: Tensor, cache: KvCache, slots: Tensor,
) -> Tensor:  # fmt: skip
    """Normalize and rotate q and k, store k and v in the cache, and return q [T, num_heads, D]. Not differentiable.

    Args:
        q, k, v: [T, num_heads, D] and [T, num_kv_heads, D]. The heads of a token are contiguous, the stride between
            tokens is free: all three may be column slices of one matmul. On a GPU D is a power of two.
        q_weight, k_weight: [D], gains of RMSNorm; both None for models that only rotate q and k.
        eps: added to the mean square of the norm.
        cos, sin: [T, D/2] fp32, of the angles position * inverse frequency.
        cache: changed in place.
        slots: [T] int64, page * page_size + offset of each token; all different.

    Raises:
        ValueError: the shapes of q, k, v, cos, slots and the cached keys do not fit together. Nothing else is checked.
    """
    (T, num_heads, D), (_, num_kv_heads, page_size, _) = q.shape, cache.keys.shape
    if not (k.shape == v.shape == (T, num_kv_heads, D)) or cos.shape != (T, D // 2) or slots.shape != (T,):
        raise ValueError(
            "expected q [T, num_heads, D], k and v [T, num_kv_heads, D], cos [T, D/2] and slots [T]; found q "
            f"{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, cos {list(cos.shape)}, slots {list(slots.shape)}"
        )
    if not on_triton(q):
        return reference(q, k, v, q_weight, k_weight, eps, cos, sin, cache, slots)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if T:
        q, k, v = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q, k, v))
        _norm_rope_write_kernel[(T,)](
            q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous(), slots.contiguous(), out, *cache,
            q.stride(0), k.stride(0), v.stride(0), num_heads, num_kv_heads, eps, PAGE_SIZE=page_size,
            BLOCK_Q=triton.next_power_of_2(num_heads), BLOCK_KV=triton.next_power_of_2(num_kv_heads), HALF=D // 2,
            num_warps=4,
        )  # fmt: skip
    return out
