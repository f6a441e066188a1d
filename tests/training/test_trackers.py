"""Trackers: every step is drawn once, also after a kill, and a package is wanted only where a recipe asks for it."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.pipeline.test_pipeline import settings
from thinksafe.cli.__main__ import main
from thinksafe.hardware import hardware_named
from thinksafe.pipeline.train import in_figures
from thinksafe.training import loop
from thinksafe.training.loop import StepMetrics, read_metrics
from thinksafe.training.trackers import figures, tracking

ROOT = Path(__file__).parents[2]


def metrics(step: int, mfu: float | None = None) -> StepMetrics:
    return StepMetrics(step, 9, 2.0 / step, 1e-5, 0.5, 100, 0.25, 400.0, 1e9, mfu, None)


class Accounts:
    """In the place of the package `wandb`: runs by id, each with what was logged of each step, as the server has it."""

    class Error(Exception):
        pass

    def __init__(self, offline=False):
        self.runs, self.settings, self.offline = {}, [], offline

    def login(self):
        return not self.offline

    def init(self, *, id, resume, **settings):
        assert resume == "allow"
        self.settings.append(settings)
        history = self.runs.setdefault(id, {})

        def log(values, step):
            assert step not in history, "drawn twice"
            history[step] = values

        step = 0 if self.offline else max(history, default=-1) + 1
        return SimpleNamespace(step=step, log=log, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch):
    accounts = Accounts()
    monkeypatch.setitem(sys.modules, "wandb", accounts)
    return accounts


def drawn(folder: Path) -> dict[str, dict[int, float]]:
    """Step to value of every curve, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    curves = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in curves.values()), "drawn twice"
    return {name: dict(points) for name, points in curves.items()}


def test_a_killed_run_goes_on_in_the_same_curves(tmp_path, wandb):
    """Killed after step 5, resumed from the checkpoint of step 3: nothing is drawn twice and nothing is missing."""
    for steps in (range(1, 6), range(4, 10)):
        with tracking(["tensorboard", "wandb"], tmp_path, "mine", {"seed": 3}) as trackers:
            for step in steps:
                for tracker in trackers:
                    tracker.log(metrics(step))
    curves = drawn(tmp_path)
    assert curves["train/loss"] == pytest.approx({step: 2.0 / step for step in range(1, 10)})
    assert curves.keys() == figures(metrics(1)).keys()
    (history,) = wandb.runs.values()
    assert history == {step: figures(metrics(step)) for step in range(1, 10)}
    assert [one["config"] for one in wandb.settings] == [{"seed": 3}] * 2


def test_offline_the_runs_own_metrics_tell_what_was_drawn(tmp_path, monkeypatch):
    accounts = Accounts(offline=True)
    monkeypatch.setitem(sys.modules, "wandb", accounts)
    for first, last in ((1, 5), (4, 9)):
        with tracking(["wandb"], tmp_path, "mine", {}) as (tracker,):
            for step in range(first, last + 1):
                tracker.log(metrics(step))
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(asdict(metrics(s))) + "\n" for s in range(1, last + 1))
        )
    (history,) = accounts.runs.values()
    assert list(history) == list(range(1, 10))


def test_everything_that_is_known_is_drawn():
    expected = asdict(metrics(2, mfu=0.4)) | {"loss": 1.0}
    for name in ("step", "total_steps", "peak_bytes", "note", "dropped_mass"):
        del expected[name]
    assert figures(metrics(2, mfu=0.4)) == {f"train/{name}": value for name, value in expected.items()}


def test_a_run_is_seen_while_it_trains(tmp_path, monkeypatch, wandb, capsys):
    """On a GPU whose figures are known, the bar shows MFU; metrics.jsonl has every figure that the curves have."""
    gpu = hardware_named("H200")
    monkeypatch.setattr(loop, "hardware_of", lambda device: gpu)
    shown = []
    monkeypatch.setattr("thinksafe.pipeline.train.in_figures", lambda one: shown.append(in_figures(one)) or {})
    out = tmp_path / "run"
    arguments = settings(tmp_path / "sets", prompts=8, evaluated=1)
    assert main(["run", *arguments, "--set", "trackers=[tensorboard, wandb]", "--out", str(out)]) == 0
    steps = list(read_metrics(out / "training" / "metrics.jsonl"))
    assert len(steps) == steps[-1].total_steps
    curves = drawn(out / "training")
    (history,) = wandb.runs.values()
    for step, bar in zip(steps, shown, strict=True):
        assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
        assert step.mfu == pytest.approx(step.flop / step.seconds / gpu.peak_flop_per_second) and step.mfu > 0
        assert history[step.step] == figures(step)
        assert math.isclose(curves["train/flop"][step.step], step.flop, rel_tol=1e-6)
        assert bar == {"loss": f"{step.loss:.3f}", "MFU": f"{step.mfu:.0%}"}
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["peak_bytes"] is None for line in lines), "a CPU has no peak that torch counts"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_any_work(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    out = tmp_path / "run"
    arguments = settings(tmp_path / "sets", prompts=4, evaluated=1)
    assert main(["run", *arguments, "--set", f"trackers=[{name}]", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"trackers: {name} is not installed: pip install 'thinksafe[{name}]'" in error and error.count("\n") == 1
    assert not (out / "responses.jsonl").exists()


def test_an_account_that_is_not_logged_in_is_one_line_before_any_work(tmp_path, monkeypatch, wandb, capsys):
    def refuse(**settings):
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    out = tmp_path / "run"
    arguments = [*settings(tmp_path / "sets", prompts=4, evaluated=1), "--set", "trackers=[wandb]", "--out", str(out)]
    expected = "trackers: wandb: No API key configured. Use `wandb login` to log in; or set WANDB_MODE=offline\n"
    monkeypatch.setattr(wandb, "login", refuse)
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err == f"thinksafe: {expected}" and not (out / "responses.jsonl").exists()
    monkeypatch.setattr(wandb, "login", lambda: True)  # it says so only where the run is to be made
    monkeypatch.setattr(wandb, "init", refuse)
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.endswith(expected)


def test_no_tracker_is_imported_unasked():
    code = "import sys, thinksafe.pipeline; print([n for n in ('tensorboard', 'wandb') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
