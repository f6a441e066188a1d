"""Causal attention over sequences packed end to end in one tensor, so the model computes no padding.

A token sees itself and the earlier tokens of its sequence, never another sequence. FLOPs: 2 * D * sum(len^2) per query
head, forward. In 16 bits on a GPU this is FlashAttention. If the flash-attn package is installed, it is used and reads
grouped heads directly. Otherwise torch's varlen_attn is used, with keys and values repeated for every query head.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return causal softmax(q kᵀ / sqrt(D)) v within each sequence; differentiable.

    Args:
        q: [T, num_heads, D].
        k, v: [T, num_kv_heads, D]; num_kv_heads divides num_heads.
        cu_seqlens: [N+1] int32 on the tensors' device; sequence i is rows cu_seqlens[i] to cu_seqlens[i+1].
        max_seqlen: length of the longest sequence; an argument, so that the host need not wait for the device. Only
            FlashAttention reads it.

    Returns:
        [T, num_heads, D] in the dtype of q.
    """
    if q.is_cuda and q.dtype in _FLASH_DTYPES:
        return VARLEN_BACKEND(q, k, v, cu_seqlens, max_seqlen)
    return reference(q, k, v, cu_seqlens, max_seqlen)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return causal attention within each sequence, [T, num_heads, D], as `packed_attention` does, in plain torch.

    It computes one sequence at a time: a padded batch would be mostly padding if one sequence is long. The host waits
    for the device to read cu_seqlens; max_seqlen is not used."""

    def attend_sequence(*qkv: Tensor) -> Tensor:
        heads_first = (part.transpose(0, 1)[None] for part in qkv)
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    seq_lens = cu_seqlens.diff().tolist()
    return torch.cat([attend_sequence(*qkv) for qkv in zip(*(x.split(seq_lens) for x in (q, k, v)), strict=True)])


def varlen_with_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return causal attention within each sequence, [T, num_heads, D], by the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)


def varlen_with_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Return causal attention within each sequence, [T, num_heads, D], by torch's FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    group_size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
    # window_size (-1, 0): all tokens to the left, none to the right.
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0))


def choose_varlen_backend() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Return the function that attends for 16-bit tensors on a GPU: flash-attn's if it is installed, else torch's.

    Neither library is imported before that function is called.
    """
    return varlen_with_flash_attn if find_spec("flash_attn") else varlen_with_torch


VARLEN_BACKEND = choose_varlen_backend()
"""Function that `packed_attention` calls for 16-bit tensors on a GPU."""


def supports_grouped_heads(dtype: torch.dtype) -> bool:
    """Return whether attention in this dtype on a GPU saves keys and values for the backward pass once per KV head.

    It does in 16 bits with the flash-attn package. Otherwise it saves a copy for every query head.
    """
    return dtype in _FLASH_DTYPES and VARLEN_BACKEND is varlen_with_flash_attn
