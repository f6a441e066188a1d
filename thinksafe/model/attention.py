"""The packed form of attention, as the decoder calls it. The paged form lives with the sampler's cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.packed_attention import packed_attention


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

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.cu_seqlens, self.max_seqlen)


def packed_positions(lengths: list[int], device: torch.device | str) -> Tensor:
    """[T] int64: 0, 1, ... within each sequence."""
    return torch.cat([torch.arange(length) for length in lengths]).to(device)
