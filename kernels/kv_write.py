"""Norm and rotation of q and k, and the way of k and v into the page cache, in one launch.

Apart, a decode step launches four kernels a layer here and moves k three times; one launch reads q, k and v once and
writes each where it is read next: 2 * T * (num_heads + 2 * num_kv_heads) * D * itemsize bytes. A cache in e4m3 (see
fp8.py) is rounded on the way, once, from fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import exponent_of, power_of_two
from thinksafe.kernels.paged_cache import Exponents, cache_row, write_kv
from thinksafe.kernels.rope import reference as rope_reference


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor,
    sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, exponents: Exponents = (None, None),
) -> Tensor:  # fmt: skip
    """`norm_rope_write_kv` in plain torch."""
    write_kv(key_cache, value_cache, rope_reference(k, k_weight, eps, cos, sin), v, slots, exponents)
    return rope_reference(q, q_weight, eps, cos, sin)


@jit
def _rotated(
    x_ptr, weight_ptr, start, num_heads, cos, sin, eps, NORM: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr
):
    """Both halves of every head of the token at x_ptr + start, [BLOCK_H, HALF] fp32 each, so that a pair lies in one
    thread."""
    heads, pairs = tl.arange(0, BLOCK_H), tl.arange(0, HALF)
    inside = (heads < num_heads)[:, None]
    at = start + heads[:, None] * (2 * HALF) + pairs[None, :]
    first = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rstd = 1 / tl.sqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)
        first *= rstd[:, None] * tl.load(weight_ptr + pairs).to(tl.float32)[None, :]
        second *= rstd[:, None] * tl.load(weight_ptr + HALF + pairs).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@jit
def _scaled(x, largest, exponents_ptr, rows, inside):
    """Heads [BLOCK_H, ...] fp32 as the cache takes them, their exponents stored where it is in e4m3."""
    if exponents_ptr is not None:
        exponent = exponent_of(largest)
        tl.store(exponents_ptr + rows[:, None], exponent[:, None], mask=inside)
        x = x * power_of_two(254 - exponent)[:, None]
    return x


@jit
def _norm_rope_write_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr, out_ptr, key_ptr, value_ptr,
    key_exponents_ptr, value_exponents_ptr, q_stride, k_stride, v_stride, num_heads, num_kv_heads, eps,
    NORM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token."""
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + pairs)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pairs)[None, :]
    heads = tl.arange(0, BLOCK_Q)
    first, second = _rotated(q_ptr, q_weight_ptr, token * q_stride, num_heads, cos, sin, eps, NORM, BLOCK_Q, HALF)
    to = (token * num_heads + heads)[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(out_ptr + to, first, mask=(heads < num_heads)[:, None])
    tl.store(out_ptr + to + HALF, second, mask=(heads < num_heads)[:, None])

    slot, heads = tl.load(slots_ptr + token), tl.arange(0, BLOCK_KV)
    inside = (heads < num_kv_heads)[:, None]
    rows = cache_row(slot // PAGE_SIZE, heads, slot % PAGE_SIZE, num_kv_heads, PAGE_SIZE)
    start = token * k_stride
    first, second = _rotated(k_ptr, k_weight_ptr, start, num_kv_heads, cos, sin, eps, NORM, BLOCK_KV, HALF)
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
    to = rows[:, None] * (2 * HALF) + pairs[None, :]
    tl.store(key_ptr + to, _scaled(first, largest, key_exponents_ptr, rows, inside), mask=inside)
    tl.store(key_ptr + to + HALF, _scaled(second, largest, key_exponents_ptr, rows, inside), mask=inside)

    columns = tl.arange(0, 2 * HALF)
    at = token * v_stride + heads[:, None] * (2 * HALF) + columns[None, :]
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = _scaled(v, tl.max(tl.abs(v), axis=1), value_exponents_ptr, rows, inside)
    tl.store(value_ptr + rows[:, None] * (2 * HALF) + columns[None, :], v, mask=inside)


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
    exponents: Exponents = (None, None),
) -> Tensor:
    """Normalise and rotate q and k, and store k and v. Not differentiable.

    Args:
        q: [T, num_heads, D]; k, v: [T, num_kv_heads, D], as projected, heads next to each other, tokens at any
            distance: they may be parts of one product. D a power of two on a GPU.
        q_weight, k_weight: [D], gains, or None for models without this norm.
        eps: added to the mean square.
        cos, sin: [T, D/2] fp32.
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], changed in place.
        slots: [T] int64, page * page_size + offset of each token; no two alike.
        exponents: of the caches that are in e4m3, changed in place.

    Returns:
        q, [T, num_heads, D].

    Raises:
        ValueError: the shapes do not fit.
    """
    (T, num_heads, D), (_, num_kv_heads, page_size, _) = q.shape, key_cache.shape
    if not (k.shape == v.shape == (T, num_kv_heads, D)) or cos.shape != (T, D // 2) or slots.shape != (T,):
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, cos {list(cos.shape)}, slots "
            f"{list(slots.shape)}: expected [T, heads, D], k and v alike, [T, D/2] and [T]"
        )
    if not on_triton(q):
        return reference(q, k, v, q_weight, k_weight, eps, cos, sin, key_cache, value_cache, slots, exponents)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if T:
        q, k, v = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q, k, v))
        block_q, block_kv = triton.next_power_of_2(num_heads), triton.next_power_of_2(num_kv_heads)
        _norm_rope_write_kernel[(T,)](
            q, k, v, q_weight, k_weight, cos.contiguous(), sin.contiguous(), slots.contiguous(), out, key_cache,
            value_cache, *exponents, q.stride(0), k.stride(0), v.stride(0), num_heads, num_kv_heads, eps,
            NORM=q_weight is not None, PAGE_SIZE=page_size, BLOCK_Q=block_q, BLOCK_KV=block_kv, HALF=D // 2,
            num_warps=4,
        )  # fmt: skip
    return out
