"""Causal attention over sequences packed end to end in one tensor, so the model computes no padding.

A token sees itself and the earlier tokens of its sequence, never another sequence. FLOPs: 2 * D * sum(len^2) per query
head, forward. In 16 bits on a GPU this is FlashAttention: the flash-attn package's if it is installed, else torch's.
Both read grouped heads directly, except torch before 2.12, which gets keys and values repeated for every query head.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_FLASH_ATTN = find_spec("flash_attn") is not None
"""Whether the flash-attn package is installed."""
TORCH_READS_GROUPED_HEADS = torch.__version__ >= (2, 12)
"""Whether torch's `varlen_attn` takes fewer key-value heads than query heads (`enable_gqa`)."""


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return causal softmax(q kᵀ / sqrt(D)) v within each sequence, [T, num_heads, D]; differentiable.

    Args:
        q, k, v: [T, num_heads, D] and [T, num_kv_heads, D]; num_kv_heads divides num_heads.
        cu_seqlens: [N+1] int32 on the tensors' device; sequence i is rows cu_seqlens[i] to cu_seqlens[i+1].
        max_seqlen: length of the longest sequence; an argument, so that the host need not wait for the device.
    """
    if q.is_cuda and _runs_as_flash(q.dtype):
        return flash_attention(q, k, v, cu_seqlens, max_seqlen)
    return reference(q, k, v, cu_seqlens)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the result of `packed_attention` in plain torch. The host waits for the device to read cu_seqlens.

    It computes one sequence at a time: a padded batch would be mostly padding if one sequence is long."""

    def attend_sequence(*qkv: Tensor) -> Tensor:
        heads_first = (part.transpose(0, 1)[None] for part in qkv)
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    seq_lens = cu_seqlens.diff().tolist()
    return torch.cat([attend_sequence(*qkv) for qkv in zip(*(x.split(seq_lens) for x in (q, k, v)), strict=True)])


def flash_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return the result of `packed_attention` by FlashAttention, for tensors in 16 bits on a GPU."""
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if HAS_FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *lengths, causal=True)
    from torch.nn.attention.varlen import varlen_attn  # a CPU does not need it

    grouped_heads = {"enable_gqa": True} if TORCH_READS_GROUPED_HEADS else {}
    if not grouped_heads:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # window_size (-1, 0): all tokens to the left, none to the right.
    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), **grouped_heads)


def supports_grouped_heads(dtype: torch.dtype) -> bool:
    """Return whether attention in this dtype on a GPU saves keys and values for the backward pass once per KV head.

    It does in 16 bits with flash-attn, or with torch 2.12 or newer. Otherwise it saves a copy for every query head."""
    return (HAS_FLASH_ATTN or TORCH_READS_GROUPED_HEADS) and _runs_as_flash(dtype)


def _runs_as_flash(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)
