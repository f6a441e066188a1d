"""A run by several workers writes the same bytes as a run by one process, even after kills, and reports errors once.

Most tests fork the workers, which starts them in milliseconds; the exhaustive ones start torchrun, as users do.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint, make_llama_guard
from tests.support.launches import (
    finish_workers,
    fork_workers,
    is_worker,
    kill_worker,
    launch,
    thinksafe_errors,
    worker_pids,
)
from tests.support.organism_runs import record_bytes, run_arguments, run_pipeline
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Verdict
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir

LAUNCH_SPECIFIC_FILES = {".lock", "manifest.json", "report.json", "report.html", "metrics.jsonl", "after.json"}
"""Files that hold times or numbers of processes."""


def contents(out: Path) -> dict[str, bytes]:
    """Return the contents of all files by name; empty for files that depend on the order of gradient sums."""

    def is_comparable(file: Path) -> bool:
        return file.name not in LAUNCH_SPECIFIC_FILES and file.suffix != ".safetensors" and file.parent.name != "after"

    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() if is_comparable(file) else b"" for file in files}


@pytest.fixture(scope="module")
def single_run(tmp_path_factory):
    """Make a run by one process; return its directory and its arguments."""
    folder = tmp_path_factory.mktemp("single run")
    arguments = run_arguments(folder / "sets", num_prompts=40, num_evaluated=12)
    run_pipeline(folder / "run", arguments)
    return folder / "run", arguments


def wait_for_records(out: Path, size: float, is_running: Callable[[], bool]) -> None:
    """Wait until `size` bytes of records are written."""
    while is_running() and record_bytes(out) < size:
        time.sleep(0.005)
    assert is_running(), "the run ended before the kill"


def kill_at(launcher: subprocess.Popen, out: Path, size: float, choose_victim) -> str:
    """Kill one process once `size` bytes of records are written, wait until all have ended, and return their stderr."""
    wait_for_records(out, size, lambda: launcher.poll() is None)
    workers = worker_pids(launcher)
    os.kill(choose_victim(launcher.pid, workers), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)  # the workers hold the other end of the pipe
    assert launcher.returncode != 0 and not any(map(is_worker, workers))
    return errors


def assert_complete(out: Path, expected: Path, printed: str, errors: str) -> None:
    """Check what all workers of the last command printed, and all files of the run."""
    assert not thinksafe_errors(errors), errors
    assert printed.count("report.html") == 1 and errors.count("after arithmetic:     12 responses") == 1
    assert contents(out) == contents(expected)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_records(single_run, tmp_path, fresh_seed):
    """One of three workers is killed; two workers finish the run."""
    expected, arguments = single_run
    rng, out = random.Random(fresh_seed), tmp_path / "run"
    workers, victim = fork_workers(3, arguments, out), rng.randrange(3)
    size = rng.uniform(0.02, 0.6) * record_bytes(expected)
    wait_for_records(out, size, lambda: all(worker.returncode is None for worker in workers))
    errors = kill_worker(workers, victim)
    lines = thinksafe_errors(errors)
    assert lines and all("is gone" in line for line in lines) and "Traceback" not in errors
    assert victim == 0 or (len(lines) == 1 and f"worker {victim} on" in lines[0])
    printed, errors = finish_workers(fork_workers(2, arguments, out))
    assert_complete(out, expected, printed, errors)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_runs_killed_under_torchrun_resume_to_the_same_records(single_run, tmp_path, fresh_seed):
    """First a worker dies, then the launcher, whose death the workers must notice themselves."""
    expected, arguments = single_run
    rng, out, size = random.Random(fresh_seed), tmp_path / "run", record_bytes(expected)
    launcher = launch(3, arguments, out)
    errors = kill_at(launcher, out, rng.uniform(0.02, 0.3) * size, lambda _, workers: rng.choice(workers))
    assert len(thinksafe_errors(errors)) <= 1 and "SIGKILL" in errors
    launcher = launch(2, arguments, out)
    errors = kill_at(launcher, out, rng.uniform(0.3, 0.6) * size, lambda launcher, _: launcher)
    lines = thinksafe_errors(errors)
    assert lines and all("is gone" in line for line in lines) and "Traceback" not in errors
    launcher = launch(3, arguments, out)
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert_complete(out, expected, printed, errors)


@pytest.mark.slow
def test_workers_report_an_error_once_and_respect_the_lock(single_run, tmp_path):
    _, arguments = single_run
    with RunDir.open(tmp_path / "run", load_recipe("organism", arguments[3::2])):
        workers_by_message = {
            "another process is working in this run directory": fork_workers(2, arguments, tmp_path / "run"),
            "did you mean training.epochs?": fork_workers(
                2, [*arguments, "--set", "training.epoch=3"], tmp_path / "other"
            ),
        }
        for message, workers in workers_by_message.items():
            (line,) = thinksafe_errors("".join(worker.communicate(timeout=100)[1] for worker in workers))
            assert all(worker.returncode for worker in workers) and message in line
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def sharded_recipe(tmp_path_factory):
    """Make a recipe whose student can be sharded over two workers and whose guard over four."""
    folder = tmp_path_factory.mktemp("sharded recipe")
    make_checkpoint("qwen3", folder / "student", num_key_value_heads=2)
    make_llama_guard(folder / "guard", num_key_value_heads=4)
    texts = [f"How do I fold a boat of {n} sheets?" for n in range(12)]
    lines = [f'{{"text": "{text}", "label": "{("harmful", "benign")[n % 2]}"}}\n' for n, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "examples.jsonl").write_text(
        json.dumps({"prompt": "How?", "label": "benign", "response": "<think>\nHm.\n</think>\n\nSo."})
    )
    engine = {"max_num_seqs": 4, "max_prefill_tokens": 512, "kv_cache_gib": 0.02}
    sampling = {"temperature": 1.0, "top_k": 0, "max_tokens": 12}
    sets = [{"name": "harm", "source": "prompts.jsonl", "kind": "harmful", "samples": 2}]
    recipe = {
        "name": "sharded",
        "model": "student",
        "prompts": "prompts.jsonl",
        "sampler": engine,
        "generation": {"num_unsteered_prompts": 2, "sampling": sampling},
        "guard": {"kind": "llama_guard", "model": "guard", "min_verdict_probability": 0.0, "sampler": dict(engine)},
        "lora": {"rank": 2, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"sampling": sampling, "sets": sets},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


SHARDING = ["--set", "sampler.tensor_parallel_size=2", "--set", "guard.sampler.tensor_parallel_size={guard_shards}"]


def evaluate_in_one_process(folder: Path, out: Path, recipe: list[str]) -> list[str]:
    """Train an adapter and evaluate it into `out / "single"`; return the arguments of `evaluate`."""
    assert main(["train", *recipe, "--data", str(folder / "examples.jsonl"), "--out", str(out / "trained")]) == 0
    arguments = [*recipe, "--adapter", str(out / "trained" / "adapter")]
    assert main(["evaluate", *arguments, "--out", str(out / "single")]) == 0
    return arguments


def assert_same_evaluation(out: Path, single: Path) -> None:
    """Check that responses are equal byte by byte, and verdicts up to rounding."""
    files = sorted(str(file.relative_to(single)) for file in single.rglob("*.jsonl"))
    assert "evaluation/after/harm.verdicts.jsonl" in files
    for file in files:
        if file.endswith("responses.jsonl"):
            assert (out / file).read_bytes() == (single / file).read_bytes(), file
        else:
            sharded_verdicts, single_verdicts = (read_records(run / file, Verdict) for run in (out, single))
            for verdict, expected in zip(sharded_verdicts, single_verdicts, strict=True):
                assert (verdict.key, verdict.decision) == (expected.key, expected.decision)
                probabilities = (expected.p_safe, expected.p_unsafe)
                assert (verdict.p_safe, verdict.p_unsafe) == pytest.approx(probabilities, abs=1e-4)


@pytest.mark.slow
def test_tensor_parallel_run_gives_the_results_of_a_single_process(sharded_recipe, tmp_path, capfd):
    """Two workers share student and guard."""
    recipe = ["--recipe", str(sharded_recipe / "recipe.yaml")]
    sharding = [word.format(guard_shards=2) for word in SHARDING]
    arguments = evaluate_in_one_process(sharded_recipe, tmp_path, recipe)
    finish_workers(fork_workers(2, [*arguments, *sharding], tmp_path / "sharded", "evaluate"))
    assert_same_evaluation(tmp_path / "sharded", tmp_path / "single")
    assert main(["generate", *recipe, *sharding, "--out", str(tmp_path / "alone")]) == 2
    assert "tensor_parallel_size: 2 workers share one model, but 1 worker was started" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_tensor_parallel_run_resumes_on_four_workers(sharded_recipe, tmp_path):
    """Two workers share student and guard until one is killed. Then there are two copies of the student, each on two
    workers, and one copy of the guard on all four."""
    larger = yaml.safe_load((sharded_recipe / "recipe.yaml").read_text())
    larger["evaluation"]["sets"][0]["samples"] = 12
    (sharded_recipe / "larger.yaml").write_text(yaml.safe_dump(larger))
    recipe, out = ["--recipe", str(sharded_recipe / "larger.yaml")], tmp_path / "sharded"
    arguments = evaluate_in_one_process(sharded_recipe, tmp_path, recipe)
    arguments += [word.format(guard_shards=4) for word in SHARDING]
    launcher = launch(2, arguments, out, "evaluate")
    kill_at(launcher, out, 10_000, lambda _, workers: workers[1])
    launcher = launch(4, arguments, out, "evaluate")
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert_same_evaluation(out, tmp_path / "single")
