"""The single-process trainer: forward, backward, clip, AdamW.

The loop calls `step`, `state_dict` and `load_state_dict` and does not know which trainer it has. The loss is the
weighted sum of token losses over the step's packs divided by the sum of the weights, so the gradient does not depend on
how sequences are packed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.model.decoder import Decoder
from thinksafe.training.cuda_graphs import DecoderGraphs
from thinksafe.training.losses import PackLoss, non_finite_examples, non_finite_message
from thinksafe.training.packing import PackedBatch


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    Attributes:
        loss: weighted mean of the token losses, in nats.
        grad_norm: norm of the gradient before clipping.
        dropped_mass: share of a pack's gradient mass at a frozen language-model head that was skipped as too small to
            matter (kernels/linear_cross_entropy.py), the largest of all packs; 0 if the head is trained.
    """

    loss: float
    grad_norm: float
    dropped_mass: float


class NonFiniteStep(ArithmeticError):
    """Error: loss, gradient or weights are NaN or infinite; the message has their values. An optimizer step that raises
    it changed nothing, so the training loop leaves the step out."""


class LocalTrainer:
    """AdamW on all parameters of the decoder that require a gradient, with fp32 master copies of bf16 parameters.

    It trains in one process without DeepSpeed; DeepSpeedTrainer has the same methods for several ranks.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_grad_norm: float,
        weight_decay: float,
        with_reference: bool = False,
        max_cuda_graph_tokens: int = 0,
    ):
        """Prepare to train a decoder on its device.

        Args:
            max_grad_norm: a gradient with a larger norm is scaled down to this norm.
            weight_decay: weight decay of AdamW.
            with_reference: whether some sequences will have a KL loss. The reference is the decoder at this moment,
                without adapters.
            max_cuda_graph_tokens: number of tokens of the largest pack that runs as CUDA graphs, see
                `choose_max_cuda_graph_tokens`; 0 disables graphs.
        """
        self.decoder = decoder
        graphs = (DecoderGraphs(decoder.embedding, max_cuda_graph_tokens),) if max_cuda_graph_tokens else ()
        self.loss = PackLoss(decoder, with_reference, *graphs)
        self.device = decoder.embedding.device
        self.max_grad_norm = max_grad_norm
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad
        }
        # An update of 1e-5 (the learning rate) is below bf16's resolution at a weight of 0.01, so AdamW works on fp32.
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, weight_decay=weight_decay, fused=True)
        # AdamW would create the moments in its first step; a checkpoint must hold them even if no step was finite.
        for master in self.masters.values():
            moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {"step": torch.zeros((), device=master.device), **moments}

    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        """Take one optimizer step over all packs, and return its result.

        Args:
            packs: packs of the step, at least one.

        Raises:
            NonFiniteStep: loss or gradient is not finite; nothing was updated.
        """
        total_weight = sum(pack.total_weight for pack in packs)
        loss, dropped_masses, bad_rows = torch.zeros((), device=self.device), [], []
        self.decoder.train()
        for pack in packs:
            pack_loss, dropped_mass, bad_row = self._accumulate_gradients(pack, total_weight)
            loss += pack_loss
            dropped_masses.append(dropped_mass)
            bad_rows.append(bad_row)
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                self.masters[name].grad, parameter.grad = parameter.grad.float(), None
        grad_norm = nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)
        results = torch.stack((loss, grad_norm, torch.stack(dropped_masses).amax()))
        result = StepResult(*results.tolist())  # the only time the step waits for the device
        if not math.isfinite(result.loss + result.grad_norm):
            self.optimizer.zero_grad()
            raise NonFiniteStep(non_finite_message(result.loss, result.grad_norm, non_finite_examples(packs, bad_rows)))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._copy_masters_to_parameters()
        return result

    def _accumulate_gradients(self, pack: PackedBatch, total_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Add one pack's gradients to those of the parameters. Return its part of the step's loss, its dropped mass
        (`StepResult.dropped_mass`), and the index of its first row whose loss is not finite or -1: scalars on the
        device.

        On return autograd holds nothing of this pass, which the capture of another pass requires.
        """
        losses, dropped_mass = self.loss(pack, pack.num_reference_rows > 0)
        pack_loss = losses.sum() / total_weight
        pack_loss.backward()
        return pack_loss.detach(), dropped_mass, first_bad_row(losses)

    @torch.no_grad()
    def _copy_masters_to_parameters(self) -> None:
        """Round the fp32 master copies to the bf16 parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def check_weights_finite(self) -> None:
        """Check that every trained weight is finite. This waits for the device, so call it for checkpoints only.

        Raises:
            NonFiniteStep: a weight is NaN or infinite, or so large (1e19) that its square is infinite.
        """
        norm = nn.utils.get_total_norm(self.masters.values()).item()
        if not math.isfinite(norm):
            raise NonFiniteStep(f"the norm of the weights is {norm}")

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: fp32 weight, AdamW's two moments and step count of each parameter,
        as `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`. The tensors are not copies."""
        state = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                state[f"{key}.{name}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned, of either trainer."""
        for name, master in self.masters.items():
            master.copy_(state[f"weight.{name}"])
            moments = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {key: value.to(master.device, copy=True) for key, value in moments.items()}
        self._copy_masters_to_parameters()

    def finish(self) -> None:
        """Do nothing: the decoder is always ready to be saved."""

    def close(self) -> None:
        """Do nothing: no memory outlives this trainer."""
