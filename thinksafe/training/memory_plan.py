"""What a run settles by counted costs before it trains: ZeRO's stage, what layers keep, which packs become CUDA graphs.

Functions `_on` ask a device for its memory; those `_within` are told of it, and serve the estimate too.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from thinksafe.distributed.ranks import gather
from thinksafe.errors import UserError
from thinksafe.hardware import Hardware, hardware_named, hardware_of
from thinksafe.model.activation_checkpointing import KEEPING, Keeping
from thinksafe.training.cost_model import TrainingCosts, Work, causal_pairs
from thinksafe.training.zero_config import ZeroConfig

SPARE = 0.05
"""Share of a GPU's memory that is left to the allocator's gaps, the context and the libraries."""


def largest_pack(lengths: Sequence[int], batch_size: int, batch_tokens: int, max_tokens: int) -> int:
    """Tokens of the largest pack that a step can hold; see `TrainingConfig` for what makes a step."""
    longest = sorted(lengths, reverse=True)
    step = min(batch_tokens, sum(lengths)) if batch_tokens else sum(longest[:batch_size])
    return max(longest[0], min(max_tokens, step))


def average_pack(lengths: Sequence[int], batch_size: int, batch_tokens: int, max_tokens: int) -> float:
    """Tokens of the pack that a step holds on average."""
    return min(max_tokens, batch_tokens or batch_size * sum(lengths) / len(lengths))


def sharding_on(device: torch.device, zero: ZeroConfig, costs: TrainingCosts, tokens: int, ranks: int) -> ZeroConfig:
    """With the stage decided: as the recipe sets it, or for `auto` the one that takes the least time.

    Args:
        zero: the recipe's.
        tokens: of the largest pack.
    """
    memory = math.inf if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    hardware = hardware_of(device) or hardware_named("H200")
    return sharding_within((1 - SPARE) * memory, hardware, zero, costs, tokens, ranks)


def sharding_within(
    memory_bytes: float, hardware: Hardware, zero: ZeroConfig, costs: TrainingCosts, tokens: int, ranks: int
) -> ZeroConfig:
    """The same for a GPU of which so much can be used.

    A higher stage leaves more room, so that less is computed again; the third one gathers all weights for either pass,
    beside the products, and takes the host longer. Of equals the lowest; where none fits, the highest.
    """
    if zero.stage != "auto":
        return zero
    possible = (3,) if zero.offload_parameters else (1, 2) if costs.fp8 else (1, 2, 3)
    stages = [replace(zero, stage=stage) for stage in possible]

    def seconds(one: ZeroConfig) -> float:
        keeping = costs.choose(memory_bytes - costs.state_bytes(one, ranks), tokens)
        if keeping is None:
            return math.inf
        computing = costs.least_seconds(keeping, Work(tokens, tokens, causal_pairs([tokens])), 0, hardware)
        if one.stage < 3:
            return computing
        link, host = costs.gathering_seconds(ranks, hardware)
        return max(computing, link) + host

    fastest = min(stages, key=seconds)
    return fastest if seconds(fastest) < math.inf else stages[-1]


def keeping_on(
    device: torch.device,
    setting: str,
    costs: TrainingCosts,
    tokens: int,
    zero: ZeroConfig | None = None,
    ranks: int = 1,
) -> tuple[Keeping, ...]:
    """What each layer keeps for its backward pass: as the recipe sets it, or for `auto` what the device has room for.

    All ranks keep the same: where weights are sharded, they are gathered together, also to compute again.

    Args:
        setting: training.activation_checkpointing.
        tokens: of the largest pack.
        zero, ranks: as in `TrainingCosts.state_bytes`.

    Raises:
        UserError: for `auto`, where a pack does not fit whatever is computed again.
    """
    if setting != "auto" or device.type == "cpu":
        return ("none" if setting == "auto" else setting,) * costs.model.num_layers
    room = (1 - SPARE) * min(gather(_free_bytes(device))) - costs.optimizer_bytes(zero, ranks)
    if zero is not None and zero.stage == 3:  # the shards are still to come
        room -= costs.weight_bytes(zero, ranks)
    keeping = costs.choose(room, tokens)
    if keeping is None:
        least = costs.step_bytes(("full",) * costs.model.num_layers, tokens, tokens)
        raise UserError(
            f"training.max_tokens_per_pack: a pack of {tokens:,} tokens takes {least / 2**30:.1f} GiB if all layers "
            f"are computed again, and the GPU has room for {max(room, 0) / 2**30:.1f}; lower it, or training.max_length"
        )
    return keeping


def _free_bytes(device: torch.device) -> int:
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def recorded_on(
    device: torch.device, costs: TrainingCosts, keeping: Sequence[Keeping], largest: int, average: float
) -> int:
    """Tokens up to which the passes of packs are recorded as CUDA graphs, see graphs.py; 0 for none, as on a CPU.

    Where the average pack may be bound by its launches, and memory is left beside the largest pack. Not in fp32, where
    attention on a GPU asks for the sequences' lengths.

    Args:
        largest, average: tokens of packs.
    """
    if device.type == "cpu" or costs.itemsize == 4:
        return 0
    room = (1 - SPARE) * _free_bytes(device) - costs.optimizer_bytes()
    hardware = hardware_of(device) or hardware_named("H200")  # of those known, the one that waits longest for a host
    return recorded_within(room, hardware, costs, keeping, largest, average)


def recorded_within(
    room: float, hardware: Hardware, costs: TrainingCosts, keeping: Sequence[Keeping], largest: int, average: float
) -> int:
    """The same for a GPU with so much memory for packs."""
    tokens = costs.launch_bound_tokens(hardware)
    if average > tokens:
        return 0
    tokens = min(tokens, largest)
    fits = costs.step_bytes(keeping, largest, largest) + costs.graph_bytes(keeping, tokens) <= room
    return tokens if fits else 0


def described(keeping: Sequence[Keeping]) -> str:
    """`none`, or `full in 12 layers, selective in 24`."""
    counts = Counter(keeping)
    if len(counts) == 1:
        return keeping[0]
    return ", ".join(f"{mode} in {counts[mode]} layers" for mode in reversed(KEEPING) if counts[mode])
