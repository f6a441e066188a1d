"""Stages evaluate_before and evaluate_after: measure harm, over-refusal and reasoning of the student."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from thinksafe.data.atomic import write_atomically
from thinksafe.data.jsonl import RecordFile, to_json
from thinksafe.data.records import Prompt, Response, Verdict, content_hash
from thinksafe.evaluation.config import EvaluationSet
from thinksafe.evaluation.metrics import SetFigures, measure
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.model.decoder import Decoder
from thinksafe.pipeline.checks import check_same_student
from thinksafe.pipeline.generate import sample_to_file
from thinksafe.pipeline.judge import judge_to_file
from thinksafe.pipeline.responses import SamplingTask
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_on_leader
from thinksafe.run.progress import print_note
from thinksafe.run.stage import Stage, run_stage
from thinksafe.text.chat import Chat

Phase = Literal["before", "after"]
"""Whether the student is measured before or after training."""


def evaluate_student(run: RunDir, checkpoints: CheckpointStore, phase: Phase, adapter: Path | None = None) -> None:
    """Sample and judge responses to the recipe's evaluation sets, and write the figures to evaluation/PHASE.json.

    The guard judges the sets of kind `harmful` and `over_refusal`; answers of `reasoning` sets are compared with the
    expected ones. All workers call this together. Without evaluation sets in the recipe, nothing is done.

    Args:
        phase: `before` measures the recipe's checkpoint, `after` the trained student.
        adapter: folder of the adapter to measure as `after`; None for the trained student of the run directory. Must be
            None for `before`.

    Raises:
        UserError: for `after`, there is no trained student, or this run directory holds an evaluation of another one;
            an evaluation set cannot be read, or it or the recipe's checkpoint has changed since the run began.
    """
    if not run.recipe.evaluation.sets:
        return
    weights = {}
    if phase == "after":
        is_adapter = adapter is not None or run.recipe.training.method == "lora"
        student = adapter or run.student_folder
        weights = {"adapter" if is_adapter else "folder": student}
        _require_same_student(run, student)
    if run.is_done(f"evaluate_{phase}"):
        return
    with run_stage(run, f"evaluate_{phase}") as stage:
        sets = run.recipe.evaluation.sets
        note = partial(print_note, "gold answers") if phase == "before" and run.workers.is_leader else None
        prompts = [evaluation_prompts(entry, note) for entry in sets]  # shows mistakes before hours of sampling

        def load_student() -> tuple[Decoder, Chat]:
            chat = checkpoints.chat  # a mistake in it shows before weights are loaded
            return checkpoints.sampled_student(**weights), chat

        results = [
            _evaluate_set(stage, checkpoints, phase, *pair, load_student) for pair in zip(sets, prompts, strict=True)
        ]
        file = run.path / "evaluation" / f"{phase}.json"
        run.workers.on_leader(lambda: write_atomically(file, json.dumps(results, indent=1, default=vars) + "\n"))
        stage.files.append(file)


def _evaluate_set(
    stage: Stage,
    checkpoints: CheckpointStore,
    phase: Phase,
    evaluation_set: EvaluationSet,
    prompts: list[Prompt],
    load_student: Callable[[], tuple[Decoder, Chat]],
) -> SetFigures:
    """Sample responses to an evaluation set, judge them unless it is a `reasoning` set, and return its figures."""
    run, name = stage.run, evaluation_set.name
    run.pin_input(f"evaluation set {name}", content_hash(map(to_json, prompts)))
    responses_file = run.path / "evaluation" / phase / f"{name}.responses.jsonl"
    verdicts_file = responses_file.with_name(f"{name}.verdicts.jsonl")
    samples, sampling = range(evaluation_set.samples), run.recipe.evaluation.sampling
    tasks = [SamplingTask(prompt, evaluation_set.instruction, sample) for prompt in prompts for sample in samples]
    sample_to_file(stage, checkpoints, responses_file, tasks, sampling, f"{phase} {name}", load_student)
    responses, verdicts = RecordFile(responses_file, Response), ()
    if evaluation_set.kind != "reasoning":
        judge_to_file(stage, checkpoints, responses, verdicts_file, f"judge {name}", include_malformed=True)
        verdicts = RecordFile(verdicts_file, Verdict)
    return measure(evaluation_set, prompts, list(responses), list(verdicts))


def _require_same_student(run: RunDir, student: Path) -> None:
    """Check that this run directory holds no evaluation of another trained student, and that this worker sees the same
    weights as the leader."""
    run.workers.on_leader(lambda: check_same_student(run.path / "evaluation" / "after", student))
    for name in run.workers.on_leader(lambda: sorted(file.name for file in student.glob("*.safetensors"))):
        write_on_leader(student / name, run.workers)
