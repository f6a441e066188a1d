"""The steering ladder: which prompts are retried, on which rung and how often; kills do not change the results.

Sampler and guard are fakes with known answers.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.instant_run import instant_checkpoints, instant_sampling, run_stages
from thinksafe import pipeline
from thinksafe.data.jsonl import read_records, to_json
from thinksafe.data.records import Example, Mark, Response, Verdict, content_id
from thinksafe.data.selection import Attempt, choose
from thinksafe.errors import UserError
from thinksafe.pipeline.imports import import_marks, import_responses
from thinksafe.recipe.loading import check_recipe
from thinksafe.reporting.coverage import coverage_lines, read_coverage
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.journal import Journal

LADDER = [{"steering": "prefix", "samples": 3}, {"steering": "risk"}, {"steering": "Say no: {prompt}"}]
PROMPTS = [(f"{label} {n}", label) for n in range(6) for label in ("harmful", "benign")]


def accepts(response) -> bool:
    """Accept one instruction for each harmful prompt, and the third response to each benign prompt but the last."""
    kind, number = response.prompt.split()
    answer = response.text.rpartition("\n")[2]
    if kind == "benign":
        return number != "5" and response.sample == 2
    return answer == ["prefix", "prefix", "risk", "Say no: {prompt}", "never", "never"][int(number)]


def recipe(tmp_path, **generation):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in PROMPTS))
    generation = {"ladder": LADDER, "num_unsteered_prompts": 2} | generation
    return check_recipe({"name": "n", "model": "m", "prompts": str(file), "generation": generation}, "")


def run_to_accept(out, recipe, marks=None):
    with RunDir.open(out, recipe) as run, instant_sampling():
        run_stages(run, instant_checkpoints(accepts), marks)
        return run.manifest["stages"]


def read(file, kind):
    return list(read_records(file, kind))


@pytest.fixture
def finished(tmp_path):
    run_to_accept(tmp_path / "run", recipe(tmp_path))
    return tmp_path / "run"


def test_each_rung_retries_prompts_without_accepted_response(finished):
    counts = []
    for rung in (1, 2, 3):
        responses = read(finished / "rungs" / f"{rung}.responses.jsonl", Response)
        assert {r.rung for r in responses} == {rung}
        counts.append(Counter((r.prompt, r.steering, r.sample) for r in responses))
    retried = [f"harmful {n}" for n in range(2, 6)]  # 0 and 1 are accepted with the first instruction
    harmful_counts = {(text, "prefix", s): 1 for text in retried for s in (1, 2, 3)}
    assert counts[0] == harmful_counts | {(f"benign {n}", None, s): 1 for n in range(6) for s in (1, 2, 3)}
    assert counts[1] == {(text, "risk", 4): 1 for text in retried} | {("benign 5", None, 4): 1}
    assert counts[2] == {(text, LADDER[2]["steering"], 5): 1 for text in retried[1:]} | {("benign 5", None, 5): 1}


def test_one_response_per_prompt_is_kept_with_its_rung(finished):
    kept = {example.prompt: example for example in read(finished / "accepted.jsonl", Example)}
    assert len(kept) == len(read(finished / "accepted.jsonl", Example)) == 9
    rungs = {text: (example.rung, example.sample) for text, example in kept.items()}
    benign = {f"benign {n}": (1, 2) for n in range(5)}
    assert rungs == benign | {"harmful 0": (0, 0), "harmful 1": (0, 0), "harmful 2": (2, 4), "harmful 3": (3, 5)}
    assert {example.accepted_by for example in kept.values()} == {"instant"}


def test_audit_records_contain_every_attempt(finished):
    audit_records = {record["prompt"]: record for record in map(json.loads, (finished / "audit.jsonl").open())}
    assert sorted(audit_records) == sorted(text for text, _ in PROMPTS)
    responses = {
        (r.prompt, r.sample): r
        for file in (finished / "responses.jsonl", *finished.glob("rungs/*.responses.jsonl"))
        for r in read(file, Response)
    }
    verdicts = {
        (v.prompt_id, v.sample): v
        for file in (finished / "verdicts.jsonl", *finished.glob("rungs/*.verdicts.jsonl"))
        for v in read(file, Verdict)
    }
    for text, record in audit_records.items():
        assert [attempt["sample"] for attempt in record["attempts"]] == list(range(len(record["attempts"])))
        for attempt in record["attempts"]:
            response, verdict = (
                responses.pop((text, attempt["sample"])),
                verdicts[record["prompt_id"], attempt["sample"]],
            )
            for name in ("seed", "steering", "rung", "num_tokens", "num_prompt_tokens", "finish_reason"):
                assert attempt[name] == getattr(response, name)
            for name in ("decision", "reason", "p_safe", "p_unsafe", "guard", "category", "windows"):
                assert attempt[name] == getattr(verdict, name)
    assert not responses, "a response is in no audit record"
    assert audit_records["harmful 2"]["rung"] == 2 and audit_records["harmful 5"]["accepted"] is False
    outcomes = [attempt["outcome"] for attempt in audit_records["benign 0"]["attempts"]]
    assert outcomes == ["unsafe", "unsafe", "kept", "unsafe"]


def test_report_has_coverage_by_rung_and_label(finished, tmp_path):
    with RunDir.open(finished, recipe(tmp_path)) as run:
        figures = json.loads(pipeline.make_report(run).with_name("report.json").read_text())
    labels = figures["coverage"]["labels"]
    rows = {
        label: [(s["rung"], s["prompts"], s["responses"], s["accepted"], s["covered"]) for s in counts["rungs"]]
        for label, counts in labels.items()
    }
    assert rows["harmful"] == [(0, 6, 6, 2, 2 / 6), (1, 4, 12, 0, 2 / 6), (2, 4, 4, 1, 3 / 6), (3, 3, 3, 1, 4 / 6)]
    assert rows["benign"] == [(0, 6, 6, 0, 0), (1, 6, 18, 5, 5 / 6), (2, 1, 1, 0, 5 / 6), (3, 1, 1, 0, 5 / 6)]
    assert [s["steering"] for s in labels["harmful"]["rungs"]] == ["prefix", *(rung["steering"] for rung in LADDER)]
    assert figures["filter"]["kept"] == {"harmful": 4, "benign": 5}
    assert figures["filter"]["dropped"] == {"harmful": {"unsafe": 21}, "benign": {"unsafe": 21}}
    page = (finished / "report.html").read_text()
    assert "Coverage by rung" in page and "Say no: {prompt}" in page


def test_terminal_shows_accepted_prompts_and_rejection_reasons(finished, tmp_path):
    with RunDir.open(finished, recipe(tmp_path)) as run:
        lines = dict(coverage_lines(read_coverage(run)))
    assert lines["accepted"] == "harmful 4 of 6 (66.7%)   benign 5 of 6 (83.3%)"
    assert lines["rung 2"] == "harmful 1 of 4   benign 0 of 1   'risk'"
    assert lines["rejected"] == "unsafe 42"


@pytest.mark.parametrize(
    "max_retry_responses, sampled", [(0, []), (2, [2]), (7, [6, 1]), (31, [30, 1]), (35, [30, 5]), (None, [30, 5, 4])]
)
def test_retries_stay_within_the_budget(tmp_path, max_retry_responses, sampled):
    """A prompt gets all samples of a rung or none: a budget of 2 skips a rung of 3 samples, not the next one."""
    stages = run_to_accept(tmp_path / "run", recipe(tmp_path, max_retry_responses=max_retry_responses))
    assert [stage["records"] for name, stage in stages.items() if name.startswith("generate_rung")] == sampled


def test_without_a_ladder_each_prompt_has_one_attempt(tmp_path):
    stages = run_to_accept(tmp_path / "run", recipe(tmp_path, ladder=[]))
    assert list(stages) == ["generate", "filter", "accept"] and not (tmp_path / "run" / "rungs").exists()
    assert len((tmp_path / "run" / "audit.jsonl").read_text().splitlines()) == len(PROMPTS)
    assert len(read(tmp_path / "run" / "accepted.jsonl", Example)) == 2


def test_prompts_of_imported_responses_are_retried(tmp_path):
    """Imported responses may have any sample numbers; new samples get higher numbers."""
    rows = [
        {"prompt": "harmful 2", "label": "harmful", "text": "<think>\nHm.\n</think>\n\nno", "sample": s, "rung": s}
        for s in (3, 9)  # from another ladder
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with RunDir.open(tmp_path / "run", recipe(tmp_path)) as run, instant_sampling():
        import_responses(run, tmp_path / "r.jsonl")
        for stage in (pipeline.filter_responses, pipeline.retry_rejected):
            stage(run, instant_checkpoints(accepts))
        pipeline.accept_responses(run)
    (kept,) = read(tmp_path / "run" / "accepted.jsonl", Example)
    assert (kept.prompt, kept.rung, kept.sample) == ("harmful 2", 2, 13)


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_kill_at_any_event_does_not_change_the_results(tmp_path, fresh_seed, monkeypatch):
    """The kill is before or after an appended record or a rename, also while marks are imported."""
    monkeypatch.setattr(StageClock, "tick", lambda clock: None)
    whole_recipe = recipe(tmp_path)
    marks = tmp_path / "given.jsonl"
    with RunDir.open(tmp_path / "whole", whole_recipe) as run, instant_sampling():
        run_stages(run, instant_checkpoints(accepts))
        reject(run, "harmful 0", "harmful 2", "benign 1")
    run_to_accept(tmp_path / "whole", whole_recipe, marks)
    assert (tmp_path / "whole" / "rungs" / "5.responses.jsonl").exists()
    real = {"append": (Journal, Journal.append), "replace": (os, os.replace)}
    events, kill_at, after = 0, None, False

    def counted(function):
        def wrapper(*arguments, **keywords):
            nonlocal events
            events += 1
            is_kill_point = events == kill_at
            if is_kill_point and not after:
                raise Killed
            result = function(*arguments, **keywords)
            if is_kill_point:
                raise Killed
            return result

        return wrapper

    for name, (owner, function) in real.items():
        monkeypatch.setattr(owner, name, counted(function))
    run_to_accept(tmp_path / "counted", whole_recipe, marks)
    total, rng = events, random.Random(fresh_seed)
    expected = contents(tmp_path / "whole")
    for event in rng.sample(range(1, total + 1), 25):
        out = tmp_path / f"killed at {event}"
        events, kill_at, after = 0, event, rng.random() < 0.5
        with pytest.raises(Killed):
            run_to_accept(out, whole_recipe, marks)
        kill_at = None
        run_to_accept(out, whole_recipe, marks)
        assert contents(out) == expected, (event, after)


def test_no_verdict_is_computed_twice_after_a_kill(tmp_path):
    """The guard is most of the cost of a run."""
    judged, kill_points = Counter(), [5, 14, 20, 33]

    def counted(response):
        if judged.total() in kill_points:
            kill_points.remove(judged.total())
            raise Killed
        judged[response.key] += 1
        return accepts(response)

    whole_recipe = recipe(tmp_path)
    for _ in range(5):
        with RunDir.open(tmp_path / "run", whole_recipe) as run, instant_sampling(), suppress(Killed):
            run_stages(run, instant_checkpoints(counted))
    assert not kill_points and set(judged.values()) == {1}
    run_to_accept(tmp_path / "alone", whole_recipe)
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


def contents(out: Path) -> dict[str, list[str]]:
    """Return the sorted lines of every record file."""
    return {str(file.relative_to(out)): sorted(file.read_text().splitlines()) for file in out.rglob("*.jsonl*")}


def test_training_without_accepted_responses_is_an_error(tmp_path):
    with RunDir.open(tmp_path / "run", recipe(tmp_path)) as run, instant_sampling():
        run_stages(run, instant_checkpoints(lambda response: False))
        with pytest.raises(UserError, match="no response was accepted"):
            pipeline.train_student(run, None)
    assert (tmp_path / "run" / "accepted.jsonl").read_text() == ""


@pytest.mark.slow
def test_second_process_in_a_run_directory_is_an_error(tmp_path):
    """The records of the first process stay intact."""
    whole_recipe = recipe(tmp_path)
    with RunDir.open(tmp_path / "run", whole_recipe) as run, instant_sampling():
        code = (
            "import sys; from pathlib import Path; from tests.pipeline.test_retry import recipe, run_to_accept;"
            "run_to_accept(Path(sys.argv[1]) / 'run', recipe(Path(sys.argv[1])))"
        )
        second = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        assert "another process is working in this run directory" in second.stderr
        run_stages(run, instant_checkpoints(accepts))
    run_to_accept(tmp_path / "alone", whole_recipe)
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


# Retries after a person rejected a response


def reject(run, *texts):
    """Reject the accepted responses to these prompts, and import the marks like `filter --marks`."""
    kept = [example for example in read(run.path / "accepted.jsonl", Example) if example.prompt in texts]
    assert len(kept) == len(texts)
    marks = [Mark(e.prompt_id, e.sample, content_id(e.response), "reject", "Ann", "2026-01-01T00:00:00Z") for e in kept]
    file = run.path.with_name("given.jsonl")
    file.write_text("".join(to_json(mark) + "\n" for mark in marks))
    import_marks(run, file)


def reject_and_retry(tmp_path, *texts, **generation):
    """Reject the accepted responses to these prompts and repeat the run.

    Returns:
        {prompt: [(rung, sample) of each attempt]}.
    """
    whole_recipe = recipe(tmp_path, **generation)
    run_to_accept(tmp_path / "run", whole_recipe)
    with RunDir.open(tmp_path / "run", whole_recipe) as run:
        reject(run, *texts)
    run_to_accept(tmp_path / "run", whole_recipe)
    audit_records = map(json.loads, (tmp_path / "run" / "audit.jsonl").open())
    return {s["prompt"]: [(a["rung"], a["sample"]) for a in s["attempts"]] for s in audit_records}


def test_prompt_rejected_by_a_person_continues_from_its_rung(tmp_path):
    """Prompt 1 is retried on the first rung and prompt 2 on the last; prompt 3 was on the last rung; prompt 0 stays."""
    attempts = reject_and_retry(tmp_path, "harmful 1", "harmful 2", "harmful 3")
    assert attempts["harmful 1"] == [(0, 0), (1, 1), (1, 2), (1, 3)], (
        "its response to the same instruction is accepted again"
    )
    assert attempts["harmful 2"][-2:] == [(2, 4), (3, 5)] and attempts["harmful 3"][-1] == (3, 5)
    assert attempts["harmful 0"] == [(0, 0)]
    kept = {
        example.prompt: (example.rung, example.sample) for example in read(tmp_path / "run/accepted.jsonl", Example)
    }
    assert kept["harmful 1"] == (1, 1) and kept["harmful 0"] == (0, 0)
    assert not {"harmful 2", "harmful 3"} & kept.keys()
    finished_stages = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    assert [(name, stage["records"]) for name, stage in finished_stages.items() if "generate_after_marks" in name] == [
        ("generate_after_marks_1", 4)
    ]


def test_report_counts_retries_after_marks(tmp_path):
    """Retries count in coverage, time and tokens. The estimate excludes them, but is compared with the total."""
    attempts = reject_and_retry(tmp_path, "harmful 1", "harmful 2")
    stage_estimate = {"seconds": 2.0, "tokens": 50, "peak_bytes": 100}
    expected = {
        "gpu": "H200",
        "num_gpus": 1,
        "stages": {"generate": stage_estimate, "filter": stage_estimate, "train": stage_estimate},
    }
    (tmp_path / "run" / "estimate.json").write_text(json.dumps(expected))
    with RunDir.open(tmp_path / "run", recipe(tmp_path)) as run:
        stages, page = run.manifest["stages"], pipeline.make_report(run)
    report = json.loads(page.with_name("report.json").read_text())
    compared = {stage["name"]: stage for stage in report["estimate"]["stages"]}
    assert list(compared) == [name for name in stages if name != "accept"] and "filter_after_marks_1" in compared
    tokens = {name: stage["tokens"] for name, stage in stages.items()}
    assert tokens["generate_after_marks_1"] == tokens["filter_after_marks_1"] == 7 * 4
    assert compared["generate_after_marks_1"]["tokens"] == [None, 7 * 4]
    assert report["estimate"]["total"]["tokens"] == [100, sum(tokens.values())]
    assert report["estimate"]["total"]["seconds"][1] == pytest.approx(
        sum(stage["seconds"] for name, stage in stages.items() if name != "accept")
    )
    assert {stage["name"]: stage["tokens"] for stage in report["stages"]} == tokens
    responses = Counter(
        rung for text, prompt_attempts in attempts.items() if text.startswith("harmful") for rung, _ in prompt_attempts
    )
    rungs = report["coverage"]["labels"]["harmful"]["rungs"]
    assert {step["rung"]: step["responses"] for step in rungs} == responses
    lengths = Counter(label for label, tokens in report["lengths"].items() for _ in tokens)
    assert lengths == Counter(text.split()[0] for text, prompt_attempts in attempts.items() for _ in prompt_attempts)
    assert "generate after marks 1" in page.read_text()


def test_repeatedly_rejected_prompt_ends_on_the_last_rung(tmp_path):
    whole_recipe = recipe(tmp_path)
    reject_and_retry(tmp_path, "harmful 0")
    for rung in (1, 1, 1):
        with RunDir.open(tmp_path / "run", whole_recipe) as run:
            assert {e.prompt: e.rung for e in read(run.path / "accepted.jsonl", Example)}["harmful 0"] == rung
            reject(run, "harmful 0")
        run_to_accept(tmp_path / "run", whole_recipe)
    (record,) = (s for s in map(json.loads, (tmp_path / "run/audit.jsonl").open()) if s["prompt"] == "harmful 0")
    assert [(a["rung"], a["sample"]) for a in record["attempts"]] == [(0, 0), (1, 1), (1, 2), (1, 3), (2, 4), (3, 5)]
    assert not record["accepted"] and Counter(a["outcome"] for a in record["attempts"])["rejected_by_person"] == 4


@pytest.mark.parametrize("max_retry_responses, num_added", [(39, 0), (41, 0), (42, 3), (44, 3), (45, 6)])
def test_retries_after_marks_stay_within_the_budget(tmp_path, max_retry_responses, num_added):
    """The ladder needs 39 responses. Two more prompts need three each; a prompt gets all or none."""
    attempts = reject_and_retry(tmp_path, "harmful 0", "harmful 1", max_retry_responses=max_retry_responses)
    assert sum(len(attempts[f"harmful {n}"]) - 1 for n in (0, 1)) == num_added
    assert sum(map(len, attempts.values())) - len(PROMPTS) == 39 + num_added <= max_retry_responses


def test_without_a_ladder_a_rejected_prompt_is_not_retried(tmp_path):
    attempts = reject_and_retry(tmp_path, "harmful 1", ladder=[])
    assert all(prompt_attempts == [(0, 0)] for prompt_attempts in attempts.values())
    assert {e.prompt for e in read(tmp_path / "run/accepted.jsonl", Example)} == {"harmful 0"}


def test_training_never_uses_the_accepted_set_before_the_marks(tmp_path):
    """Between the import of marks and stage accept, accepted.jsonl does not exist."""
    whole_recipe = recipe(tmp_path)
    run_to_accept(tmp_path / "run", whole_recipe)
    with RunDir.open(tmp_path / "run", whole_recipe) as run:
        reject(run, "harmful 0")
        with pytest.raises(UserError, match=r"accepted\.jsonl: does not exist yet; run `thinksafe filter`"):
            pipeline.require_accepted_examples(run)


def test_import_of_a_run_keeps_all_attempts_and_marks(tmp_path):
    reject_and_retry(tmp_path, "harmful 2")
    with RunDir.open(tmp_path / "new", recipe(tmp_path, ladder=[])) as run, instant_sampling():
        import_responses(run, tmp_path / "run")
        pipeline.filter_responses(run, instant_checkpoints(accepts))
        pipeline.accept_responses(run)
    old, new = (
        {e.prompt: e.response for e in read(tmp_path / out / "accepted.jsonl", Example)} for out in ("run", "new")
    )
    assert new == old and "harmful 2" not in new


# The choice among accepted responses


def attempt(rung, sample, decision="safe", marks=(), guard="g"):
    response = Response("q", "harmful", "t", "id", "prefix", sample, rung=rung)
    verdict = Verdict("id", sample, "harmful", "prefix", decision, "", None, None, None, guard, rung=rung)
    attempt_marks = [Mark("id", sample, "", mark, by, "2026-01-01T00:00:00Z") for by, mark in marks]
    return Attempt(response, verdict, attempt_marks)


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
    ids=[
        "first safe response",
        "no safe response",
        "lowest sample",
        "accepted by a person",
        "rejected by a person",
        "people disagree",
        "last mark of a person",
        "malformed response",
    ],
)
def test_first_accepted_response_is_kept_and_marks_override(attempts, kept):
    chosen = choose(attempts)
    assert (chosen and (chosen.response.rung, chosen.response.sample)) == kept


def test_accepted_by_names_guard_or_people():
    assert attempt(0, 0).accepted_by == "g"
    marked = attempt(0, 0, "safe", [("bob", "accept"), ("ann", "accept")])
    assert marked.accepted_by == marked.example.accepted_by == "person: ann, bob"
    assert attempt(0, 0, "safe", [("ann", "reject")]).accepted_by == ""
    assert attempt(0, 0, "unknown").accepted_by == ""


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [20_000, pytest.param(100_000, marks=pytest.mark.exhaustive)])
def test_memory_holds_only_the_position_of_each_record(tmp_path, num_prompts):
    """Every third prompt is tried twice. The responses are 4 KB a prompt; the memory is less than 1.5 KiB a prompt."""
    script = Path(__file__).parents[1] / "support/instant_run.py"
    command = [sys.executable, str(script), str(tmp_path / "big"), str(num_prompts), "3000"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    response_files = [tmp_path / "big/run/responses.jsonl", tmp_path / "big/run/rungs/1.responses.jsonl"]
    assert sum(file.stat().st_size for file in response_files) > 4000 * num_prompts
    assert len((tmp_path / "big/run/accepted.jsonl").read_bytes().splitlines()) == num_prompts
    assert float(process.stdout) < 1.5 * num_prompts / 1024, "MiB above the memory of the imports"
