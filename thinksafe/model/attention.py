"""How the decoder calls attention, and the packed form of it. The paged form lives with the sampler's cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.packed_attention import packed_attention
from thinksafe.kernels.rope import qk_norm_rope, rope


class Rotation(NamedTuple):
    """What a layer does to queries and keys before they meet: Qwen3's norm of every head, then the rotation.

    Attributes:
        q_weight, k_weight: [D], gains of the norm, or None for families without it.
        eps: of the norm.
        cos, sin: [T, D/2] fp32, of the tokens' positions.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    cos: Tensor
    sin: Tensor

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_weight is None:
            return rope(q, self.cos, self.sin), rope(k, self.cos, self.sin)
        return qk_norm_rope(q, k, *self)


Attention = Callable[[int, Tensor, Tensor, Tensor, Rotation], Tensor]
"""(layer index, q [T, num_heads, D], k [T, num_kv_heads, D], v likewise, rotation of q and k) -> [T, num_heads, D]. The
rotation is left to it, since a cache is best written in the same pass."""


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within sequences that lie end to end.

    Attributes:
        cu_seqlens: [N+1] int32, where each sequence starts.
        max_seqlen: the longest one, in tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str) -> "PackedAttention":
        """From the sequences' lengths, all at least 1."""
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        return cls(cu_seqlens, max(lengths, default=0))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        q, k = rotation(q, k)
        return packed_attention(q, k, v, self.cu_seqlens, self.max_seqlen)


def packed_positions(lengths: list[int], device: torch.device | str) -> Tensor:
    """[T] int64: 0, 1, ... within each sequence."""
    return torch.cat([torch.arange(length) for length in lengths]).to(device)
