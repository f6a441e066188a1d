"""docs/recipe.md: its tables equal the output of `tools/recipe_reference.py`."""

import pytest

from thinksafe.errors import UserError
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.guards.config import GuardConfig
from thinksafe.recipe.loading import load_recipe
from thinksafe.recipe.schema import Recipe
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.section import bounds_by_key
from thinksafe.training.config import TrainingConfig
from tools.recipe_reference import PAGE, page, reference

BOUNDS = {
    (Recipe, "seed"): "at least 0 and below 2^63",
    (Recipe, "max_prompts"): "at least 1",
    (SamplingConfig, "top_p"): "above 0 and at most 1",
    (SamplingConfig, "temperature"): "at least 0",
    (EngineConfig, "kv_cache_gib"): "above 0",
    (GuardConfig, "threshold"): "above 0 and below 1",
    (TrainingConfig, "learning_rate"): "above 0",
    (EvaluationSet, "samples"): "at least 1",
    (TrainingConfig, "method"): "",
    (Recipe, "name"): "",
}
"""Bounds by section and key, as the page gives them; empty for a key without bounds."""


def test_page_holds_the_present_tables():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run: python -m tools.recipe_reference"


def test_every_key_has_a_meaning():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80 and all(len(row.split(" | ")[-1]) > 10 for row in rows)


def test_bounds_are_those_of_the_keys():
    rows = [row.split(" | ") for row in reference().splitlines() if row.startswith("| `")]
    for (section, name), bounds in BOUNDS.items():
        assert str(bounds_by_key(section).get(name, "")) == bounds
        assert bounds in [cells[3].strip() for cells in rows if cells[0] == f"| `{name}`"]


def test_bound_of_the_page_is_enforced():
    assert "| `batch_size` | whole number | `8` | at least 1 |" in reference()
    load_recipe("organism", ["training.batch_size=1"])
    with pytest.raises(UserError, match="batch_size"):
        load_recipe("organism", ["training.batch_size=0"])
