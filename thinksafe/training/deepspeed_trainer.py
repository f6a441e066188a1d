"""The trainer on DeepSpeed: LocalTrainer's step with optimizer state, gradients or weights sharded over ranks (ZeRO).

It is for models that do not fit on one GPU; if a model fits, LocalTrainer computes the same in less host time. Each
rank passes its own packs. The loss is the weighted sum over the tokens of all ranks divided by the sum of the weights,
so the gradient does not depend on the number of ranks or on how sequences are packed. State is saved and loaded for
each parameter in fp32, under LocalTrainer's names: a run may resume with another number of ranks, with another ZeRO
stage, or without ZeRO.

DeepSpeed compiles no extension here: torch's AdamW also runs on the CPU, which steps an offloaded optimizer.
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

from thinksafe.distributed.ranks import all_gather_objects, init_training_ranks, partition_balanced, rank, world_size
from thinksafe.errors import UserError
from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.model.decoder import Decoder
from thinksafe.training.local_trainer import NonFiniteStep, StepResult
from thinksafe.training.losses import PackLoss, non_finite_examples, non_finite_message
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

# Without a GPU, DeepSpeed would spend a minute to compile a collective for shared memory that nothing here needs.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("WARNING")
warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # every DeepSpeed step warns

_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_settings(zero: ZeroConfig, max_grad_norm: float, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        zero: sharding with a stage of 1, 2 or 3.
        max_grad_norm: norm to which DeepSpeed scales a larger gradient down.
        dtype: dtype of the decoder's base weights.
    """
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


