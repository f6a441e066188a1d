"""The cache that attention reads: where the keys and values of a token lie, for everything that writes or reads them.

A sequence's context lies in pages scattered over one pool; its row of `page_table` lists them in order. In a page a
head's tokens lie together, [page_size, D], so that a tile is one contiguous read: 16 KB at 64 tokens of 128 in bf16. A
token's offset in its page never changes, so a page that several sequences begin with is any page: its number stands at
the front of their tables.

Keys, values or both may be in e4m3 with an exponent for every head of a token (fp8.py): 1 + 1/D bytes a number in place
of 2. Exponents lie as the rows of the cache do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import jit, tl
from thinksafe.kernels.fp8 import E4M3, dequantise
from thinksafe.kernels.fp8 import reference as quantise

STRETCH = 64
"""Tokens that references pad a context to a multiple of, and positions of a prompt that they compute at once."""

Exponents = tuple[Tensor | None, Tensor | None]
"""Of keys and of values, [num_pages, num_kv_heads, page_size] uint8 each; None for a cache that is not in e4m3."""


@jit
def cache_row(page, head, offset, num_kv_heads, PAGE_SIZE: tl.constexpr):
    """Where one head of a token lies, in rows of D numbers; of its exponent, the index."""
    return (page.to(tl.int64) * num_kv_heads + head) * PAGE_SIZE + offset


@jit
def tile_rows(pages_ptr, start, seq_len, head, num_kv_heads, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """`cache_row` of tokens start to start + BLOCK_N of a context, [BLOCK_N]; behind its end, rows of any page.

    To find a page costs one 8-byte load. A loop asks for the next tile's while it loads this one, so that a page number
    is never waited for."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages_ptr + start // PAGE_SIZE, mask=start < seq_len, other=0)
        return cache_row(page, head, start % PAGE_SIZE, num_kv_heads, PAGE_SIZE) + tl.arange(0, BLOCK_N)
    else:
        tokens = start + tl.arange(0, BLOCK_N)
        pages = tl.load(pages_ptr + tokens // PAGE_SIZE, mask=tokens < seq_len, other=0)
        return cache_row(pages, head, tokens % PAGE_SIZE, num_kv_heads, PAGE_SIZE)


@jit
def value_power(exponent):
    """What is added to scores before an online softmax takes their maximum, fp32: with the scales of values in e4m3,
    weights are at 1 or below, as fp16 needs. A head of nothing but zeros has the smallest scale, 2^-126, and the sum of
    many weights without theirs must stay finite as well."""
    return (tl.maximum(exponent, 27) - 127).to(tl.float32)


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


def contexts(
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
        context[:, :, -STRETCH:].masked_fill_(~visible[:, None, -STRETCH:, None], 0)
        contexts.append(context)
    return contexts


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [B, T, num_heads, D]; k, v [B, num_kv_heads, L, D]; visible [B, T, L]; the result has the shape of q."""
    (B, T, _, D), num_kv_heads = q.shape, k.shape[1]
    # Products of one shape a row and KV head, whatever the number of rows: so BLAS computes each alike.
    grouped = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(B * num_kv_heads, -1, D)
    scores = (grouped @ k.flatten(0, 1).transpose(1, 2)).view(B, num_kv_heads, -1, T, k.shape[2]) * D**-0.5
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    out = weights.view(B * num_kv_heads, -1, k.shape[2]) @ v.flatten(0, 1)
    return out.view(B, num_kv_heads, -1, T, D).permute(0, 3, 1, 2, 4).reshape(q.shape)


def check_cache(q: Tensor, caches: tuple[Tensor, Tensor], exponents: Exponents, page_table: Tensor) -> None:
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
