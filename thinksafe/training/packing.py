"""Packed batches: sequences end to end, without padding, and with attention within each sequence only.

A row of the hidden states predicts the next token; only rows whose next token belongs to the response have a target.
Sequences with a KL loss come first, so that the reference reads a slice of the pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.transfer import upload
from thinksafe.training.config import Reduction
from thinksafe.training.sequence import TrainingSequence


@dataclass(frozen=True)
class PackedBatch:
    """Input of one forward and backward pass, on the device.

    Attributes:
        input_ids, positions: [T] int64, token ids, and positions within their sequences.
        attention: bounds of the sequences; a token attends within its sequence only.
        target_rows: [R] int64, rows of the hidden states that have a target.
        targets: [R] int64, the token that each of these rows predicts.
        token_weight: [R] fp32, weight times advantage of each target.
        total_weight: sum of the weights of all targets.
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
        """Return the name of the sequence of an element of target_rows."""
        return self.names[int(np.searchsorted(self.row_ends, row, side="right"))]


def partition_balanced(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return `num_shares` lists of indices into `sizes`, whose sizes have about equal sums: the largest item is placed
    first, each into the list with the smallest sum. With few items some lists are empty."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = sums.index(min(sums))
        shares[smallest].append(index)
        sums[smallest] += sizes[index]
    return shares


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return groups of indices into `lengths`. Items are placed from the longest to the shortest, each in the first
    group with room. A group has at most max_tokens tokens, or it is one longer item."""
    groups: list[list[int]] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = next((g for g, free in enumerate(free_tokens) if lengths[index] <= free), len(groups))
        if group == len(groups):
            groups.append([])
            free_tokens.append(max_tokens)
        groups[group].append(index)
        free_tokens[group] -= lengths[index]
    return groups


def collate(
    sequences: Sequence[TrainingSequence], device: torch.device | str, reduction: Reduction = "token"
) -> PackedBatch:
    """Return one packed batch of at least one sequence. The reduction `sequence` divides the loss weight of a sequence
    by the number of its targets."""
    sequences = sorted(sequences, key=lambda sequence: not sequence.use_reference_kl)
    num_kl = sum(sequence.use_reference_kl for sequence in sequences)
    lengths, num_targets = [len(sequence) for sequence in sequences], [sequence.num_targets for sequence in sequences]
    input_ids = torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])).long()
    last_rows = np.cumsum(lengths) - 1
    target_rows = torch.from_numpy(
        np.concatenate([np.arange(last - count, last) for last, count in zip(last_rows, num_targets, strict=True)])
    )
    per_token = np.array(
        [sequence.weight / (max(1, sequence.num_targets) if reduction == "sequence" else 1) for sequence in sequences]
    )
    advantages = np.array([sequence.advantage for sequence in sequences])
    token_weight = np.repeat(per_token * advantages, num_targets)
    return PackedBatch(
        input_ids=upload(input_ids, device),
        positions=packed_positions(lengths, device),
        attention=PackedAttention.of(lengths, device),
        target_rows=upload(target_rows, device),
        targets=upload(input_ids[target_rows + 1], device),
        token_weight=upload(torch.from_numpy(token_weight).float(), device),
        total_weight=float(np.repeat(per_token, num_targets).sum()),
        num_reference_rows=sum(num_targets[:num_kl]),
        num_reference_tokens=sum(lengths[:num_kl]),
        reference_attention=PackedAttention.of(lengths[:num_kl], device),
        names=tuple(sequence.name for sequence in sequences),
        row_ends=np.cumsum(num_targets),
    )


def pack(
    sequences: Sequence[TrainingSequence], max_tokens: int, device: torch.device | str, reduction: Reduction = "token"
) -> list[PackedBatch]:
    """Return the packed batches of one rank's sequences of a step, see `first_fit_decreasing` and `collate`."""
    groups = first_fit_decreasing([len(sequence) for sequence in sequences], max_tokens)
    return [collate([sequences[i] for i in group], device, reduction) for group in groups]
