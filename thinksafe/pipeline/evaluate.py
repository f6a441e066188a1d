"""What the student is worth before and after training."""

import json
from pathlib import Path
from typing import Literal

from thinksafe.data.atomic import write_atomically
from thinksafe.data.jsonl import Shard, to_json
from thinksafe.data.records import Response, Verdict, content_hash
from thinksafe.evaluation.metrics import measure
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.pipeline.checks import refuse_other_student
from thinksafe.pipeline.generate import sample
from thinksafe.pipeline.judge import judge
from thinksafe.pipeline.responses import Task
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir
from thinksafe.run.journal import write_for_all

Moment = Literal["before", "after"]


def evaluate(run: RunDir, models: Models, moment: Moment, adapter: Path | None = None) -> None:
    """Measure harm, over-refusal and reasoning of the student before or after training.

    Args:
        adapter: an adapter folder for `after`; by default what `train` left in the run directory.
    """
    stage = f"evaluate_{moment}"
    sets = run.recipe.evaluation.sets
    if not sets:
        return
    checkpoint = None
    if moment == "after" and adapter is None:
        full = run.path / "model"
        checkpoint, adapter = (full, None) if run.workers.once(full.exists) else (None, run.path / "adapter")
    if moment == "after":
        student = checkpoint or adapter
        run.workers.once(lambda: refuse_other_student(run.path / "evaluation" / moment, student))
        for name in run.workers.once(lambda: sorted(file.name for file in student.glob("*.safetensors"))):
            write_for_all(student / name, run.workers)
    if run.is_done(stage):
        return
    clock, tokens, results, files = run.clock(stage), 0, [], []
    prompts = {entry.name: evaluation_prompts(entry) for entry in sets}
    for entry in sets:
        run.remember_input(f"evaluation set {entry.name}", content_hash(map(to_json, prompts[entry.name])))
        responses_file = run.path / "evaluation" / moment / f"{entry.name}.responses.jsonl"
        verdicts_file = run.path / "evaluation" / moment / f"{entry.name}.verdicts.jsonl"
        tasks = [Task(prompt, entry.instruction, s) for prompt in prompts[entry.name] for s in range(entry.samples)]
        title = f"{moment} {entry.name}"
        sampling = run.recipe.evaluation.sampling
        tokens += sample(run, models, responses_file, tasks, sampling, clock, title, checkpoint, adapter)
        responses, verdicts = Shard(responses_file, Response), ()
        files.append(responses_file)
        if entry.kind != "reasoning":
            judge(run, models, responses, verdicts_file, clock, f"judge {entry.name}", every_response=True)
            verdicts = Shard(verdicts_file, Verdict)
            files.append(verdicts_file)
        results.append(measure(entry, prompts[entry.name], list(responses), list(verdicts)))
    files.append(run.path / "evaluation" / f"{moment}.json")
    run.workers.once(lambda: write_atomically(files[-1], json.dumps(results, indent=1) + "\n"))
    run.finish_stage(stage, files, clock, tokens=tokens, records=sum(result["responses"] for result in results))
