"""Choices made before training, from counted costs: ZeRO stage, activation checkpointing, CUDA graphs.

`choose_*` functions query the device for free memory; `*_within` functions take it as an argument, so that the estimate
can use them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from thinksafe.distributed.ranks import all_gather_objects
from thinksafe.errors import UserError
from thinksafe.hardware import Hardware, hardware_named, hardware_of
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES, CheckpointMode
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs
from thinksafe.training.zero_config import ZeroConfig

MEMORY_RESERVE = 0.05
"""Share of a GPU's memory that is left for allocator fragmentation, the CUDA context and libraries."""


def max_pack_tokens(lengths: Sequence[int], batch_size: int, tokens_per_step: int, max_tokens: int) -> int:
    """Return an upper bound of the number of tokens of a pack, over all steps.

    Args:
        lengths: number of tokens of each sequence.
        batch_size: number of sequences per step; ignored unless tokens_per_step is 0.
        tokens_per_step: largest number of tokens per step; 0 to use batch_size.
        max_tokens: largest number of tokens of a pack; a longer sequence is a pack by itself.
    """
    descending = sorted(lengths, reverse=True)
    step_tokens = min(tokens_per_step, sum(lengths)) if tokens_per_step else sum(descending[:batch_size])
    return max(descending[0], min(max_tokens, step_tokens))


def mean_pack_tokens(lengths: Sequence[int], batch_size: int, tokens_per_step: int, max_tokens: int) -> float:
    """Return the mean number of tokens of a step, or max_tokens if that is less: about the mean size of a pack.

    Args:
        lengths: number of tokens of each sequence.
        batch_size: number of sequences per step; ignored unless tokens_per_step is 0.
        tokens_per_step: number of tokens per step; 0 to use batch_size.
        max_tokens: largest number of tokens of a pack.
    """
    return min(max_tokens, tokens_per_step or batch_size * sum(lengths) / len(lengths))


def choose_zero_stage(
    device: torch.device, zero: ZeroConfig, costs: TrainingCosts, tokens: int, world_size: int
) -> ZeroConfig:
    """Return the recipe's sharding with a stage of 1, 2 or 3: the recipe's stage, or for `auto` the stage that is
    expected to be fastest on the device, see `zero_stage_within`.

    A CPU counts as unlimited memory, and a GPU with unknown rates as an H200.

    Args:
        zero: sharding as the recipe sets it.
        tokens: number of tokens of the largest pack.
        world_size: number of ranks.
    """
    memory = math.inf if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    hardware = hardware_of(device) or hardware_named("H200")
    return zero_stage_within((1 - MEMORY_RESERVE) * memory, hardware, zero, costs, tokens, world_size)


def zero_stage_within(
    memory_bytes: float, hardware: Hardware, zero: ZeroConfig, costs: TrainingCosts, tokens: int, world_size: int
) -> ZeroConfig:
    """Return the recipe's sharding with a stage of 1, 2 or 3: the recipe's stage, or for `auto` the fastest stage.

    A higher stage leaves more memory, so less is recomputed. Stage 3 gathers all weights for the forward and the
    backward pass; this overlaps with matmuls, but costs more host time. Among equally fast stages choose the lowest; if
    no stage fits, the highest. Offloaded parameters need stage 3, and fp8 excludes it.

    Args:
        memory_bytes: usable memory of one GPU, before weights and state are loaded.
        zero: sharding as the recipe sets it.
        tokens: number of tokens of the largest pack.
        world_size: number of ranks.
    """
    if zero.stage != "auto":
        return zero
    allowed = (3,) if zero.offload_parameters else (1, 2) if costs.fp8 else (1, 2, 3)
    candidates = [replace(zero, stage=stage) for stage in allowed]

    def seconds(candidate: ZeroConfig) -> float:
        checkpointing = costs.checkpointing_within(memory_bytes - costs.state_bytes(candidate, world_size), tokens)
        if checkpointing is None:
            return math.inf
        compute_seconds = costs.roofline_seconds(
            checkpointing, TokenCounts(tokens, tokens, causal_pairs([tokens])), 0, hardware
        )
        if candidate.stage < 3:
            return compute_seconds
        link_seconds, host_seconds = costs.all_gather_seconds(world_size, hardware)
        return max(compute_seconds, link_seconds) + host_seconds

    fastest = min(candidates, key=seconds)
    return fastest if seconds(fastest) < math.inf else candidates[-1]


