"""A run over midnight: templates that write the date keep the date of the run's first day.

The oracle is the same run on one day.
"""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint, make_qwen3guard
from tests.support.small_world import EXAMPLES, SET, write_jsonl
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response, Verdict
from thinksafe.run import directory
from thinksafe.training.metrics import read_metrics

pytest_plugins = ["tests.support.small_world"]

DAY = datetime(2031, 2, 3, 23, 59, 58)
NEXT_DAY = DAY + timedelta(days=1)


@pytest.fixture
def set_clock(monkeypatch):
    """Function that sets the clock of ThinkSafe and of transformers' chat templates."""

    def set_now(now):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return now if tz is None else now.astimezone(tz)

        monkeypatch.setattr(directory, "datetime", Clock)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return set_now


@pytest.fixture
def recipe(world, tmp_path) -> Path:
    """Recipe of the small world whose student and guard write the date into every prompt."""
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    make_checkpoint("qwen3", tmp_path / "qwen3")
    make_qwen3guard(tmp_path / "guard")
    recipe["guard"]["kind"] = "qwen3guard"  # its format is the checkpoint's chat template
    for name in ("qwen3", "guard"):
        template = tmp_path / name / "chat_template.jinja"
        template.write_text("{{- strftime_now('On %A %d %b %Y, %H:%M:%S') -}}" + template.read_text())
    recipe["prompts"] = str(world / "prompts.jsonl")
    for evaluation_set in recipe["evaluation"]["sets"]:
        evaluation_set["source"] = str(world / evaluation_set["source"])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def results(out: Path) -> dict:
    """Return all responses and verdicts of a run, the losses and the adapter of its training."""
    kinds = {"responses": Response, "verdicts": Verdict, "unsteered": Response, "unsteered_verdicts": Verdict}
    files = [file for file in out.rglob("*.jsonl") if file.stem.rpartition(".")[2] in kinds]
    records = {
        str(file.relative_to(out)): list(read_records(file, kinds[file.stem.rpartition(".")[2]])) for file in files
    }
    records |= {file.name: file.read_bytes() for file in out.glob("adapter/*.safetensors")}
    records["losses"] = [step.loss for step in read_metrics(out / "training" / "metrics.jsonl")]
    return records


@pytest.mark.slow
def test_run_over_midnight_has_the_records_of_its_first_day(recipe, tmp_path, call, set_clock):
    """Generation, guard and evaluation, each on another day."""

    def run(name, *days):
        for command, day in zip(("generate", "filter", "evaluate"), days, strict=True):
            set_clock(day)
            options = ["--recipe", recipe, "--out", tmp_path / name]
            assert call(command, *options, recipe=False, out=False)[0] == 0
        return results(tmp_path / name)

    expected = run("one day", DAY, DAY, DAY)
    assert run("over midnight", DAY, NEXT_DAY, NEXT_DAY + timedelta(days=200)) == expected
    other = run("next day", NEXT_DAY, NEXT_DAY, NEXT_DAY)
    for file in ("responses.jsonl", "evaluation/before/harm.responses.jsonl", "evaluation/before/harm.verdicts.jsonl"):
        assert other[file] != expected[file], "the test cannot fail"


@pytest.mark.slow
def test_training_continues_after_midnight(recipe, tmp_path, call, set_clock, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", EXAMPLES)
    settings = [SET, "training.batch_size=1", SET, "training.epochs=2", SET, "training.checkpoint_every=1"]

    def train(name):
        options = ["--recipe", recipe, "--out", tmp_path / name, "--data", data, *settings]
        return call("train", *options, recipe=False, out=False)

    set_clock(DAY)
    assert train("one day")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("thinksafe.pipeline.train.format_metrics", lambda metrics: {} if metrics.step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("killed")
    (tmp_path / "killed" / "tokenized.npz").unlink()
    set_clock(NEXT_DAY)
    steps = []
    monkeypatch.setattr("thinksafe.pipeline.train.format_metrics", lambda metrics: steps.append(metrics.step) or {})
    status, _, errors = train("killed")
    assert status == 0 and steps == [4, 5, 6] and not any("checkpoint" in line for line in errors)
    assert results(tmp_path / "killed") == results(tmp_path / "one day")
