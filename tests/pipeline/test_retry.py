"""The steering ladder: who is tried again, on which rung, how often, and that no kill changes what comes of it."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.instant_run import instant_models, instantly, run_stages
from thinksafe import pipeline as stages
from thinksafe.data.jsonl import read_records, to_json
from thinksafe.data.records import Example, Mark, Response, Verdict, content_id
from thinksafe.data.selection import Attempt, choose
from thinksafe.errors import UserError
from thinksafe.pipeline.imports import take_in_marks, take_in_responses
from thinksafe.recipe.loading import check_recipe
from thinksafe.reporting.coverage import coverage_lines
from thinksafe.reporting.summary import coverage_of
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.journal import Journal

LADDER = [{"steering": "prefix", "samples": 3}, {"steering": "risk"}, {"steering": "Say no: {prompt}"}]
PROMPTS = [(f"{label} {n}", label) for n in range(6) for label in ("harmful", "benign")]


def accepts(exchange) -> bool:
    """Harmful prompt n needs the instruction of rung n; every benign one its third response, but the last has none."""
    kind, number = exchange.prompt.split()
    answer = exchange.response.rpartition("\n")[2]
    if kind == "benign":
        return number != "5" and exchange.id.endswith("/2")
    return answer == ["prefix", "prefix", "risk", "Say no: {prompt}", "never", "never"][int(number)]


def recipe(tmp_path, **generation):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in PROMPTS))
    generation = {"ladder": LADDER, "unsteered_probe": 2} | generation
    return check_recipe({"name": "n", "model": "m", "prompts": str(file), "generation": generation}, "")


def climb(out, recipe, marks=None):
    with RunDir.open(out, recipe) as run, instantly():
        run_stages(run, instant_models(accepts), marks)
        return run.manifest["stages"]


def read(file, kind):
    return list(read_records(file, kind))


@pytest.fixture
def climbed(tmp_path):
    climb(tmp_path / "run", recipe(tmp_path))
    return tmp_path / "run"


def test_each_rung_asks_those_whose_responses_were_all_rejected(climbed):
    asked = []
    for rung in (1, 2, 3):
        responses = read(climbed / "rungs" / f"{rung}.responses.jsonl", Response)
        assert {r.rung for r in responses} == {rung}
        asked.append(Counter((r.prompt, r.steering, r.sample) for r in responses))
    still = [f"harmful {n}" for n in range(2, 6)]  # 0 and 1 are content with the first instruction
    first = {(text, "prefix", s): 1 for text in still for s in (1, 2, 3)}
    assert asked[0] == first | {(f"benign {n}", None, s): 1 for n in range(6) for s in (1, 2, 3)}
    assert asked[1] == {(text, "risk", 4): 1 for text in still} | {("benign 5", None, 4): 1}
    assert asked[2] == {(text, LADDER[2]["steering"], 5): 1 for text in still[1:]} | {("benign 5", None, 5): 1}


def test_one_response_a_prompt_is_kept_and_it_knows_its_rung(climbed):
    kept = {example.prompt: example for example in read(climbed / "accepted.jsonl", Example)}
    assert len(kept) == len(read(climbed / "accepted.jsonl", Example)) == 9
    found = {text: (example.rung, example.sample) for text, example in kept.items()}
    benign = {f"benign {n}": (1, 2) for n in range(5)}
    assert found == benign | {"harmful 0": (0, 0), "harmful 1": (0, 0), "harmful 2": (2, 4), "harmful 3": (3, 5)}
    assert {example.accepted_by for example in kept.values()} == {"instant"}


def test_the_audit_trail_tells_every_prompts_story(climbed):
    stories = {story["prompt"]: story for story in map(json.loads, (climbed / "audit.jsonl").open())}
    assert sorted(stories) == sorted(text for text, _ in PROMPTS)
    responses = {
        (r.prompt, r.sample): r
        for file in (climbed / "responses.jsonl", *climbed.glob("rungs/*.responses.jsonl"))
        for r in read(file, Response)
    }
    verdicts = {
        (v.prompt_id, v.sample): v
        for file in (climbed / "verdicts.jsonl", *climbed.glob("rungs/*.verdicts.jsonl"))
        for v in read(file, Verdict)
    }
    for text, story in stories.items():
        assert [attempt["sample"] for attempt in story["attempts"]] == list(range(len(story["attempts"])))
        for attempt in story["attempts"]:
            response, verdict = (
                responses.pop((text, attempt["sample"])),
                verdicts[story["prompt_id"], attempt["sample"]],
            )
            for name in ("seed", "steering", "rung", "num_tokens", "num_prompt_tokens", "finish_reason"):
                assert attempt[name] == getattr(response, name)
            for name in ("decision", "reason", "p_safe", "p_unsafe", "guard", "category", "windows"):
                assert attempt[name] == getattr(verdict, name)
    assert not responses, "an attempt is in no story"
    assert stories["harmful 2"]["rung"] == 2 and stories["harmful 5"]["accepted"] is False
    fates = [attempt["fate"] for attempt in stories["benign 0"]["attempts"]]
    assert fates == ["unsafe", "unsafe", "kept", "unsafe"]


def test_the_report_tells_coverage_by_rung_and_label(climbed, tmp_path):
    with RunDir.open(climbed, recipe(tmp_path)) as run:
        figures = json.loads(stages.report(run).with_name("report.json").read_text())
    labels = figures["coverage"]["labels"]
    found = {
        label: [(s["rung"], s["prompts"], s["responses"], s["accepted"], s["covered"]) for s in each["rungs"]]
        for label, each in labels.items()
    }
    assert found["harmful"] == [(0, 6, 6, 2, 2 / 6), (1, 4, 12, 0, 2 / 6), (2, 4, 4, 1, 3 / 6), (3, 3, 3, 1, 4 / 6)]
    assert found["benign"] == [(0, 6, 6, 0, 0), (1, 6, 18, 5, 5 / 6), (2, 1, 1, 0, 5 / 6), (3, 1, 1, 0, 5 / 6)]
    assert [s["steering"] for s in labels["harmful"]["rungs"]] == ["prefix", *(rung["steering"] for rung in LADDER)]
    assert figures["filter"]["kept"] == {"harmful": 4, "benign": 5}
    assert figures["filter"]["dropped"] == {"harmful": {"unsafe": 21}, "benign": {"unsafe": 21}}
    page = (climbed / "report.html").read_text()
    assert "Coverage, rung by rung" in page and "Say no: {prompt}" in page


def test_the_terminal_says_what_was_accepted_and_why_the_rest_was_not(climbed, tmp_path):
    with RunDir.open(climbed, recipe(tmp_path)) as run:
        said = dict(coverage_lines(coverage_of(run)))
    assert said["accepted"] == "harmful 4 of 6 (66.7%)   benign 5 of 6 (83.3%)"
    assert said["rung 2"] == "harmful 1 of 4   benign 0 of 1   'risk'"
    assert said["rejected"] == "unsafe 42"


@pytest.mark.parametrize(
    "max_retries, sampled", [(0, []), (2, [2]), (7, [6, 1]), (31, [30, 1]), (35, [30, 5]), (None, [30, 5, 4])]
)
def test_the_budget_is_never_passed(tmp_path, max_retries, sampled):
    """Whole prompts only: with two responses left, a rung of three asks nobody, the next rung may."""
    done = climb(tmp_path / "run", recipe(tmp_path, max_retries=max_retries))
    assert [stage["records"] for name, stage in done.items() if name.startswith("generate_rung")] == sampled


def test_without_a_ladder_there_is_one_attempt(tmp_path):
    done = climb(tmp_path / "run", recipe(tmp_path, ladder=[]))
    assert list(done) == ["generate", "filter", "accept"] and not (tmp_path / "run" / "rungs").exists()
    assert len((tmp_path / "run" / "audit.jsonl").read_text().splitlines()) == len(PROMPTS)
    assert len(read(tmp_path / "run" / "accepted.jsonl", Example)) == 2


def test_responses_from_elsewhere_climb_too(tmp_path):
    """They may have any sample numbers; what is sampled here takes others."""
    rows = [
        {"prompt": "harmful 2", "label": "harmful", "text": "<think>\nHm.\n</think>\n\nno", "sample": s, "rung": s}
        for s in (3, 9)  # of a ladder that is not ours
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with RunDir.open(tmp_path / "run", recipe(tmp_path)) as run, instantly():
        take_in_responses(run, tmp_path / "r.jsonl")
        for stage in (stages.filter_responses, stages.retry):
            stage(run, instant_models(accepts))
        stages.accept(run)
    (kept,) = read(tmp_path / "run" / "accepted.jsonl", Example)
    assert (kept.prompt, kept.rung, kept.sample) == ("harmful 2", 2, 13)


class Killed(BaseException):
    pass


def test_dying_anywhere_changes_nothing(tmp_path, fresh_seed, monkeypatch):
    """At an append of a record or a rename, before or after it; the run given again ends with the same files. A
    person rejects, too, as `filter --marks` takes it in."""
    monkeypatch.setattr(StageClock, "tick", lambda clock: None)
    whole = recipe(tmp_path)
    marks = tmp_path / "given.jsonl"
    with RunDir.open(tmp_path / "whole", whole) as run, instantly():
        run_stages(run, instant_models(accepts))
        reject(run, "harmful 0", "harmful 2", "benign 1")
    climb(tmp_path / "whole", whole, marks)
    assert (tmp_path / "whole" / "rungs" / "5.responses.jsonl").exists()
    real = {"append": (Journal, Journal.append), "replace": (os, os.replace)}
    events, kill_at, after = 0, None, False

    def counted(function):
        def wrapper(*arguments, **keywords):
            nonlocal events
            events += 1
            here = events == kill_at
            if here and not after:
                raise Killed
            result = function(*arguments, **keywords)
            if here:
                raise Killed
            return result

        return wrapper

    for name, (owner, function) in real.items():
        monkeypatch.setattr(owner, name, counted(function))
    climb(tmp_path / "counted", whole, marks)
    total, choose_from = events, random.Random(fresh_seed)
    expected = contents(tmp_path / "whole")
    for place in choose_from.sample(range(1, total + 1), 25):
        out = tmp_path / f"killed at {place}"
        events, kill_at, after = 0, place, choose_from.random() < 0.5
        with pytest.raises(Killed):
            climb(out, whole, marks)
        kill_at = None
        climb(out, whole, marks)
        assert contents(out) == expected, (place, after)


def test_a_kill_during_filtering_repeats_no_verdict(tmp_path):
    """Neither of the first attempts nor of a rung's: the guard is most of what a run costs."""
    judged, dies_at = Counter(), [5, 14, 20, 33]

    def counted(exchange):
        if judged.total() in dies_at:
            dies_at.remove(judged.total())
            raise Killed
        judged[exchange.id] += 1
        return accepts(exchange)

    whole = recipe(tmp_path)
    for _ in range(5):
        with RunDir.open(tmp_path / "run", whole) as run, instantly(), suppress(Killed):
            run_stages(run, instant_models(counted))
    assert not dies_at and set(judged.values()) == {1}
    climb(tmp_path / "alone", whole)
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


