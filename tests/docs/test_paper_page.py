"""docs/paper.md: the bundled recipes hold the values of its table, and the recipe on the page loads."""

import re
from functools import reduce
from pathlib import Path

import yaml

from thinksafe.estimate.stages import estimate
from thinksafe.hardware import hardware_named
from thinksafe.recipe.loading import load_recipe

PAGE = Path(__file__).parents[2] / "docs/paper.md"


def test_recipes_hold_the_values_of_the_page():
    recipe = load_recipe("qwen3-0.6b")
    table = PAGE.read_text().partition("## As in the paper")[2].partition("##")[0]
    values = re.findall(r"`([a-z][\w.]*): ([^`]+)`", table)
    assert len(values) == 23
    for key, value in values:
        actual = reduce(getattr, key.split("."), recipe)
        expected = "cross_entropy" if key == "method.benign_loss" else yaml.safe_load(value)
        assert (list(actual) if isinstance(actual, tuple) else actual) == expected, key
    for name in ("r1-distill-qwen-1.5b", "r1-distill-qwen-7b", "r1-distill-llama-8b"):
        assert load_recipe(name).generation.sampling.top_k == 0


def test_recipe_of_all_eight_sets_loads(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "paper.yaml").write_text(block)
    evaluation = load_recipe(str(tmp_path / "paper.yaml")).evaluation
    assert evaluation.sampling.max_tokens == 32_768 and evaluation.sampling.top_k == 20
    assert {entry.name for entry in evaluation.sets if entry.kind == "harmful"} == {
        "harmbench", "strongreject", "wildjailbreak"}  # fmt: skip
    assert [entry.samples for entry in evaluation.sets if entry.kind == "reasoning"] == [8] * 4
    (gsm8k,) = (entry for entry in evaluation.sets if entry.name == "gsm8k")
    (bundled,) = (entry for entry in load_recipe("qwen3-0.6b").evaluation.sets if entry.name == "gsm8k")
    assert gsm8k.instruction == bundled.instruction
    assumptions = estimate(load_recipe(str(tmp_path / "paper.yaml")), hardware_named("H200")).assumptions
    sets_of_unknown_size = {line.partition(":")[0] for line in assumptions if "the size is unknown" in line}
    assert sets_of_unknown_size == {"harmbench.jsonl", "gpqa.jsonl"}
