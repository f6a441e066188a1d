"""Choices made before training, from counted costs: ZeRO stage, activation checkpointing, CUDA graphs.

The estimate makes the same choices for a GPU that it does not have, so each function gets a `DeviceMemory`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.errors import UserError
from thinksafe.hardware import Hardware, hardware_named, hardware_of
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES, CheckpointMode
from thinksafe.training.config import ZeroConfig
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs

MEMORY_RESERVE = 0.05
"""Share of a GPU's memory that is left for allocator fragmentation, the CUDA context and libraries."""


class DeviceMemory(NamedTuple):
    """What training may use of a device, without MEMORY_RESERVE.

    Attributes:
        usable_bytes: memory of the device; infinite on a CPU.
        free_bytes: the part of it that is not allocated.
        hardware: rates of the GPU, those of an H200 if they are unknown; None for a CPU.
    """

    usable_bytes: float
    free_bytes: float
    hardware: Hardware | None

    @classmethod
    def of(cls, device: torch.device) -> "DeviceMemory":
        """Return what a device offers now, with what torch's allocator holds unused."""
        if device.type == "cpu":
            return cls(math.inf, math.inf, None)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        share = 1 - MEMORY_RESERVE
        return cls(share * total_bytes, share * free_bytes, hardware_of(device) or hardware_named("H200"))


def pack_sizes(lengths: Sequence[int], batch_size: int, tokens_per_step: int, max_tokens: int) -> tuple[int, float]:
    """Return an upper bound of the number of tokens of a pack, over all steps, and about the mean number: that of a
    step, or max_tokens if that is less.

    Args:
        lengths: number of tokens of each sequence.
        batch_size: number of sequences per step; ignored unless tokens_per_step is 0.
        tokens_per_step: largest number of tokens per step; 0 to use batch_size.
        max_tokens: largest number of tokens of a pack; a longer sequence is a pack by itself.
    """
    descending = sorted(lengths, reverse=True)
    step_tokens = min(tokens_per_step, sum(lengths)) if tokens_per_step else sum(descending[:batch_size])
    mean_tokens = min(max_tokens, tokens_per_step or batch_size * sum(lengths) / len(lengths))
    return max(descending[0], min(max_tokens, step_tokens)), mean_tokens


def choose_zero_stage(
    memory: DeviceMemory, zero: ZeroConfig, costs: TrainingCosts, tokens: int, world_size: int
) -> ZeroConfig:
    """Return the recipe's sharding with a stage of 1, 2 or 3: the recipe's stage, or for `auto` the fastest stage.

    A higher stage leaves more memory, so less is recomputed. Stage 3 gathers all weights twice a pack, which overlaps
    with matmuls, but costs host time. Among equally fast stages choose the lowest; if no stage fits, the highest.
    Offloaded parameters need stage 3, and fp8 excludes it. `tokens` are those of the largest pack.
    """
    if zero.stage != "auto":
        return zero
    allowed = (3,) if zero.offload_parameters else (1, 2) if costs.fp8 else (1, 2, 3)
    candidates = [replace(zero, stage=stage) for stage in allowed]
    counts, hardware = TokenCounts(tokens, tokens, causal_pairs([tokens])), memory.hardware or hardware_named("H200")

    def seconds(candidate: ZeroConfig) -> float:
        free_bytes = memory.usable_bytes - costs.state_bytes(candidate, world_size)
        checkpointing = costs.checkpointing_within(free_bytes, tokens)
        if checkpointing is None:
            return math.inf
        compute_seconds = costs.roofline_seconds(checkpointing, counts, 0, hardware)
        if candidate.stage < 3:
            return compute_seconds
        link_seconds, host_seconds = costs.all_gather_seconds(world_size, hardware)
        return max(compute_seconds, link_seconds) + host_seconds

    fastest = min(candidates, key=seconds)
    return fastest if seconds(fastest) < math.inf else candidates[-1]


def choose_checkpointing(
    memory: DeviceMemory,
    setting: str,
    costs: TrainingCosts,
    tokens: int,
    zero: ZeroConfig | None = None,
    workers: Workers = SINGLE_PROCESS,
) -> tuple[CheckpointMode, ...]:
    """Return the activation checkpointing of each layer, the same on all ranks, which call this together after the
    weights are loaded: the recipe's, or for `auto` the fastest that fits.

    Args:
        setting: value of training.activation_checkpointing: `auto`, `none`, `selective` or `full`.
        tokens: number of tokens of the largest pack.
        zero: sharding with a stage of 1, 2 or 3; None for one process without DeepSpeed.

    Raises:
        UserError: for `auto`, a pack does not fit even if all layers are recomputed.
    """
    layers = costs.model.num_layers
    if setting != "auto":
        return (setting,) * layers
    free_bytes = min(workers.all_gather(memory.free_bytes)) - costs.optimizer_bytes(zero, workers.world_size)
    if zero is not None and zero.stage == 3:  # the shards are not allocated yet
        free_bytes -= costs.weight_bytes(zero, workers.world_size)
    checkpointing = costs.checkpointing_within(free_bytes, tokens)
    if checkpointing is None:
        min_gib = costs.pack_bytes(("full",) * layers, tokens, tokens) / 2**30
        free_gib = max(free_bytes, 0) / 2**30
        raise UserError(
            f"training.max_tokens_per_pack: a pack of {tokens:,} tokens takes {min_gib:.1f} GiB if all layers are "
            f"recomputed, and the GPU has {free_gib:.1f} GiB free; lower it, or training.max_length"
        )
    return checkpointing


def choose_max_cuda_graph_tokens(
    memory: DeviceMemory, costs: TrainingCosts, checkpointing: Sequence[CheckpointMode], max_pack: int, mean_pack: float
) -> int:
    """Return the number of tokens up to which packs run as CUDA graphs, see cuda_graphs.py, after the weights are
    loaded. It is 0 if the mean pack is not launch-bound, if no memory is left beside the largest pack, on a CPU, and in
    fp32, where attention on a GPU needs the sequences' lengths on the host."""
    if memory.hardware is None or costs.itemsize == 4:
        return 0
    limit = costs.launch_bound_tokens(memory.hardware)
    tokens = min(limit, max_pack)
    needed = costs.pack_bytes(checkpointing, max_pack, max_pack) + costs.cuda_graph_bytes(checkpointing, tokens)
    fits = needed <= memory.free_bytes - costs.optimizer_bytes()
    return tokens if mean_pack <= limit and fits else 0


def describe_checkpointing(checkpointing: Sequence[CheckpointMode]) -> str:
    """Return a description of the layers' modes, such as `none` or `full in 12 layers, selective in 24 layers`."""
    counts = Counter(checkpointing)
    if len(counts) == 1:
        return checkpointing[0]
    return ", ".join(f"{mode} in {counts[mode]} layers" for mode in reversed(CHECKPOINT_MODES) if counts[mode])
