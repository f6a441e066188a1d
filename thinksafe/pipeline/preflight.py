"""Before a run: the estimate of its cost, and checks that find mistakes of late stages early."""

import json
import sys

from thinksafe.data.atomic import write_atomically
from thinksafe.distributed.workers import leader_only
from thinksafe.errors import UserError
from thinksafe.estimate.stages import estimate
from thinksafe.evaluation.sets import evaluation_prompts
from thinksafe.hardware import hardware_of
from thinksafe.model.lora import check_targets
from thinksafe.model.weights import load_config
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.training.config import require_deepspeed
from thinksafe.training.trackers import require_trackers


@leader_only
def write_estimate(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Write estimate.json, the expected cost on this GPU, with which the report compares the measured cost.

    Nothing is written on a CPU, on a GPU whose rates are unknown, or after the first finished stage. If the estimate
    fails, its reason is printed to stderr and the run continues.
    """
    hardware = hardware_of(checkpoints.device)
    if hardware is None or run.manifest["stages"]:
        return
    try:
        run_estimate = estimate(run.recipe, hardware, run.workers.world_size)
    except UserError as error:
        print(f"no estimate: {error}", file=sys.stderr)
        return
    write_atomically(run.path / "estimate.json", json.dumps(run_estimate.to_json(), indent=2) + "\n")


@leader_only
def check_run(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Check before the first stage what late stages need. After the first finished stage nothing is checked.

    Raises:
        UserError: an evaluation set cannot be read, the student's chat template is not usable, the student has no
            module for a LoRA target, DeepSpeed or a tracker is needed but not installed, or a checkpoint of the guard
            does not fit its format.
    """
    if run.manifest["stages"]:
        return
    for evaluation_set in run.recipe.evaluation.sets:
        evaluation_prompts(evaluation_set)
    _ = checkpoints.chat  # reports a template that cannot be used
    if run.recipe.training.method == "lora":
        check_targets(load_config(checkpoints.base)[0], run.recipe.lora)
    if run.recipe.zero.is_needed(run.workers.world_size):
        require_deepspeed()
    checkpoints.check_guard()
    require_trackers(run.recipe.trackers)
