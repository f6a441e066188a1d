"""Attention against a paged key-value cache, for new tokens of many sequences at once.

A sequence's context lies in pages scattered over one pool; its row of `page_table` lists them in order. In a page a
head's tokens lie together, [page_size, D], so that a tile is one contiguous read: 16 KB at 64 tokens of 128 in bf16.

Decoding reads every byte of K and V once a step, so this operation, not the weights, bounds long generations:
2 * context * num_kv_heads * D * itemsize bytes a sequence and layer. A context is cut into splits of SPLIT tokens, an
own program for each split and KV head, and the partial results are combined. The cut depends on the sequence's own
length, not on the batch, and so does every bit of the result. Rows of 100 and of 16,000 tokens share a batch, and the
lengths are known to the device alone: persistent programs walk a list of splits that `decode_work` makes there.

Reading prompts is bound by FLOP, 4 * D a query head and visible (query, key) pair. A tile of queries first passes over
the keys before all of them, among those any prefix that other sequences share, without mask arithmetic, then over the
causal remainder: two segments of keys, one online softmax. The shared prefix needs no argument of its own. Its page
numbers stand at the front of every sequence's table, so that all programs read the same addresses, once from memory and
then from the L2; the pages save its whole forward pass, 2 FLOP a weight and token, where a kernel that only shared its
attention would save 4 * D. To find a page costs one 8-byte load, asked for a tile ahead, for 32 KB of keys and values.

In both, the query heads of one KV group are rows of one tile, so that K and V are read once for all of them.

Keys, values or both may be in e4m3 with an exponent for every head of a token (fp8.py): 1 + 1/D bytes a number in place
of 2. A tile becomes fp16 on its way to the tensor cores, which loses nothing of it, and so does the operand it meets:
the hardware turns two numbers of e4m3 into fp16 with one instruction, and into bf16 with five. Compiled for sm_90a, the
decoding loop issues 700 instructions a warp for 16 KB in e4m3 and 336 for 32 KB in bf16: at 4.3 TB/s of each, 80% and
19% of all issue slots. A quarter of the 700 unpacks values byte by byte, since tensor cores want them transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import E4M3, dequantise, power_of_two
from thinksafe.kernels.fp8 import reference as quantise

SPLIT = 512
MAX_SPLITS = 32
"""Contexts up to SPLIT * MAX_SPLITS = 16k tokens are cut every SPLIT tokens, longer ones every so many times SPLIT that
MAX_SPLITS are enough: it bounds the memory of partial results, 0.3 GB for 512 rows of 32 heads."""
LOG2E = 1.4426950408889634
PROGRAMS_PER_PROCESSOR = {False: 3, True: 2}
"""Decoding programs that fit, and whether the cache is in e4m3: while one begins or ends a split, the others read. They
need 72 KB of shared memory each, and in e4m3 up to 224 registers a thread."""
_BATCH_TOKENS = 2**17
"""Context tokens that the reference copies out of the cache at once."""
_STRETCH = 64
"""Tokens that the reference pads a context to a multiple of, and positions of a prompt that it computes at once."""

Exponents = tuple[Tensor | None, Tensor | None]
"""Of keys and of values, [num_pages, num_kv_heads, page_size] uint8 each; None for a cache that is not in e4m3."""


@dataclass(frozen=True)
class Tiles:
    """One configuration: rows (query head, token) and context tokens of a tile, warps a program, pipeline stages."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


DECODE = {2: Tiles(16, 64, 4, 3), 4: Tiles(16, 64, 4, 2)}
PREFILL = {2: Tiles(128, 64, 8, 3), 4: Tiles(16, 32, 8, 2)}
"""By itemsize. 64 rows a tile in bf16 would read K and V from the L2 faster than it can give them. fp32 is there for
exactness, not speed: it runs without tensor cores."""


