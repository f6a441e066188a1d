"""The layout of the paged KV cache, for all code that writes or reads keys and values.

The context of a sequence is stored in pages that are scattered over one pool. The sequence's row of `page_table` lists
its pages in order. Within a page the tokens of one head are contiguous, [page_size, D], so a tile is one contiguous
read: 16 KB for 64 tokens of 128 elements in bf16. A token's offset in its page never changes. A page that holds a
shared prefix is therefore an ordinary page: the page-table rows of all sequences that share it start with its index.

Keys, values or both may be in e4m3 with one power-of-two scale for each head of a token (fp8.py): 1 + 1/D bytes per
element instead of 2. The scales have the order of the cache rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import jit, tl
from thinksafe.kernels.fp8 import E4M3, dequantize
from thinksafe.kernels.fp8 import reference as quantize

REFERENCE_BLOCK = 64
"""Block size, in tokens, of the plain torch forms of paged attention. They pad contexts to a multiple of it and compute
a prompt block by block."""

KvScales = tuple[Tensor | None, Tensor | None]
"""(scales of keys, scales of values), each [num_pages, num_kv_heads, page_size] uint8 with element = value * 2 **
(scale - 127), or None if that cache is not in e4m3."""


@jit
def cache_row(page, head, offset, num_kv_heads, PAGE_SIZE: tl.constexpr):
    """Return the index of the cache row (D elements) that holds a KV head of the token at `offset` of `page`, int64.

    The scale of this row has the same index."""
    return (page.to(tl.int64) * num_kv_heads + head) * PAGE_SIZE + offset


@jit
def tile_rows(pages_ptr, start, seq_len, head, num_kv_heads, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the cache rows (see `cache_row`) of one KV head of the tokens start to start + BLOCK_N - 1, [BLOCK_N].

    pages_ptr points to the page-table row of the context, which has seq_len tokens. Past the end of the context the
    rows are valid indices, but their content is arbitrary. A page index costs one 8-byte load. The loops load the page
    indices of the next tile while they load the current tile, so they never wait for an index."""
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


