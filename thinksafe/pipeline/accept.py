"""Stage accept: select the response of each prompt that the student is trained on."""

from pathlib import Path

from thinksafe.data.atomic import atomic_writer
from thinksafe.data.jsonl import read_records, to_json
from thinksafe.data.records import Response, Verdict
from thinksafe.data.selection import audit_record
from thinksafe.distributed.workers import leader_only
from thinksafe.errors import UserError
from thinksafe.pipeline.checks import require_stage_output
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_on_leader
from thinksafe.run.marks import read_marks
from thinksafe.run.stage import run_stage


@leader_only
def accept_responses(run: RunDir) -> None:
    """Write accepted.jsonl, one example for each prompt that has an accepted response, and audit.jsonl.

    If several responses to a prompt are accepted, the method chooses one (`Method.choose`). audit.jsonl has one record
    for every prompt: all of its attempts and their outcomes. If the stage is finished, nothing is written.

    Raises:
        UserError: a record cannot be read, or the stage is finished and its files were changed.
    """
    if run.is_done("accept"):
        return
    with run_stage(run, "accept") as stage:
        marks = read_marks(run)
        attempts = Attempts(run, marks)
        stage.files = [run.path / "accepted.jsonl", run.path / "audit.jsonl"] + [run.path / "marks.jsonl"] * bool(marks)
        stage.records = len(attempts)
        rejected = _rejected_responses(run) if run.recipe.method.needs_rejected else {}
        with atomic_writer(stage.files[0]) as accepted_file, atomic_writer(stage.files[1]) as audit_file:
            for prompt_attempts in attempts:
                kept = run.recipe.method.choose(prompt_attempts, run.recipe.seed)
                if kept and (example := run.recipe.method.example(kept, rejected.get(kept.response.prompt_id))):
                    accepted_file.write(to_json(example) + "\n")
                audit_file.write(to_json(audit_record(prompt_attempts, kept)) + "\n")


def _rejected_responses(run: RunDir) -> dict[str, str]:
    """Return prompt id -> text of the unsteered response that the guard calls unsafe."""
    responses = read_records(run.path / "unsteered.jsonl", Response)
    verdicts = read_records(run.path / "unsteered_verdicts.jsonl", Verdict)
    return {
        response.prompt_id: response.text
        for response, verdict in zip(responses, verdicts, strict=True)
        if verdict.decision == "unsafe"
    }


def require_accepted_examples(run: RunDir) -> Path:
    """Return the path of accepted.jsonl, once this worker sees the same contents as the leader.

    All workers call this together.

    Raises:
        UserError: the file does not exist yet, was changed after stage `accept` or `load` wrote it, is empty, or
            differs on this machine.
    """
    remedy = "`thinksafe filter` first, or use --data FILE"
    stage = "load" if "load" in run.recipe.method.stages else "accept"
    accepted = require_stage_output(run, run.path / "accepted.jsonl", stage, remedy)
    write_on_leader(accepted, run.workers)
    if accepted.stat().st_size == 0:
        raise UserError(f"{accepted}: no response was accepted, so there is nothing to train on; see verdicts.jsonl")
    return accepted
