"""docs/recipe.md: its tables equal the output of `tools/recipe_reference.py`."""

import dataclasses
from typing import get_type_hints

import pytest

from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.guards.config import GuardConfig
from thinksafe.recipe.loading import load_recipe
from thinksafe.recipe.schema import Recipe
from thinksafe.sampler.engine import EngineConfig
from thinksafe.sampler.request import SamplingConfig
from thinksafe.training.loop import TrainingConfig
from tools.recipe_reference import PAGE, bounds, page, reference

BOUNDS = {
    (Recipe, "seed"): "≥ 0, < 2^63",
    (Recipe, "max_prompts"): "≥ 1",
    (SamplingConfig, "top_p"): "> 0, ≤ 1",
    (SamplingConfig, "temperature"): "≥ 0",
    (EngineConfig, "kv_cache_gib"): "> 0",
    (GuardConfig, "threshold"): "> 0, < 1",
    (TrainingConfig, "learning_rate"): "> 0",
    (EvaluationSet, "samples"): "≥ 1",
    (TrainingConfig, "method"): "",
    (Recipe, "name"): "",
}
"""Bounds by section and key, as a reader of the checks would write them."""


def test_page_holds_the_present_tables():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run: python -m tools.recipe_reference"


def test_every_key_has_a_meaning():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80 and all(len(row.split(" | ")[-1]) > 10 for row in rows)


@pytest.mark.parametrize("section, name", BOUNDS, ids=lambda part: getattr(part, "__name__", part))
def test_bounds_are_those_of_the_checks(section, name):
    (field,) = (field for field in dataclasses.fields(section) if field.name == name)
    assert bounds(section, field, get_type_hints(section)[name]) == BOUNDS[section, name]


def test_bound_of_the_page_is_enforced():
    assert "| `batch_size` | whole number | `8` | ≥ 1 |" in reference()
    load_recipe("organism", ["training.batch_size=1"])
    with pytest.raises(UserError, match="batch_size"):
        load_recipe("organism", ["training.batch_size=0"])
