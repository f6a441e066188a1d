"""What is kept of the attempts at every prompt, to train on."""

import json
from pathlib import Path

from thinksafe.data.atomic import replacing
from thinksafe.data.jsonl import to_json
from thinksafe.data.selection import choose, story
from thinksafe.errors import UserError
from thinksafe.pipeline.checks import required
from thinksafe.run.attempts import Attempts
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_for_all
from thinksafe.run.marks import read_marks


def accept(run: RunDir) -> None:
    """Keep one accepted response of every prompt as a training example, and write down every prompt's story."""
    if run.is_done("accept"):
        return
    clock, marks = run.clock("accept"), read_marks(run)
    attempts = Attempts(run, marks)
    files = [run.path / "accepted.jsonl", run.path / "audit.jsonl"]
    with replacing(files[0]) as accepted, replacing(files[1]) as audit:
        for tried in attempts:
            if kept := choose(tried):
                accepted.write(to_json(kept.example) + "\n")
            audit.write(json.dumps(story(tried), ensure_ascii=False) + "\n")
    run.finish_stage("accept", files + [run.path / "marks.jsonl"] * bool(marks), clock, tokens=0, records=len(attempts))


def examples_file(run: RunDir) -> Path:
    """Where the accepted examples are. All workers ask together.

    Raises:
        UserError: nothing was judged yet, or nothing accepted.
    """
    accepted = required(run, run.path / "accepted.jsonl", "accept", "`thinksafe filter` first, or give --data FILE")
    write_for_all(accepted, run.workers)
    if accepted.stat().st_size == 0:
        raise UserError(f"{accepted}: no response was accepted, so there is nothing to train on; see verdicts.jsonl")
    return accepted
