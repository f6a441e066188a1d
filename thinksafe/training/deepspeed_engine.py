"""The training engine on DeepSpeed: the same step, with optimiser, gradients or weights sharded over the ranks (ZeRO).

For what does not fit on one GPU; where it fits, SingleEngine does the same with less of the host's time. Each rank
gives its own packs; the loss is the weighted sum over all ranks' tokens divided by the sum of the weights, so neither
the number of ranks nor how sequences fall into packs changes the gradient. State is taken and loaded by parameter in
fp32, under the names that SingleEngine uses: a run may go on with another number of ranks, another stage, or without
ZeRO.

DeepSpeed compiles nothing here: torch's AdamW also runs on the CPU, where an offloaded optimiser lives.
"""

import gc
import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.distributed.ranks import balanced, gather, join, rank, world_size
from thinksafe.errors import UserError
from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.model.decoder import Decoder
from thinksafe.training.local_engine import NonFiniteStep, StepResult
from thinksafe.training.losses import PackLoss, broken_in, not_finite
from thinksafe.training.packing import PackedBatch, TrainingSequence, collate
from thinksafe.training.zero_config import ZeroConfig

try:
    import deepspeed
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )
except ImportError:
    raise UserError("ZeRO needs DeepSpeed, which is not installed: pip install 'thinksafe[deepspeed]'") from None

# Without a GPU DeepSpeed would compile a collective for ranks that share memory, a minute for nothing.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("WARNING")
warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # DeepSpeed's, every step

_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_settings(zero: ZeroConfig, max_grad_norm: float, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration for a base model of this dtype."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero.stage,
            "offload_optimizer": {"device": "cpu" if zero.offload_optimizer else "none"},
            "offload_param": {"device": "cpu" if zero.offload_parameters else "none"},
        },
    }


