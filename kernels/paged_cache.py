"""The layout of the paged KV cache, for all code that writes or reads keys and values.

The context of a sequence is stored in pages that are scattered over one pool. The sequence's row of `page_table` lists
its pages in order. Within a page the tokens of one head are contiguous, [page_size, D], so a tile is one contiguous
read: 16 KB for 64 tokens of 128 elements in bf16. A token's offset in its page never changes. A page that holds a
shared prefix is therefore an ordinary page: the page-table rows of all sequences that share it start with its index.

Keys, values or both may be in e4m3 with one power-of-two scale for each head of a token (fp8.py): 1 + 1/D bytes per
element instead of 2. The scales have the order of the cache rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import jit, tl, triton
from thinksafe.kernels.fp8 import E4M3, dequantize
from thinksafe.kernels.fp8 import reference as quantize

LOG2E = 1.4426950408889634
REFERENCE_BLOCK = 64
"""Block size, in tokens, of the plain torch forms of paged attention. They pad contexts to a multiple of it and compute
a prompt block by block."""


class KvCache(NamedTuple):
    """Keys and values of one layer on all pages.

    Attributes:
        keys, values: [num_pages, num_kv_heads, page_size, D], contiguous, in the dtype of the queries or in e4m3.
        key_scales, value_scales: [num_pages, num_kv_heads, page_size] uint8 with element = value * 2 ** (scale - 127)
            for a tensor in e4m3, otherwise None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@jit
def cache_row(page, head, offset, num_kv_heads, PAGE_SIZE: tl.constexpr):
    """Return the index, int64, of the cache row, and of the scale, of a KV head of the token at `offset` of `page`."""
    return (page.to(tl.int64) * num_kv_heads + head) * PAGE_SIZE + offset


