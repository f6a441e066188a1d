"""A decoder dealt out to several processes says what one process says, and all of them say the same.

Real processes over gloo, started with torchrun; shard_ranks.py is what they run, for every family in one launch.
"""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import FAMILIES, make_checkpoint
from tests.support.shard_ranks import findings, loaded
from thinksafe.errors import UserError
from thinksafe.model.config import ModelConfig
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach, save_adapter
from thinksafe.model.tensor_parallel import Shard
from thinksafe.model.weights import load_config, load_decoder

ROOT = Path(__file__).parents[2]
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint a family that four processes can share, one with every bias, and one with an adapter everywhere."""

    def checkpoint(name: str, family: str, **overrides) -> Path:
        return make_checkpoint(family, tmp_path_factory.mktemp(name), seed=11, num_key_value_heads=4, **overrides)

    made = {family: checkpoint(family, family) for family in FAMILIES}
    made["biased"] = checkpoint("biased", "llama", attention_bias=True, mlp_bias=True)
    made["adapted"] = checkpoint("adapted", "qwen3")
    decoder, config = load_decoder(made["adapted"], torch.float32, "cpu"), LoraConfig(3, 6.0, 0.0, EVERYWHERE)
    attach(decoder, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(decoder).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(decoder, config, made["adapted"] / "adapter", "base")
    return made


def launch(scenario: str, count: int, out: Path, folders: dict[str, Path]) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    named = [f"{name}={folder}" for name, folder in folders.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *torchrun, str(ROOT / "tests/support/shard_ranks.py"), scenario, str(out), *named]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def found_by(scenario: str, count: int, out: Path, folders: dict[str, Path]) -> list[dict]:
    """What each process found."""
    done = launch(scenario, count, out, folders)
    assert done.returncode == 0, done.stderr[-4000:]
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "names"), [(2, None), (4, ["qwen3", "biased"])], ids=["2", "4"])
def test_several_processes_say_what_one_says(folders, tmp_path, count, names):
    folders = {name: folders[name] for name in names or folders}
    found = found_by("equal", count, tmp_path, folders)
    for name, folder in folders.items():
        whole = findings(loaded(folder))
        for part in (process[name] for process in found):
            torch.testing.assert_close(part["logits"], whole["logits"], rtol=1e-4, atol=1e-4)
            assert part["greedy"] == whole["greedy"] and part["drawn"] == whole["drawn"], name
            assert part["scores"] == found[0][name]["scores"]
            for id_, logprobs in whole["scores"].items():
                assert part["scores"][id_] == pytest.approx(logprobs, abs=1e-4), name
            assert part["kv_elements_per_token"] * count == whole["kv_elements_per_token"]
            for weight, size in part["held"].items():
                if weight.endswith("_proj") or "_proj" not in weight:
                    assert size * (count if "_proj" in weight else 1) == whole["held"][weight], weight


@pytest.mark.slow
def test_processes_that_round_differently_still_say_the_same(folders, tmp_path):
    first, second = found_by("apart", 2, tmp_path, {"qwen3": folders["qwen3"]})
    assert first == second


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_others(folders, tmp_path):
    started = time.monotonic()
    done = launch("killed", 2, tmp_path, {"qwen3": folders["qwen3"]})
    assert done.returncode != 0 and "nobody noticed" not in done.stderr
    assert time.monotonic() - started < 60


def config_of(folders: dict[str, Path], name: str = "qwen3") -> ModelConfig:
    return load_config(folders[name])[0]


def test_what_cannot_be_dealt_out_evenly_is_refused(folders):
    with pytest.raises(UserError, match="4 key-value heads cannot be dealt out evenly to 3 GPUs"):
        Shard(0, 3).config(config_of(folders))
    with pytest.raises(UserError, match="96 neurons a layer cannot be dealt out evenly to 64 GPUs"):
        Shard(0, 64).config(ModelConfig(**{**vars(config_of(folders)), "num_kv_heads": 64}))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from(EVERYWHERE))
def test_the_parts_of_a_weight_make_the_whole(count, rows, columns, projection):
    whole = torch.arange(rows * columns * count**2).view(rows * count, columns * count)
    name = f"model.layers.3.block.{projection}.weight"
    parts = [whole[Shard(index, count).part(name, whole.shape)] for index in range(count)]
    assert torch.equal(torch.cat(parts, dim=1 if projection in ("o_proj", "down_proj") else 0), whole)


def test_a_checkpoint_of_another_shape_is_refused_in_parts_too(folders, tmp_path):
    folder = make_checkpoint("qwen3", tmp_path, num_key_value_heads=4)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 104'))
    with pytest.raises(UserError, match=r"down_proj.weight has shape \[64, 48\], config.json asks for \[64, 52\]"):
        load_decoder(folder, torch.float32, "cpu", Shard(0, 2))
