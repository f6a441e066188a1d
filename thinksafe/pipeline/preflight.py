"""Before a run: what it is expected to take, and what would stop it after its first hour."""

import json
import sys

from thinksafe.data.atomic import write_atomically
from thinksafe.errors import UserError
from thinksafe.estimate.stages import estimate
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.hardware import hardware_of
from thinksafe.model.lora import check_targets
from thinksafe.model.weights import load_config
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir
from thinksafe.training.trackers import require
from thinksafe.training.zero_config import require_deepspeed


def foresee(run: RunDir, models: Models) -> None:
    """Write down at the start what the run is expected to take on this GPU, for the report to compare."""
    hardware = hardware_of(models.device)
    if hardware is None or run.manifest["stages"]:
        return
    try:
        found = estimate(run.recipe, hardware, run.workers.count)
    except UserError as error:
        print(f"no estimate: {error}", file=sys.stderr)
        return
    write_atomically(run.path / "estimate.json", json.dumps(found.to_json(), indent=2) + "\n")


def check(run: RunDir, models: Models) -> None:
    """Find before the first hour of work what would stop the run after it; a run that has begun is past this."""
    if run.manifest["stages"]:
        return
    for entry in run.recipe.evaluation.sets:
        evaluation_prompts(entry)
    if run.recipe.training.method == "lora":
        check_targets(load_config(models.base)[0], run.recipe.lora)
    if run.recipe.zero.is_needed(run.workers.count):
        require_deepspeed()
    models.check_guard()
    require(run.recipe.trackers)
