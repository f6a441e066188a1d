"""Tensor parallelism: a decoder split over several processes gives the results of one process, and all processes agree.

The processes are real and communicate over gloo. They run tests/support/shard_ranks.py, for several models
in one launch.
"""

import pickle
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import shard_ranks
from tests.support.checkpoints import FAMILIES, make_checkpoint
from tests.support.forked import finish_forked_workers, start_forked_workers
from tests.support.shard_ranks import compute_results, load_with_adapter
from thinksafe.errors import UserError
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.lora import adapter_parameters, attach, save_adapter
from thinksafe.model.tensor_parallel import TensorShard
from thinksafe.model.weights import load_config, load_decoder

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that four processes can share: one per family, one with every bias, and one with an adapter on every
    projection."""

    def checkpoint(name: str, family: str, **overrides) -> Path:
        return make_checkpoint(family, tmp_path_factory.mktemp(name), seed=11, num_key_value_heads=4, **overrides)

    folder_by_name = {family: checkpoint(family, family) for family in FAMILIES}
    folder_by_name["biased"] = checkpoint("biased", "llama", attention_bias=True, mlp_bias=True)
    folder_by_name["adapted"] = checkpoint("adapted", "qwen3")
    decoder = load_decoder(folder_by_name["adapted"], torch.float32, "cpu")
    config = LoraConfig(3, 6.0, 0.0, ALL_PROJECTIONS)
    attach(decoder, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(decoder).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(decoder, config, folder_by_name["adapted"] / "adapter", "base")
    return folder_by_name


def run_scenario(scenario: str, count: int, out: Path, folders: dict[str, Path]) -> list[dict]:
    """Return the results of each process."""
    finish_forked_workers(count, shard_ranks.main, scenario, out, folders)
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names"),
    [
        pytest.param(2, ["qwen2", "biased", "adapted"], id="2"),
        pytest.param(2, None, marks=pytest.mark.exhaustive, id="2-all"),
        pytest.param(4, ["qwen3", "biased"], marks=pytest.mark.exhaustive, id="4"),
    ],
)
def test_results_do_not_depend_on_number_of_processes(folders, tmp_path, count, names):
    folders = {name: folders[name] for name in names or folders}
    results = run_scenario("equal", count, tmp_path, folders)
    for name, folder in folders.items():
        expected = compute_results(load_with_adapter(folder))
        for result in (process[name] for process in results):
            torch.testing.assert_close(result["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
            assert result["greedy"] == expected["greedy"] and result["sampled"] == expected["sampled"], name
            assert result["scores"] == results[0][name]["scores"]
            for id_, logprobs in expected["scores"].items():
                assert result["scores"][id_] == pytest.approx(logprobs, abs=1e-4), name
            assert result["kv_elements_per_token"] * count == expected["kv_elements_per_token"]
            for weight, size in result["num_elements"].items():
                if weight.endswith("_proj.weight") or "_proj" not in weight:
                    assert size * (count if "_proj" in weight else 1) == expected["num_elements"][weight], weight


@pytest.mark.slow
def test_processes_with_different_rounding_agree(folders, tmp_path):
    rank_0, rank_1 = run_scenario("different", 2, tmp_path, {"qwen3": folders["qwen3"]})
    assert rank_0 == rank_1


@pytest.mark.slow
def test_killed_process_ends_the_others(folders, tmp_path):
    processes = start_forked_workers(2, shard_ranks.main, "killed", tmp_path, {"qwen3": folders["qwen3"]})
    errors = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert processes[0].returncode == 1 and processes[1].returncode == -signal.SIGKILL
    assert "no process noticed" not in errors


def config_of(folders: dict[str, Path], name: str = "qwen3") -> ModelConfig:
    return load_config(folders[name])[0]


def test_uneven_split_is_an_error(folders):
    with pytest.raises(UserError, match="4 key-value heads cannot be split evenly over 3 GPUs"):
        TensorShard(0, 3).shard_config(config_of(folders))
    with pytest.raises(UserError, match="96 neurons per layer cannot be split evenly over 64 GPUs"):
        TensorShard(0, 64).shard_config(ModelConfig(**{**vars(config_of(folders)), "num_kv_heads": 64}))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from(ALL_PROJECTIONS))
def test_parts_of_a_weight_make_the_whole(count, rows, columns, projection):
    full_weight = torch.arange(rows * columns * count**2).view(rows * count, columns * count)
    name = f"model.layers.3.block.{projection}.weight"
    shards = [full_weight[TensorShard(index, count).slices(name, full_weight.shape)] for index in range(count)]
    assert torch.equal(torch.cat(shards, dim=1 if projection in ("o_proj", "down_proj") else 0), full_weight)


def test_wrong_shape_is_an_error_for_parts_too(folders, tmp_path):
    folder = make_checkpoint("qwen3", tmp_path, num_key_value_heads=4)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 104'))
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \[96, 64\], but config.json requires \[104, 64\]"):
        load_decoder(folder, torch.float32, "cpu", TensorShard(0, 2))
