"""Training curves in TensorBoard or Weights & Biases, in addition to metrics.jsonl, which is always written.

A resumed run repeats the steps after its checkpoint. TensorBoard then hides the earlier points of these steps; Weights
& Biases continues the same run, and steps that it has are not logged again. Neither package is imported unless the
recipe names it.
"""

import importlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from thinksafe.data.atomic import write_atomically
from thinksafe.errors import UserError
from thinksafe.training.config import TrackerName
from thinksafe.training.metrics import StepMetrics, read_metrics


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Check, before any work, that the named trackers can be used: raise a UserError if a package is not installed, or
    if Weights & Biases, to which this logs in, has no account."""
    for name in names:
        try:
            package = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise UserError(f"trackers: {name} is not installed: pip install 'thinksafe[{name}]'") from None
        if name == "wandb":
            with _short_wandb_errors(package):
                package.login()  # on a terminal it asks for a key


@contextmanager
def _short_wandb_errors(wandb: ModuleType) -> Iterator[None]:
    """Raise an error of Weights & Biases in the body as a UserError of one line."""
    try:
        yield
    except wandb.Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"trackers: wandb: {reason}; or set WANDB_MODE=offline") from None


class TensorBoard:
    """A tracker that writes TensorBoard's event files to `folder/tensorboard`."""

    def __init__(self, folder: Path):
        self._folder, self._writer = folder / "tensorboard", None

    def log(self, metrics: StepMetrics) -> None:
        """Log one step. The first call hides the points that an earlier process logged for this and later steps."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=metrics.step)
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Write all logged points to the disk."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A tracker that logs to one run of Weights & Biases, whose environment variables (WANDB_PROJECT, WANDB_MODE, ...)
    configure it. The run's id is in `folder`, so a later process continues the run."""

    def __init__(self, folder: Path, name: str, recipe: dict[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb.id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex)
        project = os.environ.get("WANDB_PROJECT", "thinksafe")
        with _short_wandb_errors(wandb):
            self._run = wandb.init(
                project=project, id=id_file.read_text(), name=name, config=recipe, dir=str(folder), resume="allow"
            )
        # Offline, wandb does not know the steps of an earlier process, so take them from metrics.jsonl.
        last_step = max((metrics.step for metrics in read_metrics(folder / "metrics.jsonl")), default=0)
        self._next_step = self._run.step or last_step + 1

    def log(self, metrics: StepMetrics) -> None:
        """Log one step, unless the run already has it."""
        if metrics.step >= self._next_step:
            self._run.log(scalars(metrics), step=metrics.step)

    def close(self) -> None:
        """Finish the run; this waits until all logged points are sent."""
        self._run.finish()


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return the step's point on each curve, by the curve's name `train/FIELD`: all known numbers of StepMetrics."""
    excluded = ("step", "total_steps", "note")
    return {
        f"train/{key}": value for key, value in asdict(metrics).items() if key not in excluded and value is not None
    }


@contextmanager
def open_trackers(
    names: Sequence[TrackerName], folder: Path, name: str, recipe: dict[str, Any]
) -> Iterator[list[TensorBoard | WandB]]:
    """Yield the trackers that a recipe names, see `require_trackers`, and close them at the end.

    Args:
        folder: the training folder of the run directory.
        name, recipe: name and settings of the run, for display.
    """
    require_trackers(names)
    with ExitStack() as stack:
        trackers = [
            TensorBoard(folder) if tracker == "tensorboard" else WandB(folder, name, recipe) for tracker in names
        ]
        for tracker in trackers:
            stack.enter_context(closing(tracker))
        yield trackers
