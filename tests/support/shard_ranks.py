"""The processes of tests/model/test_tensor_parallel.py: each runs `main(SCENARIO, OUT, FOLDERS)`.

Each process holds one part of the model of every folder and pickles its results to OUT.
"""

import os
import pickle
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import load_adapter
from thinksafe.model.tensor_parallel import UNSHARDED, TensorShard
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request

PROMPTS = [tuple((17 * row + 5 * column + row * column) % 380 for column in range(3 + 9 * row)) for row in range(6)]
GREEDY = SamplingConfig(temperature=0, max_tokens=20)
SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=20)
ENGINE = EngineConfig(max_num_seqs=4, max_prefill_tokens=32, page_size=8, kv_cache_gib=1e-3)


def load_with_adapter(folder: Path, shard: TensorShard = UNSHARDED) -> Decoder:
    """Return this process's part of a checkpoint in fp32, with the adapter in its folder if there is one."""
    decoder = load_decoder(folder, torch.float32, "cpu", shard)
    if (folder / "adapter").is_dir():
        load_adapter(decoder, folder / "adapter")
    return decoder


def responses(decoder: Decoder, sampling: SamplingConfig) -> dict[str, tuple[int, ...]]:
    """Return the sampled tokens for each of PROMPTS, by its index as text."""
    requests = [Request(str(index), prompt, sampling, 1000 + index, (7,)) for index, prompt in enumerate(PROMPTS)]
    return {completion.request_id: completion.tokens for completion in Engine(decoder, ENGINE).generate(requests)}


@torch.inference_mode()
def compute_results(decoder: Decoder) -> dict:
    """Return results that must not depend on the number of processes, and sizes of this process's weights and cache.

    The results are `logits` of all prompts, `greedy` and `sampled` responses, and `scores` of two tokens; the sizes are
    `num_elements` by parameter and `kv_elements_per_token`.
    """
    ids = torch.tensor([token for prompt in PROMPTS for token in prompt])
    lengths = [len(prompt) for prompt in PROMPTS]
    hidden = decoder(ids, packed_positions(lengths, "cpu"), PackedAttention.of(lengths, "cpu"))
    prompts = [(str(index), prompt) for index, prompt in enumerate(PROMPTS)]
    scores = {score.request_id: score.logprobs.tolist() for score in Engine(decoder, ENGINE).score(prompts, [3, 90])}
    return {
        "logits": hidden @ decoder.head.T,
        "greedy": responses(decoder, GREEDY),
        "sampled": responses(decoder, SAMPLED),
        "scores": scores,
        "num_elements": {name: parameter.numel() for name, parameter in decoder.named_parameters()},
        "kv_elements_per_token": decoder.config.kv_elements_per_token,
    }


def equal_ranks(folders: dict[str, Path], shard: TensorShard) -> dict:
    """Return `compute_results` for every checkpoint, by name."""
    return {name: compute_results(load_with_adapter(folder, shard)) for name, folder in folders.items()}


def different_ranks(folders: dict[str, Path], shard: TensorShard) -> dict:
    """Return responses, scores and number of pages of processes whose logits and cache sizes differ.

    Processes on different GPUs could differ in the same way.
    """
    (folder,) = folders.values()
    decoder = load_with_adapter(folder, shard)
    with torch.no_grad():
        decoder.head.add_(torch.randn(decoder.head.shape, generator=torch.Generator().manual_seed(shard.rank)))
    engine = Engine(decoder, EngineConfig(4, 32, 8, 1e-3 * (1 + shard.rank)))
    pages = len(engine.scheduler.pool.ref_count)
    scores = {s.request_id: s.logprobs.tolist() for s in engine.score([("a", PROMPTS[2])], [3, 90])}
    return {"sampled": responses(decoder, SAMPLED), "pages": pages, "scores": scores}


def killed_rank(folders: dict[str, Path], shard: TensorShard) -> dict:
    """Kill the process of rank 1 after its first response; all others must end with an error, so none returns."""
    (folder,) = folders.values()
    engine = Engine(load_with_adapter(folder, shard), ENGINE)
    for _ in engine.generate(Request(str(n), PROMPTS[n % 6], SAMPLED, n, ()) for n in range(10_000)):
        if shard.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("no process noticed the death of rank 1")


def main(scenario: str, out: Path, folders: dict[str, Path]) -> None:
    """Run the scenario `equal`, `different` or `killed` in this process, and write its results to OUT/RANK.pickle.

    Args:
        folders: folder of each checkpoint by name.
    """
    dist.init_process_group("gloo")
    shard = TensorShard(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    run_rank = {"equal": equal_ranks, "different": different_ranks, "killed": killed_rank}[scenario]
    (out / f"{shard.rank}.pickle").write_bytes(pickle.dumps(run_rank(folders, shard)))
    dist.barrier()
    os._exit(0)  # the destructor of a process group sometimes fails, after the work is done
