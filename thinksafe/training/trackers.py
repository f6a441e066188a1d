"""Training seen in TensorBoard or Weights & Biases, beside metrics.jsonl, which is always written.

A tracker is told of every step. A run that was killed repeats the steps after its checkpoint: TensorBoard is told to
forget them, Weights & Biases goes on with the same run and is not told twice. Neither package is imported unless a
recipe asks for it.
"""

import importlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from thinksafe.errors import UserError
from thinksafe.training.loop import StepMetrics, read_metrics

TrackerName = Literal["tensorboard", "wandb"]


def require(names: Sequence[TrackerName]) -> None:
    """Find out before the first hour of work whether a tracker can be had.

    Raises:
        UserError: its package is not installed, or Weights & Biases knows no account.
    """
    for name in names:
        try:
            package = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise UserError(f"trackers: {name} is not installed: pip install 'thinksafe[{name}]'") from None
        if name == "wandb":
            with _in_one_line(package):
                package.login()  # which asks for a key where there is a terminal


@contextmanager
def _in_one_line(wandb: ModuleType) -> Iterator[None]:
    try:
        yield
    except wandb.Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"trackers: wandb: {reason}; or set WANDB_MODE=offline") from None


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path):
        self._folder = folder / "tensorboard"
        self._writer = None

    def log(self, metrics: StepMetrics) -> None:
        """One step; what an earlier process wrote of it and of later ones is hidden."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=metrics.step)
        for name, value in figures(metrics).items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """One run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like are its own settings."""

    def __init__(self, folder: Path, name: str, recipe: dict[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "wandb.id"
        if not note.exists():
            partial = note.with_suffix(".partial")
            partial.write_text(uuid.uuid4().hex)
            os.replace(partial, note)
        project = os.environ.get("WANDB_PROJECT", "thinksafe")
        with _in_one_line(wandb):
            self._run = wandb.init(
                project=project, id=note.read_text(), name=name, config=recipe, dir=str(folder), resume="allow"
            )
        # Offline it does not know what an earlier process has logged; metrics.jsonl does.
        before = max((one.step for one in read_metrics(folder / "metrics.jsonl")), default=0)
        self._next = self._run.step or before + 1

    def log(self, metrics: StepMetrics) -> None:
        """One step, unless the run has it."""
        if metrics.step >= self._next:
            self._run.log(figures(metrics), step=metrics.step)

    def close(self) -> None:
        self._run.finish()


def figures(metrics: StepMetrics) -> dict[str, float]:
    """What is drawn of a step: every number that is known, but the count of steps."""
    untold = ("step", "total_steps", "note")
    return {f"train/{key}": value for key, value in asdict(metrics).items() if key not in untold and value is not None}


@contextmanager
def tracking(
    names: Sequence[TrackerName], folder: Path, name: str, recipe: dict[str, Any]
) -> Iterator[list[TensorBoard | WandB]]:
    """The trackers that a recipe asks for, open while training runs.

    Args:
        folder: training's, in the run directory.
        name: of the run, for people.
        recipe: its settings, for people.
    """
    require(names)
    with ExitStack() as closing:
        trackers = [TensorBoard(folder) if one == "tensorboard" else WandB(folder, name, recipe) for one in names]
        for tracker in trackers:
            closing.callback(tracker.close)
        yield trackers