@jit
def tile_rows(pages_ptr, start, seq_len, head, num_kv_heads, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the cache rows (see `cache_row`) of one KV head of the tokens start to start + BLOCK_N - 1, [BLOCK_N].

    pages_ptr points to the page-table row of the context, which has seq_len tokens; the content of rows past its end is
    arbitrary. The loops load the page indices of the next tile early, so they never wait for an index."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages_ptr + start // PAGE_SIZE, mask=start < seq_len, other=0)
        return cache_row(page, head, start % PAGE_SIZE, num_kv_heads, PAGE_SIZE) + tl.arange(0, BLOCK_N)
    else:
        tokens = start + tl.arange(0, BLOCK_N)
        pages = tl.load(pages_ptr + tokens // PAGE_SIZE, mask=tokens < seq_len, other=0)
        return cache_row(pages, head, tokens % PAGE_SIZE, num_kv_heads, PAGE_SIZE)


@jit
def value_log2_scale(scale_e8m0):
    """Return log2 of the scales of e4m3 values, max(scale_e8m0 - 127, -100), in fp32.

    The online softmax adds it to the scores before it takes their maximum. Softmax weights times the scales of their
    values are then at most 1, so fp16 can hold them. The bound of -100 keeps the sum of the weights, which are not
    multiplied with the scales, finite in fp32: a head of zeros has the smallest scale, 2^-126."""
    return (tl.maximum(scale_e8m0, 27) - 127).to(tl.float32)


def write_kv(cache: KvCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store keys and values [T, num_kv_heads, D] in the cache, in plain torch; a cache in e4m3 gets them quantized.

    The slot of a token, int64, is page * page_size + offset; all are different."""
    num_kv_heads, page_size, D = cache.keys.shape[1:]
    heads = torch.arange(num_kv_heads, device=slots.device)
    rows = (((slots // page_size)[:, None] * num_kv_heads + heads) * page_size + (slots % page_size)[:, None]).flatten()
    for stored, stored_scales, states in zip(cache[:2], cache[2:], (k, v), strict=True):
        if stored_scales is not None:
            states, scales = quantize(states)
            stored_scales.view(-1).index_copy_(0, rows, scales.flatten())
            stored, states = stored.view(torch.uint8), states.view(torch.uint8)  # index_copy_ lacks e4m3
        stored.view(-1, D).index_copy_(0, rows, states.flatten(0, 1))


def gather_kv(cache: KvCache, page_table: Tensor, visible: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return [keys, values] of the first L tokens of B contexts, [B, num_kv_heads, L, D] each, copied out of the cache.

    page_table is [B, W] int64, visible [B, L] bool. L is a multiple of REFERENCE_BLOCK, and only the last block holds
    invisible tokens, which become 0. A cache in e4m3 is converted to `dtype`."""
    (_, num_kv_heads, page_size, D), length = cache.keys.shape, visible.shape[1]
    width = -(-length // page_size)
    page_table = F.pad(page_table[:, :width], (0, max(0, width - page_table.shape[1])))
    heads = torch.arange(num_kv_heads, device=page_table.device)[:, None]
    page_heads = (page_table[:, None] * num_kv_heads + heads).flatten()
    gathered = []
    for stored, scales in zip(cache[:2], cache[2:], strict=True):
        if scales is None:
            tensor = stored.view(-1, page_size * D).index_select(0, page_heads)
        else:
            elements = stored.view(torch.uint8).view(-1, page_size, D).index_select(0, page_heads).view(E4M3)
            tensor = dequantize(elements, scales.view(-1, page_size).index_select(0, page_heads), dtype)
        tensor = tensor.view(len(page_table), num_kv_heads, -1, D)[:, :, :length]
        # After the last token the cache may hold NaN, and a softmax weight of 0 times NaN is NaN.
        tensor[:, :, -REFERENCE_BLOCK:].masked_fill_(~visible[:, None, -REFERENCE_BLOCK:, None], 0)
        gathered.append(tensor)
    return gathered


def reference_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Return softmax(q kᵀ / sqrt(D)) v over the visible tokens, [B, T, num_heads, D]; NaN for a query that sees none.

    It is in plain torch. q is [B, T, num_heads, D], k and v [B, num_kv_heads, L, D], visible [B, T, L] bool."""
    (B, T, _, D), num_kv_heads = q.shape, k.shape[1]
    # One matmul per row and KV head: its shape does not depend on B, so BLAS rounds a row the same way in every batch.
    grouped_q = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(B * num_kv_heads, -1, D)
    scores = (grouped_q @ k.flatten(0, 1).transpose(1, 2)).view(B, num_kv_heads, -1, T, k.shape[2]) * D**-0.5
    probs = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    out = probs.view(B * num_kv_heads, -1, k.shape[2]) @ v.flatten(0, 1)
    return out.view(B, num_kv_heads, -1, T, D).permute(0, 3, 1, 2, 4).reshape(q.shape)


def check_cache(q: Tensor, cache: KvCache, page_table: Tensor) -> None:
    """Check that q [.., num_heads, D], the cache and the dtype of the page table fit together.

    Raises:
        ValueError: a shape, dtype or stride is invalid.
    """
    shape = cache.keys.shape
    if cache.values.shape != shape or not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
        raise ValueError(
            "keys and values of the cache must have equal shapes and be contiguous; found "
            f"{list(shape)} and {list(cache.values.shape)}"
        )
    if q.shape[2] != shape[3] or q.shape[1] % shape[1]:
        raise ValueError(
            "q must be [.., num_heads, D] and a cache [num_pages, num_kv_heads, page_size, D], num_heads a multiple of "
            f"num_kv_heads; found {list(q.shape)} and {list(shape)}"
        )
    for stored, scales in zip(cache[:2], cache[2:], strict=True):
        if stored.dtype != (q.dtype if scales is None else E4M3):
            raise ValueError(
                f"a cache must have the dtype of q, or e4m3 and scales; found {stored.dtype} and {q.dtype}"
            )
        if scales is not None and (scales.shape != shape[:3] or scales.dtype != torch.uint8):
            raise ValueError(f"scales must be uint8 {list(shape[:3])}; found {scales.dtype} {list(scales.shape)}")
    if page_table.dtype != torch.int64:
        raise ValueError(f"page_table must be torch.int64; found {page_table.dtype}")


def kernel_constants(q: Tensor, cache: KvCache) -> dict[str, int]:
    """Return the constants that the attention kernels share: query heads of a KV group, D, and columns of a tile."""
    _, num_heads, D = q.shape
    return {"GROUP": num_heads // cache.keys.shape[1], "D": D, "BLOCK_D": max(triton.next_power_of_2(D), 32)}
