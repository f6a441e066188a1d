"""A run by several processes: the same bytes as by one, whoever is killed, and one voice where something goes wrong.

Started for real, with torchrun on a CPU. A launch takes seconds, so a test looks at several things.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pipeline import ROOT, progress, run, settings

from thinksafe.recipe import load_recipe
from thinksafe.rundir import RunDir

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OF_THE_LAUNCH = {".lock", "manifest.json", "report.json", "report.html", "metrics.jsonl"}
"""Files in which seconds or process numbers stand."""


def start(count: int, arguments: list[str], out: Path) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    command = [*(torchrun if count > 1 else [sys.executable, "-m"]), "thinksafe.cli", "run", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--out", str(out)], env=ENVIRONMENT, **pipes)


def said(errors: str) -> list[str]:
    """What thinksafe itself complains of; a launcher says more."""
    return [line for line in errors.splitlines() if line.startswith("thinksafe: ")]


def workers_of(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if "thinksafe.cli" in Path(f"/proc/{pid}/cmdline").read_text()]


def contents(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): b"" if file.name in OF_THE_LAUNCH else file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """(run directory, arguments) of a run by one process."""
    folder = tmp_path_factory.mktemp("by one")
    arguments = settings(folder / "sets", prompts=40, evaluated=12)
    run(folder / "run", arguments)
    return folder / "run", arguments


@pytest.mark.slow
def test_three_workers_leave_what_one_leaves(by_one, tmp_path):
    whole, arguments = by_one
    launcher = start(3, arguments, tmp_path / "run")
    printed, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    assert printed.count("report.html") == 1 and not said(errors)
    assert errors.count("generate:     40 responses") == 1, "one line about the work of all"
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.slow
def test_a_worker_killed_anywhere_ends_all_and_any_number_of_others_goes_on(by_one, tmp_path, fresh_seed):
    whole, arguments = by_one
    choose, out, kills = random.Random(fresh_seed), tmp_path / "run", 0
    for count, share in ((3, choose.uniform(0.02, 0.3)), (2, choose.uniform(0.3, 0.6))):
        launcher = start(count, arguments, out)
        while launcher.poll() is None and progress(out) < share * progress(whole):
            time.sleep(0.005)
        if launcher.poll() is None and (workers := workers_of(launcher)):
            os.kill(choose.choice(workers), signal.SIGKILL)
            killed = time.monotonic()
            _, errors = launcher.communicate(timeout=60)
            assert launcher.returncode != 0 and time.monotonic() - killed < 60
            assert len(said(errors)) <= 1, errors
            kills += 1
    assert kills == 2, "the test should have killed somebody"
    launcher = start(1, arguments, out)
    _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
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
