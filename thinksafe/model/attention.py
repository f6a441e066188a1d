"""The form in which the decoder calls attention, and attention within packed sequences.

Attention to the sampler's page cache is in sampler/model_runner.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.packed_attention import packed_attention
from thinksafe.kernels.rope import qk_norm_rope, rope
from thinksafe.model.transfer import upload


class Rotation(NamedTuple):
    """What a layer applies to queries and keys before attention: Qwen3's norm of every head with gains [D], or None
    for families without it, then the rotation by angles with cosine and sine [T, D/2] fp32."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    cos: Tensor
    sin: Tensor

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return q [T, num_heads, D] and k [T, num_kv_heads, D] after the norm, if there is one, and the rotation, in
        new tensors."""
        if self.q_weight is None:
            return rope(q, self.cos, self.sin), rope(k, self.cos, self.sin)
        return qk_norm_rope(q, k, *self)


Attention = Callable[[int, Tensor, Tensor, Tensor, Rotation], Tensor]
"""A function (layer index, q [T, num_heads, D], k and v [T, num_kv_heads, D], rotation) -> [T, num_heads, D]. The
function rotates q and k itself, because attention to the page cache writes the rotated keys in the same kernel."""


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within sequences that are packed end to end, a function of the form `Attention`.

    Attributes:
        cu_seqlens: [N+1] int32, index of each sequence's first token, and last the total number of tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str) -> "PackedAttention":
        """Return the attention for sequences of these lengths, all at least 1."""
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(upload(cu_seqlens, device), max(lengths, default=0))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        q, k = rotation(q, k)
        return packed_attention(q, k, v, self.cu_seqlens, self.max_seqlen)


def packed_positions(lengths: list[int], device: torch.device | str) -> Tensor:
    """Return the positions 0, 1, ... within each sequence, [T] int64, for packed sequences of these lengths."""
    return upload(torch.cat([torch.arange(length) for length in lengths]), device)