class DeepSpeedTrainer:
    """AdamW on all parameters of the decoder that require a gradient, sharded by DeepSpeed.

    The training stage uses it for several ranks or with a `zero` setting, otherwise LocalTrainer. All ranks must call
    every method together. With a bf16 base, adapters are trained in bf16 with fp32 master copies; `finish` puts the
    fp32 values back.
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
        """Shard a decoder that every rank has loaded in full.

        Args:
            max_grad_norm: a gradient with a larger norm is scaled down to this norm.
            weight_decay: weight decay of AdamW.
            zero: sharding with a stage of 1, 2 or 3.
            with_reference: whether some sequences will have a KL loss. The reference is the decoder at this moment,
                without adapters.
            device: device of this rank; None for the decoder's device. In stage 3 the decoder may lie in host memory;
                its weights pass through the device one by one.
        """
        self.decoder = decoder
        self.device = device or decoder.embedding.device
        init_training_ranks(self.device)
        self.parameters = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
        self._shapes_and_dtypes = {
            name: (parameter.shape, parameter.dtype) for name, parameter in self.parameters.items()
        }
        names, sizes = list(self._shapes_and_dtypes), [shape.numel() for shape, _ in self._shapes_and_dtypes.values()]
        self._owned_names = {names[index] for index in partition_balanced(sizes, world_size())[rank()]}
        # A rank with fewer packs than another computes this pack, so that collectives match. It has no target.
        self._padding_pack = collate([TrainingSequence(np.zeros(1, np.int32), 1)], self.device)
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
        # DeepSpeed rounded the fp32 adapters of a bf16 base before it made their masters; set the exact values.
        for name, full in adapters.items():
            self._set_shard(self.parameters[name], "weight", full)
        self._copy_masters_to_parameters()
        self._init_moments()

    def step(self, packs: list[PackedBatch], learning_rate: float) -> StepResult:
        """Take one optimizer step over all packs of all ranks, and return the result, the same on every rank.

        Args:
            packs: packs of this rank, possibly none.

        Raises:
            NonFiniteStep: loss or gradient is not finite on some rank; no rank was updated.
        """
        needs_reference = any(pack.num_reference_rows for pack in packs)
        local_totals = [len(packs), sum(pack.total_weight for pack in packs), needs_reference]
        local_totals = torch.tensor(local_totals, dtype=torch.float64, device=self.device)
        totals = [torch.empty_like(local_totals) for _ in range(world_size())]
        dist.all_gather(totals, local_totals)
        pack_counts, weights, reference_flags = torch.stack(totals).T.tolist()
        num_packs, total_weight = int(max(pack_counts)), sum(weights)
        needs_reference = any(reference_flags)
        loss, dropped_masses, bad_rows = torch.zeros((), device=self.device), [], []
        self.engine.train()
        for index, pack in enumerate(packs + [self._padding_pack] * (num_packs - len(packs))):
            self.engine.set_gradient_accumulation_boundary(index == num_packs - 1)
            losses, dropped_mass = self.engine(pack, needs_reference)
            dropped_masses.append(dropped_mass)
            bad_rows.append(first_bad_row(losses))
            pack_loss = losses.sum() / total_weight
            loss += pack_loss.detach()
            # A loss that is not finite makes the gradient NaN. DeepSpeed leaves out a step with such a gradient, on all
            # ranks and before it changes anything.
            nan_guard = 1 + 0 * pack_loss.detach()
            # DeepSpeed averages gradients over ranks, but the loss is a sum.
            self.engine.backward(pack_loss * nan_guard * world_size(), scale_wrt_gas=False)
        local_results = torch.stack((loss, torch.stack(dropped_masses).amax()))
        all_results = [torch.empty_like(local_results) for _ in range(world_size())]
        dist.all_gather(all_results, local_results)
        loss, dropped_mass = torch.stack(all_results).T
        self.engine.optimizer.set_lr(learning_rate)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        result = StepResult(loss.sum().item(), grad_norm, dropped_mass.amax().item())
        if not self.engine.was_step_applied():
            examples = non_finite_examples(packs, bad_rows[: len(packs)]) if packs else []
            names = [name for part in all_gather_objects(examples) for name in part]
            raise NonFiniteStep(non_finite_message(result.loss, result.grad_norm, names))
        return result

    def check_weights_finite(self) -> None:
        """Check that every trained weight is finite.

        Raises:
            NonFiniteStep: a weight is NaN or infinite, or so large (1e19) that its square is infinite.
        """
        norms = [safe_get_full_fp32_param(parameter).norm() for parameter in self.parameters.values()]
        norm = torch.stack(norms).norm().item()
        if not math.isfinite(norm):
            raise NonFiniteStep(f"the norm of the weights is {norm}")

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of the state that a resumed run needs, on the host: fp32 weight, AdamW's two moments
        and step count of some parameters, as `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`.

        Every parameter is gathered in full, and one rank returns it.
        """
        state = {}
        for name, parameter in self.parameters.items():
            values = {"weight": safe_get_full_fp32_param(parameter)}
            values |= {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if name in self._owned_names:
                state |= {f"{key}.{name}": value.detach().cpu() for key, value in values.items()}
                state[f"step.{name}"] = self._step_count().to("cpu", copy=True)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned, of either trainer. Together the ranks must pass the state of every
        parameter; any rank may pass any part of it."""
        owner = {key: owner_rank for owner_rank, keys in enumerate(all_gather_objects(list(state))) for key in keys}

        def broadcast(key: str, shape: torch.Size) -> Tensor:
            value = torch.empty(shape, device=self.device)
            if owner[key] == rank():
                value.copy_(state[key])
            dist.broadcast(value, owner[key])
            return value

        for name, parameter in self.parameters.items():
            shape, _ = self._shapes_and_dtypes[name]
            self._set_shard(parameter, "weight", broadcast(f"weight.{name}", shape))
            for key in _MOMENTS:
                self._set_shard(parameter, key, broadcast(f"{key}.{name}", shape))
        step_count = broadcast(f"step.{name}", torch.Size())
        for moments in self.engine.optimizer.optimizer.state.values():
            moments["step"].copy_(step_count)
        self._copy_masters_to_parameters()

    def finish(self) -> None:
        """Put the full trained parameters back into rank 0's decoder, on the host, ready to be saved. No step may
        follow."""
        for name, parameter in self.parameters.items():
            full = safe_get_full_fp32_param(parameter)
            if rank() == 0:
                parameter.data = full.to("cpu", self._shapes_and_dtypes[name][1])

    def close(self) -> None:
        """Free all memory; the trainer and its decoder cannot be used any more."""
        self.engine.destroy()
        # DeepSpeed's module-level caches still keep modules and optimizer alive, so free each of their tensors.
        for parameter in self.engine.module.parameters():
            parameter.data = parameter.new_empty(0)
            vars(parameter).clear()  # its shard and its links to the masters
        for optimizer in (self.engine.optimizer.optimizer, self.engine.optimizer):
            vars(optimizer).clear()
        gc.collect()

    def _master_shards(self) -> list[Tensor]:
        """Return this rank's shards of the fp32 master weights, which AdamW updates, one flat tensor per group."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self._is_stage_3 else optimizer.single_partition_of_fp32_groups

    def _step_count(self) -> Tensor:
        """Return AdamW's step count, a scalar that all parameters share."""
        return self.engine.optimizer.optimizer.state[self._master_shards()[0]]["step"]

    def _init_moments(self) -> None:
        """Create the moments before AdamW's first step, so that a checkpoint holds them even if no step was finite."""
        optimizer = self.engine.optimizer
        for master in self._master_shards():
            moments = {key: torch.zeros_like(master) for key in _MOMENTS}
            optimizer.optimizer.state[master] = {"step": torch.zeros((), device=master.device), **moments}
        if not self._is_stage_3:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _set_shard(self, parameter: nn.Parameter, key: str, full: Tensor) -> None:
        """Set this rank's shard of a parameter's fp32 weight or moment from the full tensor.

        Args:
            key: `weight`, `exp_avg` or `exp_avg_sq`.
            full: the whole tensor, in the parameter's shape.
        """
        if self._is_stage_3:
            # DeepSpeed's setter reads past the end of a tensor whose size the number of ranks does not divide.
            size = parameter.ds_tensor.numel()
            padded = F.pad(full.flatten(), (0, size * world_size() - full.numel()))
            value = padded[rank() * size : (rank() + 1) * size]
            set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        else:
            value, set_weight, set_moment = full, safe_set_full_fp32_param, safe_set_full_optimizer_state
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
