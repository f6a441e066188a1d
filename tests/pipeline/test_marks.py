"""Marks: the filter takes people's word into account, before the guard's."""

import json
import shlex
from pathlib import Path

import pytest

from tests.support.instant_run import instant_models, instantly
from tests.support.judged_run import SAFE, UNKNOWN, UNSAFE, DoubtfulGuard, give, kept, mark_of
from thinksafe import pipeline as stages
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Mark, content_id
from thinksafe.errors import UserError
from thinksafe.pipeline.imports import take_in_marks, take_in_responses
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir

pytest_plugins = ["tests.support.judged_run"]


def test_a_persons_word_goes_before_the_guards_and_is_told_apart(run, tmp_path):
    found = give(
        run, tmp_path, mark_of(run, SAFE, "reject"), mark_of(run, UNSAFE, "accept"), mark_of(run, UNKNOWN, "accept")
    )
    assert SAFE not in found and found[UNSAFE].accepted_by == found[UNKNOWN].accepted_by == "person: Ann"
    assert {e.accepted_by for p, e in found.items() if p not in (UNSAFE, UNKNOWN)} == {"doubtful"}
    story = next(s for s in map(json.loads, (run.path / "audit.jsonl").open()) if s["prompt"] == SAFE)
    (attempt,) = story["attempts"]
    assert attempt["decision"] == "safe" and attempt["fate"] == "rejected_by_person"
    assert attempt["marks"] == [{"decision": "reject", "by": "Ann", "at": "2026-01-01T10:00:00Z"}]


def test_the_report_counts_what_people_changed_and_the_categories(run, tmp_path):
    given = [(SAFE, "reject"), (UNSAFE, "accept"), (UNKNOWN, "reject"), ("How do I fold boat number 1?", "accept")]
    give(run, tmp_path, *(mark_of(run, *one) for one in given), mark_of(run, UNKNOWN, "accept", "Bob"))
    with RunDir.open(run.path, run.recipe) as again:
        figures = json.loads(stages.report(again).with_name("report.json").read_text())["coverage"]
    assert figures["people"] == {"Ann": 4, "Bob": 1}
    assert figures["marks"] == {"withdrawn": 1, "rescued": 1, "disagreed": 1, "confirmed": 1}
    assert figures["accepted_by"]["person: Ann"] == 2 and figures["uncertain"] == 2
    assert figures["categories"] == [{"category": "S9", "responses": 7, "prompts": 7, "accepted": 1}]
    page = (run.path / "report.html").read_text()
    assert "rejected against the guard" in page and "accepted by person: Ann" in page


def test_one_who_rejects_is_enough_and_the_later_word_of_a_person_counts(run, tmp_path):
    found = give(
        run,
        tmp_path,
        mark_of(run, UNSAFE, "accept", "Ann"),
        mark_of(run, UNSAFE, "reject", "Bob"),
        mark_of(run, UNKNOWN, "reject", at="2026-01-01T12:00:00+01:00"),
        mark_of(run, UNKNOWN, "accept", at="2026-01-01T11:00:01Z"),
    )
    assert UNSAFE not in found and UNKNOWN in found
    assert UNSAFE in give(run, tmp_path, mark_of(run, UNSAFE, "accept", "Bob", at="2026-01-02T10:00:00Z"))


def test_marks_given_twice_change_nothing_and_later_ones_add(run, tmp_path):
    first = mark_of(run, SAFE, "reject")
    give(run, tmp_path, first)
    stamp = (run.path / "accepted.jsonl").stat().st_mtime_ns
    give(run, tmp_path, first, first)
    assert (run.path / "accepted.jsonl").stat().st_mtime_ns == stamp
    assert UNSAFE in give(run, tmp_path, mark_of(run, UNSAFE, "accept"))
    assert SAFE not in kept(run) and len(list(read_records(run.path / "marks.jsonl", Mark))) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_id": content_id("another text")}, "record 1 marks a response that is not in this run"),
        ({"sample": 7}, "not in this run"),
        ({"prompt_id": "0" * 16}, "not in this run"),
        ({"by": " "}, "by must name who marked"),
        (
            {"at": "2026-01-01T10:00:00"},
            r"given.jsonl: line 1: .* at must be a time with its zone, such as .*T10:00:00'$",
        ),
        ({"at": "yesterday"}, r"given.jsonl: line 1: no Mark record: at must be .* found 'yesterday'$"),
        ({"at": ""}, "found ''"),
        ({"at": 5}, "no Mark record: at must be text"),
        ({"decision": "perhaps"}, "no Mark record: decision must be 'accept' or 'reject'"),
    ],
)
def test_a_mark_on_what_nobody_read_is_refused(run, tmp_path, changes, words):
    before = (run.path / "accepted.jsonl").read_bytes()
    with pytest.raises(UserError, match=words):
        give(run, tmp_path, mark_of(run, UNSAFE, "accept") | changes)
    assert (run.path / "accepted.jsonl").read_bytes() == before and not (run.path / "marks.jsonl").exists()


def test_what_cannot_be_trained_on_is_nobodys_to_accept(run, tmp_path):
    assert "Say nothing." not in give(run, tmp_path, mark_of(run, "Say nothing.", "accept"))
    with RunDir.open(run.path, run.recipe) as again:
        figures = json.loads(stages.report(again).with_name("report.json").read_text())
    assert figures["coverage"]["marks"] == {"impossible": 1}


def test_marks_after_training_are_refused_with_a_way_out_that_works(run, tmp_path):
    """The command takes over the run's responses and the marks it has; new ones come with it."""
    give(run, tmp_path, mark_of(run, UNSAFE, "accept"))
    (run.path / "training").mkdir()
    with pytest.raises(UserError, match="has already been trained without these") as refused:
        give(run, tmp_path, mark_of(run, SAFE, "reject"))
    command, name, *arguments = shlex.split(str(refused.value).partition("new folder: ")[2])
    assert (command, name) == ("thinksafe", "filter") and arguments[-2:] == ["--out", "NEW"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    models = instant_models(None)
    models.guard = DoubtfulGuard()
    with RunDir.open(tmp_path / "new", load_recipe(given["--recipe"])) as new, instantly():
        take_in_responses(new, Path(given["--responses"]))
        stages.filter_responses(new, models)
        take_in_marks(new, Path(given["--marks"]))
        stages.accept(new)
    assert kept(new).keys() == kept(run).keys() - {SAFE} and kept(new)[UNSAFE].accepted_by == "person: Ann"


def test_a_kill_while_marks_are_taken_in_loses_none(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("thinksafe.pipeline.accept.choose", killed)
        give(run, tmp_path, mark_of(run, SAFE, "reject"))
    with RunDir.open(run.path, run.recipe) as again:
        stages.accept(again)
    assert SAFE not in kept(run)