class ZeroEngine:
    """AdamW on whatever parameters of the decoder require a gradient, sharded by DeepSpeed.

    Every method is called by all ranks at once. With a bf16 base adapters are bf16 too while they train, with fp32
    master copies; `finish` puts the fp32 values back.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_grad_norm: float,
        weight_decay: float,
        zero: ZeroConfig,
        with_reference: bool = False,
        device: torch.device | None = None,
    ):
        """Shard a decoder that every rank has loaded whole, on its own device.

        Args:
            with_reference: whether sequences will come that keep to what the decoder is now, adapters aside.
            device: where it trains, if the decoder lies elsewhere: in stage 3 host memory will do, and weights pass
                through the device one by one.
        """
        self.decoder = decoder
        self.device = device or decoder.embedding.device
        join(self.device)
        self.parameters = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
        self._layout = {name: (parameter.shape, parameter.dtype) for name, parameter in self.parameters.items()}
        names, sizes = list(self._layout), [shape.numel() for shape, _ in self._layout.values()]
        self._mine = {names[index] for index in balanced(sizes, world_size())[rank()]}
        # What a rank computes that has fewer packs than another: collectives match, and without targets nothing counts.
        self._no_targets = collate([TrainingSequence(np.zeros(1, np.int32), 1)], self.device)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=weight_decay, fused=True)
        dtype = decoder.embedding.dtype
        settings = deepspeed_settings(zero, max_grad_norm, dtype)
        adapters = {name: p.detach().clone() for name, p in self.parameters.items() if p.dtype != dtype}
        model = PackLoss(decoder, with_reference)
        if zero.stage == 3:
            for name in adapters:
                self.parameters[name].data = self.parameters[name].data.to(dtype)
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        # DeepSpeed has rounded fp32 adapters of a bf16 base before it made their masters.
        for name, whole in adapters.items():
            self._assign(self.parameters[name], "weight", whole)
        self._publish_masters()
        self._make_moments()

    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        """One optimiser step over all packs of all ranks; a rank may have none.

        Raises:
            NonFiniteStep: loss or gradient is not finite on some rank; nothing was updated on any.
        """
        asks = any(pack.num_reference_rows for pack in packs)
        mine = [len(packs), sum(pack.total_weight for pack in packs), asks]
        mine = torch.tensor(mine, dtype=torch.float64, device=self.device)
        theirs = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(theirs, mine)
        counts, weights, asking = torch.stack(theirs).T.tolist()
        num_packs, total_weight, ask_reference = int(max(counts)), sum(weights), any(asking)
        loss, dropped, bad_rows = torch.zeros((), device=self.device), [], []
        self.engine.train()
        for index, pack in enumerate(packs + [self._no_targets] * (num_packs - len(packs))):
            self.engine.set_gradient_accumulation_boundary(index == num_packs - 1)
            losses, dropped_mass = self.engine(pack, ask_reference)
            dropped.append(dropped_mass)
            bad_rows.append(first_bad_row(losses))
            pack_loss = losses.sum() / total_weight
            loss += pack_loss.detach()
            # A loss that is not finite makes the gradient NaN, and DeepSpeed leaves out a step with such a gradient,
            # on all ranks and before it touches anything.
            one_or_nan = 1 + 0 * pack_loss.detach()
            # DeepSpeed averages over ranks; the loss is a sum.
            self.engine.backward(pack_loss * one_or_nan * world_size(), scale_wrt_gas=False)
        found = torch.stack((loss, torch.stack(dropped).amax()))
        everywhere = [torch.empty_like(found) for _ in range(world_size())]
        dist.all_gather(everywhere, found)
        loss, dropped_mass = torch.stack(everywhere).T
        self.engine.optimizer.set_lr(learning_rate)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        result = StepResult(loss.sum().item(), grad_norm, dropped_mass.amax().item())
        if not self.engine.was_step_applied():
            broken = broken_in(packs, bad_rows[: len(packs)]) if packs else []
            names = [name for part in gather(broken) for name in part]
            raise NonFiniteStep(not_finite(result.loss, result.grad_norm, names))
        return result

    def check_weights(self) -> None:
        """Look at every trained weight.

        Raises:
            NonFiniteStep: one is NaN or infinite, or so large (1e19) that its square is.
        """
        norms = [safe_get_full_fp32_param(parameter).norm() for parameter in self.parameters.values()]
        norm = torch.stack(norms).norm().item()
        if not math.isfinite(norm):
            raise NonFiniteStep(f"the norm of the weights is {norm}")

    def tensors(self) -> dict[str, Tensor]:
        """This rank's part of what a resumed run needs, on the host: fp32 weights and moments of whole parameters.

        Each parameter is gathered, and kept by one rank.
        """
        state = {}
        for name, parameter in self.parameters.items():
            values = {"weight": safe_get_full_fp32_param(parameter)}
            values |= {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if name in self._mine:
                state |= {f"{key}.{name}": value.detach().cpu() for key, value in values.items()}
                state[f"step.{name}"] = self._steps_done().to("cpu", copy=True)
        return state

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Take over what `tensors` of all ranks returned, each parameter read by some rank, whichever."""
        owner = {key: number for number, keys in enumerate(gather(list(state))) for key in keys}

        def received(key: str, shape: torch.Size) -> Tensor:
            value = torch.empty(shape, device=self.device)
            if owner[key] == rank():
                value.copy_(state[key])
            dist.broadcast(value, owner[key])
            return value

        for name, parameter in self.parameters.items():
            shape, _ = self._layout[name]
            self._assign(parameter, "weight", received(f"weight.{name}", shape))
            for key in _MOMENTS:
                self._assign(parameter, key, received(f"{key}.{name}", shape))
        steps = received(f"step.{name}", torch.Size())
        for moments in self.engine.optimizer.optimizer.state.values():
            moments["step"].copy_(steps)
        self._publish_masters()

    def finish(self) -> None:
        """Put whole weights back into rank 0's decoder, on the host, ready to be saved. No step may follow."""
        for name, parameter in self.parameters.items():
            whole = safe_get_full_fp32_param(parameter)
            if rank() == 0:
                parameter.data = whole.to("cpu", self._layout[name][1])

    def close(self) -> None:
        """Give all memory back; the engine, and its decoder, are of no use any more."""
        self.engine.destroy()
        # DeepSpeed's module-level caches keep modules and optimiser alive after that: what they hold goes one by one.
        for parameter in self.engine.module.parameters():
            parameter.data = parameter.new_empty(0)
            vars(parameter).clear()  # its shard, and links to its masters
        for optimizer in (self.engine.optimizer.optimizer, self.engine.optimizer):
            vars(optimizer).clear()
        gc.collect()

    def _flat_masters(self) -> list[Tensor]:
        """This rank's shards of the fp32 weights, on which AdamW works."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self._sharded else optimizer.single_partition_of_fp32_groups

    def _steps_done(self) -> Tensor:
        return self.engine.optimizer.optimizer.state[self._flat_masters()[0]]["step"]

    def _make_moments(self) -> None:
        """Now, so that a checkpoint holds them even if no step was finite; AdamW has none before its first step."""
        optimizer = self.engine.optimizer
        for master in self._flat_masters():
            moments = {key: torch.zeros_like(master) for key in _MOMENTS}
            optimizer.optimizer.state[master] = {"step": torch.zeros((), device=master.device), **moments}
        if not self._sharded:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _assign(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """Set this rank's shard of a parameter's fp32 weight or moment from the whole."""
        if self._sharded:
            # DeepSpeed's own way reads past the end of what the number of ranks does not divide.
            size = parameter.ds_tensor.numel()
            padded = F.pad(whole.flatten(), (0, size * world_size() - whole.numel()))
            value = padded[rank() * size : (rank() + 1) * size]
            set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        else:
            value, set_weight, set_moment = whole, safe_set_full_fp32_param, safe_set_full_optimizer_state
        if key == "weight":
            set_weight(parameter, value)
        else:
            set_moment(parameter, value, key)

    def _publish_masters(self) -> None:
        optimizer = self.engine.optimizer
        if self._sharded:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            optimizer.update_lp_params()

    @property
    def _sharded(self) -> bool:
        """Whether the weights themselves are sharded, which is stage 3."""
        return self.engine.zero_optimization_partition_weights()
