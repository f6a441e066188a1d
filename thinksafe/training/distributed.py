"""The processes of one training run. Without a process group there is one rank, and nothing here waits for anybody."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist

from thinksafe.errors import UserError
from thinksafe.workers import ALONE, Workers


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed shards training over the GPUs (ZeRO, arXiv 1910.02054). It changes what fits, not what is learned:
    a run may go on with other values, and on another number of GPUs.

    Attributes:
        stage: 1 shards the optimiser's state, 2 the gradients too, 3 the weights too, which costs the most host time;
            `auto` is the fastest by estimate: the lowest one, unless in the room that a higher one leaves so much less
            is computed again that it takes less time. One process that is asked for no stage and no offload needs no
            DeepSpeed.
        offload_optimizer: keep the optimiser's state in host memory and step there.
        offload_parameters: keep the weights in host memory until a layer needs them; stage 3 only.
    """

    __pydantic_config__ = {"extra": "forbid"}

    stage: Literal["auto", 1, 2, 3] = "auto"
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self):
        if self.offload_parameters and self.stage not in ("auto", 3):
            raise ValueError("offload_parameters needs stage 3")

    def is_needed(self, ranks: int) -> bool:
        """Whether so many ranks train with DeepSpeed."""
        return ranks > 1 or self != ZeroConfig()


def require_deepspeed() -> None:
    """Find out before the first hour of work whether ZeRO can be had.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise UserError("ZeRO needs DeepSpeed, which is not installed: pip install 'thinksafe[deepspeed]'")


def join(device: torch.device, workers: Workers = ALONE) -> None:
    """Make the workers the ranks of one training run, each on a device of its own."""
    # DeepSpeed asks for these when it is imported.
    os.environ["LOCAL_RANK"] = str(workers.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    workers.connect(device)


def rank() -> int:
    """This process, from 0; rank 0 alone writes what is written once."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """What every rank gave, by rank, on every rank. For small things: it is pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def balanced(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Indices in shares that sum to about the same: the largest goes first, each to the share that is least full."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = sums.index(min(sums))
        shares[least].append(index)
        sums[least] += sizes[index]
    return shares
