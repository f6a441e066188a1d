"""What stages take in: files become records and training sequences, or are refused where they would mislead a stage.

Files come from this run, from elsewhere (`--responses`, `--data`) or from the recipe's evaluation sets.
"""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from thinksafe.chat import Chat, parse_response
from thinksafe.errors import UserError
from thinksafe.files import sha256, write_atomically, write_shard
from thinksafe.model.weights import load_config
from thinksafe.models import Models
from thinksafe.prompts import load_rows
from thinksafe.recipe import EvaluationSet, Recipe
from thinksafe.records import (
    Example,
    Mark,
    Prompt,
    Response,
    content_id,
    prompts_from_rows,
    read_records,
    take_in,
)
from thinksafe.rundir import RunDir
from thinksafe.training.packing import TrainingSequence


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


def filter_anew(run: RunDir, marks: Path | str) -> str:
    """The command that decides on a run's responses again where its training can no longer be changed."""
    recipe, responses, marks = (shlex.quote(str(path)) for path in (run.path / "recipe.yaml", run.path, marks))
    return f"thinksafe filter --recipe {recipe} --responses {responses} --marks {marks} --out NEW"


def read_marks(run: RunDir) -> dict[tuple[str, int], list[Mark]]:
    """Marks by prompt and sample, in the order in which they were made."""
    file, marks = run.path / "marks.jsonl", defaultdict(list)
    for mark in read_records(file, Mark) if file.exists() else ():
        marks[mark.prompt_id, mark.sample].append(mark)
    return marks


def _use(shard: Path, records: Iterable[Response | Example]) -> None:
    taken = shard.with_name(shard.name + ".taken")
    write_shard(taken, records)
    if shard.exists() and sha256(shard) != sha256(taken):
        taken.unlink()
        raise UserError(f"{shard}: the run already has other records here; give a new --out folder")
    os.replace(taken, shard)


def required(run: RunDir, file: Path, stage: str, remedy: str) -> Path:
    """A file that a stage wrote, unchanged since, or that was taken in from elsewhere."""
    if not run.is_done(stage) and not run.workers.once(file.exists):
        raise UserError(f"{file}: not there yet; run {remedy}")
    return file


def refuse_repeated(file: Path) -> None:
    """A verdict is on a prompt and a sample number, so two responses must not share both."""
    seen = set()
    for number, response in enumerate(read_records(file, Response), start=1):
        if (response.prompt_id, response.sample) in seen:
            raise UserError(
                f"{file}: record {number} is a second response with sample {response.sample} to its prompt; "
                "give the responses to a prompt different 'sample' numbers"
            )
        seen.add((response.prompt_id, response.sample))


def response_problem(response: Response, chat: Chat) -> str | None:
    """Why a response cannot be trained on whatever a guard says, or None."""
    unfinished = {"length": "truncated", "loop": "loop", "nan": "nan"}
    if response.finish_reason in unfinished:
        return unfinished[response.finish_reason]
    if chat.has_control_token(response.text):
        return "control_token"
    parsed = parse_response(response.text)
    return parsed if isinstance(parsed, str) else None


def training_sequences(file: Path, recipe: Recipe, models: Models) -> tuple[list[TrainingSequence], Counter[str]]:
    """The examples as tokens, and how many were dropped for which reason. Nothing is cut."""
    limit = min(recipe.training.max_length, load_config(models.base)[0].max_seq_len)
    sequences, dropped = [], Counter()
    for example in read_records(file, Example):
        problem = parse_response(example.response)
        if isinstance(problem, str):
            dropped[problem] += 1
            continue
        sequence = models.chat.training_sequence(example)
        if recipe.training.benign_loss == "kl" and example.label == "benign":
            sequence = replace(sequence, keeps_to_reference=True)
        if len(sequence) > limit:
            dropped[f"longer_than_{limit}_tokens"] += 1
        else:
            sequences.append(sequence)
    return sequences, dropped


def evaluation_prompts(entry: EvaluationSet) -> list[Prompt]:
    """The questions of a set, from the columns and rows that it names.

    Raises:
        UserError: nothing there, a missing column, or a reasoning set without answers.
    """
    prompts = list(prompts_from_rows(_rows(entry), entry.name))
    if not prompts:
        raise UserError(f"{entry.file}: evaluation set {entry.name} keeps no row; look at its `where`")
    if entry.kind == "reasoning" and any(prompt.answer is None for prompt in prompts):
        raise UserError(f"{entry.file}: a reasoning set needs 'answer' in every record")
    return prompts


def _rows(entry: EvaluationSet) -> Iterator[tuple[str, dict[str, Any]]]:
    columns, wanted = entry.columns or {}, entry.where or {}
    for where, row in load_rows(entry.file, entry.config, entry.split):
        if missing := sorted({*columns.values(), *wanted} - row.keys()):
            raise UserError(f"{where}: no column {', '.join(missing)}; there are {', '.join(sorted(row))}")
        if any(str(row[column]) != value for column, value in wanted.items()):
            continue
        found = {name: row[column] for name, column in columns.items()} or dict(row)
        found.setdefault("label", "harmful" if entry.kind == "harmful" else "benign")
        if entry.answer_after is not None:
            _, mark, found["answer"] = str(found.get("answer")).rpartition(entry.answer_after)
            if not mark:
                raise UserError(f"{where}: no {entry.answer_after!r} in its answer")
        yield where, found


def refuse_other_student(folder: Path, student: Path) -> None:
    """An evaluation that was begun with one adapter or checkpoint is not finished, or reported, with another."""
    weights = sorted(student.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{student}: no adapter_model.safetensors there, so there is no trained student to evaluate")
    identity = "\n".join(map(sha256, weights))
    note = folder / "student.sha256"
    if note.exists() and note.read_text() == identity:
        return
    if any(shard.stat().st_size for shard in folder.glob("*.jsonl*")):
        raise UserError(f"{folder}: was measured with other weights than {student} holds now; give a new --out folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, identity)
