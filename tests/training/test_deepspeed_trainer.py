"""Training on several ranks with DeepSpeed equals training in one process, and a kill does not change a run.

Real ZeRO runs on two forked processes on a CPU; they run zero_ranks.py. tests/distributed starts them with torchrun.
"""

import dataclasses
import importlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.support import zero_ranks
from tests.support.checkpoints import make_checkpoint
from tests.support.forked import ForkedProcess, start_forked_workers
from tests.support.zero_ranks import (
    CLIP,
    DECAY,
    GOOD,
    INTERRUPTED_SETUPS,
    MAIN_SETUPS,
    MIXED_CONFIG,
    POISON_TOKEN,
    RATES,
    SEED,
    SEQUENCES,
    SETUPS,
    TRAINING_CONFIG,
    batches,
    export,
    local_packs,
    mixed_sequences,
    mixed_student,
    packs_of_rank,
    student,
)
from thinksafe.errors import UserError
from thinksafe.model.lora import adapter_parameters
from thinksafe.training.config import ZeroConfig
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import train
from thinksafe.training.metrics import read_metrics
from thinksafe.training.packing import partition_balanced

LORA_TOLERANCE, FULL_TOLERANCE = 1e-6, 5e-5
"""At learning rates of 1e-2. Where a moment is near 0, AdamW turns a rounding error into a visible difference."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("student"))


def start_scenario(folder: Path, out: Path, scenario: str, *arguments: str, ranks: int = 2) -> list[ForkedProcess]:
    """Start a scenario of zero_ranks.py."""
    (out / "done").unlink(missing_ok=True)
    return start_forked_workers(ranks, zero_ranks.main, scenario, folder, out, *arguments)


def complete_scenario(folder: Path, out: Path, scenario: str, *arguments: str, ranks: int = 2) -> None:
    """Run a scenario that must complete; the exit status of the processes after that does not matter."""
    processes = start_scenario(folder, out, scenario, *arguments, ranks=ranks)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert (out / "done").exists(), "".join(errors)[-6000:]


def local_trainer(folder, method, **options) -> LocalTrainer:
    return LocalTrainer(student(folder, method, **options), CLIP, DECAY)


def assert_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, what: str
) -> None:
    assert actual.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, f"{what} {name}"
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, names",
    [
        pytest.param(1, ("lora-3-offloaded", "full-2"), id="1"),
        pytest.param(2, MAIN_SETUPS, id="2"),
        pytest.param(1, tuple(SETUPS), marks=pytest.mark.exhaustive, id="1-all"),
        pytest.param(2, tuple(SETUPS), marks=pytest.mark.exhaustive, id="2-all"),
    ],
)
def test_every_setup_matches_a_single_process(folder, tmp_path, ranks, names):
    complete_scenario(folder, tmp_path, "steps", *names, ranks=ranks)
    for name in names:
        method, zero = SETUPS[name]
        summary = json.loads((tmp_path / f"{name}.json").read_text())
        single = LocalTrainer(student(folder, method), CLIP, DECAY, with_reference=name.endswith(("kl", "pairs")))
        expected = [
            dataclasses.astuple(
                dataclasses.replace(single.step(local_packs(batch), rate), dropped_mass=(ranks - 1) / 8)
            )
            for batch, rate in zip(batches(name), RATES, strict=True)
        ]
        assert max(norm for _, norm, _ in expected) > CLIP, "the test should clip"
        assert summary["results"] == summary["results"][:1] * ranks, f"{name}: the ranks disagree"
        for step, (actual_step, expected_step) in enumerate(zip(summary["results"][0], expected, strict=True)):
            assert actual_step == pytest.approx(expected_step, rel=1e-5), (
                f"{name}, step {step + 1}: loss, norm, dropped mass"
            )
        tolerance = LORA_TOLERANCE if method != "full" else FULL_TOLERANCE
        assert_close(load_file(tmp_path / f"{name}.safetensors"), single.state_dict(), tolerance, name)
        assert summary["sharded"] == (zero.stage == 3), name
        assert summary["num_reference_passes"] == sum(
            max(len(packs_of_rank(batch, rank, ranks)) for rank in range(ranks))
            for batch in batches(name)
            if any(item.needs_reference for item in batch)
        ), f"{name}: the reference runs in steps with KL sequences, equally often on all ranks"
        assert summary["num_alive"] == [0] * ranks and summary["num_tensors"] >= 4, f"{name}: memory is not freed"
        assert max(summary["parts"]) < 1.5 * sum(summary["parts"]) / ranks, f"{name}: one rank holds the checkpoint"
        export(single.decoder, method, tmp_path / "expected" / name, folder)
        file = "adapter_model.safetensors" if method != "full" else "model.safetensors"
        actual, expected_tensors = (load_file(folder / name / file) for folder in (tmp_path, tmp_path / "expected"))
        assert_close(actual, expected_tensors, tolerance, f"{name} {file}")
        for config in (tmp_path / "expected" / name).glob("*.json"):
            assert (tmp_path / name / config.name).read_text() == config.read_text()
    assert_bf16_steps_add_up(folder, tmp_path)


def assert_bf16_steps_add_up(folder, out):
    single = local_trainer(folder, "lora", dtype=torch.bfloat16)
    start = {name: master.detach().clone() for name, master in single.masters.items()}
    for _ in range(5):
        single.step(local_packs(SEQUENCES), 1e-5)
    state, adapter = load_file(out / "bf16.safetensors"), load_file(out / "bf16/adapter_model.safetensors")
    path = {id(parameter): name for name, parameter in adapter_parameters(single.decoder).items()}
    for name, master in single.masters.items():
        actual, moved = state[f"weight.{name}"], (master - start[name]).abs().mean()
        assert moved > 2e-5 and (actual - master).abs().mean() < 0.1 * moved, name
        assert torch.equal(adapter[path[id(single.parameters[name])]], actual), "the adapter is the fp32 weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("lora-3-offloaded", "lora-1", "full-2"), id="main"),
        pytest.param(tuple(SETUPS), marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_nonfinite_step_on_one_rank_changes_nothing_on_any(tmp_path, names):
    """The next step counts again. The head is untied, so that a poisoned token affects only the sequence with it."""
    untied = make_checkpoint("qwen3", tmp_path / "untied", tie_word_embeddings=False)
    complete_scenario(untied, tmp_path, "not_finite", *names)
    results_by_setup = json.loads((tmp_path / "results.json").read_text())
    assert tuple(results_by_setup) == names
    for name, results in results_by_setup.items():
        method, _ = SETUPS[name]
        single = local_trainer(untied, method)
        for _ in range(2):
            single.step(local_packs([GOOD]), 1e-2)
        if method == "full":
            with torch.no_grad():
                single.masters["embedding"][POISON_TOKEN] = torch.nan
        state = {key: value.nan_to_num() for key, value in load_file(tmp_path / f"{name}.safetensors").items()}
        expected = {key: value.nan_to_num() for key, value in single.state_dict().items()}
        assert_close(state, expected, LORA_TOLERANCE if method == "lora" else FULL_TOLERANCE, name)
        assert results[0] == results[1], f"{name}: the ranks disagree"
        messages, unchanged, weights = results[0]
        cause = "gradient norm inf, from an unnamed example"
        for message, pattern in zip(
            messages, (f"loss nan, {cause}", f"loss inf, {cause}", r"loss \d+\.\d+, gradient norm inf"), strict=True
        ):
            assert re.fullmatch(pattern, message), name
        assert unchanged, name
        assert weights == ("the norm of the weights is nan" if method == "full" else None), name


@pytest.mark.slow
def test_run_killed_during_save_resumes_without_a_trace(folder, tmp_path):
    """Bit for bit on the same number of ranks; on one or three, and after a torn checkpoint, within the tolerance."""
    killed = tmp_path / "dropout-killed"
    killed.mkdir()
    processes = start_scenario(folder, killed, "killed")
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode for process in processes), errors
    present = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert present == ["step-00000002", "step-00000004.partial"]

    complete_scenario(folder, tmp_path, "resumed", "dropout", "dropout-killed", "plain")
    whole, resumed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("dropout", "dropout-killed"))
    assert (whole["first_step"], resumed["first_step"]) == (1, 3)
    assert len(set(whole["seeds"])) == 2, "the ranks' dropout should differ"
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("dropout", "dropout-killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert steps_without_times(tmp_path / "dropout") == steps_without_times(killed)

    shutil.copytree(tmp_path / "plain", tmp_path / "single")
    shutil.rmtree(tmp_path / "single/checkpoints/step-00000006")
    single, step_metrics = local_trainer(folder, "lora"), []
    train(single, SEQUENCES, TRAINING_CONFIG, SEED, tmp_path / "single", step_metrics.append)
    assert step_metrics[0].step == 5
    expected = load_file(tmp_path / "plain.safetensors")
    assert_close(single.state_dict(), expected, LORA_TOLERANCE, "on one rank")

    shutil.copytree(tmp_path / "plain", tmp_path / "torn")
    part = tmp_path / "torn/checkpoints/step-00000006/state-1.safetensors"
    part.write_bytes(part.read_bytes()[:-5])  # only rank 1 reads it
    complete_scenario(folder, tmp_path, "resumed", "torn", ranks=3)
    assert json.loads((tmp_path / "torn.json").read_text())["first_step"] == 5
    assert_close(load_file(tmp_path / "torn.safetensors"), expected, LORA_TOLERANCE, "on three ranks")


@pytest.mark.slow
def test_interrupted_kl_run_with_left_out_steps_resumes_bit_for_bit(tmp_path):
    """A run that starts on two ranks and ends on one agrees within the tolerance. Three bad steps stop all ranks."""
    untied = make_checkpoint("qwen3", tmp_path / "untied", tie_word_embeddings=False)
    complete_scenario(untied, tmp_path, "interrupted")
    for name, (method, _) in INTERRUPTED_SETUPS.items():
        first_report, second_report = json.loads((tmp_path / f"{name}.json").read_text())
        assert first_report == second_report, f"{name}: the ranks disagree"
        assert set(first_report["same_state"].values()) == {True}, (name, first_report["same_state"])
        whole = steps_without_times(tmp_path / name / "whole")
        num_steps = len(whole)
        left_out = [step.step for step in whole if step.loss is None]
        assert bool(left_out) == (method == "lora") and len(left_out) < num_steps / 2
        resumed = {"cut off at 1": list(range(1, num_steps + 1)), "cut off at 5": list(range(5, num_steps + 1))}
        assert first_report["steps"] == {"no step left": [], **resumed}
        for run_name in resumed:
            assert steps_without_times(tmp_path / name / run_name) == whole

        newest = max((tmp_path / name / "whole" / "checkpoints").iterdir())
        shutil.rmtree(newest)
        single = LocalTrainer(mixed_student(untied, method), CLIP, DECAY, with_reference=True)
        step_metrics = []
        train(single, mixed_sequences(), MIXED_CONFIG, SEED, tmp_path / name / "whole", step_metrics.append)
        assert 1 < step_metrics[0].step <= num_steps
        expected = load_file(tmp_path / f"{name}.safetensors")
        assert_close(single.state_dict(), expected, LORA_TOLERANCE if method == "lora" else FULL_TOLERANCE, name)
        assert [step.step for step in steps_without_times(tmp_path / name / "whole") if step.loss is None] == left_out
    lora = json.loads((tmp_path / "lora-2-kl.json").read_text())[0]
    assert re.fullmatch(r"step 3, the 3rd in a row that was left out: loss nan, .*", lora["stop_message"])


def steps_without_times(run: Path) -> list:
    metrics = [
        dataclasses.replace(step, seconds=0, tokens_per_second=0) for step in read_metrics(run / "metrics.jsonl")
    ]
    assert [step.step for step in metrics] == list(range(1, metrics[0].total_steps + 1))
    return metrics


def test_partition_holds_every_index_once():
    for sizes, ranks in itertools.product([[30, 7, 55, 16, 31, 2, 41], [5], [], [8] * 9], [1, 2, 3, 8]):
        shares = partition_balanced(sizes, ranks)
        assert len(shares) == ranks and sorted(itertools.chain(*shares)) == list(range(len(sizes)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 16))
def test_shares_differ_by_at_most_their_last_item(sizes, ranks):
    shares = partition_balanced(sizes, ranks)
    sums = [sum(sizes[index] for index in share) for share in shares]
    assert sorted(itertools.chain(*shares)) == list(range(len(sizes)))
    assert all(total - sizes[share[-1]] <= min(sums) for total, share in zip(sums, shares, strict=True) if share)


def test_parameter_offload_needs_stage_3():
    with pytest.raises(ValueError, match="stage 3"):
        ZeroConfig(2, offload_parameters=True)


def test_missing_deepspeed_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, "thinksafe.training.deepspeed_trainer", raising=False)
    with pytest.raises(UserError, match=r"pip install 'thinksafe\[deepspeed\]'"):
        importlib.import_module("thinksafe.training.deepspeed_trainer")
