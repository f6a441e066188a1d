"""Packed batches: sequences end to end, without padding, and with attention within each sequence only.

A row of the hidden states predicts the next token; only rows whose next token belongs to the response have a target.
Preference pairs come first, then sequences with a KL loss, so that the reference reads a slice of the pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.transfer import upload
from thinksafe.training.config import Reduction
from thinksafe.training.sequence import PreferencePair, TrainingSequence


class PairRows(NamedTuple):
    """The rows of N preference pairs, which are the first P rows with a target.

    Attributes:
        pair: [P] int64, index of each row's pair.
        last_row: [N] int64, last row of each pair.
        weight: [N] fp32, weight of each pair.
    """

    pair: Tensor
    last_row: Tensor
    weight: Tensor


class SpanRows(NamedTuple):
    """The tokens that SafeKey's heads read, of N sequences with a `SafetySpan`.

    Attributes:
        token: [S] int64, tokens of the pack: of each sequence those of its summary, then all up to the summary's end.
        share: [S] fp32, 1 / number of tokens over which the token's mean is.
        mean: [S] int64, index of the token's mean among 2 N: 2 i for the summary of sequence i, 2 i + 1 for all tokens.
        is_harmful: [N] fp32, 1 or 0.
        weight: [N] fp32, weight of each sequence's loss.
        last_row: [N] int64, index in target_rows of each sequence's last row.
    """

    token: Tensor
    share: Tensor
    mean: Tensor
    is_harmful: Tensor
    weight: Tensor
    last_row: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Input of one forward and backward pass, on the device.

    Attributes:
        input_ids, positions: [T] int64, token ids, and positions within their sequences.
        attention: bounds of the sequences; a token attends within its sequence only.
        target_rows: [R] int64, rows of the hidden states that have a target.
        targets: [R] int64, the token that each of these rows predicts.
        token_weight: [R] fp32, weight times advantage of each target; in a preference pair beta, negative for the
            rejected response.
        total_weight: sum of the weights of all targets and pairs.
        num_reference_rows: number of rows of pairs or with a KL loss; they are the first of target_rows.
        num_reference_tokens: number of tokens of their sequences; they are the first of input_ids.
        reference_attention: bounds of their sequences.
        pairs: the rows of preference pairs; None without pairs.
        spans: what SafeKey's heads read; None if no sequence has a span.
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
    pairs: PairRows | None
    spans: SpanRows | None
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
    items: Sequence[TrainingSequence | PreferencePair], device: torch.device | str, reduction: Reduction = "token"
) -> PackedBatch:
    """Return one packed batch of at least one item. The reduction `sequence` divides the loss weight of a sequence by
    the number of its targets."""
    pairs = [item for item in items if isinstance(item, PreferencePair)]
    singles = [item for item in items if not isinstance(item, PreferencePair)]
    singles.sort(key=lambda sequence: not sequence.use_reference_kl)
    sequences = [sequence for item in (*pairs, *singles) for sequence in item.sequences]
    num_reference = 2 * len(pairs) + sum(sequence.use_reference_kl for sequence in singles)
    lengths, num_targets = [len(sequence) for sequence in sequences], [sequence.num_targets for sequence in sequences]
    input_ids = torch.from_numpy(np.concatenate([sequence.input_ids for sequence in sequences])).long()
    last_rows = np.cumsum(lengths) - 1
    target_rows = torch.from_numpy(
        np.concatenate([np.arange(last - count, last) for last, count in zip(last_rows, num_targets, strict=True)])
    )
    per_token = np.array(
        [sequence.weight / (max(1, sequence.num_targets) if reduction == "sequence" else 1) for sequence in singles]
    )
    factors = [signed for pair in pairs for signed in (pair.beta, -pair.beta)]
    factors += [weight * sequence.advantage for weight, sequence in zip(per_token, singles, strict=True)]
    in_mean = [sequence.is_in_mean * sequence.num_targets for sequence in singles]
    token_weight = np.repeat(np.array(factors), num_targets)
    row_ends = np.cumsum(num_targets)
    return PackedBatch(
        input_ids=upload(input_ids, device),
        positions=packed_positions(lengths, device),
        attention=PackedAttention.of(lengths, device),
        target_rows=upload(target_rows, device),
        targets=upload(input_ids[target_rows + 1], device),
        token_weight=upload(torch.from_numpy(token_weight).float(), device),
        total_weight=float(np.repeat(per_token, np.array(in_mean, dtype=np.int64)).sum())
        + sum(pair.chosen.weight for pair in pairs),
        num_reference_rows=sum(num_targets[:num_reference]),
        num_reference_tokens=sum(lengths[:num_reference]),
        reference_attention=PackedAttention.of(lengths[:num_reference], device),
        pairs=_pair_rows(pairs, device) if pairs else None,
        spans=_span_rows(sequences, device) if any(sequence.safety_span for sequence in sequences) else None,
        names=tuple(sequence.name for sequence in sequences),
        row_ends=row_ends,
    )


def _pair_rows(pairs: Sequence[PreferencePair], device: torch.device | str) -> PairRows:
    num_rows = np.array([pair.chosen.num_targets + pair.rejected.num_targets for pair in pairs])
    weight = np.array([pair.chosen.weight for pair in pairs], dtype=np.float32)
    arrays = np.repeat(np.arange(len(pairs)), num_rows), np.cumsum(num_rows) - 1, weight
    return PairRows(*(upload(array, device) for array in arrays))


def _span_rows(sequences: Sequence[TrainingSequence], device: torch.device | str) -> SpanRows:
    starts = np.cumsum([0, *map(len, sequences)])
    row_ends = np.cumsum([sequence.num_targets for sequence in sequences])
    tokens, shares, means, per_sequence = [], [], [], []
    for start, row_end, sequence in zip(starts, row_ends, sequences, strict=False):
        if (span := sequence.safety_span) is None:
            continue
        for first in (span.start, 0):
            tokens.append(np.arange(start + first, start + span.end))
            shares.append(np.full(len(tokens[-1]), 1 / len(tokens[-1]), dtype=np.float32))
            means.append(np.full(len(tokens[-1]), len(means)))
        per_sequence.append((span.is_harmful, span.weight * sequence.weight, row_end - 1))
    is_harmful, weight, last_row = np.array(per_sequence).T
    floats = is_harmful.astype(np.float32), weight.astype(np.float32)
    arrays = *map(np.concatenate, (tokens, shares, means)), *floats, last_row.astype(np.int64)
    return SpanRows(*(upload(array, device) for array in arrays))


def pack(
    items: Sequence[TrainingSequence | PreferencePair],
    max_tokens: int,
    device: torch.device | str,
    reduction: Reduction = "token",
) -> list[PackedBatch]:
    """Return the packed batches of one rank's items of a step, see `first_fit_decreasing` and `collate`."""
    groups = first_fit_decreasing([len(item) for item in items], max_tokens)
    return [collate([items[i] for i in group], device, reduction) for group in groups]
