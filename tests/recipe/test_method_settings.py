"""`--method`: a method's settings, its budgets, the recipe's changes for it, and the order in which they apply."""

import pytest

from thinksafe.cli.__main__ import main
from thinksafe.errors import UserError
from thinksafe.methods.registry import METHODS
from thinksafe.paths import bundled_methods
from thinksafe.recipe.loading import load_recipe

RECIPE = """\
name: mine
model: m
method: {benign_loss: kl}
training: {epochs: 7, batch_size: 3}
methods:
  star1: {method: {source: rows.jsonl}, training: {learning_rate: 0.5}}
  sft: {method: {source: rows.jsonl}}
  teacher: {method: {model: t}}
  safekey: {method: {source: rows.jsonl}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", bundled_methods())
def test_every_method_of_the_option_is_a_class(recipe, name):
    loaded = load_recipe(recipe, [], name)
    assert loaded.name == f"mine-{name}" and type(loaded.method) is METHODS[loaded.method.type]
    assert loaded.method.type == name.removesuffix("_kl")


def test_every_class_has_settings():
    assert METHODS.keys() == set(bundled_methods()) - {"thinksafe_kl"}


def test_settings_apply_in_order(recipe, tmp_path):
    plain, star1 = load_recipe(recipe), load_recipe(recipe, [], "star1")
    assert (plain.method.benign_loss, plain.training.epochs) == ("kl", 7)
    assert star1.method.source == str(tmp_path / "rows.jsonl")  # from the recipe's folder
    assert (star1.training.epochs, star1.training.batch_size, star1.training.learning_rate) == (5, 3, 0.5)
    assert load_recipe(recipe, ["training.epochs=2"], "star1").training.epochs == 2
    own = load_recipe(recipe, [], "star1@own_recipe")
    assert (own.name, own.training.method, own.training.batch_size) == ("mine-star1-own_recipe", "full", 128)


def test_section_of_the_recipe_is_replaced(recipe):
    assert load_recipe(recipe, [], "thinksafe").method.benign_loss == "cross_entropy"


def test_matched_budget_needs_a_number_of_steps(recipe):
    assert load_recipe(recipe, ["training.steps=9"], "star1@matched").training.steps == 9
    with pytest.raises(UserError, match=r"--method star1@matched: set training\.steps"):
        load_recipe(recipe, [], "star1@matched")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("star2", "--method: no method 'star2'; choose one of direct_refusal, "),
        ("star1@own", "--method star1@own: no budget 'own'; choose one of as_in_the_paper, own_recipe, matched"),
        ("safechain@own_recipe", "no budget 'own_recipe'; choose one of as_in_the_paper, matched"),
    ],
)
def test_unknown_name_lists_the_known_ones(recipe, method, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [], method)


def test_recipe_command_prints_the_method(capsys):
    assert main(["recipe", "--method", "safechain"]) == 0
    assert "  type: safechain\n" in capsys.readouterr().out
