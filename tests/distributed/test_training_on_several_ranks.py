"""Training by several ranks gives the student of a single process, also after one rank was killed.

Real ZeRO over gloo. A launch with torchrun takes seconds, so one test checks several things.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launches import finish_workers, fork_workers, kill_worker, launch, thinksafe_errors, worker_pids
from tests.support.organism_runs import run_arguments
from thinksafe.cli.__main__ import main
from thinksafe.training.metrics import read_metrics

TOLERANCE = 1e-6
NUM_STEPS = 30


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Return arguments of `thinksafe train` on sampled examples, without dropout: masks depend on the packing."""
    folder = tmp_path_factory.mktemp("accepted")
    sampling = run_arguments(folder / "sets", num_prompts=40, num_evaluated=2)
    for command in ("generate", "filter"):
        assert main([command, *sampling, "--out", str(folder / "run")]) == 0
    changes = {"epochs": 3, "batch_size": 4, "checkpoint_every": 2, "learning_rate": 1e-4, "max_tokens_per_pack": 128}
    training_settings = [word for key, value in changes.items() for word in ("--set", f"training.{key}={value}")]
    data = str(folder / "run" / "accepted.jsonl")
    return ["--recipe", "organism", "--data", data, *training_settings, "--set", "lora.dropout=0"]


def finish(num_ranks: int, arguments: list[str], out: Path) -> str:
    """Train, check that it succeeds, and return what it printed to stderr."""
    launcher = launch(num_ranks, arguments, out, "train")
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0 and printed == f"{out}/adapter\n", errors
    return errors


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def losses(out: Path) -> list[tuple]:
    return [(metrics.step, metrics.loss, metrics.grad_norm) for metrics in read_metrics(out / "training/metrics.jsonl")]


def assert_close(out: Path, expected: Path) -> None:
    for name, tensor in adapter(expected).items():
        torch.testing.assert_close(adapter(out)[name], tensor, rtol=0, atol=TOLERANCE)
    for loss, expected_loss in zip(losses(out), losses(expected), strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-4)


def wait_for_steps(out: Path, is_running: Callable[[], bool]) -> None:
    """Wait until a third of the steps are done."""
    metrics = out / "training" / "metrics.jsonl"
    while is_running() and not (metrics.exists() and metrics.read_bytes().count(b"\n") > NUM_STEPS // 3):
        time.sleep(0.002)


def assert_killed(out: Path, errors: str) -> None:
    """Check that a run ended without a result, and that its only error names worker 1."""
    (line,) = thinksafe_errors(errors)
    assert re.search(r": worker 1 on \S+ is gone, so all workers end", line)
    assert "run the same command again to continue" in line and "thinksafe/pipeline" not in errors, errors
    assert NUM_STEPS // 3 < len(losses(out)) < NUM_STEPS and not (out / "adapter").exists()


@pytest.mark.slow
def test_training_resumes_after_a_rank_was_killed(arguments, tmp_path):
    """The result of two ranks is within the tolerance; after a kill and a resume it is equal bit for bit."""
    single, whole, killed = tmp_path / "single", tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *arguments, "--out", str(single)]) == 0
    output = finish(2, arguments, whole)
    assert output.count(f"train:     {NUM_STEPS} steps") == 1 and "ZeRO stage 1 over 2 processes" in output
    assert max(tensor.abs().max() for name, tensor in adapter(single).items() if "lora_B" in name) > 1e-3
    assert_close(whole, single)

    workers = fork_workers(2, arguments, killed, "train")
    wait_for_steps(killed, lambda: all(worker.returncode is None for worker in workers))
    assert_killed(killed, kill_worker(workers, 1))
    printed, _ = finish_workers(fork_workers(2, arguments, killed, "train"))
    assert printed == f"{killed}/adapter\n"
    assert losses(killed) == losses(whole)
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(killed).items())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_training_resumes_on_other_ranks_and_at_another_stage(arguments, tmp_path):
    """The rank is killed under torchrun. On one rank, or with stage 3, the result is within the tolerance."""
    single, killed = tmp_path / "single", tmp_path / "killed"
    assert main(["train", *arguments, "--out", str(single)]) == 0
    launcher = launch(2, arguments, killed, "train")
    wait_for_steps(killed, lambda: launcher.poll() is None)
    os.kill(worker_pids(launcher)[1], signal.SIGKILL)
    killed_at = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and time.monotonic() - killed_at < 60
    assert_killed(killed, errors)
    for name, changes in (("on one rank", ()), ("at another stage", ("zero.stage=3", "zero.offload_optimizer=true"))):
        shutil.copytree(killed, tmp_path / name)
        finish(1, [*arguments, *(word for change in changes for word in ("--set", change))], tmp_path / name)
        assert_close(tmp_path / name, single)
