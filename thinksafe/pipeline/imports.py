"""Import of responses, examples and marks from files outside the run directory."""

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from thinksafe.data.atomic import sha256, write_records
from thinksafe.data.jsonl import import_records, read_records
from thinksafe.data.records import Example, Mark, Response, content_id
from thinksafe.distributed.workers import leader_only
from thinksafe.errors import UserError
from thinksafe.pipeline.checks import check_unique_samples
from thinksafe.run.directory import RunDir, check_format
from thinksafe.run.marks import refilter_command


@leader_only
def import_responses(run: RunDir, file: Path) -> None:
    """Write responses.jsonl from responses that exist already, to be judged as first attempts (rung 0).

    Args:
        file: file of responses; or another run directory, of which all responses of all rungs are imported, and its
            human marks if this run has none yet.

    Raises:
        UserError: this run samples responses or holds other ones; a file cannot be read as responses; or two responses
            to a prompt have the same sample.
    """
    if file.is_dir():
        check_format(file, "train on its accepted.jsonl with --data")
    if (run.path / "prompts.jsonl").exists() and not run.is_done("generate"):
        raise UserError(f"--responses {file}: {run.path} already samples responses; use a new --out folder")
    files = [file / "responses.jsonl", *sorted(file.glob("rungs/*.responses.jsonl"))] if file.is_dir() else [file]
    responses = chain.from_iterable(import_records(source, Response) for source in files)
    _install_records(run.path / "responses.jsonl", (replace(response, rung=0) for response in responses), file)
    imported_marks, marks_file = file / "marks.jsonl", run.path / "marks.jsonl"
    if imported_marks.exists() and not marks_file.exists():
        write_records(marks_file, read_records(imported_marks, Mark))


@leader_only
def import_examples(run: RunDir, file: Path) -> None:
    """Write accepted.jsonl from a file of examples, to train on them. Raise a UserError if the file cannot be read as
    examples, or if the run holds other ones."""
    _install_records(run.path / "accepted.jsonl", import_records(file, Example), file)


@leader_only
def import_marks(run: RunDir, file: Path) -> None:
    """Add the human marks of a JSONL file to the run's marks.jsonl, in order of their time. If any mark is new, stage
    `accept` becomes unfinished and accepted.jsonl is deleted.

    Raises:
        UserError: a mark refers to a response or a text that this run does not hold, or contradicts another mark of the
            same person and time; or a mark is new although training has begun.
    """
    new_marks = list(read_records(file, Mark))
    marked = {(mark.prompt_id, mark.sample) for mark in new_marks}
    texts = {
        (response.prompt_id, response.sample): content_id(response.text)
        for responses_file, _ in run.attempt_files()
        for response in read_records(responses_file, Response)
        if (response.prompt_id, response.sample) in marked
    }
    for number, mark in enumerate(new_marks, start=1):
        if texts.get((mark.prompt_id, mark.sample)) != mark.text_id:
            raise UserError(
                f"{file}: record {number} marks a response that is not in this run (prompt {mark.prompt_id}, sample "
                f"{mark.sample}); use marks from the review page of this run"
            )
    marks_file = run.path / "marks.jsonl"
    known_marks = dict.fromkeys(read_records(marks_file, Mark) if marks_file.exists() else ())
    added_marks = [mark for mark in dict.fromkeys(new_marks) if mark not in known_marks]
    if not added_marks:
        return
    decisions: dict[tuple, str] = {}
    for mark in [*known_marks, *added_marks]:
        key = (mark.prompt_id, mark.sample, mark.by, mark.timestamp)
        if decisions.setdefault(key, mark.decision) != mark.decision:
            raise UserError(
                f"--marks {file}: {mark.by} accepts and rejects sample {mark.sample} of prompt {mark.prompt_id} at the "
                f"same time, {mark.at}; remove one of the two marks"
            )
    if run.training_has_begun:
        raise UserError(
            f"--marks {file}: the run has already been trained without these marks; filter its responses again in a "
            f"new folder: {refilter_command(run, file)}"
        )
    run.invalidate_stage("accept")
    (run.path / "accepted.jsonl").unlink(missing_ok=True)  # otherwise `train` would treat it as an imported file
    write_records(marks_file, sorted([*known_marks, *added_marks], key=lambda mark: mark.timestamp))


def _install_records(file: Path, records: Iterable[Response | Example], source: Path) -> None:
    """Write records from a source to a JSONL file. If the file exists, it must have exactly these records, else raise a
    UserError; also if two of them are responses to one prompt with the same sample."""
    new_file = file.with_suffix(".new.jsonl")
    try:
        write_records(new_file, records)
        if file.name == "responses.jsonl":
            check_unique_samples(new_file, source)
        if file.exists() and sha256(file) != sha256(new_file):
            raise UserError(f"{file}: already has other records; use a new --out folder")
        os.replace(new_file, file)
    finally:
        new_file.unlink(missing_ok=True)
