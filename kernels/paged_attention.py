"""Attention against a paged key-value cache, for new tokens of many sequences at once.

A sequence's context lies in pages scattered over one pool; its row of `page_table` lists them in order. Decoding
reads every byte of K and V once a step, so this operation, not the weights, bounds long generations:
2 * context * num_kv_heads * D * itemsize bytes a sequence and layer. This plain form copies what it reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BATCH_TOKENS = 2**17
"""Context tokens, padding included, that one batch of decoding rows copies out of the cache: 0.5 GB a layer at 8
key-value heads of 128 in bf16. Without a bound one row of 16k tokens would pad 255 others to its length."""


def write_kv(key_cache: Tensor, value_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store new keys and values.

    Args:
        key_cache, value_cache: [num_pages, page_size, num_kv_heads, D], changed in place.
        k, v: [T, num_kv_heads, D].
        slots: [T] int64, page * page_size + offset of each token; no two alike.
    """
    key_cache.flatten(0, 1).index_copy_(0, slots, k)
    value_cache.flatten(0, 1).index_copy_(0, slots, v)


def paged_decode(q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor) -> Tensor:
    """One new token a sequence against its whole context, itself included.

    Args:
        q: [B, num_heads, D].
        key_cache, value_cache: [num_pages, page_size, num_kv_heads, D].
        page_table: [B, W] int64; entries past a sequence's last page may be any valid page.
        seq_lens: [B] int64, at least 1.

    Returns:
        [B, num_heads, D].
    """
    out = torch.empty_like(q)
    for rows in _similar_lengths(seq_lens):
        out[rows] = _decode_padded(q[rows], key_cache, value_cache, page_table[rows], seq_lens[rows])
    return out


def _similar_lengths(seq_lens: Tensor) -> list[Tensor]:
    """Rows in batches, shortest first, each at most _BATCH_TOKENS when padded to its longest."""
    order = seq_lens.argsort(stable=True)
    lengths = seq_lens[order].tolist()
    batches, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > _BATCH_TOKENS:
            batches.append(order[start:end])
            start = end
    return batches


def _decode_padded(q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, seq_lens: Tensor) -> Tensor:
    page_size = key_cache.shape[1]
    page_table = page_table[:, : -(-int(seq_lens.max()) // page_size)]
    positions = torch.arange(page_table.shape[1] * page_size, device=q.device)
    visible = positions < seq_lens[:, None]
    slots = (page_table[:, :, None] * page_size + positions[:page_size]).flatten(1)
    # Behind its last token lies anything, even NaN, which no mask undoes (0 * NaN): the first token stands in.
    slots = torch.where(visible, slots, slots[:, :1])
    k, v = _gather(key_cache.flatten(0, 1), slots), _gather(value_cache.flatten(0, 1), slots)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=visible[:, None, None], enable_gqa=True)
    return out[:, :, 0]


def _gather(cache: Tensor, index: Tensor) -> Tensor:
    """Rows of [N, ..., num_kv_heads, D] named by [B, W] -> [B, num_kv_heads, tokens, D]."""
    rows = cache.index_select(0, index.flatten())  # twice as fast as cache[index] on a CPU
    return rows.view(len(index), -1, *cache.shape[-2:]).transpose(1, 2)


def paged_prefill(q: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Tensor, seq_len: int) -> Tensor:
    """Consecutive new tokens of one sequence, the last of them at position seq_len - 1, causal.

    Args:
        q: [T, num_heads, D].
        key_cache, value_cache: [num_pages, page_size, num_kv_heads, D].
        pages: [W] int64, W * page_size >= seq_len.
        seq_len: context length, new tokens included.

    Returns:
        [T, num_heads, D].
    """
    k = _gather(key_cache, pages[None])[:, :, :seq_len]
    v = _gather(value_cache, pages[None])[:, :, :seq_len]
    query_position = torch.arange(seq_len - q.shape[0], seq_len, device=q.device)
    visible = torch.arange(seq_len, device=q.device) <= query_position[:, None]
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)
