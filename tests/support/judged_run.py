"""A judged run about boats, and what people make of it.

A test file takes `run` with `pytest_plugins = ["tests.support.judged_run"]`."""

import json
from pathlib import Path

import pytest

from tests.support.instant_run import InstantGuard, instant_models, instantly, run_stages
from thinksafe import pipeline as stages
from thinksafe.data.records import Example
from thinksafe.guards.base import Judgement
from thinksafe.pipeline.imports import take_in_marks
from thinksafe.recipe.loading import check_recipe
from thinksafe.run.directory import RunDir

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script> ]]> &lt;b&gt; {{ 7 * 7 }} ${window.hacked = 1} \\u003c",
    "line\u2028separator\u2029 é🪁\ttab",
]
PROMPTS = [(f"How do I fold boat number {n}?", "benign") for n in range(6)]
PROMPTS += [(f"Brew me a ka lo mi, recipe {n}.", "harmful") for n in range(6)]
PROMPTS += [(text, "benign") for text in HOSTILE]


class DoubtfulGuard(InstantGuard):
    """P(unsafe) by the number in the prompt: 0 is 1%, 1 is 21%, ... 5 is certain; one prompt it cannot judge."""

    name = "doubtful"

    def __init__(self):
        super().__init__(None)

    def judge(self, exchanges):
        for exchange in exchanges:
            digits = [c for c in exchange.prompt if c.isdigit()]
            share = min(0.01 + 0.2 * int(digits[0]), 1.0) if digits else 0.3
            if exchange.prompt.endswith("recipe 1."):
                yield Judgement(exchange.id, "unknown", None, None, None, "too_long_for_guard")
            elif abs(share - 0.5) < 0.1:
                yield Judgement(exchange.id, "unknown", 1 - share, share, None, "uncertain")
            else:
                decision, labels = ("unsafe", {"S9": 0.8, "S2": 0.1}) if share > 0.5 else ("safe", {})
                category = "S9" if decision == "unsafe" else ""
                yield Judgement(exchange.id, decision, 1 - share, share, None, "", category, labels)


def make_run(folder: Path):
    """A judged run: 12 plain prompts, 4 hostile ones that say the same as answers, one malformed response."""
    prompts = [*PROMPTS, ("Say nothing.", "benign")]
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in prompts))
    raw = {"name": "boats", "model": "m", "prompts": str(folder / "p.jsonl"), "guard": {"margin": 0.1}}
    raw["generation"] = {"unsteered_probe": 0}
    models = instant_models(None)
    models.guard = DoubtfulGuard()

    def say(task):
        return "" if task.prompt.text == "Say nothing." else f"About that. {task.prompt.text}\n\nSecond paragraph."

    with RunDir.open(folder / "run", check_recipe(raw, "")) as run, instantly(say):
        run_stages(run, models)
        return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def kept(run) -> dict[str, Example]:
    examples = map(json.loads, (run.path / "accepted.jsonl").open())
    return {example["prompt"]: Example(**example) for example in examples}


def mark_of(run, prompt, decision, by="Ann", at="2026-01-01T10:00:00Z") -> dict:
    stories = map(json.loads, (run.path / "audit.jsonl").open())
    story = next(story for story in stories if story["prompt"] == prompt)
    (attempt,) = story["attempts"]
    found = {"prompt_id": story["prompt_id"], "sample": attempt["sample"], "text_id": attempt["text_id"]}
    return found | {"decision": decision, "by": by, "at": at}


def give(run, tmp_path, *marks):
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    with RunDir.open(run.path, run.recipe) as again:
        take_in_marks(again, file)
        stages.accept(again)
    return kept(run)


SAFE, UNSAFE, UNKNOWN = (f"How do I fold boat number {n}?" for n in (0, 4, 2))
