"""Import responses, examples and marks from files outside the run directory."""

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from thinksafe.data.atomic import sha256, write_shard
from thinksafe.data.jsonl import read_records, take_in
from thinksafe.data.records import Example, Mark, Response, content_id
from thinksafe.errors import UserError
from thinksafe.run.directory import RunDir
from thinksafe.run.marks import filter_anew


def take_in_responses(run: RunDir, file: Path) -> None:
    """Use responses from elsewhere as this run's; of another run's directory all, and people's marks on them.

    Raises:
        UserError: the run has begun to sample its own.
    """
    if (run.path / "prompts.jsonl").exists() and not run.is_done("generate"):
        raise UserError(f"--responses {file}: {run.path} samples responses of its own; give a new --out folder")
    files = [file / "responses.jsonl", *sorted(file.glob("rungs/*.responses.jsonl"))] if file.is_dir() else [file]
    taken = chain.from_iterable(take_in(each, Response) for each in files)
    # Whatever ladder they come from, here they are the first attempts.
    _use(run.path / "responses.jsonl", (replace(response, rung=0) for response in taken))
    marks, there = file / "marks.jsonl", run.path / "marks.jsonl"
    if marks.exists() and not there.exists():
        write_shard(there, read_records(marks, Mark))


def take_in_examples(run: RunDir, file: Path) -> None:
    """Use examples from elsewhere as this run's accepted data set."""
    _use(run.path / "accepted.jsonl", take_in(file, Example))


def take_in_marks(run: RunDir, file: Path) -> None:
    """Add people's marks to those that the run has; what is accepted is decided anew.

    Raises:
        UserError: a mark on a response that this run does not hold, or one that comes after training has begun.
    """
    new = list(read_records(file, Mark))
    wanted = {(mark.prompt_id, mark.sample) for mark in new}
    texts = {
        (response.prompt_id, response.sample): content_id(response.text)
        for responses, _ in run.rungs()
        for response in read_records(responses, Response)
        if (response.prompt_id, response.sample) in wanted
    }
    for number, mark in enumerate(new, start=1):
        if texts.get((mark.prompt_id, mark.sample)) != mark.text_id:
            raise UserError(
                f"{file}: record {number} marks a response that is not in this run (prompt {mark.prompt_id}, sample "
                f"{mark.sample}); take marks from this run's own review page"
            )
    there = run.path / "marks.jsonl"
    known = list(read_records(there, Mark)) if there.exists() else []
    if not (added := [mark for mark in dict.fromkeys(new) if mark not in known]):
        return
    if run.training_has_begun:
        raise UserError(
            f"--marks {file}: the run has already been trained without these; take its records over into a new folder: "
            f"{filter_anew(run, file)}"
        )
    run.forget_stage("accept")
    (run.path / "accepted.jsonl").unlink(missing_ok=True)  # or `train` would take it for one from elsewhere
    write_shard(there, sorted([*known, *added], key=lambda mark: mark.moment))


def _use(shard: Path, records: Iterable[Response | Example]) -> None:
    taken = shard.with_name(shard.name + ".taken")
    write_shard(taken, records)
    if shard.exists() and sha256(shard) != sha256(taken):
        taken.unlink()
        raise UserError(f"{shard}: the run already has other records here; give a new --out folder")
    os.replace(taken, shard)
