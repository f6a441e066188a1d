"""The trainer on DeepSpeed: LocalTrainer's step with optimizer state, gradients or weights sharded over ranks (ZeRO).

LocalTrainer computes the same in less host time, if the model fits on one GPU. State is saved and loaded for each
parameter in fp32, under LocalTrainer's names: a run may resume with another number of ranks, with another ZeRO stage,
or without ZeRO. DeepSpeed compiles no extension: torch's AdamW also steps an optimizer that is offloaded to the CPU.
"""

import gc
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.errors import UserError
from thinksafe.model.decoder import Decoder, DecoderLayer
from thinksafe.training.config import ZeroConfig
from thinksafe.training.losses import PackLoss
from thinksafe.training.packing import PackedBatch, collate, partition_balanced
from thinksafe.training.sequence import TrainingSequence
from thinksafe.training.trainer import NonFiniteStep, StepResult, Trainer, non_finite_examples, zero_moments

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

# Without a GPU, DeepSpeed would spend a minute to compile a collective for shared memory that nothing here needs.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("WARNING")
warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # every DeepSpeed step warns

_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_settings(zero: ZeroConfig, max_grad_norm: float, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a stage of 1, 2 or 3 and base weights of a dtype."""
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


class DeepSpeedTrainer(Trainer):
    """A trainer sharded by DeepSpeed, for several ranks or with a `zero` setting.

    With a bf16 base, adapters are trained in bf16 with fp32 master copies; `finish` puts the fp32 values back.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_grad_norm: float,
        weight_decay: float,
        zero: ZeroConfig,
        with_reference: bool = False,
        device: torch.device | None = None,
        workers: Workers = SINGLE_PROCESS,
        beta2: float = 0.999,
    ):
        """Shard a decoder that every rank has loaded in full. Arguments not below are those of `LocalTrainer`.

        Args:
            zero: sharding with a stage of 1, 2 or 3.
            device: device of this rank; None for the decoder's device. In stage 3 the decoder may lie in host memory;
                its weights pass through the device one by one.
            workers: this rank and its relation to the others.
        """
        super().__init__(decoder, device or decoder.embedding.device)
        self.workers = workers
        workers.connect(self.device)
        self._shapes_and_dtypes = {name: (p.shape, p.dtype) for name, p in self.parameters.items()}
        names, sizes = list(self.parameters), [parameter.numel() for parameter in self.parameters.values()]
        self._owned_names = {names[i] for i in partition_balanced(sizes, workers.world_size)[workers.rank]}
        # A rank with fewer packs than another computes this pack, so that collectives match. It has no target.
        self._padding_pack = collate([TrainingSequence(np.zeros(1, np.int32), 1)], self.device)
        betas = (0.9, beta2)
        optimizer = torch.optim.AdamW(self.parameters.values(), 0.0, betas, weight_decay=weight_decay, fused=True)
        dtype = decoder.embedding.dtype
        settings = deepspeed_settings(zero, max_grad_norm, dtype)
        adapters = {name: p.detach().clone() for name, p in self.parameters.items() if p.dtype != dtype}
        model = PackLoss(decoder, with_reference)
        if zero.stage == 3:
            for name in adapters:
                self.parameters[name].data = self.parameters[name].data.to(dtype)
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            for layer in (module for module in model.modules() if isinstance(module, DecoderLayer)):
                for parameter in layer.parameters():  # of its submodules; a layer gathers them together
                    deepspeed.zero.register_external_parameter(layer, parameter)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.loss = self.engine
        # DeepSpeed rounded the fp32 adapters of a bf16 base before it made their masters; set the exact values.
        for name, full in adapters.items():
            self._set_shard(name, "weight", full)
        self._copy_masters_to_parameters()
        for master in self._master_shards():
            self.engine.optimizer.optimizer.state[master] = zero_moments(master)
        if not self._is_stage_3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        weight, has_reference = sum(pack.total_weight for pack in packs), any(pack.num_reference_rows for pack in packs)
        totals = torch.tensor([len(packs), weight, has_reference], dtype=torch.float64, device=self.device)
        pack_counts, weights, reference_flags = self._all_gather(totals).T.tolist()
        num_packs, total_weight, needs_reference = int(max(pack_counts)), sum(weights), any(reference_flags)
        loss, dropped_masses, bad_rows = torch.zeros((), device=self.device), [], []
        self.engine.train()
        for index, pack in enumerate(packs + [self._padding_pack] * (num_packs - len(packs))):
            self.engine.set_gradient_accumulation_boundary(index == num_packs - 1)
            pack_loss, dropped_mass, bad_row = self._accumulate_gradients(pack, total_weight, needs_reference)
            loss += pack_loss
            dropped_masses.append(dropped_mass)
            bad_rows.append(bad_row)
        loss, dropped_mass = self._all_gather(torch.stack((loss, torch.stack(dropped_masses).amax()))).T
        self.engine.optimizer.set_lr(learning_rate)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        result = StepResult(loss.sum().item(), grad_norm, dropped_mass.amax().item())
        if not self.engine.was_step_applied():
            examples_by_rank = self.workers.all_gather(non_finite_examples(packs, bad_rows))
            raise NonFiniteStep.of(result, list(chain(*examples_by_rank)))
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Gather every parameter in full; each is returned by one rank, on the host."""
        state = {}
        for name, parameter in self.parameters.items():
            values = {"weight": safe_get_full_fp32_param(parameter)}
            values |= {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if name in self._owned_names:
                values["step"] = self.engine.optimizer.optimizer.state[self._master_shards()[0]]["step"]
                state |= {f"{key}.{name}": value.detach().to("cpu", copy=True) for key, value in values.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        owner = {key: rank for rank, keys in enumerate(self.workers.all_gather(list(state))) for key in keys}

        def broadcast(key: str, shape: torch.Size) -> Tensor:
            value = torch.empty(shape, device=self.device)
            if owner[key] == self.workers.rank:
                value.copy_(state[key])
            dist.broadcast(value, owner[key])
            return value

        for name, (shape, _) in self._shapes_and_dtypes.items():
            for key in ("weight", *_MOMENTS):
                self._set_shard(name, key, broadcast(f"{key}.{name}", shape))
        step_count = broadcast(f"step.{name}", torch.Size())  # all parameters have the same
        for moments in self.engine.optimizer.optimizer.state.values():
            moments["step"].copy_(step_count)
        self._copy_masters_to_parameters()

    def finish(self) -> None:
        for name, full in self._full_masters():
            if self.workers.is_leader:
                self.parameters[name].data = full.to("cpu", self._shapes_and_dtypes[name][1])

    def close(self) -> None:
        self.engine.destroy()
        # DeepSpeed's module-level caches still keep modules and optimizer alive, so free each of their tensors.
        for parameter in self.engine.module.parameters():
            parameter.data = parameter.new_empty(0)
            vars(parameter).clear()  # its shard and its links to the masters
        for optimizer in (self.engine.optimizer.optimizer, self.engine.optimizer):
            vars(optimizer).clear()
        gc.collect()

    def _full_masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, safe_get_full_fp32_param(parameter)

    def _backward(self, pack_loss: Tensor) -> None:
        # A loss that is not finite makes the gradient NaN. DeepSpeed leaves out a step with such a gradient, on all
        # ranks and before it changes anything.
        nan_guard = 1 + 0 * pack_loss.detach()
        # DeepSpeed averages gradients over ranks, but the loss is a sum.
        self.engine.backward(pack_loss * nan_guard * self.workers.world_size, scale_wrt_gas=False)

    def _all_gather(self, values: Tensor) -> Tensor:
        """Return the values of all ranks, with the rank as the first dimension."""
        gathered = values.new_empty(self.workers.world_size, *values.shape)
        dist.all_gather(list(gathered), values)
        return gathered

    def _master_shards(self) -> list[Tensor]:
        """Return this rank's shards of the fp32 master weights, which AdamW updates, one flat tensor per group."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self._is_stage_3 else optimizer.single_partition_of_fp32_groups

    def _set_shard(self, name: str, key: str, full: Tensor) -> None:
        """Set this rank's shard of a parameter's fp32 weight or moment (`weight` or one of _MOMENTS) from the full
        tensor."""
        parameter, value = self.parameters[name], full
        set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if self._is_stage_3:
            # DeepSpeed's setter reads past the end of a tensor whose size the number of ranks does not divide.
            size, rank = parameter.ds_tensor.numel(), self.workers.rank
            padded = F.pad(full.flatten(), (0, size * self.workers.world_size - full.numel()))
            value = padded[rank * size : (rank + 1) * size]
            set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        if key == "weight":
            set_weight(parameter, value)
        else:
            set_moment(parameter, value, key)

    def _copy_masters_to_parameters(self) -> None:
        """Round the fp32 master weights to the parameters that the forward pass uses."""
        optimizer = self.engine.optimizer
        if self._is_stage_3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            optimizer.update_lp_params()

    @property
    def _is_stage_3(self) -> bool:
        """Whether the weights themselves are sharded (stage 3)."""
        return self.engine.zero_optimization_partition_weights()
