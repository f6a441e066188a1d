"""The processes of one training run. Without a process group there is one rank, and nothing here waits for anybody."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ZeroConfig:
    """How training is sharded over the ranks (ZeRO, arXiv 1910.02054).

    Attributes:
        stage: 1 shards the optimiser's state, 2 the gradients too, 3 the weights too; 3 costs the most host time.
        offload_optimizer: keep the optimiser's state in host memory and step there.
        offload_parameters: keep the weights in host memory until a layer needs them; stage 3 only.
    """

    __pydantic_config__ = {"extra": "forbid"}

    stage: Literal[1, 2, 3] = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self):
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs stage 3")


def join() -> None:
    """Make the process group of the ranks that torchrun started, each on a GPU of its own; else of this process alone.

    A group that exists is kept.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it even so
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


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