def write_kv(
    key_cache: Tensor, value_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, scales_e8m0: KvScales = (None, None)
) -> None:
    """Store new keys and values in the cache, in plain torch; an e4m3 cache gets them quantized per head and token.

    Args:
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D], changed in place.
        k, v: [T, num_kv_heads, D].
        slots: [T] int64, page * page_size + offset of each token; all different.
        scales_e8m0: scales of the caches in e4m3, changed in place; None for a cache in the dtype of k and v.
    """
    num_kv_heads, page_size, D = key_cache.shape[1:]
    heads = torch.arange(num_kv_heads, device=slots.device)
    rows = ((slots // page_size)[:, None] * num_kv_heads + heads) * page_size + (slots % page_size)[:, None]
    for cache, cache_scales, states in zip((key_cache, value_cache), scales_e8m0, (k, v), strict=True):
        if cache_scales is not None:
            states, state_scales = quantize(states)
            cache_scales.view(-1).index_copy_(0, rows.flatten(), state_scales.flatten())
            cache, states = cache.view(torch.uint8), states.view(torch.uint8)  # index_copy_ lacks e4m3
        cache.view(-1, D).index_copy_(0, rows.flatten(), states.flatten(0, 1))


def gather_kv(
    key_cache: Tensor, value_cache: Tensor, scales_e8m0: KvScales, page_table: Tensor, visible: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Return the first L keys and values of B contexts, copied out of the cache; those of invisible tokens are 0.

    Args:
        key_cache, value_cache: [num_pages, num_kv_heads, page_size, D].
        scales_e8m0: scales of the caches in e4m3; None for any other cache.
        page_table: [B, W] int64, the pages of each context in order.
        visible: [B, L] bool; L is a multiple of REFERENCE_BLOCK, and only the last block holds invisible tokens.
        dtype: dtype of the result for a cache in e4m3; any other cache keeps its dtype.

    Returns:
        [keys, values], [B, num_kv_heads, L, D] each.
    """
    (_, num_kv_heads, page_size, D), length = key_cache.shape, visible.shape[1]
    width = -(-length // page_size)
    page_table = F.pad(page_table[:, :width], (0, max(0, width - page_table.shape[1])))
    page_heads = page_table[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=page_table.device)[:, None]
    gathered = []
    for cache, cache_scales in zip((key_cache, value_cache), scales_e8m0, strict=True):
        if cache_scales is None:
            tensor = cache.view(-1, page_size * D).index_select(0, page_heads.flatten())
        else:
            values = cache.view(torch.uint8).view(-1, page_size, D).index_select(0, page_heads.flatten()).view(E4M3)
            scales = cache_scales.view(-1, page_size).index_select(0, page_heads.flatten())
            tensor = dequantize(values, scales, dtype)
        tensor = tensor.view(len(page_table), num_kv_heads, -1, D)[:, :, :length]
        # The cache may hold anything after the last token, even NaN, and a softmax weight of 0 times NaN is NaN.
        tensor[:, :, -REFERENCE_BLOCK:].masked_fill_(~visible[:, None, -REFERENCE_BLOCK:, None], 0)
        gathered.append(tensor)
    return gathered


def reference_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Return softmax(q kᵀ / sqrt(D)) v over the visible tokens, in plain torch; NaN for a query that sees no token.

    Args:
        q: [B, T, num_heads, D].
        k, v: [B, num_kv_heads, L, D].
        visible: [B, T, L] bool; True if the query attends to the key.

    Returns:
        [B, T, num_heads, D].
    """
    (B, T, _, D), num_kv_heads = q.shape, k.shape[1]
    # One matmul per row and KV head: its shape does not depend on B, so BLAS rounds a row the same way in every batch.
    grouped_q = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(B * num_kv_heads, -1, D)
    scores = (grouped_q @ k.flatten(0, 1).transpose(1, 2)).view(B, num_kv_heads, -1, T, k.shape[2]) * D**-0.5
    probs = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    out = probs.view(B * num_kv_heads, -1, k.shape[2]) @ v.flatten(0, 1)
    return out.view(B, num_kv_heads, -1, T, D).permute(0, 3, 1, 2, 4).reshape(q.shape)


def check_cache(q: Tensor, caches: tuple[Tensor, Tensor], scales_e8m0: KvScales, page_table: Tensor) -> None:
    """Check that q, the key and value caches, their scales and the page table fit together.

    Args:
        q: [.., num_heads, D], three dimensions; num_heads must be a multiple of num_kv_heads.
        caches: (key cache, value cache), [num_pages, num_kv_heads, page_size, D] each, contiguous.
        scales_e8m0: uint8 scales of a cache in e4m3; None requires a cache in the dtype of q.
        page_table: must be int64; its shape is not checked.

    Raises:
        ValueError: a shape, dtype or stride is invalid.
    """
    shape = caches[0].shape
    if caches[1].shape != shape or not all(cache.is_contiguous() for cache in caches):
        raise ValueError(
            "key_cache and value_cache must have equal shapes and be contiguous; found "
            f"{list(shape)} and {list(caches[1].shape)}"
        )
    if q.shape[2] != shape[3] or q.shape[1] % shape[1]:
        raise ValueError(
            "q must be [.., num_heads, D] and a cache [num_pages, num_kv_heads, page_size, D], num_heads a multiple of "
            f"num_kv_heads; found {list(q.shape)} and {list(shape)}"
        )
    for cache, cache_scales in zip(caches, scales_e8m0, strict=True):
        if cache.dtype != (q.dtype if cache_scales is None else E4M3):
            raise ValueError(
                f"a cache must have the dtype of q, or be in e4m3 with scales_e8m0; found {cache.dtype} and {q.dtype}"
            )
        if cache_scales is not None and (cache_scales.shape != shape[:3] or cache_scales.dtype != torch.uint8):
            raise ValueError(
                f"scales_e8m0 must be uint8 {list(shape[:3])}; found {cache_scales.dtype} {list(cache_scales.shape)}"
            )
    if page_table.dtype != torch.int64:
        raise ValueError(f"page_table must be torch.int64; found {page_table.dtype}")
