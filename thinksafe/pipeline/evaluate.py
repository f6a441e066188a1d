"""Stages evaluate_before and evaluate_after: measure harm, over-refusal and reasoning of the student."""

import json
from pathlib import Path
from typing import Literal

from thinksafe.data.atomic import write_atomically
from thinksafe.data.jsonl import RecordFile, to_json
from thinksafe.data.records import Response, Verdict, content_hash
from thinksafe.evaluation.metrics import measure
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.pipeline.checks import check_same_student
from thinksafe.pipeline.generate import sample_to_file
from thinksafe.pipeline.judge import judge_to_file
from thinksafe.pipeline.responses import SamplingTask
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_on_leader

Phase = Literal["before", "after"]
"""Whether the student is measured before or after training."""


def evaluate_student(run: RunDir, checkpoints: CheckpointStore, phase: Phase, adapter: Path | None = None) -> None:
    """Sample and judge responses to the recipe's evaluation sets, and write the figures to evaluation/PHASE.json.

    The guard judges the sets of kind `harmful` and `over_refusal`; answers of `reasoning` sets are compared with the
    expected ones. All workers call this together. Without evaluation sets in the recipe, nothing is done.

    Args:
        phase: `before` measures the recipe's checkpoint, `after` the trained student.
        adapter: folder of the adapter to measure as `after`. None: the trained student of the run directory, which is
            the folder `model` if it exists, else `adapter`. Must be None for `before`.

    Raises:
        UserError: for `after`, there is no trained student, or this run directory holds an evaluation of another one;
            an evaluation set cannot be read, or it or the recipe's checkpoint has changed since the run began.
    """
    stage = f"evaluate_{phase}"
    sets = run.recipe.evaluation.sets
    if not sets:
        return
    checkpoint = None
    if phase == "after" and adapter is None:
        trained_model = run.path / "model"
        checkpoint, adapter = (
            (trained_model, None) if run.workers.on_leader(trained_model.exists) else (None, run.path / "adapter")
        )
    if phase == "after":
        student = checkpoint or adapter
        run.workers.on_leader(lambda: check_same_student(run.path / "evaluation" / phase, student))
        for name in run.workers.on_leader(lambda: sorted(file.name for file in student.glob("*.safetensors"))):
            write_on_leader(student / name, run.workers)
    if run.is_done(stage):
        return
    clock, tokens, results, files = run.clock(stage), 0, [], []
    prompts = {evaluation_set.name: evaluation_prompts(evaluation_set) for evaluation_set in sets}
    for evaluation_set in sets:
        run.pin_input(f"evaluation set {evaluation_set.name}", content_hash(map(to_json, prompts[evaluation_set.name])))
        responses_file = run.path / "evaluation" / phase / f"{evaluation_set.name}.responses.jsonl"
        verdicts_file = run.path / "evaluation" / phase / f"{evaluation_set.name}.verdicts.jsonl"
        tasks = [
            SamplingTask(prompt, evaluation_set.instruction, sample)
            for prompt in prompts[evaluation_set.name]
            for sample in range(evaluation_set.samples)
        ]
        title = f"{phase} {evaluation_set.name}"
        sampling = run.recipe.evaluation.sampling
        tokens += sample_to_file(run, checkpoints, responses_file, tasks, sampling, clock, title, checkpoint, adapter)
        responses, verdicts = RecordFile(responses_file, Response), ()
        files.append(responses_file)
        if evaluation_set.kind != "reasoning":
            judge_to_file(
                run,
                checkpoints,
                responses,
                verdicts_file,
                clock,
                f"judge {evaluation_set.name}",
                include_malformed=True,
            )
            verdicts = RecordFile(verdicts_file, Verdict)
            files.append(verdicts_file)
        results.append(measure(evaluation_set, prompts[evaluation_set.name], list(responses), list(verdicts)))
    files.append(run.path / "evaluation" / f"{phase}.json")
    run.workers.on_leader(lambda: write_atomically(files[-1], json.dumps(results, indent=1) + "\n"))
    run.finish_stage(stage, files, clock, tokens=tokens, records=sum(result["responses"] for result in results))
