"""Attention against a paged key-value cache, for new tokens of many sequences at once.

A sequence's context lies in pages scattered over one pool; its row of `page_table` lists them in order. Decoding
reads every byte of K and V once a step, so this operation, not the weights, bounds long generations:
2 * context * num_kv_heads * D * itemsize bytes a sequence and layer. This plain form copies what it reads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    page_size = key_cache.shape[1]
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
