"""New tokens of prompts, or of parts of them, against all that is before them in the page cache (paged_cache.py).

Reading prompts is bound by FLOP, 4 * D a query head and visible (query, key) pair. A tile of queries first passes over
the keys before all of them, among those any prefix that other sequences share, without mask arithmetic, then over the
causal remainder: two segments of keys, one online softmax. The shared prefix needs no argument of its own. Its page
numbers stand at the front of every sequence's table, so that all programs read the same addresses, once from memory and
then from the L2; the pages save its whole forward pass, 2 FLOP a weight and token, where a kernel that only shared its
attention would save 4 * D.

The query heads of one KV group are rows of one tile, so that K and V are read once for all of them. Tiles in e4m3
become fp16 on the way to the tensor cores, and so do the operands they meet, as in paged_decode.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import power_of_two
from thinksafe.kernels.paged_cache import STRETCH, Exponents, attended, check_cache, contexts, tile_rows, value_power

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """One configuration: rows (query head, token) and context tokens of a tile, warps a program, pipeline stages."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


TILES = {2: Tiles(128, 64, 8, 3), 4: Tiles(16, 32, 8, 2)}
"""By itemsize. 64 rows a tile in bf16 would read K and V from the L2 faster than it can give them. fp32 is there for
exactness, not speed: it runs without tensor cores."""


