"""What test_parallel.py runs in several processes: `torchrun shard_ranks.py SCENARIO OUT NAME=FOLDER ...`."""

import os
import pickle
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import load_adapter
from thinksafe.model.tensor_parallel import WHOLE, Shard
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Request, SamplingConfig

PROMPTS = [tuple((17 * row + 5 * column + row * column) % 380 for column in range(3 + 9 * row)) for row in range(6)]
GREEDY = SamplingConfig(temperature=0, max_tokens=20)
DRAWN = SamplingConfig(temperature=1.0, top_p=0.9, top_k=30, max_tokens=20)
ENGINE = EngineConfig(max_running=4, max_step_tokens=32, page_size=8, kv_cache_gib=1e-3)


def loaded(folder: Path, shard: Shard = WHOLE) -> Decoder:
    """The checkpoint, with the adapter that lies in it, if one does."""
    decoder = load_decoder(folder, torch.float32, "cpu", shard)
    if (folder / "adapter").is_dir():
        load_adapter(decoder, folder / "adapter")
    return decoder


def responses(decoder: Decoder, sampling: SamplingConfig) -> dict[str, tuple[int, ...]]:
    requests = [Request(str(index), prompt, sampling, 1000 + index, (7,)) for index, prompt in enumerate(PROMPTS)]
    return {done.request_id: done.tokens for done in Engine(decoder, ENGINE).generate(requests)}


@torch.inference_mode()
def findings(decoder: Decoder) -> dict:
    """Everything that must not depend on the number of processes, and what each of them holds."""
    ids = torch.tensor([token for prompt in PROMPTS for token in prompt])
    lengths = [len(prompt) for prompt in PROMPTS]
    hidden = decoder(ids, packed_positions(lengths, "cpu"), PackedAttention.of(lengths, "cpu"))
    prompts = [(str(index), prompt) for index, prompt in enumerate(PROMPTS)]
    scores = {score.request_id: score.logprobs.tolist() for score in Engine(decoder, ENGINE).score(prompts, [3, 90])}
    return {
        "logits": hidden @ decoder.head.T,
        "greedy": responses(decoder, GREEDY),
        "drawn": responses(decoder, DRAWN),
        "scores": scores,
        "held": {name: parameter.numel() for name, parameter in decoder.named_parameters()},
        "kv_elements_per_token": decoder.config.kv_elements_per_token,
    }


def equal(folders: dict[str, Path], shard: Shard) -> dict:
    return {name: findings(loaded(folder, shard)) for name, folder in folders.items()}


def apart(folders: dict[str, Path], shard: Shard) -> dict:
    """Every process computes other logits and has other room, as another GPU of another rounding might."""
    (folder,) = folders.values()
    decoder = loaded(folder, shard)
    with torch.no_grad():
        decoder.head.add_(torch.randn(decoder.head.shape, generator=torch.Generator().manual_seed(shard.index)))
    engine = Engine(decoder, EngineConfig(4, 32, 8, 1e-3 * (1 + shard.index)))
    pages = len(engine.scheduler.pool.owners)
    scores = {s.request_id: s.logprobs.tolist() for s in engine.score([("a", PROMPTS[2])], [3, 90])}
    return {"drawn": responses(decoder, DRAWN), "pages": pages, "scores": scores}


def killed(folders: dict[str, Path], shard: Shard) -> dict:
    (folder,) = folders.values()
    engine = Engine(loaded(folder, shard), ENGINE)
    for _ in engine.generate(Request(str(n), PROMPTS[n % 6], DRAWN, n, ()) for n in range(10_000)):
        if shard.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody noticed")


def main(scenario: str, out: str, *folders: str) -> None:
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    shard = Shard(rank, count, dist.group.WORLD)
    named = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in folders)}
    found = {"equal": equal, "apart": apart, "killed": killed}[scenario](named, shard)
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    os._exit(0)  # a process group now and then fails in its destructor, after all is done


if __name__ == "__main__":
    main(*sys.argv[1:])