def contents(out: Path) -> dict[str, list[str]]:
    """Every shard, its lines in any order: who is answered first may differ."""
    return {str(file.relative_to(out)): sorted(file.read_text().splitlines()) for file in out.rglob("*.jsonl*")}


def test_a_guard_that_calls_everything_unsafe_leaves_nothing_to_train_on(tmp_path):
    with RunDir.open(tmp_path / "run", recipe(tmp_path)) as run, instantly():
        run_stages(run, instant_models(lambda exchange: False))
        with pytest.raises(UserError, match="no response was accepted"):
            stages.train(run, None)
    assert (tmp_path / "run" / "accepted.jsonl").read_text() == ""


def test_two_processes_on_one_run_directory(tmp_path):
    """The second is told so, and the first one's records stay whole."""
    whole = recipe(tmp_path)
    with RunDir.open(tmp_path / "run", whole) as run, instantly():
        code = (
            "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import test_ladder;"
            "test_ladder.climb(Path(sys.argv[1]) / 'run', test_ladder.recipe(Path(sys.argv[1])))"
        )
        second = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        assert "another process is working in this run directory" in second.stderr
        run_stages(run, instant_models(accepts))
    climb(tmp_path / "alone", whole)
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


# What a person rejects


def reject(run, *texts):
    """Marks on every accepted response to these prompts, taken in as `filter --marks` does."""
    kept = [example for example in read(run.path / "accepted.jsonl", Example) if example.prompt in texts]
    assert len(kept) == len(texts)
    marks = [Mark(e.prompt_id, e.sample, content_id(e.response), "reject", "Ann", "2026-01-01T00:00:00Z") for e in kept]
    file = run.path.with_name("given.jsonl")
    file.write_text("".join(to_json(mark) + "\n" for mark in marks))
    take_in_marks(run, file)