def reference_prefill(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, seq_lens: Tensor,
    exponents: Exponents = (None, None),
) -> Tensor:  # fmt: skip
    """`paged_prefill` in plain torch, one sequence and one stretch of its positions at a time: a token's bits depend on
    its position and what is before it, not on how its prompt was cut."""
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for row, (start, end, seq_len) in enumerate(zip(bounds, bounds[1:], seq_lens.tolist(), strict=False)):
        first = seq_len - (end - start)
        position = torch.arange(-(-seq_len // STRETCH) * STRETCH, device=q.device)
        written = (position < seq_len)[None]
        k, v = contexts(key_cache, value_cache, exponents, page_table[row : row + 1], written, q.dtype)
        for low in range(first // STRETCH * STRETCH, seq_len, STRETCH):
            high = low + STRETCH
            mine = slice(max(low, first), min(high, seq_len))  # of the stretch's positions, those that are asked for
            theirs = slice(start + mine.start - first, start + mine.stop - first)
            inside = slice(mine.start - low, mine.stop - low)
            queries = q.new_zeros(1, STRETCH, *q.shape[1:])
            queries[0, inside] = q[theirs]
            visible = (position[:high] <= position[low:high, None])[None]
            out[theirs] = attended(queries, k[:, :, :high], v[:, :, :high], visible)[0, inside]
    return out


@jit
def _tile(cache_ptr, exponents_ptr, rows, columns, written, D: tl.constexpr, DTYPE: tl.constexpr):
    """Keys or values of a tile's tokens, [BLOCK_N, BLOCK_D]; in DTYPE, without their scales, where they are e4m3."""
    inside = written[:, None] & (columns < D)[None, :]
    x = tl.load(cache_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    if exponents_ptr is not None:
        x = x.to(DTYPE)
    return x


@jit
def _scores(q, k, exponents_ptr, rows, written, scale):
    """[.., BLOCK_N] fp32, in powers of two."""
    scores = tl.dot(q, k.T, input_precision="ieee") * scale
    if exponents_ptr is not None:
        exponent = tl.load(exponents_ptr + rows, mask=written, other=0).to(tl.int32)
        scores *= power_of_two(exponent)[None, :]
    return scores


@jit
def _absorb(scores, v, exponents_ptr, rows, written, best, total, acc):
    """One tile of the online softmax, in powers of two: row maxima, row sums and weighted values so far. In e4m3 the
    weights take on the scales of their values."""
    if exponents_ptr is None:
        higher = tl.maximum(best, tl.max(scores, axis=1))
    else:
        exponent = tl.load(exponents_ptr + rows, mask=written, other=0).to(tl.int32)
        reach = scores + value_power(exponent)[None, :]
        higher = tl.maximum(best, tl.max(reach, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    if exponents_ptr is not None:
        weights *= power_of_two(exponent)[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@jit
def _attend(
    q, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, pages_ptr, rows, first, last, seq_len, position,
    head, num_kv_heads, scale, best, total, acc,
    CAUSAL: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries, carried from key `first` to key `last`."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        tokens, here = start + tl.arange(0, BLOCK_N), rows
        rows = tile_rows(pages_ptr, start + BLOCK_N, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
        # Behind the last token lies anything, even NaN: it is not read.
        written = tokens < seq_len if CAUSAL else tl.full((BLOCK_N,), True, tl.int1)
        k = _tile(key_ptr, key_exponents_ptr, here, columns, written, D, DTYPE)
        v = _tile(value_ptr, value_exponents_ptr, here, columns, written, D, DTYPE)
        scores = _scores(q, k, key_exponents_ptr, here, written, scale)
        if CAUSAL:
            scores = tl.where(tokens[None, :] <= position[:, None], scores, float("-inf"))
        best, total, acc = _absorb(scores, v, value_exponents_ptr, here, written, best, total, acc)
    return rows, best, total, acc


@jit
def _prefill_kernel(
    q_ptr, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, page_table_ptr, cu_seqlens_ptr, seq_lens_ptr,
    tiles_ptr, out_ptr, scale, width, num_kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float16 if q_ptr.dtype.element_ty == tl.bfloat16 else q_ptr.dtype.element_ty
    # Heads of one tile lie next to each other in the grid, tiles in the order of the list.
    tile, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    row = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + row)
    count = tl.load(cu_seqlens_ptr + row + 1) - begin
    seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
    # Rows of the tile are (token, head of the group), the heads of a token together.
    member = tl.load(tiles_ptr + 2 * tile + 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, heads = member // GROUP, head * GROUP + member % GROUP
    columns = tl.arange(0, BLOCK_D)
    inside = (token < count)[:, None] & (columns < D)[None, :]
    at = ((begin + token).to(tl.int64) * (num_kv_heads * GROUP) + heads)[:, None] * D + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    if key_exponents_ptr is not None:
        q = q.to(dtype)
    position = seq_len - count + token
    unmasked = (tl.min(position, axis=0) + 1) // BLOCK_N * BLOCK_N  # all queries see all of these keys
    last = tl.minimum(tl.max(position, axis=0) + 1, seq_len)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pages_ptr = page_table_ptr + row * width
    rows = tile_rows(pages_ptr, 0, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
    rows, best, total, acc = _attend(
        q, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, pages_ptr, rows, 0, unmasked, seq_len,
        position, head, num_kv_heads, scale, best, total, acc, False, D, PAGE_SIZE, BLOCK_N, BLOCK_D, dtype,
    )  # fmt: skip
    rows, best, total, acc = _attend(
        q, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, pages_ptr, rows, unmasked, last, seq_len,
        position, head, num_kv_heads, scale, best, total, acc, True, D, PAGE_SIZE, BLOCK_N, BLOCK_D, dtype,
    )  # fmt: skip
    tl.store(out_ptr + at, acc / total[:, None], mask=inside)


def prefill_tiles(lengths: np.ndarray, seq_lens: np.ndarray, group: int, itemsize: int) -> np.ndarray:
    """The tiles of queries that `paged_prefill` works through, those with most keys to see first: a long one started
    last would end alone. Made on the host, which plans the pass anyway.

    Args:
        lengths, seq_lens: [R] int64, new tokens and context of each sequence.
        group: query heads a KV head.
        itemsize: bytes an element of the queries.

    Returns:
        [N, 2] int32, sequence and number of the tile in it.
    """
    rows = TILES[itemsize].rows
    counts = -(-lengths * group // rows)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    tile = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.minimum((seq_lens - lengths)[sequence] + (tile + 1) * rows // group, seq_lens[sequence])
    order = np.argsort(-keys, kind="stable")
    return np.stack((sequence, tile), axis=1)[order].astype(np.int32)


def paged_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    exponents: Exponents = (None, None),
) -> Tensor:
    """Consecutive new tokens of several sequences, the last of each at position seq_len - 1, causal.

    Args:
        q: [T, num_heads, D], the sequences end to end.
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], the new tokens' own keys and values in it.
        page_table: [R, W] int64; entries past a sequence's last page may be any valid page.
        cu_seqlens: [R+1] int32; sequence i is rows cu_seqlens[i] to cu_seqlens[i+1] of q.
        seq_lens: [R] int64, context lengths, new tokens included.
        tiles: [N, 2] int32, of `prefill_tiles`.
        exponents: of the caches that are in e4m3.

    Returns:
        [T, num_heads, D].

    Raises:
        ValueError: the shapes do not fit.
    """
    check_cache(q, (key_cache, value_cache), exponents, page_table)
    if not on_triton(q):
        return reference_prefill(q, key_cache, value_cache, page_table, cu_seqlens, seq_lens, exponents)
    (_, num_heads, D), (_, num_kv_heads, page_size, _) = q.shape, key_cache.shape
    q, page_table, tiles = q.contiguous(), page_table.contiguous(), tiles.contiguous()
    cu_seqlens, seq_lens = cu_seqlens.contiguous(), seq_lens.contiguous()
    out = torch.empty_like(q)
    config = TILES[q.element_size()]
    if len(tiles):
        _prefill_kernel[(len(tiles) * num_kv_heads,)](
            q, key_cache, value_cache, *exponents, page_table, cu_seqlens, seq_lens, tiles, out,
            D**-0.5 * LOG2E, page_table.shape[1], num_kv_heads,
            GROUP=num_heads // num_kv_heads, D=D, PAGE_SIZE=page_size, BLOCK_M=config.rows, BLOCK_N=config.tokens,
            BLOCK_D=max(triton.next_power_of_2(D), 16), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
