"""The processes of one training run. Without a process group there is one rank, and nothing here waits for anybody."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from thinksafe.distributed.workers import ALONE, Workers


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
