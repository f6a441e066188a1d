"""The figures of every optimizer step: metrics.jsonl, one line a step."""

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch

from thinksafe.hardware import hardware_of
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs
from thinksafe.training.sequence import PreferencePair, TrainingSequence
from thinksafe.training.trainer import NonFiniteStep, StepResult, Trainer

MAX_SKIPPED_STEPS = 3
"""Number of non-finite steps in a row that stop the run: a single bad example does not explain them."""
SPIKE_WINDOW = 50
"""Number of recent losses with which a new loss is compared."""
SPIKE_SIGMA = 6.0
"""Standard deviations above the mean of the last SPIKE_WINDOW losses from which a loss is noted as a spike."""
MAX_NAMED_EXAMPLES = 16
"""Number of a step's examples that a message names; it gives the number of further ones."""


@dataclass(frozen=True)
class StepMetrics:
    """Results of one optimizer step: one line of metrics.jsonl.

    Attributes:
        step: number of the step, counted from 1.
        total_steps: number of steps of the training.
        loss: weighted mean of the token losses, in nats; None for a step that was left out.
        learning_rate: learning rate of this step.
        grad_norm: norm of the gradient before clipping; None for a step that was left out.
        tokens: tokens of all ranks, prompts included.
        seconds: wall time of the step.
        tokens_per_second: `tokens` / `seconds`.
        flop: model FLOPs of all ranks and those of the reference's pass, see training/cost_model.py; no recomputation.
        mfu: the rate of these FLOPs as a share of the peak rate of the ranks' GPUs; None if the peak is unknown.
        peak_bytes: peak memory of this rank's GPU so far; None on a CPU.
        note: why the step was left out, or that its loss is a spike; empty otherwise.
        dropped_mass: share of a pack's gradient mass at a frozen language-model head that was skipped as too small to
            matter (kernels/linear_cross_entropy.py), the largest of all packs; None for a step that was left out.
    """

    step: int
    total_steps: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    flop: float
    mfu: float | None
    peak_bytes: int | None
    note: str = ""
    dropped_mass: float | None = None


class MetricsLog(AbstractContextManager):
    """metrics.jsonl while a training writes it. Every rank makes one, and rank 0 alone writes the file.

    Opened anew, it continues after the line of the step where the run resumes: later steps run again.
    """

    def __init__(self, file: Path, first_step: int, num_steps: int, trainer: Trainer):
        """Open the file.

        Args:
            first_step: number of steps that the resumed run has done.
            num_steps: number of steps of the training.
        """
        past_steps = list(takewhile(lambda metrics: metrics.step <= first_step, read_metrics(file)))
        losses = [metrics.loss for metrics in past_steps]
        self._recent_losses = deque((loss for loss in losses if loss is not None), maxlen=SPIKE_WINDOW)
        self._num_skipped = len(list(takewhile(lambda loss: loss is None, reversed(losses))))
        self._stream = None
        if trainer.workers.is_leader:
            kept_bytes = sum(map(len, file.read_bytes().splitlines(keepends=True)[: len(losses)])) if losses else 0
            self._stream = file.open("a")
            self._stream.truncate(kept_bytes)
        decoder = trainer.decoder
        self._costs = TrainingCosts(decoder.config, decoder.lora, decoder.embedding.element_size())
        self._num_steps, self._trainer, self._started = num_steps, trainer, time.perf_counter()

    def __exit__(self, *error) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(
        self,
        step: int,
        learning_rate: float,
        batch: Sequence[TrainingSequence | PreferencePair],
        result: StepResult | NonFiniteStep,
    ) -> StepMetrics:
        """Write the line of a step, and return its metrics.

        Args:
            step: number of the step, counted from 0.
            batch: sequences of the step on all ranks.
            result: result of the step, or the error with which it was left out.

        Raises:
            NonFiniteStep: this is the last of MAX_SKIPPED_STEPS steps in a row that were left out.
        """
        if isinstance(result, NonFiniteStep):
            loss = grad_norm = dropped_mass = None
            note = f"left out: {result}; examples of the step: {_example_names(batch)}"
            self._num_skipped += 1
            if self._num_skipped == MAX_SKIPPED_STEPS:
                raise NonFiniteStep(f"step {step + 1}, the {self._num_skipped}rd in a row that was {note}")
        else:
            loss, grad_norm, dropped_mass = result.loss, result.grad_norm, result.dropped_mass
            note = _spike_note(loss, self._recent_losses)
            self._recent_losses.append(loss)
            self._num_skipped = 0
        now, device = time.perf_counter(), self._trainer.device
        seconds, self._started = now - self._started, now
        tokens, flops, hardware = sum(map(len, batch)), self._flops(batch), hardware_of(device)
        peak_flops = self._trainer.workers.world_size * hardware.peak_flop_per_second if hardware else None
        metrics = StepMetrics(
            step=step + 1,
            total_steps=self._num_steps,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            flop=flops,
            mfu=flops / seconds / peak_flops if peak_flops else None,
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            note=note,
            dropped_mass=dropped_mass,
        )
        if self._stream is not None:
            self._stream.write(json.dumps(asdict(metrics)) + "\n")
            self._stream.flush()
        return metrics

    def sync(self) -> None:
        """Wait until all lines are on the disk: after a power failure, no checkpoint may lack its steps' metrics."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def _flops(self, batch: Sequence[TrainingSequence | PreferencePair]) -> float:
        """Return the model FLOPs of a step on all ranks, with those of the reference's pass."""
        reference_counts = _token_counts([item for item in batch if item.needs_reference])
        return self._costs.model_flops(_token_counts(batch)) + self._costs.forward_flops(reference_counts)


def read_metrics(file: Path) -> Iterator[StepMetrics]:
    """Yield the steps of a metrics.jsonl, up to the first line that a kill or a power failure has torn; nothing if the
    file is missing."""
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
        try:
            metrics = StepMetrics(**json.loads(line))
        except (ValueError, TypeError):
            return
        if line.endswith(b"\n"):
            yield metrics


def _token_counts(batch: Sequence[TrainingSequence | PreferencePair]) -> TokenCounts:
    """Return the token counts of all sequences together."""
    sequences = [sequence for item in batch for sequence in item.sequences]
    lengths = [len(sequence) for sequence in sequences]
    return TokenCounts(sum(lengths), sum(sequence.num_targets for sequence in sequences), causal_pairs(lengths))


def _spike_note(loss: float, recent_losses: Sequence[float]) -> str:
    """Return a note if the loss is a spike; an empty string if it is not, or if fewer than half of SPIKE_WINDOW losses
    are known."""
    if len(recent_losses) < SPIKE_WINDOW // 2:
        return ""
    mean, deviation = statistics.mean(recent_losses), statistics.stdev(recent_losses)
    return f"loss spike: {loss:.3g}, usually {mean:.3g}" if loss > mean + SPIKE_SIGMA * deviation else ""


def _example_names(batch: Sequence[TrainingSequence | PreferencePair]) -> str:
    """Return the names of a step's first examples, and the number of the others if there are any: `a, b and 5 more`."""
    names = ", ".join(sequence.name for sequence in batch[:MAX_NAMED_EXAMPLES])
    return names + (f" and {len(batch) - MAX_NAMED_EXAMPLES} more" if len(batch) > MAX_NAMED_EXAMPLES else "")
