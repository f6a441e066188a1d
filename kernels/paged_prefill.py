"""Causal attention of the new tokens of prompts, or of parts of prompts, to their context in the paged KV cache
(paged_cache.py).

Prefill computes softmax(q kᵀ / sqrt(D)) v and is bound by arithmetic: 4 * D FLOPs per query head and visible (query,
key) pair. A tile of queries first passes over the keys that all its queries see, without a mask, then over the causal
remainder. One online softmax covers both passes.

A prefix that several sequences share needs no separate argument. Its page indices come first in the page-table rows of
these sequences, so all programs read the same addresses: once from memory, then from the L2 cache. Shared pages save
the whole forward pass of the prefix, 2 FLOPs per weight and token. A kernel that shared only the attention to the
prefix would save 4 * D FLOPs per query head and pair.

The query heads of one KV group are rows of one tile, so K and V are read once for all of them. As in paged_decode.py,
e4m3 tiles and the other operand of their matmul are converted to fp16 for the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import power_of_two
from thinksafe.kernels.paged_cache import (
    REFERENCE_BLOCK,
    KvScales,
    check_cache,
    gather_kv,
    reference_attention,
    tile_rows,
    value_log2_scale,
)

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes and launch settings of `_prefill_kernel`.

    Attributes:
        block_m: rows of a tile; a row is one query head of one new token.
        block_n: context tokens of a tile.
        num_warps: warps per program.
        num_stages: pipeline stages.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CONFIGS = {2: PrefillConfig(128, 64, 8, 3), 4: PrefillConfig(16, 32, 8, 2)}
"""Bytes per element of q -> configuration. In bf16, tiles of 64 rows would need K and V faster than the L2 cache
delivers them. fp32 is for exactness, not for speed: it runs without tensor cores."""


def reference_prefill(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, seq_lens: Tensor,
    scales_e8m0: KvScales = (None, None),
) -> Tensor:  # fmt: skip
    """Return the causal attention of new tokens to their contexts, [T, num_heads, D], as `paged_prefill` does.

    This is the plain torch form. It computes one block of positions of one sequence at a time. The bits of a token
    depend on its position and context only, not on how its prompt was cut into parts."""
    out = torch.empty_like(q)
    offsets = cu_seqlens.tolist()
    for row, (start, end, seq_len) in enumerate(zip(offsets, offsets[1:], seq_lens.tolist(), strict=False)):
        first_position = seq_len - (end - start)
        position = torch.arange(-(-seq_len // REFERENCE_BLOCK) * REFERENCE_BLOCK, device=q.device)
        token_mask = (position < seq_len)[None]
        k, v = gather_kv(key_cache, value_cache, scales_e8m0, page_table[row : row + 1], token_mask, q.dtype)
        for block_start in range(first_position // REFERENCE_BLOCK * REFERENCE_BLOCK, seq_len, REFERENCE_BLOCK):
            block_end = block_start + REFERENCE_BLOCK
            new_start, new_end = max(block_start, first_position), min(block_end, seq_len)  # the block's new tokens
            q_rows = slice(start + new_start - first_position, start + new_end - first_position)
            block_rows = slice(new_start - block_start, new_end - block_start)
            block_q = q.new_zeros(1, REFERENCE_BLOCK, *q.shape[1:])
            block_q[0, block_rows] = q[q_rows]
            visible = (position[:block_end] <= position[block_start:block_end, None])[None]
            block_out = reference_attention(block_q, k[:, :, :block_end], v[:, :, :block_end], visible)
            out[q_rows] = block_out[0, block_rows]
    return out


@jit
def _load_kv_tile(cache_ptr, scales_ptr, kv_rows, columns, token_mask, D: tl.constexpr, DTYPE: tl.constexpr):
    """Return keys or values of a tile's tokens, [BLOCK_N, BLOCK_D]; 0 where token_mask is False, and from column D on.

    scales_ptr is only a flag: None means that the cache is not in e4m3 and keeps its dtype. Otherwise elements are
    converted from e4m3 to DTYPE, and the caller multiplies results by the scales."""
    mask = token_mask[:, None] & (columns < D)[None, :]
    x = tl.load(cache_ptr + kv_rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
    if scales_ptr is not None:
        x = x.to(DTYPE)
    return x


@jit
def _qk_scores(q, k, scales_ptr, kv_rows, token_mask, scale):
    """Return log2 of the unnormalized softmax weights, q kᵀ * scale, [BLOCK_M, BLOCK_N] fp32.

    `scale` is log2(e) / sqrt(D). scales_ptr points to the scales of e4m3 keys, which multiply the scores of their
    tokens, or is None for keys that are not in e4m3."""
    scores = tl.dot(q, k.T, input_precision="ieee") * scale
    if scales_ptr is not None:
        scale_e8m0 = tl.load(scales_ptr + kv_rows, mask=token_mask, other=0).to(tl.int32)
        scores *= power_of_two(scale_e8m0)[None, :]
    return scores


@jit
def _online_softmax_step(scores, v, scales_ptr, kv_rows, token_mask, m_i, l_i, acc):
    """Return row maxima m_i, row sums l_i and weighted values acc of the online softmax, updated with one tile.

    Scores are log2 of the unnormalized weights. scales_ptr points to the scales of e4m3 values, which multiply the
    weights of their tokens in acc and not in l_i, or is None for values that are not in e4m3."""
    if scales_ptr is None:
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    else:
        scale_e8m0 = tl.load(scales_ptr + kv_rows, mask=token_mask, other=0).to(tl.int32)
        shifted_scores = scores + value_log2_scale(scale_e8m0)[None, :]
        m_new = tl.maximum(m_i, tl.max(shifted_scores, axis=1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    if scales_ptr is not None:
        p *= power_of_two(scale_e8m0)[None, :]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i, acc


@jit
def _attend_keys(
    q, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, pages_ptr, next_kv_rows, key_start, key_end, seq_len,
    position, kv_head, num_kv_heads, scale, m_i, l_i, acc,
    CAUSAL: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax of a tile of queries over the keys from `key_start` to `key_end`, exclusive.

    With CAUSAL, a query sees keys up to its position only; without, all of these keys. next_kv_rows holds the cache
    rows of the first tile of keys. Return (cache rows of the tile after the last one, m_i, l_i, acc)."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(key_start, key_end, BLOCK_N):
        tokens, kv_rows = start + tl.arange(0, BLOCK_N), next_kv_rows
        next_kv_rows = tile_rows(pages_ptr, start + BLOCK_N, seq_len, kv_head, num_kv_heads, PAGE_SIZE, BLOCK_N)
        # The cache may hold anything after the last token, even NaN, so it is not loaded.
        token_mask = tokens < seq_len if CAUSAL else tl.full((BLOCK_N,), True, tl.int1)
        k = _load_kv_tile(key_ptr, key_scales_ptr, kv_rows, columns, token_mask, D, DTYPE)
        v = _load_kv_tile(value_ptr, value_scales_ptr, kv_rows, columns, token_mask, D, DTYPE)
        scores = _qk_scores(q, k, key_scales_ptr, kv_rows, token_mask, scale)
        if CAUSAL:
            scores = tl.where(tokens[None, :] <= position[:, None], scores, float("-inf"))
        m_i, l_i, acc = _online_softmax_step(scores, v, value_scales_ptr, kv_rows, token_mask, m_i, l_i, acc)
    return next_kv_rows, m_i, l_i, acc


@jit
def _prefill_kernel(
    q_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, page_table_ptr, cu_seqlens_ptr, seq_lens_ptr,
    tiles_ptr, out_ptr, scale, width, num_kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute `out` for one tile of queries: BLOCK_M (new token, query head) pairs of one KV head and one sequence."""
    dtype: tl.constexpr = tl.float16 if q_ptr.dtype.element_ty == tl.bfloat16 else q_ptr.dtype.element_ty
    # The KV heads of one tile are adjacent in the grid; tiles have the order of the list.
    tile, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    row = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    q_start = tl.load(cu_seqlens_ptr + row)
    q_len = tl.load(cu_seqlens_ptr + row + 1) - q_start
    seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
    # Rows of the tile are (token, head of the group); the heads of a token are adjacent.
    q_rows = tl.load(tiles_ptr + 2 * tile + 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, q_heads = q_rows // GROUP, kv_head * GROUP + q_rows % GROUP
    columns = tl.arange(0, BLOCK_D)
    q_mask = (token < q_len)[:, None] & (columns < D)[None, :]
    offsets = ((q_start + token).to(tl.int64) * (num_kv_heads * GROUP) + q_heads)[:, None] * D + columns[None, :]
    q = tl.load(q_ptr + offsets, mask=q_mask, other=0.0)
    if key_scales_ptr is not None:
        q = q.to(dtype)
    position = seq_len - q_len + token
    unmasked_end = (tl.min(position, axis=0) + 1) // BLOCK_N * BLOCK_N  # all queries of the tile see all keys before it
    key_end = tl.minimum(tl.max(position, axis=0) + 1, seq_len)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pages_ptr = page_table_ptr + row * width
    next_kv_rows = tile_rows(pages_ptr, 0, seq_len, kv_head, num_kv_heads, PAGE_SIZE, BLOCK_N)
    next_kv_rows, m_i, l_i, acc = _attend_keys(
        q, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, pages_ptr, next_kv_rows, 0, unmasked_end, seq_len,
        position, kv_head, num_kv_heads, scale, m_i, l_i, acc, False, D, PAGE_SIZE, BLOCK_N, BLOCK_D, dtype,
    )  # fmt: skip
    next_kv_rows, m_i, l_i, acc = _attend_keys(
        q, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, pages_ptr, next_kv_rows, unmasked_end, key_end,
        seq_len, position, kv_head, num_kv_heads, scale, m_i, l_i, acc, True, D, PAGE_SIZE, BLOCK_N, BLOCK_D, dtype,
    )  # fmt: skip
    tl.store(out_ptr + offsets, acc / l_i[:, None], mask=q_mask)


def prefill_tiles(query_lens: np.ndarray, seq_lens: np.ndarray, group_size: int, itemsize: int) -> np.ndarray:
    """Return the list of query tiles that `paged_prefill` computes; a tile is block_m (new token, query head) pairs.

    Tiles with most visible keys come first: a long tile that starts last would run alone at the end. The list is built
    on the host, which plans the pass anyway.

    Args:
        query_lens, seq_lens: [R] int64, new tokens and context length of each sequence.
        group_size: query heads per KV head.
        itemsize: bytes per element of the queries.

    Returns:
        [N, 2] int32, for each tile the index of its sequence and the tile's index within that sequence.
    """
    block_m = CONFIGS[itemsize].block_m
    num_tiles = -(-query_lens * group_size // block_m)
    sequence = np.repeat(np.arange(len(query_lens)), num_tiles)
    tile = np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    num_keys = np.minimum((seq_lens - query_lens)[sequence] + (tile + 1) * block_m // group_size, seq_lens[sequence])
    order = np.argsort(-num_keys, kind="stable")
    return np.stack((sequence, tile), axis=1)[order].astype(np.int32)


def paged_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    scales_e8m0: KvScales = (None, None),
) -> Tensor:
    """Return causal softmax(q kᵀ / sqrt(D)) v of the new tokens of R sequences over their contexts. Not differentiable.

    The new tokens of a sequence are the last tokens of its context: the last one is at position seq_len - 1.

    Args:
        q: [T, num_heads, D], the new tokens of all sequences end to end.
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], in the dtype of q or in e4m3; they already hold
            the new tokens' keys and values.
        page_table: [R, W] int64, the pages of each context in order; entries past the last page may be any valid page.
        cu_seqlens: [R+1] int32; sequence i is rows cu_seqlens[i] to cu_seqlens[i+1] of q.
        seq_lens: [R] int64, context lengths, new tokens included.
        tiles: [N, 2] int32, the result of `prefill_tiles` on the device; a CPU does not read it.
        scales_e8m0: (scales of keys, scales of values), each [num_pages, num_kv_heads, page_size] uint8, or None if
            that cache is in the dtype of q and not in e4m3.

    Returns:
        [T, num_heads, D] in the dtype of q.

    Raises:
        ValueError: q, the caches, their scales or the dtype of page_table do not fit together.
    """
    check_cache(q, (key_cache, value_cache), scales_e8m0, page_table)
    if not on_triton(q):
        return reference_prefill(q, key_cache, value_cache, page_table, cu_seqlens, seq_lens, scales_e8m0)
    (_, num_heads, D), (_, num_kv_heads, page_size, _) = q.shape, key_cache.shape
    q, page_table, tiles = q.contiguous(), page_table.contiguous(), tiles.contiguous()
    cu_seqlens, seq_lens = cu_seqlens.contiguous(), seq_lens.contiguous()
    out = torch.empty_like(q)
    config = CONFIGS[q.element_size()]
    if len(tiles):
        _prefill_kernel[(len(tiles) * num_kv_heads,)](
            q, key_cache, value_cache, *scales_e8m0, page_table, cu_seqlens, seq_lens, tiles, out,
            D**-0.5 * LOG2E, page_table.shape[1], num_kv_heads,
            GROUP=num_heads // num_kv_heads, D=D, PAGE_SIZE=page_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=max(triton.next_power_of_2(D), 16), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
