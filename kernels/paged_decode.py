"""Attention of one new token per sequence to its whole context in the paged KV cache (paged_cache.py).

A decode step reads every byte of K and V once, 2 * context * num_kv_heads * D * itemsize bytes per sequence and layer.
In long generations these reads take more time than the weights.

A context is cut into splits of SPLIT tokens. One work item computes one split for one KV head, and a second kernel
combines the partial results. The cuts depend on the sequence's length only, so the bits of its result do not depend on
the batch. A batch may mix rows of 100 and of 16,000 tokens, and only the device knows the lengths. Therefore persistent
programs walk through a list of splits that `list_splits` builds on the device.

All arithmetic must fit into the time of these reads, and e4m3 halves that time. Four choices serve this goal:
- A program is one warp, so it never waits for another warp.
- Tiles are transposed: scores are K Qᵀ, [tokens, heads], and the result is Vᵀ Pᵀ, [D, heads]. The tensor-core
  instruction needs 16 rows of one operand and 8 of the other, and 8 is enough for the query heads of a KV group.
- e4m3 elements are converted to fp16, which is exact, with one instruction for two elements; bf16 would need five.
- The tensor-core instruction needs V elements of two consecutive tokens in one register, but these are one cache row
  apart. The kernel loads pairs of adjacent e4m3 columns as 16-bit words, splits them into even and odd columns, and
  accumulates two matmuls.

Compiled for sm_90a, the loop issues 600 instructions per 8 KB in e4m3 and 490 per 16 KB in bf16: 39% and 16% of what
the SMs can issue at 1.7 GHz while 4.8 TB/s load the next tile (tools/hopper/compiled.py counts them).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, jit, on_triton, tl, triton
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

SPLIT, MAX_SPLITS = 512, 32
"""A context of up to SPLIT * MAX_SPLITS = 16k tokens is cut every SPLIT tokens. In a longer context the split length is
the smallest multiple of SPLIT that gives at most MAX_SPLITS splits. This bounds the memory of partial results: 0.3 GB
for 512 rows of 32 heads."""
REFERENCE_BATCH_TOKENS = 2**17
"""Largest number of context tokens that `reference` copies out of the cache at once, unless one row has more."""


class DecodeConfig(NamedTuple):
    """Settings of `_decode_kernel`; the tile of a KV group of more than block_g query heads has the next power of two.

    programs_per_sm fit into an SM's registers and shared memory: while one waits or starts a split, the others read."""

    block_g: int
    block_n: int
    num_stages: int
    programs_per_sm: int


CONFIGS = {1: DecodeConfig(8, 32, 3, 11), 2: DecodeConfig(8, 32, 3, 6), 4: DecodeConfig(8, 16, 2, 6)}
"""Bytes per element of the key cache -> configuration; elements of the value cache are never larger. The one for fp32
is for exactness, not for speed."""


def reference(q: Tensor, cache: KvCache, page_table: Tensor, seq_lens: Tensor) -> Tensor:
    """Return the result of `paged_decode` in plain torch, from batches of rows with equal padded length.

    The padded length depends on the row alone, so the bits of a row do not depend on the batch."""
    out = torch.zeros_like(q)
    for rows, length in batch_by_length(seq_lens):
        visible = torch.arange(length, device=q.device) < seq_lens[rows, None]
        k, v = gather_kv(cache, page_table[rows], visible, q.dtype)
        out[rows] = reference_attention(q[rows, None], k, v, visible[:, None])[:, 0]
    return out


