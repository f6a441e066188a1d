"""The single-process training engine: forward, backward, clip, AdamW.

The loop drives an engine through `step`, `tensors` and `load_tensors` and does not know which one it has. The loss is
the weighted sum of token losses over the step's packs divided by the sum of the weights, so how sequences fall into
packs does not change the gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.model.decoder import Decoder
from thinksafe.training.cuda_graphs import DecoderGraphs
from thinksafe.training.losses import PackLoss, broken_in, not_finite
from thinksafe.training.packing import PackedBatch


@dataclass(frozen=True)
class StepResult:
    """Weighted mean of the token losses, in nats, the gradient's norm before clipping, and the largest share of a
    pack's gradient mass at the head that was skipped, see linear_cross_entropy.py."""

    loss: float
    grad_norm: float
    dropped_mass: float


class NonFiniteStep(ArithmeticError):
    """Loss, gradient or weights are NaN or infinite."""


class SingleEngine:
    """AdamW on whatever parameters of the decoder require a gradient, with fp32 master copies of bf16 ones."""

    def __init__(
        self,
        decoder: Decoder,
        max_grad_norm: float,
        weight_decay: float,
        with_reference: bool = False,
        recorded_tokens: int = 0,
    ):
        """Train a decoder where it is.

        Args:
            with_reference: whether sequences will come that keep to what the decoder is now, adapters aside.
            recorded_tokens: up to which packs are run as CUDA graphs, see `recorded_on`; 0 for none.
        """
        self.decoder = decoder
        graphs = (DecoderGraphs(decoder.embedding, recorded_tokens),) if recorded_tokens else ()
        self.loss = PackLoss(decoder, with_reference, *graphs)
        self.device = decoder.embedding.device
        self.max_grad_norm = max_grad_norm
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad
        }
        # lr 1e-5 is below bf16's resolution of a weight of 0.01: the optimiser works on fp32.
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, weight_decay=weight_decay, fused=True)
        for master in self.masters.values():  # now, so that a checkpoint holds them even if no step was finite
            moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {"step": torch.zeros((), device=master.device), **moments}

    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        """One optimiser step over all packs.

        Raises:
            NonFiniteStep: loss or gradient is not finite; nothing was updated.
        """
        total_weight = sum(pack.total_weight for pack in packs)
        loss, dropped, bad_rows = torch.zeros((), device=self.device), [], []
        self.decoder.train()
        for pack in packs:
            pack_loss, dropped_mass, bad_row = self._add_gradients(pack, total_weight)
            loss += pack_loss
            dropped.append(dropped_mass)
            bad_rows.append(bad_row)
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                self.masters[name].grad, parameter.grad = parameter.grad.float(), None
        grad_norm = nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)
        found = torch.stack((loss, grad_norm, torch.stack(dropped).amax()))
        result = StepResult(*found.tolist())  # the step's only wait for the device
        if not math.isfinite(result.loss + result.grad_norm):
            self.optimizer.zero_grad()
            raise NonFiniteStep(not_finite(result.loss, result.grad_norm, broken_in(packs, bad_rows)))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._publish_masters()
        return result

    def _add_gradients(self, pack: PackedBatch, total_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of one pack; its part of the loss, its dropped mass and its first bad row. What autograd holds of the pass is
        gone on return, as the recording of another one needs."""
        losses, dropped_mass = self.loss(pack, pack.num_reference_rows > 0)
        pack_loss = losses.sum() / total_weight
        pack_loss.backward()
        return pack_loss.detach(), dropped_mass, first_bad_row(losses)

    @torch.no_grad()
    def _publish_masters(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def check_weights(self) -> None:
        """Look at every trained weight, which waits for the device: for checkpoints, not for every step.

        Raises:
            NonFiniteStep: one is NaN or infinite, or so large (1e19) that its square is.
        """
        norm = nn.utils.get_total_norm(self.masters.values()).item()
        if not math.isfinite(norm):
            raise NonFiniteStep(f"the norm of the weights is {norm}")

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs: fp32 weights and both moments."""
        state = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                state[f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned, in place."""
        for name, master in self.masters.items():
            master.copy_(state[f"weight.{name}"])
            moments = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {key: value.to(master.device, copy=True) for key, value in moments.items()}
        self._publish_masters()

    def finish(self) -> None:
        """Make the decoder ready to be saved, which here it always is."""

    def close(self) -> None:
        """Nothing outlives this engine, so there is nothing to give back."""
