"""What a pack of sequences costs, on one GPU and under ZeRO alike: a weighted sum over target tokens.

Cross-entropy on responses, -log p(y); for sequences that keep to the reference the divergence of the whole next-token
distribution, KL(p_ref ‖ p), as the paper's +KL has it on benign responses. The reference is the student itself with
its adapters off: a forward pass over those sequences, 2 N FLOP a token, and no memory. Where every weight trains it is
a frozen copy.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy_with_stats
from thinksafe.kernels.linear_kl import linear_kl
from thinksafe.model.attention import PackedAttention
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import without_adapters
from thinksafe.training.packing import PackedBatch


class LossHead(nn.Module):
    """The language-model head as a module of its own, so that ZeRO-3 gathers it for a pack and not for a chunk.

    The gradients are formed in the forward pass, while the weight is whole.
    """

    def __init__(self, weight: nn.Parameter, reference_weight: nn.Parameter | None):
        """reference_weight: where the reference has a head of its own."""
        super().__init__()
        self.weight, self.reference_weight = weight, reference_weight

    def forward(self, hidden: Tensor, reference: Tensor | None, pack: PackedBatch) -> tuple[Tensor, Tensor]:
        """[R] fp32, weighted token losses of [R, H] rows, in nats, and the share of gradient mass that was skipped.

        Args:
            reference: [pack.num_reference_rows, H], the reference's states of the first rows; None for no such rows.
        """
        rows = pack.num_reference_rows
        # The packer left masked rows out, so nothing is counted on the device.
        losses, stats = linear_cross_entropy_with_stats(
            hidden[rows:], self.weight, pack.targets[rows:], token_weight=pack.token_weight[rows:], ignore_index=None,
            reduction="none",
        )  # fmt: skip
        if rows:
            compared = linear_kl(
                hidden[:rows], reference, self.weight, self.reference_weight, token_weight=pack.token_weight[:rows],
                reduction="none",
            )  # fmt: skip
            losses = torch.cat((compared, losses))
        return losses, stats.dropped_mass


class PackLoss(nn.Module):
    """Decoder and head: a pack in, its weighted token losses out."""

    def __init__(self, decoder: Decoder, with_reference: bool, run: Callable[..., Tensor] = Decoder.__call__):
        """Takes the decoder as it is now, adapters aside, for the reference.

        Args:
            with_reference: whether some sequences will keep to it.
            run: how a decoder is run on tokens, positions and attention: as it is, or by DecoderGraphs.
        """
        super().__init__()
        self.decoder = decoder
        self.run = run
        copied = with_reference and decoder.lora is None
        self.copy = copy.deepcopy(decoder).requires_grad_(False) if copied else None
        self.head = LossHead(decoder.head, self.copy.head if copied else None)

    def forward(self, pack: PackedBatch, ask_reference: bool) -> tuple[Tensor, Tensor]:
        """[R] fp32, the pack's weighted token losses; a step's loss is their sum. And `Stats.dropped_mass` of them.

        Args:
            ask_reference: read the pack's reference sequences with the reference; where there are none, a single
                token, since under ZeRO-3 all ranks must gather the same weights at the same time.
        """
        reference = self._reference_states(pack) if ask_reference else None
        hidden = self.run(self.decoder, pack.input_ids, pack.positions, pack.attention)
        return self.head(hidden[pack.target_rows], reference, pack)

    @torch.no_grad()
    def _reference_states(self, pack: PackedBatch) -> Tensor:
        """[pack.num_reference_rows, H]."""
        tokens, attention = pack.num_reference_tokens, pack.reference_attention
        if not tokens:
            tokens, attention = 1, PackedAttention.of([1], pack.input_ids.device)
        with without_adapters(self.decoder):
            hidden = self.run(self.copy or self.decoder, pack.input_ids[:tokens], pack.positions[:tokens], attention)
        return hidden[pack.target_rows[: pack.num_reference_rows]]


def broken_in(packs: Sequence[PackedBatch], bad_rows: Sequence[Tensor]) -> list[str]:
    """The examples whose losses are not finite, the first of each pack. Waits for the device.

    Args:
        bad_rows: of each pack, see `first_bad_row`.
    """
    rows = torch.stack(list(bad_rows)).tolist()
    return [pack.name_of(row) for pack, row in zip(packs, rows, strict=True) if row >= 0]


def not_finite(loss: float, grad_norm: float, broken: Sequence[str]) -> str:
    """What is wrong with a step, and where it comes from as far as that is known."""
    return f"loss {loss}, gradient norm {grad_norm}" + (f", from {', '.join(broken)}" if broken else "")
