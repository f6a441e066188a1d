"""Ranks of a training run. Without a process group there is one rank, and no function here waits."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers


def init_training_ranks(device: torch.device, workers: Workers = SINGLE_PROCESS) -> None:
    """Make every worker a rank of one training run, on its device."""
    # DeepSpeed reads these variables when it is imported.
    os.environ["LOCAL_RANK"] = str(workers.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    workers.connect(device)


def rank() -> int:
    """Return the index of this process, from 0; rank 0 alone writes the files that are written once."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has called this function."""
    if world_size() > 1:
        dist.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order, on every rank. Values are pickled, so keep them small."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def partition_balanced(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Split indices into shares of about equal sums: the largest item first, each to the share with the least sum."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = sums.index(min(sums))
        shares[smallest].append(index)
        sums[smallest] += sizes[index]
    return shares
