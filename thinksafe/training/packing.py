"""Sequences laid end to end, so that no step computes padding and no token sees another sequence.

A row of hidden states predicts the next token; only rows whose next token belongs to the response have a target.
Sequences that are to stay as the reference has them lie at the front, so that the reference reads a slice of the pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thinksafe.model.attention import PackedAttention, packed_positions

Reduction = Literal["token", "sequence"]


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One tokenised example.

    Attributes:
        input_ids: [T] int32, prompt and response.
        response_start: index of the first response token, at least 1; everything from there on is trained.
        name: of the example, for messages.
        weight: of the example in the loss, positive.
        keeps_to_reference: its loss is the divergence from the reference, not the cross-entropy.
    """

    input_ids: np.ndarray
    response_start: int
    name: str = "an unnamed example"
    weight: float = 1.0
    keeps_to_reference: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return len(self.input_ids) - self.response_start


@dataclass(frozen=True)
class PackedBatch:
    """What one forward and backward pass reads, on the device.

    Attributes:
        input_ids, positions: [T] int64.
        attention: keeps the sequences apart.
        target_rows: [R] int64, rows of the hidden states that have a target.
        targets: [R] int64, the tokens they predict.
        token_weight: [R] fp32, of each target in the loss.
        total_weight: their sum.
        num_reference_rows: the first so many of target_rows are compared with the reference.
        num_reference_tokens: the first so many tokens are the sequences that these belong to.
        reference_attention: keeps those apart.
        names: of the sequences, in order.
        row_ends: where in target_rows those of each sequence end.
    """

    input_ids: Tensor
    positions: Tensor
    attention: PackedAttention
    target_rows: Tensor
    targets: Tensor
    token_weight: Tensor
    total_weight: float
    num_reference_rows: int
    num_reference_tokens: int
    reference_attention: PackedAttention
    names: tuple[str, ...]
    row_ends: np.ndarray

    def name_of(self, row: int) -> str:
        """The sequence of a target row."""
        return self.names[int(np.searchsorted(self.row_ends, row, side="right"))]


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that each group's lengths sum to at most max_tokens; a longer one is a group of its own."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = next((g for g, free in enumerate(room) if lengths[index] <= free), None)
        if fits is None:
            groups.append([index])
            room.append(max_tokens - lengths[index])
        else:
            groups[fits].append(index)
            room[fits] -= lengths[index]
    return groups


def collate(
    sequences: Sequence[TrainingSequence], device: torch.device | str, reduction: Reduction = "token"
) -> PackedBatch:
    """Lay sequences end to end.

    Args:
        reduction: whether every token counts alike, or every sequence, whose tokens then share its weight.
    """
    sequences = sorted(sequences, key=lambda sequence: not sequence.keeps_to_reference)
    to_reference = [sequence for sequence in sequences if sequence.keeps_to_reference]
    lengths = [len(sequence) for sequence in sequences]
    input_ids = torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])).long()
    starts = np.cumsum([0, *lengths])
    rows = [
        np.arange(start + sequence.response_start - 1, start + len(sequence) - 1)
        for start, sequence in zip(starts, sequences, strict=False)
    ]
    target_rows = torch.from_numpy(np.concatenate(rows))
    counts = [sequence.num_targets for sequence in sequences]
    shares = [s.weight / max(1, n if reduction == "sequence" else 1) for s, n in zip(sequences, counts, strict=True)]
    weights = np.repeat(shares, counts)
    return PackedBatch(
        input_ids=_moved(input_ids, device),
        positions=_moved(packed_positions(lengths, "cpu"), device),
        attention=PackedAttention.of(lengths, device),
        target_rows=_moved(target_rows, device),
        targets=_moved(input_ids[target_rows + 1], device),
        token_weight=_moved(torch.from_numpy(weights).float(), device),
        total_weight=float(weights.sum()),
        num_reference_rows=sum(sequence.num_targets for sequence in to_reference),
        num_reference_tokens=sum(map(len, to_reference)),
        reference_attention=PackedAttention.of(lengths[: len(to_reference)], device),
        names=tuple(sequence.name for sequence in sequences),
        row_ends=np.cumsum(counts),
    )


def pack(
    sequences: Sequence[TrainingSequence],
    max_tokens: int,
    device: torch.device | str,
    reduction: Reduction = "token",
) -> list[PackedBatch]:
    """The micro-batches of one optimiser step, each within max_tokens."""
    groups = first_fit_decreasing([len(sequence) for sequence in sequences], max_tokens)
    return [collate([sequences[i] for i in group], device, reduction) for group in groups]


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor
