"""Packed batches: sequences end to end, without padding, and with attention within each sequence only.

A row of the hidden states predicts the next token; only rows whose next token belongs to the response have a target.
Sequences with a KL loss come first, so that the reference reads a slice of the pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thinksafe.model.attention import PackedAttention, packed_positions

Reduction = Literal["token", "sequence"]
"""What has equal weight in the loss of a step: all response tokens, or all sequences."""


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One tokenized example.

    Attributes:
        input_ids: [T] int32, prompt and response.
        num_prompt_tokens: index of the first response token, at least 1; all tokens from there on have a loss.
        name: name of the example, for messages.
        weight: positive loss weight of the example. With the reduction `token` each target has this weight; with
            `sequence` all targets together have it.
        use_reference_kl: whether the loss is the KL divergence from the reference instead of the cross-entropy.
    """

    input_ids: np.ndarray
    num_prompt_tokens: int
    name: str = "an unnamed example"
    weight: float = 1.0
    use_reference_kl: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Number of tokens with a loss."""
        return len(self.input_ids) - self.num_prompt_tokens


@dataclass(frozen=True)
class PackedBatch:
    """Input of one forward and backward pass, on the device.

    Attributes:
        input_ids, positions: [T] int64, token ids, and positions within their sequences.
        attention: bounds of the sequences; a token attends within its sequence only.
        target_rows: [R] int64, rows of the hidden states that have a target.
        targets: [R] int64, the token that each of these rows predicts.
        token_weight: [R] fp32, weight of each target in the loss.
        total_weight: sum of token_weight.
        num_reference_rows: number of rows with a KL loss; they are the first of target_rows.
        num_reference_tokens: number of tokens in sequences with a KL loss; they are the first of input_ids.
        reference_attention: bounds of the sequences with a KL loss.
        names: names of the sequences, in their order in the pack.
        row_ends: [number of sequences] int64 on the host, index in target_rows after the last row of each sequence.
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

    def sequence_name(self, row: int) -> str:
        """Return the name of the sequence to which a target row belongs.

        Args:
            row: index in target_rows.
        """
        return self.names[int(np.searchsorted(self.row_ends, row, side="right"))]


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return groups of indices into `lengths` so that the lengths of a group sum to at most max_tokens. A longer item
    is a group by itself. The longest item is placed first, each into the first group with room."""
    groups: list[list[int]] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = next((g for g, free in enumerate(free_tokens) if lengths[index] <= free), None)
        if group is None:
            groups.append([index])
            free_tokens.append(max_tokens - lengths[index])
        else:
            groups[group].append(index)
            free_tokens[group] -= lengths[index]
    return groups


def collate(
    sequences: Sequence[TrainingSequence], device: torch.device | str, reduction: Reduction = "token"
) -> PackedBatch:
    """Return one packed batch of all `sequences`; sequences with a KL loss come first.

    Args:
        sequences: at least one.
        reduction: `token` gives every target the loss weight of its sequence; `sequence` divides that weight by the
            number of the sequence's targets.
    """
    sequences = sorted(sequences, key=lambda sequence: not sequence.use_reference_kl)
    kl_sequences = [sequence for sequence in sequences if sequence.use_reference_kl]
    lengths = [len(sequence) for sequence in sequences]
    input_ids = torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])).long()
    starts = np.cumsum([0, *lengths])
    rows_of_sequences = [
        np.arange(start + sequence.num_prompt_tokens - 1, start + len(sequence) - 1)
        for start, sequence in zip(starts, sequences, strict=False)
    ]
    target_rows = torch.from_numpy(np.concatenate(rows_of_sequences))
    num_targets = [sequence.num_targets for sequence in sequences]
    per_token = [
        sequence.weight / max(1, count if reduction == "sequence" else 1)
        for sequence, count in zip(sequences, num_targets, strict=True)
    ]
    token_weight = np.repeat(per_token, num_targets)
    return PackedBatch(
        input_ids=_to_device(input_ids, device),
        positions=_to_device(packed_positions(lengths, "cpu"), device),
        attention=PackedAttention.of(lengths, device),
        target_rows=_to_device(target_rows, device),
        targets=_to_device(input_ids[target_rows + 1], device),
        token_weight=_to_device(torch.from_numpy(token_weight).float(), device),
        total_weight=float(token_weight.sum()),
        num_reference_rows=sum(sequence.num_targets for sequence in kl_sequences),
        num_reference_tokens=sum(map(len, kl_sequences)),
        reference_attention=PackedAttention.of(lengths[: len(kl_sequences)], device),
        names=tuple(sequence.name for sequence in sequences),
        row_ends=np.cumsum(num_targets),
    )


def pack(
    sequences: Sequence[TrainingSequence],
    max_tokens: int,
    device: torch.device | str,
    reduction: Reduction = "token",
) -> list[PackedBatch]:
    """Return the packed batches of one rank's sequences of an optimizer step, each of at most max_tokens tokens or of
    one longer sequence; empty without sequences.

    Args:
        reduction: `token` gives every target the loss weight of its sequence; `sequence` divides that weight by the
            number of the sequence's targets.
    """
    groups = first_fit_decreasing([len(sequence) for sequence in sequences], max_tokens)
    return [collate([sequences[i] for i in group], device, reduction) for group in groups]


def _to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a host tensor's copy on the GPU, without waiting for it; on a CPU the tensor itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor
