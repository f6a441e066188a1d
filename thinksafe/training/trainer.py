"""What both trainers share: the gradients of a pack, the check of the weights, and the state in a checkpoint.

The loss of a step is the weighted sum of token losses over the packs of all ranks divided by the sum of the weights, so
the gradient does not depend on how sequences are packed or on the number of ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.model.decoder import Decoder
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

    @classmethod
    def of(cls, result: StepResult, examples: Sequence[str]) -> "NonFiniteStep":
        """Return the error of a step. `examples` names those with a loss that is not finite, possibly none."""
        cause = f", from {', '.join(examples)}" if examples else ""
        return cls(f"loss {result.loss}, gradient norm {result.grad_norm}{cause}")


class Trainer(ABC):
    """AdamW on all parameters of a decoder that require a gradient. All ranks call every method together.

    Attributes:
        workers: the ranks that train together.
        parameters: the trained parameters, by name.
        loss: a `PackLoss`, or what computes the same.
    """

    workers: Workers = SINGLE_PROCESS
    loss: Callable[[PackedBatch, bool], tuple[Tensor, Tensor]]

    def __init__(self, decoder: Decoder, device: torch.device):
        self.decoder, self.device = decoder, device
        self.parameters = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        """Take one optimizer step over the packs of all ranks, of which one must have a pack, and return its result,
        the same on every rank. Raise a NonFiniteStep, and update nothing, if loss or gradient are not finite on a
        rank."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of the state that a resumed run needs: fp32 weight, AdamW's two moments and step
        count of parameters, as `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`; they may not be
        copies."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the state of either trainer. Together the ranks pass that of every parameter; any rank passes any
        part."""

    @abstractmethod
    def _full_masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the fp32 weight of each trained parameter."""

    @abstractmethod
    def _backward(self, pack_loss: Tensor) -> None:
        """Add the gradients of a pack's part of the step's loss to those of the parameters."""

    def finish(self) -> None:  # noqa: B027 - one process has nothing to do
        """Make rank 0's decoder ready to be saved. No step may follow."""

    def close(self) -> None:  # noqa: B027
        """Free all memory; the trainer and its decoder cannot be used any more."""

    @torch.no_grad()
    def check_weights_finite(self) -> None:
        """Raise a NonFiniteStep if a trained weight is NaN or infinite, or so large (1e19) that its square is infinite.
        This waits for the device, so call it for checkpoints only."""
        norm = torch.stack([master.norm() for _, master in self._full_masters()]).norm().item()
        if not math.isfinite(norm):
            raise NonFiniteStep(f"the norm of the weights is {norm}")

    def _accumulate_gradients(
        self, pack: PackedBatch, total_weight: float, needs_reference: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add one pack's gradients to those of the parameters. Return its part of the step's loss, its dropped mass,
        and the index of its first row whose loss is not finite or -1, as scalars on the device. Autograd then holds
        nothing of this pass, which the capture of another pass as a CUDA graph requires."""
        losses, dropped_mass = self.loss(pack, needs_reference)
        pack_loss = losses.sum() / total_weight
        self._backward(pack_loss)
        return pack_loss.detach(), dropped_mass, first_bad_row(losses)


def zero_moments(master: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a tensor before its first step, which a checkpoint must hold if no step was finite."""
    moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=master.device), **moments}


def non_finite_examples(packs: Sequence[PackedBatch], bad_rows: Sequence[Tensor]) -> list[str]:
    """Return the name of the first example of each pack whose loss is not finite, see `_accumulate_gradients`."""
    rows = [int(row) for row in bad_rows]
    return [pack.sequence_name(row) for pack, row in zip(packs, rows, strict=False) if row >= 0]
