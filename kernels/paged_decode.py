"""One new token a sequence against its whole context in the page cache (paged_cache.py).

Decoding reads every byte of K and V once a step, so this operation, not the weights, bounds long generations:
2 * context * num_kv_heads * D * itemsize bytes a sequence and layer. A context is cut into splits of SPLIT tokens, an
own program for each split and KV head, and the partial results are combined. The cut depends on the sequence's own
length, not on the batch, and so does every bit of the result. Rows of 100 and of 16,000 tokens share a batch, and the
lengths are known to the device alone: persistent programs walk a list of splits that `decode_work` makes there.

All else must be done in the time that the bytes take, and in e4m3 they are half as many. So a program is one warp,
which waits for no other, and its tiles are transposed: scores are K Qᵀ, [tokens, heads], and the result is Vᵀ Pᵀ,
[D, heads]. Tensor cores take 16 rows of one operand and 8 of the other, and 8 are enough for the query heads of a KV
group. Numbers in e4m3 become fp16 on the way to them, which loses nothing of them, and so does the operand they meet:
the hardware turns two numbers into fp16 with one instruction, and into bf16 with five. Of values it wants two tokens of
one column together, which lie a row apart; so two neighbours in a row travel as one number of 16 bits, and come apart
into even and odd columns, each with a product of its own.

Compiled for sm_90a the loop issues 600 instructions for 8 KB in e4m3 and 490 for 16 KB in bf16, 39% and 16% of what the
processors can issue at 1.7 GHz while 4.8 TB/s bring the next (benchmarks/compiled.py; a test holds it below a half).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import power_of_two
from thinksafe.kernels.paged_cache import STRETCH, Exponents, attended, check_cache, contexts, tile_rows, value_power

SPLIT = 512
MAX_SPLITS = 32
"""Contexts up to SPLIT * MAX_SPLITS = 16k tokens are cut every SPLIT tokens, longer ones every so many times SPLIT that
MAX_SPLITS are enough: it bounds the memory of partial results, 0.3 GB for 512 rows of 32 heads."""
LOG2E = 1.4426950408889634
_BATCH_TOKENS = 2**17
"""Context tokens that the reference copies out of the cache at once."""


@dataclass(frozen=True)
class Tiles:
    """One configuration: heads and context tokens of a tile, pipeline stages, and programs, of one warp each, that fit
    a processor's registers and shared memory: while some wait or begin a split, the others read."""

    heads: int
    tokens: int
    num_stages: int
    programs: int


TILES = {1: Tiles(8, 32, 3, 11), 2: Tiles(8, 32, 3, 6), 4: Tiles(8, 16, 2, 6)}
"""By bytes of a key's numbers, of which values have no more. fp32 is there for exactness, not speed."""


def reference_decode(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor,
    exponents: Exponents = (None, None),
) -> Tensor:  # fmt: skip
    """`paged_decode` in plain torch, rows of similar length together, each padded to a length that is its own: a row's
    bits depend on nothing else."""
    out = torch.zeros_like(q)
    for rows, length in _similar_lengths(seq_lens):
        visible = torch.arange(length, device=q.device) < seq_lens[rows, None]
        k, v = contexts(key_cache, value_cache, exponents, page_table[rows], visible, q.dtype)
        out[rows] = attended(q[rows, None], k, v, visible[:, None])[:, 0]
    return out


