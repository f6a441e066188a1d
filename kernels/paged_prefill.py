"""Causal attention of the new tokens of prompts, or of parts of prompts, to their context in the paged KV cache
(paged_cache.py).

Prefill is bound by arithmetic: 4 * D FLOPs per query head and visible (query, key) pair. A tile of queries first passes
over the keys that all its queries see, without a mask, then over the causal remainder. One online softmax covers both
passes.

A prefix that several sequences share needs no separate argument. Its page indices come first in the page-table rows of
these sequences, so all programs read the same addresses: once from memory, then from the L2 cache. Shared pages save
the whole forward pass of the prefix, 2 FLOPs per weight and token; to share only the attention to it would save 4 * D
FLOPs per query head and pair.

The query heads of one KV group are rows of one tile, so K and V are read once for all of them. As in paged_decode.py,
e4m3 tiles and the other operand of their matmul are converted to fp16 for the tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl
from thinksafe.kernels.fp8 import power_of_two
from thinksafe.kernels.paged_cache import (
    LOG2E,
    REFERENCE_BLOCK,
    KvCache,
    check_cache,
    gather_kv,
    kernel_constants,
    reference_attention,
    tile_rows,
    value_log2_scale,
)


class PrefillConfig(NamedTuple):
    """Constants and launch settings of `_prefill_kernel`. A row of a tile is one query head of one new token."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


CONFIGS = {2: PrefillConfig(128, 64, 8, 3), 4: PrefillConfig(16, 32, 8, 2)}
"""Bytes per element of q -> configuration. In bf16, tiles of 64 rows would need K and V faster than the L2 cache
delivers them. fp32 is for exactness, not for speed: it runs without tensor cores."""


