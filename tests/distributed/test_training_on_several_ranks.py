"""Training by several processes through the command line: the student that one process gives, whoever is killed.

Real ZeRO over gloo, started with torchrun. A launch takes seconds, so a test looks at several things.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_runs_on_several_workers import said, start, workers_of
from tests.pipeline.test_pipeline import run, settings
from thinksafe.cli.__main__ import main
from thinksafe.training.loop import read_metrics

WITHIN = 1e-6
STEPS = 30


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Of `thinksafe train` on what a small run accepted; without dropout, whose masks depend on how packs fall."""
    folder = tmp_path_factory.mktemp("accepted")
    run(folder / "run", settings(folder / "sets", prompts=40, evaluated=2))
    changes = {"epochs": 3, "batch_size": 4, "checkpoint_every": 2, "learning_rate": 1e-4, "max_tokens_per_pack": 128}
    settings_of_training = [word for key, value in changes.items() for word in ("--set", f"training.{key}={value}")]
    data = str(folder / "run" / "accepted.jsonl")
    return ["--recipe", "organism", "--data", data, *settings_of_training, "--set", "lora.dropout=0"]


def finish(ranks: int, arguments: list[str], out: Path) -> str:
    """What a training that must succeed says."""
    launcher = start(ranks, arguments, out, "train")
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0 and printed == f"{out}/adapter\n", errors
    return errors


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def losses(out: Path) -> list[tuple]:
    return [(one.step, one.loss, one.grad_norm) for one in read_metrics(out / "training/metrics.jsonl")]


def assert_close(found: Path, expected: Path) -> None:
    for name, tensor in adapter(expected).items():
        torch.testing.assert_close(adapter(found)[name], tensor, rtol=0, atol=WITHIN)
    for ours, theirs in zip(losses(found), losses(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_training_changes_nothing_in_the_end(arguments, tmp_path):
    """Bit for bit on as many ranks; on one, or at another stage, as near as the steps are."""
    single, whole, killed = tmp_path / "single", tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *arguments, "--out", str(single)]) == 0
    said_of_it = finish(2, arguments, whole)
    assert said_of_it.count(f"train:     {STEPS} steps") == 1 and "ZeRO stage 1 over 2 processes" in said_of_it
    assert max(tensor.abs().max() for name, tensor in adapter(single).items() if "lora_B" in name) > 1e-3
    assert_close(whole, single)

    launcher = start(2, arguments, killed, "train")
    metrics = killed / "training" / "metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > STEPS // 3):
        time.sleep(0.002)
    os.kill(workers_of(launcher)[1], signal.SIGKILL)
    since = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and time.monotonic() - since < 60
    (line,) = said(errors)
    assert re.search(r": worker 1 on \S+ is gone, so all end", line)
    assert "the same command goes on" in line and "thinksafe/stages.py" not in errors, errors
    assert STEPS // 3 < len(losses(killed)) < STEPS and not (killed / "adapter").exists()

    for name, ranks, changes in (
        ("on one", 1, ()),
        ("at another stage", 1, ("zero.stage=3", "zero.offload_optimizer=true")),
    ):
        shutil.copytree(killed, tmp_path / name)
        finish(ranks, [*arguments, *(word for change in changes for word in ("--set", change))], tmp_path / name)
        assert_close(tmp_path / name, single)
    finish(2, arguments, killed)
    assert losses(killed) == losses(whole)
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(killed).items())
