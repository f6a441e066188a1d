"""Training on several ranks with DeepSpeed: what one process computes, and a run that a kill cannot change.

Real ZeRO on two CPU processes, started with torchrun; zero_ranks.py is what they run. A launch takes some seconds, so
a test looks at several things.
"""

import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.support.checkpoints import make_checkpoint
from tests.support.zero_ranks import (
    CLIP,
    DECAY,
    GOOD,
    MIXED,
    MIXED_RUN,
    POISON,
    RATES,
    RUN,
    SEED,
    SEQUENCES,
    SETUPS,
    batches,
    export,
    mixed,
    mixed_student,
    my_packs,
    packs_of,
    student,
)
from thinksafe.distributed.ranks import balanced
from thinksafe.errors import UserError
from thinksafe.model.lora import adapter_parameters
from thinksafe.training.local_engine import SingleEngine
from thinksafe.training.loop import read_metrics, train
from thinksafe.training.zero_config import ZeroConfig

ROOT = Path(__file__).parents[2]
LORA_WITHIN, FULL_WITHIN = 1e-6, 5e-5
"""At learning rates of 1e-2; where a moment is near 0 AdamW turns a difference in the last bit into a visible one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("student"))


def launch(folder: Path, out: Path, scenario: str, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run a scenario of zero_ranks.py with torchrun, or as a plain process where there is one rank."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    script = [str(ROOT / "tests/support/zero_ranks.py"), scenario, str(folder), str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    (out / "done").unlink(missing_ok=True)
    return subprocess.run(
        [sys.executable, *torchrun, *script], env=environment, capture_output=True, text=True, timeout=200
    )


def finish(folder: Path, out: Path, scenario: str, *arguments: str, ranks: int = 2) -> None:
    """Run a scenario that must come to its end; how the processes exit after it does not matter."""
    done = launch(folder, out, scenario, *arguments, ranks=ranks)
    assert (out / "done").exists(), done.stdout[-2000:] + done.stderr[-6000:]


def single_engine(folder, method, **options) -> SingleEngine:
    return SingleEngine(student(folder, method, **options), CLIP, DECAY)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, f"{what} {name}"
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=within, msg=lambda m, n=name: f"{what} {n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_set_up_takes_the_steps_of_one_process(folder, tmp_path, ranks):
    finish(folder, tmp_path, "steps", ranks=ranks)
    for name, (method, zero) in SETUPS.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        single = SingleEngine(student(folder, method), CLIP, DECAY, with_reference=name.endswith("kl"))
        expected = [
            dataclasses.astuple(dataclasses.replace(single.step(my_packs(batch), rate), dropped_mass=(ranks - 1) / 8))
            for batch, rate in zip(batches(name), RATES, strict=True)
        ]
        assert max(norm for _, norm, _ in expected) > CLIP, "the test should clip"
        assert found["results"] == found["results"][:1] * ranks, f"{name}: the ranks disagree"
        for step, (ours, theirs) in enumerate(zip(found["results"][0], expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-5), f"{name}, step {step + 1}: loss, norm, dropped mass"
        within = LORA_WITHIN if method != "full" else FULL_WITHIN
        assert_close(load_file(tmp_path / f"{name}.safetensors"), single.tensors(), within, name)
        assert found["sharded"] == (zero.stage == 3), name
        assert found["reads"] == sum(
            max(len(packs_of(batch, rank, ranks)) for rank in range(ranks))
            for batch in batches(name)
            if any(one.keeps_to_reference for one in batch)
        ), f"{name}: the reference reads in the steps that have something for it, on all ranks alike"
        assert found["alive"] == [0] * ranks and found["held"] >= 4, f"{name}: memory is not given back"
        assert max(found["parts"]) < 1.5 * sum(found["parts"]) / ranks, f"{name}: one rank holds the checkpoint"
        export(single.decoder, method, tmp_path / "expected" / name, folder)
        file = "adapter_model.safetensors" if method != "full" else "model.safetensors"
        ours, theirs = (load_file(one / name / file) for one in (tmp_path, tmp_path / "expected"))
        assert_close(ours, theirs, within, f"{name} {file}")
        for config in (tmp_path / "expected" / name).glob("*.json"):
            assert (tmp_path / name / config.name).read_text() == config.read_text()
    assert_bf16_steps_add_up(folder, tmp_path)


def assert_bf16_steps_add_up(folder, out):
    single = single_engine(folder, "lora", dtype=torch.bfloat16)
    start = {name: master.detach().clone() for name, master in single.masters.items()}
    for _ in range(5):
        single.step(my_packs(SEQUENCES), 1e-5)
    found, adapter = load_file(out / "bf16.safetensors"), load_file(out / "bf16/adapter_model.safetensors")
    path = {id(parameter): name for name, parameter in adapter_parameters(single.decoder).items()}
    for name, master in single.masters.items():
        ours, moved = found[f"weight.{name}"], (master - start[name]).abs().mean()
        assert moved > 2e-5 and (ours - master).abs().mean() < 0.1 * moved, name
        assert torch.equal(adapter[path[id(single.parameters[name])]], ours), "the adapter is the fp32 weight"


@pytest.mark.slow
def test_a_step_that_breaks_on_one_rank_changes_nothing_on_any_and_the_next_one_counts(tmp_path):
    """The head is not the embedding here, so that a poisoned token harms only the sequence that holds it."""
    untied = make_checkpoint("qwen3", tmp_path / "untied", tie_word_embeddings=False)
    finish(untied, tmp_path, "not_finite")
    for name, results in json.loads((tmp_path / "found.json").read_text()).items():
        method, _ = SETUPS[name]
        single = single_engine(untied, method)
        for _ in range(2):
            single.step(my_packs([GOOD]), 1e-2)
        if method == "full":
            with torch.no_grad():
                single.masters["embedding"][POISON] = torch.nan
        state = {key: value.nan_to_num() for key, value in load_file(tmp_path / f"{name}.safetensors").items()}
        expected = {key: value.nan_to_num() for key, value in single.tensors().items()}
        assert_close(state, expected, LORA_WITHIN if method == "lora" else FULL_WITHIN, name)
        assert results[0] == results[1], f"{name}: the ranks disagree"
        messages, unchanged, weights = results[0]
        broken = "gradient norm inf, from an unnamed example"
        for message, words in zip(
            messages, (f"loss nan, {broken}", f"loss inf, {broken}", r"loss \d+\.\d+, gradient norm inf"), strict=True
        ):
            assert re.fullmatch(words, message), name
        assert unchanged, name
        assert weights == ("the norm of the weights is nan" if method == "full" else None), name


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    """Bit for bit on as many ranks; on one or three, and past a torn checkpoint, as near as the steps are."""
    killed = tmp_path / "dropout-killed"
    killed.mkdir()
    assert launch(folder, killed, "killed").returncode != 0
    present = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert present == ["step-00000002", "step-00000004.partial"]

    finish(folder, tmp_path, "resumed", "dropout", "dropout-killed", "plain")
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("dropout", "dropout-killed"))
    assert (whole["first_step"], again["first_step"]) == (1, 3)
    assert len(set(whole["seeds"])) == 2, "the ranks' dropout should differ"
    whole, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("dropout", "dropout-killed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    assert steps_of(tmp_path / "dropout") == steps_of(killed)

    shutil.copytree(tmp_path / "plain", tmp_path / "single")
    shutil.rmtree(tmp_path / "single/checkpoints/step-00000006")
    single, seen = single_engine(folder, "lora"), []
    train(single, SEQUENCES, RUN, SEED, tmp_path / "single", seen.append)
    assert seen[0].step == 5
    expected = load_file(tmp_path / "plain.safetensors")
    assert_close(single.tensors(), expected, LORA_WITHIN, "on one rank")

    shutil.copytree(tmp_path / "plain", tmp_path / "torn")
    part = tmp_path / "torn/checkpoints/step-00000006/state-1.safetensors"
    part.write_bytes(part.read_bytes()[:-5])  # only rank 1 reads it
    finish(folder, tmp_path, "resumed", "torn", ranks=3)
    assert json.loads((tmp_path / "torn.json").read_text())["first_step"] == 5
    assert_close(load_file(tmp_path / "torn.safetensors"), expected, LORA_WITHIN, "on three ranks")


@pytest.mark.slow
def test_a_run_with_kl_a_token_budget_and_left_out_steps_is_cut_off_and_goes_on_bit_for_bit(tmp_path):
    """Also begun on two ranks and ended on one, as near as the steps are. Three bad steps in a row stop all ranks."""
    untied = make_checkpoint("qwen3", tmp_path / "untied", tie_word_embeddings=False)
    finish(untied, tmp_path, "interrupted")
    for name, (method, _) in MIXED.items():
        ours, theirs = json.loads((tmp_path / f"{name}.json").read_text())
        assert ours == theirs, f"{name}: the ranks disagree"
        assert set(ours["same"].values()) == {True}, (name, ours["same"])
        whole = steps_of(tmp_path / name / "whole")
        last = len(whole)
        left_out = [one.step for one in whole if one.loss is None]
        assert bool(left_out) == (method == "lora") and len(left_out) < last / 2
        resumed = {"cut off at 1": list(range(1, last + 1)), "cut off at 5": list(range(5, last + 1))}
        assert ours["steps"] == {"no step left": [], **resumed}
        for place in resumed:
            assert steps_of(tmp_path / name / place) == whole

        newest = max((tmp_path / name / "whole" / "checkpoints").iterdir())
        shutil.rmtree(newest)
        single = SingleEngine(mixed_student(untied, method), CLIP, DECAY, with_reference=True)
        seen = []
        train(single, mixed(), MIXED_RUN, SEED, tmp_path / name / "whole", seen.append)
        assert 1 < seen[0].step <= last
        expected = load_file(tmp_path / f"{name}.safetensors")
        assert_close(single.tensors(), expected, LORA_WITHIN if method == "lora" else FULL_WITHIN, name)
        assert [one.step for one in steps_of(tmp_path / name / "whole") if one.loss is None] == left_out
    lora = json.loads((tmp_path / "lora-2-kl.json").read_text())[0]
    assert re.fullmatch(r"step 3, the 3rd in a row left out: loss nan, .*", lora["stopped"])


def steps_of(run: Path) -> list:
    metrics = [dataclasses.replace(one, seconds=0, tokens_per_second=0) for one in read_metrics(run / "metrics.jsonl")]
    assert [one.step for one in metrics] == list(range(1, metrics[0].total_steps + 1))
    return metrics


def test_shares_are_fair_and_hold_everything_once():
    for sizes, ranks in itertools.product([[30, 7, 55, 16, 31, 2, 41], [5], [], [8] * 9], [1, 2, 3, 8]):
        shares = balanced(sizes, ranks)
        assert len(shares) == ranks and sorted(itertools.chain(*shares)) == list(range(len(sizes)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 16))
def test_no_share_is_larger_than_another_by_more_than_its_last_item(sizes, ranks):
    shares = balanced(sizes, ranks)
    sums = [sum(sizes[index] for index in share) for share in shares]
    assert sorted(itertools.chain(*shares)) == list(range(len(sizes)))
    assert all(total - sizes[share[-1]] <= min(sums) for total, share in zip(sums, shares, strict=True) if share)


def test_parameters_are_offloaded_only_where_they_are_sharded():
    with pytest.raises(ValueError, match="stage 3"):
        ZeroConfig(2, offload_parameters=True)


def test_without_deepspeed_there_is_one_line_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, "thinksafe.training.deepspeed_engine", raising=False)
    with pytest.raises(UserError, match=r"pip install 'thinksafe\[deepspeed\]'"):
        importlib.import_module("thinksafe.training.deepspeed_engine")
