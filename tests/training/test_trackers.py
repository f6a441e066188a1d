"""Trackers: every step is logged once, also after a kill, and a package is needed only if the recipe names it."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.organism_runs import run_arguments
from thinksafe.cli.__main__ import main
from thinksafe.hardware import hardware_named
from thinksafe.pipeline.train import format_metrics
from thinksafe.training import metrics as metrics_module
from thinksafe.training.metrics import StepMetrics, read_metrics
from thinksafe.training.trackers import open_trackers, scalars

ROOT = Path(__file__).parents[2]


def metrics(step: int, mfu: float | None = None) -> StepMetrics:
    return StepMetrics(step, 9, 2.0 / step, 1e-5, 0.5, 100, 0.25, 400.0, 1e9, mfu, None)


class FakeWandB:
    """Stand-in for the package `wandb`: `runs` maps a run id to the values logged for each step, as the server does."""

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
            assert step not in history, "logged twice"
            history[step] = values

        step = 0 if self.offline else max(history, default=-1) + 1
        return SimpleNamespace(step=step, log=log, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch):
    fake_wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    return fake_wandb


def tensorboard_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return {step: value} of every curve, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    curves = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in curves.values()), "logged twice"
    return {name: dict(points) for name, points in curves.items()}


def test_resumed_run_continues_the_same_curves(tmp_path, wandb):
    """Killed after step 5 and resumed from the checkpoint of step 3, a run logs every step exactly once."""
    for steps in (range(1, 6), range(4, 10)):
        with open_trackers(["tensorboard", "wandb"], tmp_path, "mine", {"seed": 3}) as trackers:
            for step in steps:
                for tracker in trackers:
                    tracker.log(metrics(step))
    curves = tensorboard_curves(tmp_path)
    assert curves["train/loss"] == pytest.approx({step: 2.0 / step for step in range(1, 10)})
    assert curves.keys() == scalars(metrics(1)).keys()
    (history,) = wandb.runs.values()
    assert history == {step: scalars(metrics(step)) for step in range(1, 10)}
    assert [settings["config"] for settings in wandb.settings] == [{"seed": 3}] * 2


def test_offline_wandb_continues_after_the_steps_in_metrics_jsonl(tmp_path, monkeypatch):
    fake_wandb = FakeWandB(offline=True)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    for first_step, last_step in ((1, 5), (4, 9)):
        with open_trackers(["wandb"], tmp_path, "mine", {}) as (tracker,):
            for step in range(first_step, last_step + 1):
                tracker.log(metrics(step))
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(asdict(metrics(s))) + "\n" for s in range(1, last_step + 1))
        )
    (history,) = fake_wandb.runs.values()
    assert list(history) == list(range(1, 10))


def test_every_known_number_has_a_curve():
    expected = asdict(metrics(2, mfu=0.4)) | {"loss": 1.0}
    for name in ("step", "total_steps", "peak_bytes", "note", "dropped_mass"):
        del expected[name]
    assert scalars(metrics(2, mfu=0.4)) == {f"train/{name}": value for name, value in expected.items()}


def test_trackers_and_bar_show_the_metrics_of_every_step(tmp_path, monkeypatch, wandb, capsys):
    """On a GPU with known rates the bar shows MFU; metrics.jsonl has the numbers of all curves."""
    gpu = hardware_named("H200")
    monkeypatch.setattr(metrics_module, "hardware_of", lambda device: gpu)
    bars = []
    monkeypatch.setattr(
        "thinksafe.pipeline.train.format_metrics", lambda metrics: bars.append(format_metrics(metrics)) or {}
    )
    out = tmp_path / "run"
    arguments = run_arguments(tmp_path / "sets", num_prompts=8, num_evaluated=1)
    assert main(["run", *arguments, "--set", "trackers=[tensorboard, wandb]", "--out", str(out)]) == 0
    steps = list(read_metrics(out / "training" / "metrics.jsonl"))
    assert len(steps) == steps[-1].total_steps
    curves = tensorboard_curves(out / "training")
    (history,) = wandb.runs.values()
    for step, bar in zip(steps, bars, strict=True):
        assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
        assert step.mfu == pytest.approx(step.flop / step.seconds / gpu.peak_flop_per_second) and step.mfu > 0
        assert history[step.step] == scalars(step)
        assert math.isclose(curves["train/flop"][step.step], step.flop, rel_tol=1e-6)
        assert bar == {"loss": f"{step.loss:.3f}", "MFU": f"{step.mfu:.0%}"}
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["peak_bytes"] is None for line in lines), "torch counts no peak memory on a CPU"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_tracker_package_stops_before_any_work(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    out = tmp_path / "run"
    arguments = run_arguments(tmp_path / "sets", num_prompts=4, num_evaluated=1)
    assert main(["run", *arguments, "--set", f"trackers=[{name}]", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"trackers: {name} is not installed: pip install 'thinksafe[{name}]'" in error and error.count("\n") == 1
    assert not (out / "responses.jsonl").exists()


def test_missing_wandb_login_stops_before_any_work(tmp_path, monkeypatch, wandb, capsys):
    def raise_error(**settings):
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    out = tmp_path / "run"
    arguments = run_arguments(tmp_path / "sets", num_prompts=4, num_evaluated=1)
    arguments += ["--set", "trackers=[wandb]", "--out", str(out)]
    expected = "trackers: wandb: No API key configured. Use `wandb login` to log in; or set WANDB_MODE=offline\n"
    monkeypatch.setattr(wandb, "login", raise_error)
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err == f"thinksafe: {expected}" and not (out / "responses.jsonl").exists()
    monkeypatch.setattr(wandb, "login", lambda: True)  # the error comes only when the run is created
    monkeypatch.setattr(wandb, "init", raise_error)
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.slow
def test_trackers_are_not_imported_by_default():
    code = "import sys, thinksafe.pipeline; print([n for n in ('tensorboard', 'wandb') if n in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert process.stdout.strip() == "[]"
