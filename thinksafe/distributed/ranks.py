"""Ranks of a training run. Without a process group there is one rank, and no function here waits."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers


def init_training_ranks(device: torch.device, workers: Workers = SINGLE_PROCESS) -> None:
    """Make every worker a rank of one training run: create the process group of all workers, unless it exists, and set
    the environment variables that DeepSpeed reads.

    Args:
        device: device of this worker; a GPU communicates by NCCL, a CPU by Gloo.
    """
    # DeepSpeed reads these variables when it is imported.
    os.environ["LOCAL_RANK"] = str(workers.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    workers.connect(device)


def rank() -> int:
    """Return the index of this process among the ranks, from 0; 0 without a process group. Rank 0 alone writes the
    files that are written once."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has called this function; return at once if there is one rank."""
    if world_size() > 1:
        dist.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order, on every rank. All ranks must call this together. Values are
    pickled, so keep them small."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def partition_balanced(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return `num_shares` lists of indices into `sizes`, whose sizes have about equal sums. The largest item is placed
    first, each into the list with the smallest sum. With few items some lists are empty."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = sums.index(min(sums))
        shares[smallest].append(index)
        sums[smallest] += sizes[index]
    return shares
