"""A run by several processes: the same bytes as by one, whoever is killed, and one voice where something goes wrong.

Started for real, with torchrun on a CPU. A launch takes seconds, so a test looks at several things.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.pipeline.test_pipeline import ROOT, progress, run, settings
from tests.support.checkpoints import make_checkpoint, make_llama_guard
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Verdict
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OF_THE_LAUNCH = {".lock", "manifest.json", "report.json", "report.html", "metrics.jsonl", "after.json"}
"""Files in which seconds or process numbers stand."""


def start(count: int, arguments: list[str], out: Path, command: str = "run") -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    started = [*(torchrun if count > 1 else [sys.executable, "-m"]), "thinksafe.cli", command, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*started, "--out", str(out)], env=ENVIRONMENT, **pipes)


def said(errors: str) -> list[str]:
    """What thinksafe itself complains of; a launcher says more."""
    return [line for line in errors.splitlines() if line.startswith("thinksafe: ")]


def workers_of(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if "thinksafe.cli" in Path(f"/proc/{pid}/cmdline").read_text()]


def contents(out: Path) -> dict[str, bytes]:
    """Of all files; of those that gradients summed in another order went into, only the names."""

    def comparable(file: Path) -> bool:
        return file.name not in OF_THE_LAUNCH and file.suffix != ".safetensors" and file.parent.name != "after"

    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() if comparable(file) else b"" for file in files}


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """(run directory, arguments) of a run by one process."""
    folder = tmp_path_factory.mktemp("by one")
    arguments = settings(folder / "sets", prompts=40, evaluated=12)
    run(folder / "run", arguments)
    return folder / "run", arguments


def is_alive(pid: int) -> bool:
    try:
        return "thinksafe.cli" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_at(launcher: subprocess.Popen, out: Path, size: float, choose_victim) -> str:
    """Wait until so many bytes are written, kill one process, and wait until all have ended; what they said."""
    while launcher.poll() is None and progress(out) < size:
        time.sleep(0.005)
    workers = workers_of(launcher)
    assert workers and launcher.poll() is None, "the test should have killed somebody"
    os.kill(choose_victim(launcher.pid, workers), signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)  # the workers hold the other end of the pipe
    assert launcher.returncode != 0 and not any(map(is_alive, workers))
    return errors


@pytest.mark.slow
def test_whoever_is_killed_ends_all_and_any_number_of_others_ends_with_the_records_of_one(by_one, tmp_path, fresh_seed):
    """First a worker dies, then the launcher, whose workers must find out by themselves."""
    whole, arguments = by_one
    choose, out, size = random.Random(fresh_seed), tmp_path / "run", progress(whole)
    launcher = start(3, arguments, out)
    errors = kill_at(launcher, out, choose.uniform(0.02, 0.3) * size, lambda _, workers: choose.choice(workers))
    assert len(said(errors)) <= 1 and "SIGKILL" in errors
    launcher = start(2, arguments, out)
    errors = kill_at(launcher, out, choose.uniform(0.3, 0.6) * size, lambda launcher, _: launcher)
    assert said(errors) and all("is gone" in line for line in said(errors)) and "Traceback" not in errors
    launcher = start(3, arguments, out)
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0 and not said(errors), errors
    assert printed.count("report.html") == 1 and errors.count("after arithmetic:     12 responses") == 1
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_several_workers_complain_with_one_voice_and_leave_a_run_of_others_alone(by_one, tmp_path):
    _, arguments = by_one
    with RunDir.open(tmp_path / "run", load_recipe("organism", arguments[3::2])):
        launchers = {
            "another process is working in this run directory": start(2, arguments, tmp_path / "run"),
            "did you mean training.epochs?": start(2, [*arguments, "--set", "training.epoch=3"], tmp_path / "other"),
        }
        for words, launcher in launchers.items():
            _, errors = launcher.communicate(timeout=100)
            (line,) = said(errors)
            assert launcher.returncode != 0 and words in line
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def dealt_out(tmp_path_factory):
    """A recipe whose student two workers hold together and whose guard four."""
    folder = tmp_path_factory.mktemp("dealt out")
    make_checkpoint("qwen3", folder / "student", num_key_value_heads=2)
    make_llama_guard(folder / "guard", num_key_value_heads=4)
    rows = [f"How do I fold a boat of {n} sheets?" for n in range(12)]
    lines = [f'{{"text": "{text}", "label": "{("harmful", "benign")[n % 2]}"}}\n' for n, text in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    engine = {"max_running": 4, "max_step_tokens": 512, "kv_cache_gib": 0.02}
    sampling = {"temperature": 1.0, "top_k": 0, "max_tokens": 12}
    sets = [{"name": "harm", "file": "prompts.jsonl", "kind": "harmful", "samples": 12}]
    recipe = {
        "name": "dealt-out",
        "model": "student",
        "prompts": "prompts.jsonl",
        "sampler": engine,
        "generation": {"unsteered_probe": 2, "sampling": sampling},
        "guard": {"kind": "llama_guard", "model": "guard", "min_mass": 0.0, "sampler": dict(engine)},
        "lora": {"rank": 2, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"sampling": sampling, "sets": sets},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.slow
def test_models_dealt_out_to_several_workers_say_what_whole_ones_say(dealt_out, tmp_path, capfd):
    """Two workers hold student and guard together, until one is killed; then four: two students of two parts each share
    the prompts, and the guard is one of four parts."""
    given = ["--recipe", str(dealt_out / "recipe.yaml")]
    parts = ["--set", "sampler.tensor_parallel=2", "--set", "guard.sampler.tensor_parallel=4"]
    (tmp_path / "examples.jsonl").write_text(
        json.dumps({"prompt": "How?", "label": "benign", "response": "<think>\nHm.\n</think>\n\nSo."})
    )
    trained, whole, out = (tmp_path / name for name in ("trained", "whole", "parts"))
    assert main(["train", *given, "--data", str(tmp_path / "examples.jsonl"), "--out", str(trained)]) == 0
    evaluate = [*given, "--adapter", str(trained / "adapter")]
    assert main(["evaluate", *evaluate, "--out", str(whole)]) == 0
    launcher = start(2, [*evaluate, *parts], out, "evaluate")
    kill_at(launcher, out, 10_000, lambda _, workers: workers[1])
    launcher = start(4, [*evaluate, *parts], out, "evaluate")
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*.jsonl"))
    assert "evaluation/after/harm.verdicts.jsonl" in files
    for file in files:
        if file.endswith("responses.jsonl"):
            assert (out / file).read_bytes() == (whole / file).read_bytes(), file
        else:
            ours, theirs = (read_records(run / file, Verdict) for run in (out, whole))
            for one, other in zip(ours, theirs, strict=True):
                assert (one.key, one.decision) == (other.key, other.decision)
                assert (one.p_safe, one.p_unsafe) == pytest.approx((other.p_safe, other.p_unsafe), abs=1e-4)
    assert main(["generate", *given, *parts, "--out", str(tmp_path / "alone")]) == 2
    assert "tensor_parallel: 2 GPUs are to hold one model, and 1 worker cannot" in capfd.readouterr().err
