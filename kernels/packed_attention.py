"""Causal attention over sequences that lie end to end in one tensor, without a token of padding in the model.

A token sees the tokens of its own sequence up to itself and nothing of its neighbours. FLOPs: 2 * D * sum(len^2) a
query head, forward. On a GPU in 16 bits this is FlashAttention's: its own package where that is installed, which reads
grouped heads as they are, else the one in torch, for which keys and values are repeated for every query head.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

_IN_16_BITS = (torch.bfloat16, torch.float16)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v within each sequence, causal, differentiable.

    Args:
        q: [T, num_heads, D].
        k, v: [T, num_kv_heads, D]; num_kv_heads divides num_heads.
        cu_seqlens: [N+1] int32 on the tensors' device; sequence i is rows cu_seqlens[i] to cu_seqlens[i+1].
        max_seqlen: the longest sequence, known on the host so that nothing waits for the device.

    Returns:
        [T, num_heads, D].
    """
    if q.is_cuda and q.dtype in _IN_16_BITS:
        return _VARLEN(q, k, v, cu_seqlens, max_seqlen)
    return reference(q, k, v, cu_seqlens, max_seqlen)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The same, one sequence after another: of a dense batch most would be padding where one sequence is long."""

    def of(*parts: Tensor) -> Tensor:
        heads_first = (part.transpose(0, 1)[None] for part in parts)
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    lengths = cu_seqlens.diff().tolist()
    return torch.cat([of(*parts) for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])


def _with_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)


def _with_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # (-1, 0): any number of tokens to the left, none to the right.
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0))


def _varlen() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Which of the two; found out once, and without importing either."""
    return _with_flash_attn if find_spec("flash_attn") else _with_torch


_VARLEN = _varlen()


def keeps_grouped_heads(dtype: torch.dtype) -> bool:
    """Whether on a GPU keys and values are kept for the backward pass as they are, not once for every query head."""
    return dtype in _IN_16_BITS and _VARLEN is _with_flash_attn
