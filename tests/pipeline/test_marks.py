"""Human marks: they override the guard, and invalid or late marks are errors. The guard is a fake with known scores."""

import json
import shlex
from pathlib import Path

import pytest

from tests.support.instant_run import instant_checkpoints, instant_sampling
from tests.support.judged_run import SAFE, UNKNOWN, UNSAFE, DoubtfulGuard, accepted_examples, add_marks, make_mark
from thinksafe import pipeline
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Mark, content_id
from thinksafe.errors import UserError
from thinksafe.pipeline.imports import import_marks, import_responses
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir

pytest_plugins = ["tests.support.judged_run"]


def test_mark_overrides_the_guard_and_is_recorded(run, tmp_path):
    accepted = add_marks(
        run,
        tmp_path,
        make_mark(run, SAFE, "reject"),
        make_mark(run, UNSAFE, "accept"),
        make_mark(run, UNKNOWN, "accept"),
    )
    assert SAFE not in accepted and accepted[UNSAFE].accepted_by == accepted[UNKNOWN].accepted_by == "person: Ann"
    assert {example.accepted_by for prompt, example in accepted.items() if prompt not in (UNSAFE, UNKNOWN)} == {
        "doubtful"
    }
    record = next(r for r in map(json.loads, (run.path / "audit.jsonl").open()) if r["prompt"] == SAFE)
    (attempt,) = record["attempts"]
    assert attempt["decision"] == "safe" and attempt["outcome"] == "rejected_by_person"
    assert attempt["marks"] == [{"decision": "reject", "by": "Ann", "at": "2026-01-01T10:00:00Z"}]


def test_report_counts_marks_and_categories(run, tmp_path):
    marks = [(SAFE, "reject"), (UNSAFE, "accept"), (UNKNOWN, "reject"), ("How do I fold boat number 1?", "accept")]
    add_marks(run, tmp_path, *(make_mark(run, *mark) for mark in marks), make_mark(run, UNKNOWN, "accept", "Bob"))
    with RunDir.open(run.path, run.recipe) as reopened:
        figures = json.loads(pipeline.make_report(reopened).with_name("report.json").read_text())["coverage"]
    assert figures["people"] == {"Ann": 4, "Bob": 1}
    assert figures["marks"] == {"withdrawn": 1, "rescued": 1, "disagreed": 1, "confirmed": 1}
    assert figures["accepted_by"]["person: Ann"] == 2 and figures["uncertain"] == 2
    assert figures["categories"] == [{"category": "S9", "responses": 7, "prompts": 7, "accepted": 1}]
    page = (run.path / "report.html").read_text()
    assert "only the guard accepts" in page and "accepted by person: Ann" in page


def test_one_rejection_is_enough_and_the_last_mark_counts(run, tmp_path):
    accepted = add_marks(
        run,
        tmp_path,
        make_mark(run, UNSAFE, "accept", "Ann"),
        make_mark(run, UNSAFE, "reject", "Bob"),
        make_mark(run, UNKNOWN, "reject", at="2026-01-01T12:00:00+01:00"),
        make_mark(run, UNKNOWN, "accept", at="2026-01-01T11:00:01Z"),
    )
    assert UNSAFE not in accepted and UNKNOWN in accepted
    assert UNSAFE in add_marks(run, tmp_path, make_mark(run, UNSAFE, "accept", "Bob", at="2026-01-02T10:00:00Z"))


def test_known_marks_change_nothing_and_new_marks_are_added(run, tmp_path):
    mark = make_mark(run, SAFE, "reject")
    add_marks(run, tmp_path, mark)
    stamp = (run.path / "accepted.jsonl").stat().st_mtime_ns
    add_marks(run, tmp_path, mark, mark)
    assert (run.path / "accepted.jsonl").stat().st_mtime_ns == stamp
    assert UNSAFE in add_marks(run, tmp_path, make_mark(run, UNSAFE, "accept"))
    assert SAFE not in accepted_examples(run) and len(list(read_records(run.path / "marks.jsonl", Mark))) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_id": content_id("another text")}, "record 1 marks a response that is not in this run"),
        ({"sample": 7}, "not in this run"),
        ({"prompt_id": "0" * 16}, "not in this run"),
        ({"by": " "}, "by must name the person who made the mark"),
        (
            {"at": "2026-01-01T10:00:00"},
            r"given.jsonl: line 1: .* at must be a time with a time zone, such as .*T10:00:00'$",
        ),
        ({"at": "yesterday"}, r"given.jsonl: line 1: not a valid Mark record: at must be .* found 'yesterday'$"),
        ({"at": ""}, "found ''"),
        ({"at": 5}, "not a valid Mark record: at must be text"),
        ({"decision": "perhaps"}, "not a valid Mark record: decision must be 'accept' or 'reject'"),
    ],
    ids=["text", "sample", "prompt", "person", "time zone", "time", "empty time", "type of time", "decision"],
)
def test_invalid_mark_is_an_error_and_changes_nothing(run, tmp_path, changes, message):
    before = (run.path / "accepted.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        add_marks(run, tmp_path, make_mark(run, UNSAFE, "accept") | changes)
    assert (run.path / "accepted.jsonl").read_bytes() == before and not (run.path / "marks.jsonl").exists()


def test_people_cannot_accept_a_malformed_response(run, tmp_path):
    assert "Say nothing." not in add_marks(run, tmp_path, make_mark(run, "Say nothing.", "accept"))
    with RunDir.open(run.path, run.recipe) as reopened:
        figures = json.loads(pipeline.make_report(reopened).with_name("report.json").read_text())
    assert figures["coverage"]["marks"] == {"impossible": 1}


def test_marks_after_training_are_an_error_with_a_working_command(run, tmp_path):
    """The command imports the run's responses, its earlier marks and the new marks."""
    add_marks(run, tmp_path, make_mark(run, UNSAFE, "accept"))
    (run.path / "training").mkdir()
    with pytest.raises(UserError, match="has already been trained without these") as error:
        add_marks(run, tmp_path, make_mark(run, SAFE, "reject"))
    command, name, *arguments = shlex.split(str(error.value).partition("new folder: ")[2])
    assert (command, name) == ("thinksafe", "filter") and arguments[-2:] == ["--out", "NEW"]
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    checkpoints = instant_checkpoints(None)
    checkpoints.guard = DoubtfulGuard()
    with RunDir.open(tmp_path / "new", load_recipe(options["--recipe"])) as new, instant_sampling():
        import_responses(new, Path(options["--responses"]))
        pipeline.filter_responses(new, checkpoints)
        import_marks(new, Path(options["--marks"]))
        pipeline.accept_responses(new)
    assert (
        accepted_examples(new).keys() == accepted_examples(run).keys() - {SAFE}
        and accepted_examples(new)[UNSAFE].accepted_by == "person: Ann"
    )


def test_kill_during_the_import_loses_no_mark(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("thinksafe.pipeline.accept.audit_record", kill)
        add_marks(run, tmp_path, make_mark(run, SAFE, "reject"))
    with RunDir.open(run.path, run.recipe) as reopened:
        pipeline.accept_responses(reopened)
    assert SAFE not in accepted_examples(run)