def reference(q: Tensor, cache: KvCache, page_table: Tensor, cu_seqlens: Tensor, seq_lens: Tensor) -> Tensor:
    """Return the result of `paged_prefill` in plain torch, computed block by block of each sequence's positions.

    The bits of a token depend on its position and context only, not on how its prompt was cut into parts."""
    out = torch.empty_like(q)
    offsets = cu_seqlens.tolist()
    for row, (start, end, seq_len) in enumerate(zip(offsets, offsets[1:], seq_lens.tolist(), strict=False)):
        first, padded_len = seq_len - (end - start), -(-seq_len // REFERENCE_BLOCK) * REFERENCE_BLOCK
        position = torch.arange(padded_len, device=q.device)
        k, v = gather_kv(cache, page_table[row : row + 1], (position < seq_len)[None], q.dtype)
        padded_q, padded_out = q.new_zeros(2, 1, padded_len, *q.shape[1:])
        padded_q[0, first:seq_len] = q[start:end]
        for block in range(first // REFERENCE_BLOCK * REFERENCE_BLOCK, seq_len, REFERENCE_BLOCK):
            rows, keys = slice(block, block + REFERENCE_BLOCK), slice(block + REFERENCE_BLOCK)
            visible = (position[keys] <= position[rows, None])[None]
            padded_out[:, rows] = reference_attention(padded_q[:, rows], k[:, :, keys], v[:, :, keys], visible)
        out[start:end] = padded_out[0, first:seq_len]
    return out


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
    for CAUSAL in tl.static_range(2):  # first the keys that all queries see, then the keys up to each position
        for start in range(unmasked_end if CAUSAL else 0, key_end if CAUSAL else unmasked_end, BLOCK_N):
            tokens, kv_rows = start + tl.arange(0, BLOCK_N), next_kv_rows
            next_kv_rows = tile_rows(pages_ptr, start + BLOCK_N, seq_len, kv_head, num_kv_heads, PAGE_SIZE, BLOCK_N)
            # The cache may hold anything after the last token, even NaN, so it is not loaded.
            token_mask = tokens < seq_len if CAUSAL else tl.full((BLOCK_N,), True, tl.int1)
            kv_mask = token_mask[:, None] & (columns < D)[None, :]
            k = tl.load(key_ptr + kv_rows[:, None] * D + columns[None, :], mask=kv_mask, other=0.0).to(q.dtype)
            v = tl.load(value_ptr + kv_rows[:, None] * D + columns[None, :], mask=kv_mask, other=0.0)
            v = v if value_scales_ptr is None else v.to(dtype)
            scores = tl.dot(q, k.T, input_precision="ieee") * scale
            if key_scales_ptr is not None:
                key_scale = tl.load(key_scales_ptr + kv_rows, mask=token_mask, other=0).to(tl.int32)
                scores *= power_of_two(key_scale)[None, :]
            if CAUSAL:
                scores = tl.where(tokens[None, :] <= position[:, None], scores, float("-inf"))

            # The online softmax, with 2^x instead of e^x. Scales of values multiply their weights in acc, not in l_i.
            shifted_scores = scores
            if value_scales_ptr is not None:
                value_scale = tl.load(value_scales_ptr + kv_rows, mask=token_mask, other=0).to(tl.int32)
                shifted_scores += value_log2_scale(value_scale)[None, :]
            m_new = tl.maximum(m_i, tl.max(shifted_scores, axis=1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            m_i, l_i = m_new, l_i * alpha + tl.sum(p, axis=1)
            if value_scales_ptr is not None:
                p *= power_of_two(value_scale)[None, :]
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    tl.store(out_ptr + offsets, acc / l_i[:, None], mask=q_mask)


def prefill_tiles(query_lens: np.ndarray, seq_lens: np.ndarray, group_size: int, itemsize: int) -> np.ndarray:
    """Return the list of query tiles that `paged_prefill` computes; a tile is BLOCK_M (new token, query head) pairs.

    query_lens and seq_lens, [R] int64, are new tokens and context length of each sequence, group_size the query heads
    per KV head, itemsize the bytes per element of the queries. The list is [N, 2] int32: the index of the tile's
    sequence, and its index within that sequence. Tiles with most visible keys come first: a long tile that starts last
    would run alone at the end."""
    block_m = CONFIGS[itemsize].BLOCK_M
    num_tiles = -(-query_lens * group_size // block_m)
    sequence = np.repeat(np.arange(len(query_lens)), num_tiles)
    tile = np.arange(len(sequence)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    num_keys = np.minimum((seq_lens - query_lens)[sequence] + (tile + 1) * block_m // group_size, seq_lens[sequence])
    order = np.argsort(-num_keys, kind="stable")
    return np.stack((sequence, tile), axis=1)[order].astype(np.int32)


def paged_prefill(
    q: Tensor, cache: KvCache, page_table: Tensor, cu_seqlens: Tensor, seq_lens: Tensor, tiles: Tensor
) -> Tensor:
    """Return causal softmax(q kᵀ / sqrt(D)) v, [T, num_heads, D], of the new tokens of R sequences over their context.

    The new tokens of a sequence are the last tokens of its context: the last one is at position seq_len - 1. Not
    differentiable.

    Args:
        q: [T, num_heads, D], the new tokens of all sequences end to end.
        cache: already holds the new tokens' keys and values.
        page_table: [R, W] int64, the pages of each context in order; entries past the last page may be any valid page.
        cu_seqlens: [R+1] int32; sequence i is rows cu_seqlens[i] to cu_seqlens[i+1] of q.
        seq_lens: [R] int64, context lengths, new tokens included.
        tiles: [N, 2] int32, the result of `prefill_tiles` on the device; a CPU does not read it.

    Raises:
        ValueError: q, the cache or the dtype of page_table do not fit together.
    """
    check_cache(q, cache, page_table)
    if not on_triton(q):
        return reference(q, cache, page_table, cu_seqlens, seq_lens)
    q, page_table, cu_seqlens, seq_lens, tiles = (x.contiguous() for x in (q, page_table, cu_seqlens, seq_lens, tiles))
    out, (num_kv_heads, page_size) = torch.empty_like(q), cache.keys.shape[1:3]
    if len(tiles):
        _prefill_kernel[(len(tiles) * num_kv_heads,)](
            q, *cache, page_table, cu_seqlens, seq_lens, tiles, out, q.shape[2] ** -0.5 * LOG2E, page_table.shape[1],
            num_kv_heads, PAGE_SIZE=page_size, **kernel_constants(q, cache), **CONFIGS[q.element_size()]._asdict(),
        )  # fmt: skip
    return out
