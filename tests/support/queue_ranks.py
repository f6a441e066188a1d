"""What test_invariance.py runs in several processes: `torchrun queue_ranks.py OUT FOLDER DEVICE TOGETHER ...`.

The processes answer one queue of requests in batch-invariant mode, once for each number that hold the model together;
on GPUs once more without CUDA graphs.
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
from thinksafe.model.tensor_parallel import WHOLE, Shard
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Request, SamplingConfig

SAMPLING = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=24)
REQUESTS = [Request(str(number), PROMPTS[number % 6], SAMPLING, 1000 + number, (7, 9)) for number in range(40)]


def answered(folder: Path, workers: Workers, together: int, device: str = "cpu", graphs: bool = True) -> dict:
    """By id what this process wrote, bits of log-probabilities included. Each group's engine has another size."""
    shard, dtype = WHOLE, torch.float32 if device == "cpu" else torch.bfloat16
    if together > 1:
        shard = Shard(workers.rank % together, together, workers.neighbours(together, torch.device(device)), True)
    group = workers.rank // together
    config = EngineConfig(3 + 2 * group, 24 + 9 * group, 8, 1e-3, batch_invariant=True)
    engine = Engine(load_decoder(folder, dtype, device, shard), config, most_at_once=4)
    if not graphs:
        engine.runner._graphs = None
    found = {}
    for done in engine.generate(workers.share(REQUESTS, together)):
        time.sleep(0.01)  # or whoever comes first has done all before the others have begun
        found[done.request_id] = (done.tokens, done.finish_reason, done.logprobs)
    assert device == "cpu" or bool(engine.runner._graphs) == graphs
    return found if workers.speaks(together) else {}


def refused_out_of_order(folder: Path, workers: Workers) -> str:
    """What a batch-invariant engine says of a model whose parts are summed by an all-reduce."""
    shard = Shard(workers.rank, workers.count, workers.neighbours(workers.count, torch.device("cpu")))
    try:
        Engine(load_decoder(folder, torch.float32, "cpu", shard), EngineConfig(16, 64, 8, 1e-3, batch_invariant=True))
    except UserError as error:
        return str(error)
    return ""


def main(out: str, folder: str, device: str, *together: str) -> None:
    with Workers.join() as workers:
        if device == "cuda":
            torch.cuda.set_device(workers.local_rank)
        found = {int(number): answered(Path(folder), workers, int(number), device) for number in together}
        if device == "cuda":
            found["direct"] = answered(Path(folder), workers, workers.count, device, graphs=False)
        elif workers.count > 2:
            found["refused"] = refused_out_of_order(Path(folder), workers)
        Path(out, f"{workers.rank}.pickle").write_bytes(pickle.dumps(found))
        workers.meet()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # a process group now and then fails in its destructor, after all is done