def after_marks(tmp_path, *texts, **generation):
    """The run after people rejected what was accepted for these prompts; prompt -> (rung, sample) of its attempts."""
    whole = recipe(tmp_path, **generation)
    climb(tmp_path / "run", whole)
    with RunDir.open(tmp_path / "run", whole) as run:
        reject(run, *texts)
    climb(tmp_path / "run", whole)
    stories = map(json.loads, (tmp_path / "run" / "audit.jsonl").open())
    return {s["prompt"]: [(a["rung"], a["sample"]) for a in s["attempts"]] for s in stories}


def test_a_prompt_whose_accepted_response_a_person_rejects_climbs_on_from_its_own_rung(tmp_path):
    """Number 1 goes through all rungs, 2 through the last; 3 was on the last one already, and who was content stays."""
    tried = after_marks(tmp_path, "harmful 1", "harmful 2", "harmful 3")
    assert tried["harmful 1"] == [(0, 0), (1, 1), (1, 2), (1, 3)], "the same instruction is accepted once more"
    assert tried["harmful 2"][-2:] == [(2, 4), (3, 5)] and tried["harmful 3"][-1] == (3, 5)
    assert tried["harmful 0"] == [(0, 0)]
    kept = {
        example.prompt: (example.rung, example.sample) for example in read(tmp_path / "run/accepted.jsonl", Example)
    }
    assert kept["harmful 1"] == (1, 1) and kept["harmful 0"] == (0, 0)
    assert not {"harmful 2", "harmful 3"} & kept.keys()
    stages_done = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    assert [(name, stage["records"]) for name, stage in stages_done.items() if "generate_after_marks" in name] == [
        ("generate_after_marks_1", 4)
    ]


