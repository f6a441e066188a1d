"""The processes of tests/sampler/test_batch_invariance.py: `torchrun queue_ranks.py OUT FOLDER DEVICE GROUP_SIZE ...`.

The processes answer one queue of requests in batch-invariant mode, once for each tensor_parallel_size GROUP_SIZE, and
on GPUs once more without CUDA graphs. Each process pickles its results to OUT.
"""

import os
import pickle
import sys
import time
from pathlib import Path

import torch

from tests.support.shard_ranks import PROMPTS
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request

SAMPLING = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=24)
REQUESTS = [Request(str(number), PROMPTS[number % 6], SAMPLING, 1000 + number, (7, 9)) for number in range(40)]


def answer_share(folder: Path, workers: Workers, group_size: int, device: str = "cpu", graphs: bool = True) -> dict:
    """Return {request id: (tokens, finish reason, log-probabilities)} of the requests that this process answered.

    It is empty for a process that is not the first of its group. Each group has different engine limits.

    Args:
        folder: folder of the checkpoint.
        group_size: tensor_parallel_size.
        graphs: whether a GPU may use CUDA graphs.
    """
    shard, dtype = UNSHARDED, torch.float32 if device == "cpu" else torch.bfloat16
    if group_size > 1:
        group = workers.tensor_parallel_group(group_size, torch.device(device))
        shard = TensorShard(workers.rank % group_size, group_size, group, True)
    group_index = workers.rank // group_size
    config = EngineConfig(3 + 2 * group_index, 24 + 9 * group_index, 8, 1e-3, batch_invariant=True)
    engine = Engine(load_decoder(folder, dtype, device, shard), config, max_requests=4)
    if not graphs:
        engine.runner._graphs = None
    answers = {}
    for completion in engine.generate(workers.claim_items(REQUESTS, group_size)):
        time.sleep(0.01)  # otherwise one worker could finish before the others start
        answers[completion.request_id] = (completion.tokens, completion.finish_reason, completion.logprobs)
    assert device == "cpu" or bool(engine.runner._graphs) == graphs
    return answers if workers.is_group_leader(group_size) else {}


def error_without_ordered_sum(folder: Path, workers: Workers) -> str:
    """Return the error message of a batch-invariant engine whose partial sums an all-reduce adds; "" without error."""
    group = workers.tensor_parallel_group(workers.world_size, torch.device("cpu"))
    shard = TensorShard(workers.rank, workers.world_size, group)
    try:
        Engine(load_decoder(folder, torch.float32, "cpu", shard), EngineConfig(16, 64, 8, 1e-3, batch_invariant=True))
    except UserError as error:
        return str(error)
    return ""


def main(out: str, folder: str, device: str, *group_sizes: str) -> None:
    """Answer the queue once for each group size, and write the results to OUT/RANK.pickle."""
    with Workers.start() as workers:
        if device == "cuda":
            torch.cuda.set_device(workers.local_rank)
        results = {int(number): answer_share(Path(folder), workers, int(number), device) for number in group_sizes}
        if device == "cuda":
            results["direct"] = answer_share(Path(folder), workers, workers.world_size, device, graphs=False)
        elif workers.world_size > 2:
            results["error"] = error_without_ordered_sum(Path(folder), workers)
        Path(out, f"{workers.rank}.pickle").write_bytes(pickle.dumps(results))
        workers.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # the destructor of a process group sometimes fails, after the work is done
