"""The loss of a pack, the same on one GPU and under ZeRO: a weighted sum over target tokens.

The loss of a response token is its cross-entropy, -log p(y). In sequences with `use_reference_kl` it is the divergence
of the full next-token distribution, KL(p_ref ‖ p), the paper's +KL on benign responses. The reference is the student
itself with its adapters off: one forward pass over those sequences, 2 N FLOP per token, and no memory. In full
fine-tuning the reference is a frozen copy.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy
from thinksafe.kernels.linear_kl import linear_kl
from thinksafe.model.attention import PackedAttention
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import without_adapters
from thinksafe.training.packing import PackedBatch


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
        """Return the weighted token losses of R rows, [R] fp32 in nats, and `StepResult.dropped_mass`, an fp32 scalar.

        A row's loss is token_weight * KL(p_ref ‖ p) if it is among the first pack.num_reference_rows, else token_weight
        * -log p(target).

        Args:
            hidden: [R, H], the decoder's output at the target rows.
            reference: [pack.num_reference_rows, H], the reference's output at the first rows; None if there are none.
        """
        rows, token_weight = pack.num_reference_rows, pack.token_weight
        losses, stats = linear_cross_entropy(
            hidden[rows:], self.weight, pack.targets[rows:], token_weight=token_weight[rows:], reduction="none",
            return_stats=True,
        )  # fmt: skip
        if rows:
            kl_losses = linear_kl(
                hidden[:rows], reference, self.weight, self.reference_weight, token_weight=token_weight[:rows],
                reduction="none",
            )  # fmt: skip
            losses = torch.cat((kl_losses, losses))
        return losses, stats.dropped_mass


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
        return self.head(hidden[pack.target_rows], reference, pack)

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