def write_kv(
    key_cache: Tensor, value_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, exponents: Exponents = (None, None)
) -> None:
    """Store new keys and values.

    Args:
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], changed in place.
        k, v: [T, num_kv_heads, D].
        slots: [T] int64, page * page_size + offset of each token; no two alike.
        exponents: of the caches that are in e4m3, changed in place.
    """
    num_heads, page_size, D = key_cache.shape[1:]
    heads = torch.arange(num_heads, device=slots.device)
    rows = ((slots // page_size)[:, None] * num_heads + heads) * page_size + (slots % page_size)[:, None]
    for cache, powers, new in zip((key_cache, value_cache), exponents, (k, v), strict=True):
        if powers is not None:
            new, exponent = quantise(new)
            powers.view(-1).index_copy_(0, rows.flatten(), exponent.flatten())
            cache, new = cache.view(torch.uint8), new.view(torch.uint8)  # torch moves no rows of e4m3
        cache.view(-1, D).index_copy_(0, rows.flatten(), new.flatten(0, 1))


def reference_decode(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    exponents: Exponents = (None, None),
) -> Tensor:  # fmt: skip
    """`paged_decode` in plain torch, rows of similar length together, each padded to a length that is its own: a row's
    bits depend on nothing else."""
    out = torch.zeros_like(q)
    for rows, length in _similar_lengths(seq_lens):
        visible = torch.arange(length, device=q.device) < seq_lens[rows, None]
        k, v = _contexts(key_cache, value_cache, exponents, page_table[rows], visible, q.dtype)
        out[rows] = _attended(q[rows, None], k, v, visible[:, None])[:, 0]
    return out


def _similar_lengths(seq_lens: Tensor) -> list[tuple[Tensor, int]]:
    """(rows, length padded to whole stretches) of rows with a context, at most _BATCH_TOKENS together."""
    padded = (seq_lens + _STRETCH - 1) // _STRETCH * _STRETCH
    batches = []
    for length in padded.unique().tolist():
        if length:
            rows = (padded == length).nonzero()[:, 0]
            batches += [(some, length) for some in rows.split(max(_BATCH_TOKENS // length, 1))]
    return batches


def _contexts(
    key_cache: Tensor, value_cache: Tensor, exponents: Exponents, page_table: Tensor, visible: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Copies of keys and values, [B, num_kv_heads, L, D] each; page_table [B, W]; visible [B, L], L in stretches, of
    which the last alone holds what is not visible."""
    (_, num_heads, page_size, D), length = key_cache.shape, visible.shape[1]
    width = -(-length // page_size)
    page_table = F.pad(page_table[:, :width], (0, max(0, width - page_table.shape[1])))
    tiles = page_table[:, None] * num_heads + torch.arange(num_heads, device=page_table.device)[:, None]
    contexts = []
    for cache, powers in zip((key_cache, value_cache), exponents, strict=True):
        if powers is None:
            context = cache.view(-1, page_size * D).index_select(0, tiles.flatten())
        else:
            values = cache.view(torch.uint8).view(-1, page_size, D).index_select(0, tiles.flatten()).view(E4M3)
            context = dequantise(values, powers.view(-1, page_size).index_select(0, tiles.flatten()), dtype)
        context = context.view(len(page_table), num_heads, -1, D)[:, :, :length]
        # Behind a last token lies anything, even NaN, which no weight of 0 undoes.
        context[:, :, -_STRETCH:].masked_fill_(~visible[:, None, -_STRETCH:, None], 0)
        contexts.append(context)
    return contexts


def _attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [B, T, num_heads, D]; k, v [B, num_kv_heads, L, D]; visible [B, T, L]; the result has the shape of q."""
    (B, T, _, D), num_kv_heads = q.shape, k.shape[1]
    # Products of one shape a row and KV head, whatever the number of rows: so BLAS computes each alike.
    grouped = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(B * num_kv_heads, -1, D)
    scores = (grouped @ k.flatten(0, 1).transpose(1, 2)).view(B, num_kv_heads, -1, T, k.shape[2]) * D**-0.5
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    out = weights.view(B * num_kv_heads, -1, k.shape[2]) @ v.flatten(0, 1)
    return out.view(B, num_kv_heads, -1, T, D).permute(0, 3, 1, 2, 4).reshape(q.shape)


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
        position = torch.arange(-(-seq_len // _STRETCH) * _STRETCH, device=q.device)
        written = (position < seq_len)[None]
        k, v = _contexts(key_cache, value_cache, exponents, page_table[row : row + 1], written, q.dtype)
        for low in range(first // _STRETCH * _STRETCH, seq_len, _STRETCH):
            high = low + _STRETCH
            mine = slice(max(low, first), min(high, seq_len))  # of the stretch's positions, those that are asked for
            theirs = slice(start + mine.start - first, start + mine.stop - first)
            inside = slice(mine.start - low, mine.stop - low)
            queries = q.new_zeros(1, _STRETCH, *q.shape[1:])
            queries[0, inside] = q[theirs]
            visible = (position[:high] <= position[low:high, None])[None]
            out[theirs] = _attended(queries, k[:, :, :high], v[:, :, :high], visible)[0, inside]
    return out


@jit
def _split_length(seq_len, max_splits, SPLIT: tl.constexpr):
    """Tokens of each split of such a context; the last one has what is left."""
    return tl.maximum(tl.cdiv(tl.cdiv(seq_len, max_splits), SPLIT), 1) * SPLIT


@jit
def _work_kernel(seq_lens_ptr, work_ptr, num_rows, max_splits, SPLIT: tl.constexpr, BLOCK_B: tl.constexpr):
    rows = tl.arange(0, BLOCK_B)
    seq_lens = tl.load(seq_lens_ptr + rows, mask=rows < num_rows, other=0).to(tl.int32)
    num_splits = tl.cdiv(seq_lens, _split_length(seq_lens, max_splits, SPLIT))
    first = tl.cumsum(num_splits, 0) - num_splits
    tl.store(work_ptr, tl.sum(num_splits, 0))
    for split in range(max_splits):
        tl.store(work_ptr + 1 + first + split, rows * max_splits + split, mask=split < num_splits)


@jit
def _cache_rows(pages_ptr, start, seq_len, head, num_kv_heads, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where tokens start to start + BLOCK_N of a context lie, in rows of D elements. A loop asks for the next tile's
    while it loads this one: a page number must not be waited for."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages_ptr + start // PAGE_SIZE, mask=start < seq_len, other=0).to(tl.int64)
        return (page * num_kv_heads + head) * PAGE_SIZE + start % PAGE_SIZE + tl.arange(0, BLOCK_N)
    else:
        tokens = start + tl.arange(0, BLOCK_N)
        pages = tl.load(pages_ptr + tokens // PAGE_SIZE, mask=tokens < seq_len, other=0).to(tl.int64)
        return (pages * num_kv_heads + head) * PAGE_SIZE + tokens % PAGE_SIZE


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
    """One tile of the online softmax, in powers of two: row maxima, row sums and weighted values so far."""
    higher = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    if exponents_ptr is None:
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    else:
        # The weights take on the scales of their values, less the tile's largest, and so stay what fp16 can hold.
        exponent = tl.load(exponents_ptr + rows, mask=written, other=0).to(tl.int32)
        largest = tl.max(exponent, axis=0)
        weights *= power_of_two(tl.maximum(exponent - largest + 127, 0))[None, :]
        product = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        acc = acc * shrink[:, None] + product * power_of_two(largest)
    return higher, total, acc


@jit
def _decode_kernel(
    q_ptr, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, page_table_ptr, seq_lens_ptr, work_ptr, out_ptr,
    partial_ptr, lse_ptr, scale, width, num_kv_heads, max_splits,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float16 if q_ptr.dtype.element_ty == tl.bfloat16 else q_ptr.dtype.element_ty
    num_heads = num_kv_heads * GROUP
    group, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = (group < GROUP)[:, None] & (columns < D)[None, :]
    for unit in range(tl.program_id(0), tl.load(work_ptr) * num_kv_heads, tl.num_programs(0)):
        item, head = tl.load(work_ptr + 1 + unit // num_kv_heads), unit % num_kv_heads
        row, split = (item // max_splits).to(tl.int64), item % max_splits
        seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
        length = _split_length(seq_len, max_splits, SPLIT)
        heads = head * GROUP + group
        q = tl.load(q_ptr + (row * num_heads + heads)[:, None] * D + columns[None, :], mask=inside, other=0.0)
        if key_exponents_ptr is not None:
            q = q.to(dtype)
        best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        pages_ptr = page_table_ptr + row * width
        first = split * length
        rows = _cache_rows(pages_ptr, first, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
        for start in range(first, min(first + length, seq_len), BLOCK_N):
            tokens, here = start + tl.arange(0, BLOCK_N), rows
            rows = _cache_rows(pages_ptr, start + BLOCK_N, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
            written = tokens < seq_len  # behind the last token lies anything, even NaN: it is not read
            k = _tile(key_ptr, key_exponents_ptr, here, columns, written, D, dtype)
            v = _tile(value_ptr, value_exponents_ptr, here, columns, written, D, dtype)
            scores = _scores(q, k, key_exponents_ptr, here, written, scale)
            scores = tl.where(written[None, :], scores, float("-inf"))
            best, total, acc = _absorb(scores, v, value_exponents_ptr, here, written, best, total, acc)
        acc = acc / total[:, None]
        if length >= seq_len:  # the only split
            tl.store(out_ptr + (row * num_heads + heads)[:, None] * D + columns[None, :], acc, mask=inside)
        else:
            slots = item.to(tl.int64) * num_heads + heads
            tl.store(partial_ptr + slots[:, None] * D + columns[None, :], acc, mask=inside)
            tl.store(lse_ptr + slots, best + tl.log2(total), mask=group < GROUP)


@jit
def _combine_kernel(
    seq_lens_ptr, partial_ptr, lse_ptr, out_ptr, num_kv_heads, max_splits,
    GROUP: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row and KV head: the mean of its splits, each weighted with 2^lse. A row without context becomes zero."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
    num_splits = tl.cdiv(seq_len, _split_length(seq_len, max_splits, SPLIT))
    if num_splits != 1:
        num_heads = num_kv_heads * GROUP
        group, columns, splits = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
        heads = head * GROUP + group
        first = row * max_splits
        inside = (group < GROUP)[:, None] & (columns < D)[None, :]
        there = (splits < num_splits)[:, None] & (group < GROUP)[None, :]
        all_slots = (first + splits)[:, None] * num_heads + heads[None, :]
        best = tl.max(tl.load(lse_ptr + all_slots, mask=there, other=float("-inf")), axis=0)
        total = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for split in range(num_splits):
            slots = (first + split) * num_heads + heads
            weight = tl.exp2(tl.load(lse_ptr + slots, mask=group < GROUP, other=0.0) - best)
            total += weight
            partial = tl.load(partial_ptr + slots[:, None] * D + columns[None, :], mask=inside, other=0.0)
            acc += weight[:, None] * partial
        acc = tl.where(num_splits > 0, acc / total[:, None], 0.0)
        tl.store(out_ptr + (row * num_heads + heads)[:, None] * D + columns[None, :], acc, mask=inside)


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
        rows = _cache_rows(pages_ptr, start + BLOCK_N, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
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
    rows = _cache_rows(pages_ptr, 0, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
    rows, best, total, acc = _attend(
        q, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, pages_ptr, rows, 0, unmasked, seq_len,
        position, head, num_kv_heads, scale, best, total, acc, False, D, PAGE_SIZE, BLOCK_N, BLOCK_D, dtype,
    )  # fmt: skip
    rows, best, total, acc = _attend(
        q, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, pages_ptr, rows, unmasked, last, seq_len,
        position, head, num_kv_heads, scale, best, total, acc, True, D, PAGE_SIZE, BLOCK_N, BLOCK_D, dtype,
    )  # fmt: skip
    tl.store(out_ptr + at, acc / total[:, None], mask=inside)


def decode_work(seq_lens: Tensor, max_seq_len: int) -> Tensor | None:
    """The splits that `paged_decode` works through, in a form that only it reads: the same for all layers of a step.

    Args:
        seq_lens: [B] int64.
        max_seq_len: what `page_table` has room for, W * page_size.

    Returns:
        [1 + B * splits] int32, or None on the CPU.
    """
    if not on_triton(seq_lens):
        return None
    max_splits = min(MAX_SPLITS, triton.cdiv(max_seq_len, SPLIT))
    work = torch.empty(1 + len(seq_lens) * max_splits, dtype=torch.int32, device=seq_lens.device)
    block = triton.next_power_of_2(max(len(seq_lens), 1))
    _work_kernel[(1,)](seq_lens, work, len(seq_lens), max_splits, SPLIT=SPLIT, BLOCK_B=block, num_warps=4)
    return work


def paged_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    work: Tensor | None = None,
    exponents: Exponents = (None, None),
) -> Tensor:
    """One new token a sequence against its whole context, itself included. Nothing waits for the device.

    Args:
        q: [B, num_heads, D].
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], in the dtype of q or in e4m3.
        page_table: [B, W] int64; entries past a sequence's last page may be any valid page.
        seq_lens: [B] int64; 0 for a row that sees nothing and becomes zero.
        work: of `decode_work`, where it was made before for other layers.
        exponents: of the caches that are in e4m3.

    Returns:
        [B, num_heads, D].

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(q, (key_cache, value_cache), exponents, page_table)
    if not on_triton(q):
        return reference_decode(q, key_cache, value_cache, page_table, seq_lens, exponents)
    (B, num_heads, D), (_, num_kv_heads, page_size, _), width = q.shape, key_cache.shape, page_table.shape[1]
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    out = torch.empty_like(q)
    if not B:
        return out
    if work is None:
        work = decode_work(seq_lens, width * page_size)
    tiles, max_splits = DECODE[q.element_size()], (len(work) - 1) // B
    partial = q.new_empty(B * max_splits, num_heads, D, dtype=torch.float32)
    lse = q.new_empty(B * max_splits, num_heads, dtype=torch.float32)
    group = num_heads // num_kv_heads
    sizes = {"GROUP": group, "D": D, "SPLIT": SPLIT, "BLOCK_D": max(triton.next_power_of_2(D), 16)}
    num_programs = min(B * max_splits * num_kv_heads, _num_programs(q.device, exponents != (None, None)))
    _decode_kernel[(num_programs,)](
        q, key_cache, value_cache, *exponents, page_table, seq_lens, work, out, partial, lse,
        D**-0.5 * LOG2E, width, num_kv_heads, max_splits,
        PAGE_SIZE=page_size, BLOCK_G=max(triton.next_power_of_2(group), tiles.rows), BLOCK_N=tiles.tokens, **sizes,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    _combine_kernel[(B, num_kv_heads)](
        seq_lens, partial, lse, out, num_kv_heads, max_splits,
        BLOCK_S=triton.next_power_of_2(max_splits), BLOCK_G=triton.next_power_of_2(group), **sizes, num_warps=1,
    )  # fmt: skip
    return out


def _num_programs(device: torch.device, in_e4m3: bool) -> int:
    if INTERPRETED:
        return 3
    return PROGRAMS_PER_PROCESSOR[in_e4m3] * torch.cuda.get_device_properties(device).multi_processor_count


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
    rows = PREFILL[itemsize].rows
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
    _check(q, (key_cache, value_cache), exponents, page_table)
    if not on_triton(q):
        return reference_prefill(q, key_cache, value_cache, page_table, cu_seqlens, seq_lens, exponents)
    (_, num_heads, D), (_, num_kv_heads, page_size, _) = q.shape, key_cache.shape
    q, page_table = q.contiguous(), page_table.contiguous()
    out = torch.empty_like(q)
    config = PREFILL[q.element_size()]
    if len(tiles):
        _prefill_kernel[(len(tiles) * num_kv_heads,)](
            q, key_cache, value_cache, *exponents, page_table, cu_seqlens, seq_lens, tiles, out,
            D**-0.5 * LOG2E, page_table.shape[1], num_kv_heads,
            GROUP=num_heads // num_kv_heads, D=D, PAGE_SIZE=page_size, BLOCK_M=config.rows, BLOCK_N=config.tokens,
            BLOCK_D=max(triton.next_power_of_2(D), 16), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def _check(q: Tensor, caches: tuple[Tensor, Tensor], exponents: Exponents, page_table: Tensor) -> None:
    shape = caches[0].shape
    if caches[1].shape != shape or not all(cache.is_contiguous() for cache in caches):
        raise ValueError(f"caches are {list(shape)} and {list(caches[1].shape)}: expected equal, contiguous")
    if q.shape[2] != shape[3] or q.shape[1] % shape[1]:
        raise ValueError(
            f"q is {list(q.shape)}, a cache is {list(shape)}: expected [.., num_heads, D] and [num_pages, "
            "num_kv_heads, page_size, D], num_heads a multiple of num_kv_heads"
        )
    for cache, powers in zip(caches, exponents, strict=True):
        if cache.dtype != (q.dtype if powers is None else E4M3):
            raise ValueError(f"q is {q.dtype}, a cache is {cache.dtype}; both must be the same, or exponents be given")
        if powers is not None and (powers.shape != shape[:3] or powers.dtype != torch.uint8):
            raise ValueError(f"exponents are {list(powers.shape)} {powers.dtype}, not {list(shape[:3])} uint8")
    if page_table.dtype != torch.int64:
        raise ValueError(f"page_table is {page_table.dtype}, not int64")
