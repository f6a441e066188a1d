"""The loss of a pack, the same on one GPU and under ZeRO: a weighted sum over target tokens.

The loss of a response token is its cross-entropy, -log p(y). In sequences with `use_reference_kl` it is the divergence
of the full next-token distribution, KL(p_ref ‖ p), the paper's +KL on benign responses. A preference pair has DPO's
loss of its two responses. The reference is the student itself with its adapters off: one forward pass over these
sequences, 2 N FLOP per token, and no memory. In full fine-tuning the reference is a frozen copy.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy
from thinksafe.kernels.linear_kl import linear_kl
from thinksafe.kernels.linear_logprob import linear_logprob_of
from thinksafe.model.attention import PackedAttention
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import without_adapters
from thinksafe.training.packing import PackedBatch, PairRows, SpanRows


class LossHead(nn.Module):
    """The language-model head as a separate module, so that ZeRO-3 gathers it once per pack, not once per chunk. The
    gradients are computed in the forward pass, while the weight is gathered.

    Attributes:
        weight: [V, H], the language-model head.
        reference_weight: [V, H], that of the reference; None if it is `weight`, or without reference.
    """

    def __init__(self, weight: nn.Parameter, reference_weight: nn.Parameter | None):
        super().__init__()
        self.weight, self.reference_weight = weight, reference_weight

    def forward(self, hidden: Tensor, reference: Tensor | None, pack: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the weighted losses of R rows, [R] fp32 in nats, and `StepResult.dropped_mass`, an fp32 scalar.

        The rows of preference pairs come first; the last row of a pair has its loss, its other rows have 0. The next
        rows, up to pack.num_reference_rows, have token_weight * KL(p_ref ‖ p), and all others token_weight * -log
        p(target).

        Args:
            hidden: [R, H], the decoder's output at the target rows.
            reference: [pack.num_reference_rows, H], the reference's output at the first rows; None if there are none.
        """
        num_pair_rows = 0 if pack.pairs is None else len(pack.pairs.pair)
        kl, other = slice(num_pair_rows, pack.num_reference_rows), slice(pack.num_reference_rows, None)
        targets, token_weight = pack.targets, pack.token_weight
        losses, stats = linear_cross_entropy(
            hidden[other], self.weight, targets[other], token_weight=token_weight[other], reduction="none",
            return_stats=True,
        )  # fmt: skip
        if kl.start < kl.stop:
            kl_losses = linear_kl(
                hidden[kl], reference[kl], self.weight, self.reference_weight, token_weight=token_weight[kl],
                reduction="none",
            )  # fmt: skip
            losses = torch.cat((kl_losses, losses))
        if pack.pairs is not None:
            pair = slice(num_pair_rows)
            cross_entropy, pair_stats = linear_cross_entropy(
                hidden[pair], self.weight, targets[pair], reduction="none", return_stats=True
            )
            head = self.weight if self.reference_weight is None else self.reference_weight
            reference_logprobs = linear_logprob_of(reference[pair], head.detach(), targets[pair, None])[:, 0]
            log_ratios = token_weight[pair] * (-cross_entropy - reference_logprobs)
            losses = torch.cat((_pair_losses(log_ratios, pack.pairs), losses))
            return losses, torch.maximum(stats.dropped_mass, pair_stats.dropped_mass)
        return losses, stats.dropped_mass


def _pair_losses(log_ratios: Tensor, pairs: PairRows) -> Tensor:
    """Return DPO's losses at the last row of each pair and 0 at its other rows, [P]. `log_ratios` [P] holds beta *
    log(p / p_ref) of each target, with the opposite sign in rejected responses."""
    margins = log_ratios.new_zeros(len(pairs.weight)).index_add(0, pairs.pair, log_ratios)
    return torch.zeros_like(log_ratios).index_add(0, pairs.last_row, pairs.weight * F.softplus(-margins))


class SafetyHeads(nn.Linear):
    """SafeKey's two linear heads: row 0 reads the mean state of the summary, row 1 that of prompt and summary."""

    def __init__(self, hidden_size: int, device: torch.device):
        super().__init__(hidden_size, 2)  # on the host, so that a seed gives the same weights on every device
        self.to(device)

    def forward(self, hidden: Tensor, spans: SpanRows | None) -> Tensor:
        """Return the weighted loss of each sequence with a span, [N] fp32: the mean of both heads' binary
        cross-entropy.

        Args:
            hidden: [T, H], the decoder's output at all tokens.
            spans: None gives a loss of 0, [1], which still uses the weights: under ZeRO-3 all ranks must gather them.
        """
        if spans is None:
            return 0 * super().forward(hidden[:1].to(self.weight.dtype)).sum(1)
        means = hidden.new_zeros(2 * len(spans.weight), hidden.shape[1], dtype=torch.float32)
        means = means.index_add(0, spans.mean, spans.share[:, None] * hidden[spans.token].float())
        logits = (means.unflatten(0, (-1, 2)) * self.weight.float()).sum(-1) + self.bias.float()
        targets = spans.is_harmful[:, None].expand_as(logits)
        return spans.weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


class PackLoss(nn.Module):
    """Decoder and language-model head: computes the weighted token losses of a pack."""

    def __init__(self, decoder: Decoder, with_reference: bool, run_decoder: Callable[..., Tensor] = Decoder.__call__):
        """Keep a decoder and, with_reference, the reference of KL losses: the decoder without its adapters or, in full
        fine-tuning, a copy of it. `run_decoder` runs a decoder on tokens, positions and attention: eagerly, or as
        `DecoderGraphs`."""
        super().__init__()
        self.decoder, self.run_decoder = decoder, run_decoder
        needs_copy = with_reference and decoder.lora is None
        self.reference_copy = copy.deepcopy(decoder).requires_grad_(False) if needs_copy else None
        self.head = LossHead(decoder.head, self.reference_copy.head if needs_copy else None)

    def forward(self, pack: PackedBatch, needs_reference: bool) -> tuple[Tensor, Tensor]:
        """Return the losses and the dropped mass of `LossHead`; the sum of the losses is the pack's loss.

        Args:
            needs_reference: whether to run the reference over the pack's sequences with a KL loss. If there are none,
                the reference runs over a single token, since under ZeRO-3 all ranks must gather the same weights at the
                same time.
        """
        reference = self._reference_states(pack) if needs_reference else None
        hidden = self.run_decoder(self.decoder, pack.input_ids, pack.positions, pack.attention)
        losses, dropped_mass = self.head(hidden[pack.target_rows], reference, pack)
        if self.decoder.safety_heads is not None:
            head_losses, spans = self.decoder.safety_heads(hidden, pack.spans), pack.spans
            losses = losses + head_losses if spans is None else losses.index_add(0, spans.last_row, head_losses)
        return losses, dropped_mass

    @torch.no_grad()
    def _reference_states(self, pack: PackedBatch) -> Tensor:
        """Return the reference's hidden states at the rows with a KL loss, [pack.num_reference_rows, H]."""
        tokens, attention = pack.num_reference_tokens, pack.reference_attention
        if not tokens:
            tokens, attention = 1, PackedAttention.of([1], pack.input_ids.device)
        decoder = self.reference_copy or self.decoder
        with without_adapters(self.decoder):
            hidden = self.run_decoder(decoder, pack.input_ids[:tokens], pack.positions[:tokens], attention)
        return hidden[pack.target_rows[: pack.num_reference_rows]]
