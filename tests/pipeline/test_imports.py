"""Responses, examples and marks from outside: a row that contradicts another row or its own id is an error."""

import json

import pytest

from tests.support.judged_run import SAFE, add_marks, make_mark
from thinksafe.data.jsonl import import_records, read_records
from thinksafe.data.records import Example, Response, content_id
from thinksafe.errors import UserError
from thinksafe.pipeline.imports import import_responses
from thinksafe.recipe.loading import check_recipe
from thinksafe.run.directory import RunDir

pytest_plugins = ["tests.support.judged_run"]

TEXT = "<think>\na\n</think>\n\nb"
ROW = {"prompt": "fold?", "label": "benign", "text": TEXT, "response": TEXT}
OTHER = {"prompt": "brew?", "label": "benign"}


@pytest.fixture
def import_rows(tmp_path):
    """Return a function that imports rows of a file as records of a kind."""

    def import_rows(kind, *rows):
        file = tmp_path / "given.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(import_records(file, kind))

    return import_rows


@pytest.mark.parametrize("kind", [Response, Example])
@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROW | {"prompt_id": "q"}, ROW | OTHER | {"prompt_id": "q"}], "line 2: prompt_id 'q' belongs to another"),
        ([ROW | {"prompt_id": "q"}, ROW | {"label": "harmful", "prompt_id": "q"}], "line 2: prompt_id 'q' belongs"),
        ([ROW | {"prompt_id": content_id("benign", "other")}], "line 1: prompt_id '[0-9a-f]{16}' belongs to another"),
        ([ROW | {"prompt_id": content_id("harmful", "fold?")}], "line 1: prompt_id"),
        ([ROW, ROW | {"prompt": " \n"}], "line 2: needs a text in 'prompt' or 'instruction' that is not blank"),
        ([ROW | {"prompt": None}], "line 1: needs a text"),
        ([ROW | {"instruction": "brew?"}], "line 1: 'prompt' and 'instruction' differ"),
        ([ROW | {"prompt": None, "instruction": "Do it.", "input": "boat"}], "line 1: 'instruction' and 'input' are"),
        ([ROW | {"sample": -1}], "line 1: .* sample must be at least 0 and below 2.31 .found -1"),
        ([ROW | {"rung": -1}], "line 1: .* rung must be at least 0"),
        ([ROW | {"sample": 2**31}], "line 1: .* sample must be at least 0"),
        ([ROW | {"sample": 0.5}], "line 1: .* sample must be a whole number"),
    ],
)
def test_contradictory_row_is_an_error_that_names_the_line(import_rows, kind, rows, message):
    with pytest.raises(UserError, match=rf"given\.jsonl: {message}"):
        import_rows(kind, *rows)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"response": "other"}, "'text' and 'response' differ"),
        ({"num_tokens": -1}, "num_tokens must be at least 0"),
        ({"num_prompt_tokens": -5}, "num_prompt_tokens must be at least 0"),
        ({"seed": 2**63}, "seed must fit in 64 bits"),
    ],
)
def test_contradictory_response_is_an_error(import_rows, changes, message):
    with pytest.raises(UserError, match=message):
        import_rows(Response, ROW | changes)


@pytest.mark.parametrize("column", ["text", "response"])
def test_response_is_in_either_of_two_columns(import_rows, column):
    (response,) = import_rows(Response, OTHER | {column: "so"})
    assert response.text == "so"


def test_example_is_never_made_from_an_unfiltered_response(import_rows):
    with pytest.raises(UserError, match="needs a string 'response'"):
        import_rows(Example, OTHER | {"text": TEXT})


def test_own_ids_of_prompts_are_kept(import_rows):
    rows = [ROW | {"prompt_id": "q1"}, ROW | OTHER | {"prompt_id": "q2"}, ROW | {"prompt_id": "q1", "sample": 1}]
    assert [record.prompt_id for record in import_rows(Response, *rows)] == ["q1", "q2", "q1"]


def test_prompt_may_have_several_examples(import_rows):
    """Training on several responses to a prompt is common, so examples need no `sample`."""
    assert len(import_rows(Example, ROW, ROW | {"response": "other"}, ROW)) == 3


RECIPE = check_recipe({"name": "n", "model": "m"}, "test")


def test_repeated_sample_is_an_error_and_leaves_the_folder_usable(tmp_path):
    file = tmp_path / "r.jsonl"
    rows = [ROW, ROW | OTHER, ROW | {"text": "x", "response": None, "rung": 1}]
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=r"r\.jsonl: record 3 is a second response with sample 0"):
            import_responses(run, file)
        assert not list(run.path.glob("responses*"))
        file.write_text("".join(json.dumps(row | {"sample": n}) + "\n" for n, row in enumerate(rows)))
        import_responses(run, file)
        assert len(list(read_records(run.path / "responses.jsonl", Response))) == 3


def test_two_decisions_of_a_person_at_one_time_are_an_error(run, tmp_path):
    marks = make_mark(run, SAFE, "reject"), make_mark(run, SAFE, "accept", at="2026-01-01T11:00:00+01:00")
    with pytest.raises(UserError, match=r"Ann accepts and rejects sample 0 of prompt .* at the same time"):
        add_marks(run, tmp_path, *marks)
    add_marks(run, tmp_path, marks[0])
    with pytest.raises(UserError, match="remove one of the two marks"):
        add_marks(run, tmp_path, marks[1])
