"""The single-process trainer: forward, backward, clip, AdamW, without DeepSpeed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from thinksafe.model.decoder import Decoder
from thinksafe.training.cuda_graphs import DecoderGraphs
from thinksafe.training.losses import PackLoss
from thinksafe.training.packing import PackedBatch
from thinksafe.training.trainer import NonFiniteStep, StepResult, Trainer, non_finite_examples, zero_moments


class LocalTrainer(Trainer):
    """A trainer of one process, with fp32 master copies of bf16 parameters.

    Attributes:
        masters: the fp32 weights that AdamW updates, by name; an fp32 parameter is its own master.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_grad_norm: float,
        weight_decay: float,
        with_reference: bool = False,
        max_cuda_graph_tokens: int = 0,
        beta2: float = 0.999,
    ):
        """Prepare to train a decoder on its device.

        Args:
            max_grad_norm: a gradient with a larger norm is scaled down to this norm.
            with_reference: whether some sequences will have a KL loss. The reference is the decoder at this moment,
                without adapters.
            max_cuda_graph_tokens: number of tokens of the largest pack that runs as CUDA graphs, see
                `choose_max_cuda_graph_tokens`; 0 disables graphs.
            beta2: decay of AdamW's mean of squared gradients.
        """
        super().__init__(decoder, decoder.embedding.device)
        graphs = (DecoderGraphs(decoder.embedding, max_cuda_graph_tokens),) if max_cuda_graph_tokens else ()
        self.loss = PackLoss(decoder, with_reference, *graphs)
        self.max_grad_norm = max_grad_norm
        # An update of 1e-5 (the learning rate) is below bf16's resolution at a weight of 0.01, so AdamW works on fp32.
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.parameters.items()
        }
        settings = {"betas": (0.9, beta2), "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, fused=True, **settings)
        self.optimizer.state.update((master, zero_moments(master)) for master in self.masters.values())

    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        total_weight = sum(pack.total_weight for pack in packs)
        self.decoder.train()
        loss, dropped_masses, bad_rows = torch.zeros((), device=self.device), [], []
        for pack in packs:
            has_reference = pack.num_reference_rows > 0
            pack_loss, dropped_mass, bad_row = self._accumulate_gradients(pack, total_weight, has_reference)
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
            raise NonFiniteStep.of(result, non_finite_examples(packs, bad_rows))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._copy_masters_to_parameters()
        return result

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": value
            for name, master in self.masters.items()
            for key, value in {"weight": master.detach(), **self.optimizer.state[master]}.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, value in self.state_dict().items():
            value.copy_(state[key])
        self._copy_masters_to_parameters()

    def _full_masters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.masters.items()

    def _backward(self, pack_loss: Tensor) -> None:
        pack_loss.backward()

    @torch.no_grad()
    def _copy_masters_to_parameters(self) -> None:
        """Round the fp32 master copies to the bf16 parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