def test_the_report_counts_what_marks_asked_for(tmp_path):
    """In coverage, time and tokens; the estimate, which foresees no further attempt, is compared with all of it."""
    tried = after_marks(tmp_path, "harmful 1", "harmful 2")
    foreseen = {"seconds": 2.0, "tokens": 50, "peak_bytes": 100}
    expected = {"gpu": "H200", "num_gpus": 1, "stages": {"generate": foreseen, "filter": foreseen, "train": foreseen}}
    (tmp_path / "run" / "estimate.json").write_text(json.dumps(expected))
    with RunDir.open(tmp_path / "run", recipe(tmp_path)) as run:
        done, page = run.manifest["stages"], stages.report(run)
    found = json.loads(page.with_name("report.json").read_text())
    compared = {stage["name"]: stage for stage in found["estimate"]["stages"]}
    assert list(compared) == [name for name in done if name != "accept"] and "filter_after_marks_1" in compared
    tokens = {name: stage["tokens"] for name, stage in done.items()}
    assert tokens["generate_after_marks_1"] == tokens["filter_after_marks_1"] == 7 * 4
    assert compared["generate_after_marks_1"]["tokens"] == [None, 7 * 4]
    assert found["estimate"]["total"]["tokens"] == [100, sum(tokens.values())]
    assert found["estimate"]["total"]["seconds"][1] == pytest.approx(
        sum(stage["seconds"] for name, stage in done.items() if name != "accept")
    )
    assert {stage["name"]: stage["tokens"] for stage in found["stages"]} == tokens
    asked = Counter(rung for text, made in tried.items() if text.startswith("harmful") for rung, _ in made)
    rungs = found["coverage"]["labels"]["harmful"]["rungs"]
    assert {step["rung"]: step["responses"] for step in rungs} == asked
    lengths = Counter(label for label, tokens in found["lengths"].items() for _ in tokens)
    assert lengths == Counter(text.split()[0] for text, made in tried.items() for _ in made)
    assert "generate after marks 1" in page.read_text()


def test_who_is_rejected_again_and_again_ends_at_the_top_of_the_ladder(tmp_path):
    whole = recipe(tmp_path)
    after_marks(tmp_path, "harmful 0")
    for rung in (1, 1, 1):
        with RunDir.open(tmp_path / "run", whole) as run:
            assert {e.prompt: e.rung for e in read(run.path / "accepted.jsonl", Example)}["harmful 0"] == rung
            reject(run, "harmful 0")
        climb(tmp_path / "run", whole)
    (story,) = (s for s in map(json.loads, (tmp_path / "run/audit.jsonl").open()) if s["prompt"] == "harmful 0")
    assert [(a["rung"], a["sample"]) for a in story["attempts"]] == [(0, 0), (1, 1), (1, 2), (1, 3), (2, 4), (3, 5)]
    assert not story["accepted"] and Counter(a["fate"] for a in story["attempts"])["rejected_by_person"] == 4