def _similar_lengths(seq_lens: Tensor) -> list[tuple[Tensor, int]]:
    """(rows, length padded to whole stretches) of rows with a context, at most _BATCH_TOKENS together."""
    padded = (seq_lens + STRETCH - 1) // STRETCH * STRETCH
    batches = []
    for length in padded.unique().tolist():
        if length:
            rows = (padded == length).nonzero()[:, 0]
            batches += [(some, length) for some in rows.split(max(_BATCH_TOKENS // length, 1))]
    return batches


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
def _exponents(exponents_ptr, rows):
    """Of a tile's tokens, [BLOCK_N]; where the cache has none they are not used."""
    if exponents_ptr is None:
        return tl.zeros(rows.shape, tl.int32)
    else:
        return tl.load(exponents_ptr + rows)


@jit
def _apart(pairs, INTERPRETED: tl.constexpr):
    """The first and the second of two numbers in e4m3 that lie in 16 bits. Two such pairs share a register, and in PTX
    one permutation of its bytes and two conversions take them apart; the compiler would handle each byte by itself."""
    if INTERPRETED:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        odd = (pairs >> 8 & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return even.to(tl.float32), odd.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            """
            { .reg .b32 sorted; .reg .b16 even, odd;
              prmt.b32 sorted, $2, 0, 0x3120;
              mov.b32 {even, odd}, sorted;
              cvt.rn.f16x2.e4m3x2 $0, even;
              cvt.rn.f16x2.e4m3x2 $1, odd; }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@jit
def _decode_kernel(
    q_ptr, key_ptr, value_ptr, key_exponents_ptr, value_exponents_ptr, page_table_ptr, seq_lens_ptr, work_ptr, out_ptr,
    partial_ptr, lse_ptr, scale, width, num_kv_heads, max_splits,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float16 if q_ptr.dtype.element_ty == tl.bfloat16 else q_ptr.dtype.element_ty
    num_heads = num_kv_heads * GROUP
    group, within, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (columns < D)[:, None] & (group < GROUP)[None, :]
    # Where a head is narrower than the tile it is read again, against zeros of q and for nobody.
    read, read_pairs = columns % D, tl.arange(0, BLOCK_D // 2) % (D // 2)
    for unit in range(tl.program_id(0), tl.load(work_ptr) * num_kv_heads, tl.num_programs(0)):
        item, head = tl.load(work_ptr + 1 + unit // num_kv_heads), unit % num_kv_heads
        row, split = (item // max_splits).to(tl.int64), item % max_splits
        seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
        length = _split_length(seq_len, max_splits, SPLIT)
        heads = head * GROUP + group
        at = (row * num_heads + heads)[None, :] * D + columns[:, None]
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        if key_exponents_ptr is not None:
            q = q.to(dtype)
        best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        if value_exponents_ptr is None:
            acc = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
        else:
            even = tl.zeros((BLOCK_D // 2, BLOCK_G), tl.float32)
            odd = tl.zeros((BLOCK_D // 2, BLOCK_G), tl.float32)
        pages_ptr = page_table_ptr + row * width
        first = split * length
        rows = tile_rows(pages_ptr, first, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
        key_exponent, value_exponent = _exponents(key_exponents_ptr, rows), _exponents(value_exponents_ptr, rows)
        for start in range(first, min(first + length, seq_len), BLOCK_N):
            here, key_scale, value_scale = rows, key_exponent.to(tl.int32), value_exponent.to(tl.int32)
            rows = tile_rows(pages_ptr, start + BLOCK_N, seq_len, head, num_kv_heads, PAGE_SIZE, BLOCK_N)
            key_exponent, value_exponent = _exponents(key_exponents_ptr, rows), _exponents(value_exponents_ptr, rows)

            # Behind the last token lies anything, even NaN: keys give scores that nobody sees, values are not read.
            written = start + within < seq_len
            k = tl.load(key_ptr + here[:, None] * D + read[None, :])
            if key_exponents_ptr is None:
                scores = tl.dot(k, q, input_precision="ieee") * scale
            else:
                product = tl.dot(k.to(dtype), q, input_precision="ieee")
                scores = product * (power_of_two(key_scale) * scale)[:, None]
            scores = tl.where(written[:, None], scores, float("-inf"))

            # The online softmax, in powers of two.
            reach = scores
            if value_exponents_ptr is not None:
                reach += value_power(value_scale)[:, None]
            higher = tl.maximum(best, tl.max(reach, axis=0))
            weights = tl.exp2(scores - higher[None, :])
            shrink = tl.exp2(best - higher)
            best, total = higher, total * shrink + tl.sum(weights, axis=0)
            if value_exponents_ptr is None:
                at_values = here[None, :] * D + read[:, None]
                v = tl.load(value_ptr + at_values, mask=written[None, :], other=0.0)
                acc = tl.dot(v, weights.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
            else:
                at_pairs = here[None, :] * (D // 2) + read_pairs[:, None]
                pairs_ptr = value_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
                pairs = tl.load(pairs_ptr + at_pairs, mask=written[None, :], other=0)
                first_v, second_v = _apart(pairs, INTERPRETED)
                weights = (weights * power_of_two(value_scale)[:, None]).to(dtype)
                even = tl.dot(first_v.to(dtype), weights, even * shrink[None, :], input_precision="ieee")
                odd = tl.dot(second_v.to(dtype), weights, odd * shrink[None, :], input_precision="ieee")
        if value_exponents_ptr is not None:
            acc = tl.join(even, odd).permute(0, 2, 1).reshape(BLOCK_D, BLOCK_G)
        acc = acc / total[None, :]
        if length >= seq_len:  # the only split
            tl.store(out_ptr + at, acc, mask=inside)
        else:
            slots = item.to(tl.int64) * num_heads + heads
            tl.store(partial_ptr + slots[None, :] * D + columns[:, None], acc, mask=inside)
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
    _work_kernel[(1,)](seq_lens.contiguous(), work, len(seq_lens), max_splits, SPLIT=SPLIT, BLOCK_B=block, num_warps=4)
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
    check_cache(q, (key_cache, value_cache), exponents, page_table)
    if not on_triton(q):
        return reference_decode(q, key_cache, value_cache, page_table, seq_lens, exponents)
    (B, num_heads, D), (_, num_kv_heads, page_size, _), width = q.shape, key_cache.shape, page_table.shape[1]
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    out = torch.empty_like(q)
    if not B:
        return out
    if work is None:
        work = decode_work(seq_lens, width * page_size)
    tiles, max_splits = TILES[key_cache.element_size()], (len(work) - 1) // B
    partial = q.new_empty(B * max_splits, num_heads, D, dtype=torch.float32)
    lse = q.new_empty(B * max_splits, num_heads, dtype=torch.float32)
    group = num_heads // num_kv_heads
    sizes = {"GROUP": group, "D": D, "SPLIT": SPLIT, "BLOCK_D": max(triton.next_power_of_2(D), 32)}
    num_programs = min(B * max_splits * num_kv_heads, _num_programs(q.device, tiles))
    _decode_kernel[(num_programs,)](
        q, key_cache, value_cache, *exponents, page_table, seq_lens, work, out, partial, lse,
        D**-0.5 * LOG2E, width, num_kv_heads, max_splits,
        PAGE_SIZE=page_size, BLOCK_G=max(triton.next_power_of_2(group), tiles.heads), BLOCK_N=tiles.tokens, **sizes,
        INTERPRETED=INTERPRETED, num_warps=1, num_stages=tiles.num_stages,
    )  # fmt: skip
    _combine_kernel[(B, num_kv_heads)](
        seq_lens, partial, lse, out, num_kv_heads, max_splits,
        BLOCK_S=triton.next_power_of_2(max_splits), BLOCK_G=triton.next_power_of_2(group), **sizes, num_warps=1,
    )  # fmt: skip
    return out


def _num_programs(device: torch.device, tiles: Tiles) -> int:
    return 3 if INTERPRETED else tiles.programs * torch.cuda.get_device_properties(device).multi_processor_count