def choose_checkpointing(
    device: torch.device,
    setting: str,
    costs: TrainingCosts,
    tokens: int,
    zero: ZeroConfig | None = None,
    world_size: int = 1,
) -> tuple[CheckpointMode, ...]:
    """Return the activation checkpointing of each layer: the recipe's, or for `auto` the fastest that fits the device's
    free memory, and `none` on a CPU.

    All ranks must call this together, and use the same modes: they gather sharded weights together, also to recompute.

    Args:
        setting: value of training.activation_checkpointing: `auto`, `none`, `selective` or `full`.
        tokens: number of tokens of the largest pack.
        zero: sharding with a stage of 1, 2 or 3; None for one process without DeepSpeed.
        world_size: number of ranks that share the state.

    Raises:
        UserError: for `auto`, a pack does not fit even if all layers are recomputed.
    """
    if setting != "auto" or device.type == "cpu":
        return ("none" if setting == "auto" else setting,) * costs.model.num_layers
    free_bytes = (1 - MEMORY_RESERVE) * min(all_gather_objects(_free_bytes(device))) - costs.optimizer_bytes(
        zero, world_size
    )
    if zero is not None and zero.stage == 3:  # the shards are not allocated yet
        free_bytes -= costs.weight_bytes(zero, world_size)
    checkpointing = costs.checkpointing_within(free_bytes, tokens)
    if checkpointing is None:
        min_gib = costs.pack_bytes(("full",) * costs.model.num_layers, tokens, tokens) / 2**30
        free_gib = max(free_bytes, 0) / 2**30
        raise UserError(
            f"training.max_tokens_per_pack: a pack of {tokens:,} tokens takes {min_gib:.1f} GiB if all layers are "
            f"recomputed, and the GPU has {free_gib:.1f} GiB free; lower it, or training.max_length"
        )
    return checkpointing


def _free_bytes(device: torch.device) -> int:
    """Return the GPU's free memory in bytes, with what torch's allocator holds unused."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def choose_max_cuda_graph_tokens(
    device: torch.device, costs: TrainingCosts, checkpointing: Sequence[CheckpointMode], max_pack: int, mean_pack: float
) -> int:
    """Return the number of tokens up to which packs run as CUDA graphs, see cuda_graphs.py; 0 if none does.

    Passes are captured if the mean pack may be launch-bound and memory is left beside the largest pack. They are not
    captured on a CPU, or in fp32, where attention on a GPU needs the sequences' lengths on the host.

    Args:
        max_pack, mean_pack: number of tokens of the largest pack, and of the mean pack.
    """
    if device.type == "cpu" or costs.itemsize == 4:
        return 0
    free_bytes = (1 - MEMORY_RESERVE) * _free_bytes(device) - costs.optimizer_bytes()
    hardware = hardware_of(device) or hardware_named("H200")  # an unknown GPU waits at most as long
    return max_cuda_graph_tokens_within(free_bytes, hardware, costs, checkpointing, max_pack, mean_pack)


def max_cuda_graph_tokens_within(
    free_bytes: float,
    hardware: Hardware,
    costs: TrainingCosts,
    checkpointing: Sequence[CheckpointMode],
    max_pack: int,
    mean_pack: float,
) -> int:
    """Return the number of tokens up to which packs run as CUDA graphs; 0 if the mean pack is too large to be
    launch-bound, or if the graphs do not fit beside the largest pack.

    Args:
        free_bytes: GPU memory for packs and graphs, beside weights and state.
        checkpointing: mode of each layer.
        max_pack, mean_pack: number of tokens of the largest pack, and of the mean pack.
    """
    tokens = costs.launch_bound_tokens(hardware)
    if mean_pack > tokens:
        return 0
    tokens = min(tokens, max_pack)
    fits = (
        costs.pack_bytes(checkpointing, max_pack, max_pack) + costs.cuda_graph_bytes(checkpointing, tokens)
        <= free_bytes
    )
    return tokens if fits else 0


def describe_checkpointing(checkpointing: Sequence[CheckpointMode]) -> str:
    """Return a description of the layers' modes, such as `none` or `full in 12 layers, selective in 24 layers`."""
    counts = Counter(checkpointing)
    if len(counts) == 1:
        return checkpointing[0]
    return ", ".join(f"{mode} in {counts[mode]} layers" for mode in reversed(CHECKPOINT_MODES) if counts[mode])