@pytest.mark.parametrize("max_retries, more", [(39, 0), (41, 0), (42, 3), (44, 3), (45, 6)])
def test_marks_spend_what_the_budget_has_left(tmp_path, max_retries, more):
    """The ladder itself takes 39; two prompts ask for three each, whole prompts only."""
    tried = after_marks(tmp_path, "harmful 0", "harmful 1", max_retries=max_retries)
    assert sum(len(tried[f"harmful {n}"]) - 1 for n in (0, 1)) == more
    assert sum(map(len, tried.values())) - len(PROMPTS) == 39 + more <= max_retries


def test_without_a_ladder_a_rejected_prompt_is_lost(tmp_path):
    tried = after_marks(tmp_path, "harmful 1", ladder=[])
    assert all(attempts == [(0, 0)] for attempts in tried.values())
    assert {e.prompt for e in read(tmp_path / "run/accepted.jsonl", Example)} == {"harmful 0"}


def test_marks_that_were_interrupted_are_not_trained_around(tmp_path):
    """Between the marks and what they change there is no accepted set, so `train` cannot take the one from before."""
    whole = recipe(tmp_path)
    climb(tmp_path / "run", whole)
    with RunDir.open(tmp_path / "run", whole) as run:
        reject(run, "harmful 0")
        with pytest.raises(UserError, match=r"accepted\.jsonl: not there yet; run `thinksafe filter`"):
            stages.examples_file(run)


def test_another_runs_attempts_and_marks_are_taken_over_whole(tmp_path):
    after_marks(tmp_path, "harmful 2")
    with RunDir.open(tmp_path / "new", recipe(tmp_path, ladder=[])) as run, instantly():
        take_in_responses(run, tmp_path / "run")
        stages.filter_responses(run, instant_models(accepts))
        stages.accept(run)
    old, new = (
        {e.prompt: e.response for e in read(tmp_path / out / "accepted.jsonl", Example)} for out in ("run", "new")
    )
    assert new == old and "harmful 2" not in new


# Which one is kept


def attempt(rung, sample, decision="safe", marks=(), guard="g"):
    response = Response("q", "harmful", "t", "id", "prefix", sample, rung=rung)
    verdict = Verdict("id", sample, "harmful", "prefix", decision, "", None, None, None, guard, rung=rung)
    made = [Mark("id", sample, "", word, by, "2026-01-01T00:00:00Z") for by, word in marks]
    return Attempt(response, verdict, made)


@pytest.mark.parametrize(
    "attempts, kept",
    [
        ([attempt(0, 0, "unsafe"), attempt(1, 1), attempt(1, 2)], (1, 1)),
        ([attempt(0, 0, "unknown"), attempt(0, 1, "unsafe")], None),
        ([attempt(0, 1), attempt(0, 0)], (0, 0)),
        ([attempt(0, 0), attempt(0, 1, "unsafe", [("ann", "accept")])], (0, 1)),
        ([attempt(0, 0, "safe", [("ann", "reject")]), attempt(1, 1)], (1, 1)),
        ([attempt(0, 0, "safe", [("ann", "reject"), ("bob", "accept")])], None),
        ([attempt(0, 0, "safe", [("ann", "reject"), ("ann", "accept")])], (0, 0)),
        ([attempt(0, 0, "dropped", [("ann", "accept")])], None),
    ],
)
def test_the_first_accepted_is_kept_and_a_person_goes_before_a_guard(attempts, kept):
    found = choose(attempts)
    assert (found and (found.response.rung, found.response.sample)) == kept


def test_who_accepted_is_told_apart():
    assert attempt(0, 0).accepted_by == "g"
    marked = attempt(0, 0, "safe", [("bob", "accept"), ("ann", "accept")])
    assert marked.accepted_by == marked.example.accepted_by == "person: ann, bob"
    assert attempt(0, 0, "safe", [("ann", "reject")]).accepted_by == ""
    assert attempt(0, 0, "unknown").accepted_by == ""


# Size


@pytest.mark.slow
def test_a_hundred_thousand_records_in_bounded_memory(tmp_path):
    """400 MB of responses, every third prompt tried twice: what is held is where each record lies."""
    script = Path(__file__).parents[1] / "support/instant_run.py"
    command = [sys.executable, str(script), str(tmp_path / "big"), "100000", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shards = [tmp_path / "big/run/responses.jsonl", tmp_path / "big/run/rungs/1.responses.jsonl"]
    assert sum(file.stat().st_size for file in shards) > 400e6
    assert len((tmp_path / "big/run/accepted.jsonl").read_bytes().splitlines()) == 100_000
    assert float(done.stdout) < 150, "MiB above what the imports took"
