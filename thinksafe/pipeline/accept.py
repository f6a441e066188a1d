"""Stage accept: select the response of each prompt that the student is trained on."""

from pathlib import Path

from thinksafe.data.atomic import atomic_writer
from thinksafe.data.jsonl import to_json
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
        with atomic_writer(stage.files[0]) as accepted_file, atomic_writer(stage.files[1]) as audit_file:
            for prompt_attempts in attempts:
                if kept := run.recipe.method.choose(prompt_attempts):
                    accepted_file.write(to_json(kept.example) + "\n")
                audit_file.write(to_json(audit_record(prompt_attempts, kept)) + "\n")


def require_accepted_examples(run: RunDir) -> Path:
    """Return the path of accepted.jsonl, once this worker sees the same contents as the leader.

    All workers call this together.

    Raises:
        UserError: the file does not exist yet, was changed after stage `accept` wrote it, is empty, or differs on this
            machine.
    """
    remedy = "`thinksafe filter` first, or use --data FILE"
    accepted = require_stage_output(run, run.path / "accepted.jsonl", "accept", remedy)
    write_on_leader(accepted, run.workers)
    if accepted.stat().st_size == 0:
        raise UserError(f"{accepted}: no response was accepted, so there is nothing to train on; see verdicts.jsonl")
    return accepted
