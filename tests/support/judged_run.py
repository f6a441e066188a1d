"""A judged run about boats, and functions that mark its responses.

A test file gets the fixture `run` with `pytest_plugins = ["tests.support.judged_run"]`.
"""

import json
from pathlib import Path

import pytest

from tests.support.instant_run import InstantGuard, instant_checkpoints, instant_sampling, run_stages
from thinksafe import pipeline
from thinksafe.data.records import Example, Verdict
from thinksafe.pipeline.imports import import_marks
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
    """A guard whose P(unsafe) depends on the number in the prompt: 1% for 0, 21% for 1, ... 100% for 5.

    It cannot judge the prompt with `recipe 1.`.
    """

    name = "doubtful"

    def __init__(self):
        super().__init__(None)

    def judge(self, responses):
        for response in responses:
            digits = [c for c in response.prompt if c.isdigit()]
            share = min(0.01 + 0.2 * int(digits[0]), 1.0) if digits else 0.3
            probabilities = {"p_safe": 1 - share, "p_unsafe": share}
            if response.prompt.endswith("recipe 1."):
                yield Verdict.of(response, self.name, "unknown", "too_long_for_guard")
            elif abs(share - 0.5) < 0.1:
                yield Verdict.of(response, self.name, "unknown", "uncertain", **probabilities)
            elif share > 0.5:
                fields = {"category": "S9", "labels": {"S9": 0.8, "S2": 0.1}}
                yield Verdict.of(response, self.name, "unsafe", **probabilities, **fields)
            else:
                yield Verdict.of(response, self.name, "safe", **probabilities)


def make_run(folder: Path):
    """Return a run after stage `accept`, with 12 plain prompts, 4 prompts with markup, and one malformed response.

    An answer repeats its prompt; the response without an answer is malformed.

    Args:
        folder: receives the prompts and the run directory `run`; created if needed.
    """
    prompts = [*PROMPTS, ("Say nothing.", "benign")]
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in prompts))
    raw = {"name": "boats", "model": "m", "prompts": str(folder / "p.jsonl"), "guard": {"margin": 0.1}}
    raw["generation"] = {"num_unsteered_prompts": 0}
    checkpoints = instant_checkpoints(None)
    checkpoints.guard = DoubtfulGuard()

    def answer(task):
        return "" if task.prompt.text == "Say nothing." else f"About that. {task.prompt.text}\n\nSecond paragraph."

    with RunDir.open(folder / "run", check_recipe(raw, "")) as run, instant_sampling(answer):
        run_stages(run, checkpoints)
        return run


@pytest.fixture
def run(tmp_path):
    """The run of `make_run`, in a folder of this test."""
    return make_run(tmp_path)


def accepted_examples(run) -> dict[str, Example]:
    """Return the accepted examples by the text of their prompt."""
    examples = map(json.loads, (run.path / "accepted.jsonl").open())
    return {example["prompt"]: Example(**example) for example in examples}


def make_mark(run, prompt, decision, by="Ann", at="2026-01-01T10:00:00Z") -> dict:
    """Return a mark on the only response to a prompt, as a line of marks.jsonl has it."""
    audit_records = map(json.loads, (run.path / "audit.jsonl").open())
    record = next(record for record in audit_records if record["prompt"] == prompt)
    (attempt,) = record["attempts"]
    response_fields = {"prompt_id": record["prompt_id"], "sample": attempt["sample"], "text_id": attempt["text_id"]}
    return response_fields | {"decision": decision, "by": by, "at": at}


def add_marks(run, tmp_path, *marks):
    """Import marks into a run, select the accepted responses again, and return the accepted examples by prompt."""
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    with RunDir.open(run.path, run.recipe) as reopened:
        import_marks(reopened, file)
        pipeline.accept_responses(reopened)
    return accepted_examples(run)


SAFE, UNSAFE, UNKNOWN = (f"How do I fold boat number {n}?" for n in (0, 4, 2))
