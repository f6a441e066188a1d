"""Sequences laid end to end, so that no step computes padding and no token sees another sequence.

A row of hidden states predicts the next token; only rows whose next token belongs to the response have a target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinksafe.model.attention import PackedAttention, packed_positions


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One tokenised example.

    Attributes:
        input_ids: [T] int32, prompt and response.
        response_start: index of the first response token, at least 1; everything from there on is trained.
    """

    input_ids: np.ndarray
    response_start: int

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
    """

    input_ids: Tensor
    positions: Tensor
    attention: PackedAttention
    target_rows: Tensor
    targets: Tensor


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


def collate(sequences: Sequence[TrainingSequence], device: torch.device | str) -> PackedBatch:
    """Lay sequences end to end."""
    lengths = [len(sequence) for sequence in sequences]
    input_ids = torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])).long()
    starts = np.cumsum([0, *lengths])
    rows = [
        np.arange(start + sequence.response_start - 1, start + len(sequence) - 1)
        for start, sequence in zip(starts, sequences, strict=False)
    ]
    target_rows = torch.from_numpy(np.concatenate(rows))
    return PackedBatch(
        input_ids.to(device),
        packed_positions(lengths, device),
        PackedAttention.of(lengths, device),
        target_rows.to(device),
        input_ids[target_rows + 1].to(device),
    )


def pack(sequences: Sequence[TrainingSequence], max_tokens: int, device: torch.device | str) -> list[PackedBatch]:
    """The micro-batches of one optimiser step, each within max_tokens."""
    groups = first_fit_decreasing([len(sequence) for sequence in sequences], max_tokens)
    return [collate([sequences[i] for i in group], device) for group in groups]
