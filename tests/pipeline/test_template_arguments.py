"""The recipe key template_arguments: it reaches every prompt, belongs to the run, and a mistake is one line."""

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint
from tests.support.small_world import EXAMPLES, SET, write_jsonl
from thinksafe.errors import UserError
from thinksafe.recipe.loading import check_recipe, load_recipe

pytest_plugins = ["tests.support.small_world"]

SWITCH = (
    "{%- if add_generation_prompt -%}{%- if enable_thinking is defined and enable_thinking -%}{{- '<think>\\n' -}}"
    "{%- else -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}"
)
THINK = [SET, "template_arguments.enable_thinking=true"]


@pytest.fixture
def student(tmp_path):
    """Arguments that name a student whose template closes the think block by default."""
    folder = make_checkpoint("qwen3", tmp_path / "student")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + SWITCH)
    return [SET, f"model={folder}"]


def test_one_line_says_that_the_student_does_not_think(call, student):
    status, _, errors = call("generate", *student)
    notes = [line.strip() for line in errors if "template_arguments" in line]
    assert status == 0 and len(notes) == 1
    assert notes[0].startswith("no thinking: ") and notes[0].endswith(
        "the chat template closes the think block in the prompt; set template_arguments.enable_thinking=true to think"
    )


def test_argument_opens_the_think_block(tmp_path, call, student):
    status, _, errors = call("generate", *student, *THINK)
    assert status == 0 and not any("think" in line for line in errors)
    responses = (tmp_path / "run" / "responses.jsonl").read_text().splitlines()
    assert all('"text": "<think>\\n' in line for line in responses)


def test_argument_belongs_to_the_run(call, student):
    assert call("generate", *student, *THINK)[0] == 0
    status, _, errors = call("generate", *student)
    assert status == 2 and "template_arguments.enable_thinking: nothing instead of true" in errors[-1]


def test_unknown_argument_is_one_line_before_any_model_is_loaded(tmp_path, call, student, monkeypatch):
    monkeypatch.setattr("thinksafe.run.checkpoints.load_decoder", lambda *_: pytest.fail("a model was loaded"))
    data = write_jsonl(tmp_path / "data.jsonl", EXAMPLES)
    for command in (["run"], ["generate"], ["train", "--data", data]):
        status, _, errors = call(*command, *student, SET, "template_arguments={enable_thinkin: true}")
        assert status == 2 and errors[-1].startswith("thinksafe: template_arguments.enable_thinkin: ")
        assert errors[-1].endswith("does not read it; it reads enable_thinking")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), [1], {"a": 1}])
def test_argument_is_a_plain_value(value):
    with pytest.raises(UserError, match=r"template_arguments\.level: must be true, false, a number or text"):
        check_recipe({"name": "mine", "model": "m", "template_arguments": {"level": value}}, "mine.yaml")


def test_arguments_keep_their_types_in_the_recipe_of_a_run():
    values = {"switch": True, "budget": 3, "share": 0.5, "level": "high", "date_string": "2026-01-02"}
    overrides = [f"template_arguments.{name}={value}" for name, value in values.items()]
    recipe = load_recipe("qwen3-0.6b", [text.replace("True", "true") for text in overrides])
    assert recipe.template_arguments == values
    assert check_recipe(yaml.safe_load(recipe.to_yaml()), "recipe.yaml") == recipe