def batch_by_length(seq_lens: Tensor) -> list[tuple[Tensor, int]]:
    """Return (row indices [n] int64, length padded to REFERENCE_BLOCK) of each batch; rows of length 0 are in none.

    A batch of several rows holds at most REFERENCE_BATCH_TOKENS tokens."""
    padded_lens = (seq_lens + REFERENCE_BLOCK - 1) // REFERENCE_BLOCK * REFERENCE_BLOCK
    batches = []
    for length in padded_lens[padded_lens > 0].unique().tolist():
        rows = (padded_lens == length).nonzero()[:, 0]
        batches += [(batch_rows, length) for batch_rows in rows.split(max(REFERENCE_BATCH_TOKENS // length, 1))]
    return batches


@jit
def _split_length(seq_len, max_splits, SPLIT: tl.constexpr):
    """Return the tokens per split of a context, the smallest multiple of SPLIT that gives at most max_splits splits."""
    return tl.maximum(tl.cdiv(tl.cdiv(seq_len, max_splits), SPLIT), 1) * SPLIT


@jit
def _list_splits_kernel(seq_lens_ptr, split_list_ptr, num_rows, max_splits, SPLIT: tl.constexpr, BLOCK_B: tl.constexpr):
    rows = tl.arange(0, BLOCK_B)
    seq_lens = tl.load(seq_lens_ptr + rows, mask=rows < num_rows, other=0).to(tl.int32)
    num_splits = tl.cdiv(seq_lens, _split_length(seq_lens, max_splits, SPLIT))
    row_offset = tl.cumsum(num_splits, 0) - num_splits
    tl.store(split_list_ptr, tl.sum(num_splits, 0))
    for split in range(max_splits):
        tl.store(split_list_ptr + 1 + row_offset + split, rows * max_splits + split, mask=split < num_splits)


@jit
def _load_scales(scales_ptr, kv_rows):
    """Return scale_e8m0 of the cache rows kv_rows, [BLOCK_N]; zeros, which nothing reads, if scales_ptr is None."""
    if scales_ptr is None:
        return tl.zeros(kv_rows.shape, tl.int32)
    else:
        return tl.load(scales_ptr + kv_rows)


@jit
def _unpack_e4m3x2(pairs, INTERPRETED: tl.constexpr):
    """Return two tensors: the low and the high byte of each 16-bit word, which are e4m3, in fp16 (interpreter: fp32).

    Two words share a register. In PTX one byte permutation and two conversions unpack both words; Triton's compiler
    would handle each byte separately."""
    if INTERPRETED:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        odd = (pairs >> 8 & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return even.to(tl.float32), odd.to(tl.float32)
    else:
        asm: tl.constexpr = """
            { .reg .b32 sorted; .reg .b16 even, odd;
              prmt.b32 sorted, $2, 0, 0x3120;
              mov.b32 {even, odd}, sorted;
              cvt.rn.f16x2.e4m3x2 $0, even;
              cvt.rn.f16x2.e4m3x2 $1, odd; }
            """
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)


@jit
def _decode_kernel(
    q_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, page_table_ptr, seq_lens_ptr, split_list_ptr, out_ptr,
    partial_ptr, lse_ptr, scale, width, num_kv_heads, max_splits,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute the splits of `split_list` for every KV head; a program takes every num_programs-th work item.

    A context's only split goes to `out`. Several splits go to `partial`, the softmax of the split alone, and `lse`,
    log2 of its sum of weights; `_combine_kernel` reads both."""
    dtype: tl.constexpr = tl.float16 if q_ptr.dtype.element_ty == tl.bfloat16 else q_ptr.dtype.element_ty
    num_heads = num_kv_heads * GROUP
    group_heads, tile_tokens, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q_mask = (columns < D)[:, None] & (group_heads < GROUP)[None, :]
    # If D < BLOCK_D, the extra columns reread valid memory; q is zero there and the result is masked.
    kv_columns, kv_column_pairs = columns % D, tl.arange(0, BLOCK_D // 2) % (D // 2)
    for work_item in range(tl.program_id(0), tl.load(split_list_ptr) * num_kv_heads, tl.num_programs(0)):
        split_index, kv_head = tl.load(split_list_ptr + 1 + work_item // num_kv_heads), work_item % num_kv_heads
        row, split = (split_index // max_splits).to(tl.int64), split_index % max_splits
        seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
        split_len = _split_length(seq_len, max_splits, SPLIT)
        q_heads = kv_head * GROUP + group_heads
        offsets = (row * num_heads + q_heads)[None, :] * D + columns[:, None]
        q = tl.load(q_ptr + offsets, mask=q_mask, other=0.0)
        if key_scales_ptr is not None:
            q = q.to(dtype)
        m_i = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_G,), tl.float32)
        if value_scales_ptr is None:
            acc = tl.zeros((BLOCK_D, BLOCK_G), tl.float32)
        else:
            acc_even = tl.zeros((BLOCK_D // 2, BLOCK_G), tl.float32)
            acc_odd = tl.zeros((BLOCK_D // 2, BLOCK_G), tl.float32)
        pages_ptr = page_table_ptr + row * width
        split_start = split * split_len
        next_kv_rows = tile_rows(pages_ptr, split_start, seq_len, kv_head, num_kv_heads, PAGE_SIZE, BLOCK_N)
        next_key_scale = _load_scales(key_scales_ptr, next_kv_rows)
        next_value_scale = _load_scales(value_scales_ptr, next_kv_rows)
        for start in range(split_start, min(split_start + split_len, seq_len), BLOCK_N):
            kv_rows, key_scale, value_scale = next_kv_rows, next_key_scale.to(tl.int32), next_value_scale.to(tl.int32)
            next_kv_rows = tile_rows(pages_ptr, start + BLOCK_N, seq_len, kv_head, num_kv_heads, PAGE_SIZE, BLOCK_N)
            next_key_scale = _load_scales(key_scales_ptr, next_kv_rows)
            next_value_scale = _load_scales(value_scales_ptr, next_kv_rows)

            # The cache may hold anything after the last token, even NaN: scores of such keys are masked, and such
            # values are not loaded.
            token_mask = start + tile_tokens < seq_len
            k = tl.load(key_ptr + kv_rows[:, None] * D + kv_columns[None, :])
            if key_scales_ptr is None:
                scores = tl.dot(k, q, input_precision="ieee") * scale
            else:
                qk = tl.dot(k.to(dtype), q, input_precision="ieee")
                scores = qk * (power_of_two(key_scale) * scale)[:, None]
            scores = tl.where(token_mask[:, None], scores, float("-inf"))

            # The online softmax, with 2^x instead of e^x.
            shifted_scores = scores
            if value_scales_ptr is not None:
                shifted_scores += value_log2_scale(value_scale)[:, None]
            m_new = tl.maximum(m_i, tl.max(shifted_scores, axis=0))
            p = tl.exp2(scores - m_new[None, :])
            alpha = tl.exp2(m_i - m_new)
            m_i, l_i = m_new, l_i * alpha + tl.sum(p, axis=0)
            if value_scales_ptr is None:
                value_offsets = kv_rows[None, :] * D + kv_columns[:, None]
                v = tl.load(value_ptr + value_offsets, mask=token_mask[None, :], other=0.0)
                acc = tl.dot(v, p.to(v.dtype), acc * alpha[None, :], input_precision="ieee")
            else:
                pair_offsets = kv_rows[None, :] * (D // 2) + kv_column_pairs[:, None]
                pairs_ptr = value_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
                pairs = tl.load(pairs_ptr + pair_offsets, mask=token_mask[None, :], other=0)
                v_even, v_odd = _unpack_e4m3x2(pairs, INTERPRETED)
                p = (p * power_of_two(value_scale)[:, None]).to(dtype)
                acc_even = tl.dot(v_even.to(dtype), p, acc_even * alpha[None, :], input_precision="ieee")
                acc_odd = tl.dot(v_odd.to(dtype), p, acc_odd * alpha[None, :], input_precision="ieee")
        if value_scales_ptr is not None:
            acc = tl.join(acc_even, acc_odd).permute(0, 2, 1).reshape(BLOCK_D, BLOCK_G)
        acc = acc / l_i[None, :]
        if split_len >= seq_len:  # the only split
            tl.store(out_ptr + offsets, acc, mask=q_mask)
        else:
            partial_rows = split_index.to(tl.int64) * num_heads + q_heads
            tl.store(partial_ptr + partial_rows[None, :] * D + columns[:, None], acc, mask=q_mask)
            tl.store(lse_ptr + partial_rows, m_i + tl.log2(l_i), mask=group_heads < GROUP)


@jit
def _combine_kernel(
    seq_lens_ptr, partial_ptr, lse_ptr, out_ptr, num_kv_heads, max_splits,
    GROUP: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store in `out` the result of one row and KV head: the mean of its splits, weighted with 2^lse.

    A row without context gets zeros. A row with one split is already in `out` and is left alone."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
    num_splits = tl.cdiv(seq_len, _split_length(seq_len, max_splits, SPLIT))
    if num_splits != 1:
        num_heads = num_kv_heads * GROUP
        group_heads, columns, splits = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
        q_heads = kv_head * GROUP + group_heads
        first_partial = row * max_splits
        out_mask = (group_heads < GROUP)[:, None] & (columns < D)[None, :]
        lse_mask = (splits < num_splits)[:, None] & (group_heads < GROUP)[None, :]
        all_partial_rows = (first_partial + splits)[:, None] * num_heads + q_heads[None, :]
        lse_max = tl.max(tl.load(lse_ptr + all_partial_rows, mask=lse_mask, other=float("-inf")), axis=0)
        weight_sum = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for split in range(num_splits):
            partial_rows = (first_partial + split) * num_heads + q_heads
            weight = tl.exp2(tl.load(lse_ptr + partial_rows, mask=group_heads < GROUP, other=0.0) - lse_max)
            weight_sum += weight
            partial = tl.load(partial_ptr + partial_rows[:, None] * D + columns[None, :], mask=out_mask, other=0.0)
            acc += weight[:, None] * partial
        acc = tl.where(num_splits > 0, acc / weight_sum[:, None], 0.0)
        tl.store(out_ptr + (row * num_heads + q_heads)[:, None] * D + columns[None, :], acc, mask=out_mask)


def list_splits(seq_lens: Tensor, max_seq_len: int) -> Tensor | None:
    """Return the list of splits that `paged_decode` works through; one list serves all layers of a step.

    seq_lens is [B] int64, max_seq_len the longest context that `page_table` can hold. The list is [1 + B * max_splits]
    int32: the number of splits, then their indices row * max_splits + split, then unused elements; max_splits is the
    smaller of MAX_SPLITS and ceil(max_seq_len / SPLIT). It is None on a CPU, which needs no list."""
    if not on_triton(seq_lens):
        return None
    num_rows, max_splits = len(seq_lens), min(MAX_SPLITS, triton.cdiv(max_seq_len, SPLIT))
    split_list = torch.empty(1 + num_rows * max_splits, dtype=torch.int32, device=seq_lens.device)
    _list_splits_kernel[(1,)](
        seq_lens.contiguous(), split_list, num_rows, max_splits, SPLIT=SPLIT,
        BLOCK_B=triton.next_power_of_2(max(num_rows, 1)), num_warps=4,
    )  # fmt: skip
    return split_list


def paged_decode(
    q: Tensor, cache: KvCache, page_table: Tensor, seq_lens: Tensor, split_list: Tensor | None = None
) -> Tensor:
    """Return softmax(q kᵀ / sqrt(D)) v, [B, num_heads, D], of one new token per sequence over its whole context.

    Not differentiable. On a GPU the host does not wait for the device.

    Args:
        q: [B, num_heads, D].
        cache: already holds the new tokens' keys and values.
        page_table: [B, W] int64, the pages of each context in order; entries past the last page may be any valid page.
        seq_lens: [B] int64, context lengths, new token included; the result of a row of length 0 is zero.
        split_list: the result of list_splits(seq_lens, W * page_size), if it exists from another layer; None builds it.

    Raises:
        ValueError: q, the cache or the dtype of page_table do not fit together.
    """
    check_cache(q, cache, page_table)
    if not on_triton(q):
        return reference(q, cache, page_table, seq_lens)
    (B, num_heads, D), (_, num_kv_heads, page_size, _), width = q.shape, cache.keys.shape, page_table.shape[1]
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    out = torch.empty_like(q)
    if not B:
        return out
    if split_list is None:
        split_list = list_splits(seq_lens, width * page_size)
    config, max_splits = CONFIGS[cache.keys.element_size()], (len(split_list) - 1) // B
    partial = q.new_empty(B * max_splits, num_heads, D, dtype=torch.float32)
    lse = q.new_empty(B * max_splits, num_heads, dtype=torch.float32)
    gpu = None if INTERPRETED else torch.cuda.get_device_properties(q.device)
    num_programs = config.programs_per_sm * gpu.multi_processor_count if gpu else 3
    constants, padded_group = kernel_constants(q, cache), triton.next_power_of_2(num_heads // num_kv_heads)
    _decode_kernel[(min(B * max_splits * num_kv_heads, num_programs),)](
        q, *cache, page_table, seq_lens, split_list, out, partial, lse, D**-0.5 * LOG2E, width, num_kv_heads,
        max_splits, **constants, PAGE_SIZE=page_size, SPLIT=SPLIT, BLOCK_G=max(padded_group, config.block_g),
        BLOCK_N=config.block_n, INTERPRETED=INTERPRETED, num_warps=1, num_stages=config.num_stages,
    )  # fmt: skip
    _combine_kernel[(B, num_kv_heads)](
        seq_lens, partial, lse, out, num_kv_heads, max_splits, **constants, SPLIT=SPLIT,
        BLOCK_S=triton.next_power_of_2(max_splits), BLOCK_G=padded_group, num_warps=1,
    )  # fmt: skip
    return out
