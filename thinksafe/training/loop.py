"""The training loop: choose a step's sequences, pack them, step, log, and save a checkpoint at intervals.

Order, packing, learning rate and dropout are functions of (seed, step) alone, so a killed run resumes as if it had not
stopped, bit for bit on a CPU. A thread makes the next step's packs while the device computes the current step.

A step whose loss or gradient is not finite is left out: it changes nothing, and the log names its examples. After three
such steps in a row the run stops.
"""

import hashlib
import json
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np
import torch

from thinksafe.distributed.ranks import partition_balanced, rank, world_size
from thinksafe.hardware import hardware_of
from thinksafe.model.weights import WeightDtype
from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs
from thinksafe.training.local_trainer import LocalTrainer, NonFiniteStep
from thinksafe.training.packing import PackedBatch, Reduction, TrainingSequence, pack

if TYPE_CHECKING:
    from thinksafe.training.deepspeed_trainer import DeepSpeedTrainer


T = TypeVar("T")
MAX_SKIPPED_STEPS = 3
"""Number of non-finite steps in a row that stop the run: a single bad example does not explain them."""
SPIKE_WINDOW = 50
"""Number of recent losses with which a new loss is compared."""
MAX_NAMED_EXAMPLES = 16
"""Number of a step's examples that a message names; it gives the number of further ones."""
SPIKE_SIGMA = 6.0
"""Standard deviations above the mean of the last SPIKE_WINDOW losses from which a loss is noted as a spike."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of fine-tuning. The defaults are those of the paper.

    Attributes:
        method: whether to train adapters (`lora`) or every weight (`full`).
        epochs: passes over the accepted examples.
        batch_size: sequences per optimizer step.
        tokens_per_step: largest number of prompt and response tokens per optimizer step, instead of batch_size; 0 to
            use batch_size. A longer sequence is a step by itself.
        loss_reduction: whether all response tokens of a step have equal weight (`token`), or all sequences
            (`sequence`).
        benign_loss: loss on benign responses, `cross_entropy` or `kl`. `kl` is the divergence of the full next-token
            distribution from that of the untrained student, the paper's +KL; it costs the untrained student's forward
            pass over these tokens.
        frozen_weight_dtype: `fp8` computes the matmuls with frozen projections in e4m3, in the forward pass and for the
            gradients of their inputs. Adapters, norms, embedding and head keep their dtype, and the adapter belongs to
            the base as its checkpoint stores it. For method `lora` only; memory use stays the same, and a GPU needs
            compute capability 8.9 or more.
        learning_rate: peak learning rate, after a linear warm-up; then it falls to 0 as a cosine.
        warmup_ratio: share of all steps that are warm-up.
        weight_decay: weight decay of AdamW.
        max_grad_norm: a gradient with a larger norm is scaled down to this norm.
        max_length: largest number of tokens in an example; a longer example is dropped and counted.
        max_tokens_per_pack: largest number of tokens in one forward pass; lower it if memory is short.
        activation_checkpointing: what the backward pass recomputes to save memory. `none`: nothing; `selective`: cheap
            operations; `full`: whole layers; `auto`: for each layer as little as the GPU's memory allows.
        cuda_graphs: `auto` captures the passes of a small, launch-bound model as CUDA graphs if memory allows; `none`
            never does.
        checkpoint_every: optimizer steps between two checkpoints.
    """

    __pydantic_config__ = {"extra": "forbid"}
    MEMORY_ONLY_FIELDS: ClassVar[tuple[str, ...]] = ("max_tokens_per_pack", "activation_checkpointing", "cuda_graphs")
    """Settings that change the memory of a step, but not its result; a resumed run may change them."""

    method: Literal["lora", "full"] = "lora"
    epochs: int = 3
    batch_size: int = 8
    tokens_per_step: int = 0
    loss_reduction: Reduction = "token"
    benign_loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    frozen_weight_dtype: WeightDtype = "auto"
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 16_384
    max_tokens_per_pack: int = 16_384
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    cuda_graphs: Literal["auto", "none"] = "auto"
    checkpoint_every: int = 100

    def __post_init__(self):
        for name in ("epochs", "batch_size", "max_length", "max_tokens_per_pack", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.frozen_weight_dtype == "fp8" and self.method == "full":
            raise ValueError("frozen_weight_dtype: fp8 is for method lora; full fine-tuning freezes no weight")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError("warmup_ratio must lie between 0 and 1")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("learning_rate and max_grad_norm must be positive")
        if self.weight_decay < 0 or self.tokens_per_step < 0:
            raise ValueError("weight_decay and tokens_per_step must not be negative")


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


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step: linear warm-up to `config.learning_rate`, then half a cosine towards 0.

    Args:
        step: number of the step, counted from 0.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def plan_steps(lengths: Sequence[int], config: TrainingConfig, seed: int) -> list[np.ndarray]:
    """Return the indices of each step's sequences, one int array for each step of all epochs.

    Each epoch is a new permutation, cut into batches in its order. A batch has `batch_size` sequences, the last one of
    an epoch possibly fewer. If `tokens_per_step` is set, it replaces `batch_size`: a batch then has the sequences that
    fit into that many tokens together, or a single longer one.

    Args:
        lengths: number of tokens of each sequence.
        seed: seed of the run; with the number of the epoch, it determines the permutation.
    """
    steps = []
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        if config.tokens_per_step:
            steps += np.split(order, _batch_boundaries([lengths[index] for index in order], config.tokens_per_step))
        else:
            steps += np.split(order, range(config.batch_size, len(order), config.batch_size))
    return steps


def _batch_boundaries(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Return the indices in `lengths` at which a new batch begins, since its first sequence would give the batch before
    more than `max_tokens` tokens; without the 0 of the first batch."""
    boundaries, num_tokens = [], 0
    for index, length in enumerate(lengths):
        if num_tokens and num_tokens + length > max_tokens:
            boundaries.append(index)
            num_tokens = 0
        num_tokens += length
    return boundaries


def training_fingerprint(sequences: Sequence[TrainingSequence], config: TrainingConfig, seed: int) -> str:
    """Return a hex hash of sequences, seed and settings other than MEMORY_ONLY_FIELDS. It identifies a training run: a
    checkpoint with another hash is ignored."""
    settings = {key: value for key, value in asdict(config).items() if key not in config.MEMORY_ONLY_FIELDS}
    digest = hashlib.sha256(json.dumps([settings, seed]).encode())
    for sequence in sequences:
        digest.update(np.int64([len(sequence), sequence.num_prompt_tokens, sequence.use_reference_kl]).tobytes())
        digest.update(np.float64(sequence.weight).tobytes())
        digest.update(sequence.input_ids.tobytes())
    return digest.hexdigest()


def train(
    trainer: "LocalTrainer | DeepSpeedTrainer",
    sequences: Sequence[TrainingSequence],
    config: TrainingConfig,
    seed: int,
    folder: Path,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
) -> None:
    """Train to the end, from the newest checkpoint if there is one, and leave the decoder ready to be saved.

    All ranks must call this with the same arguments; each trains on its share of every step's sequences.

    Args:
        sequences: at least one; their order is part of the run's identity.
        folder: folder of metrics.jsonl and checkpoints/, the same on every rank.
        on_step: called on every rank after every step, for progress.

    Raises:
        NonFiniteStep: MAX_SKIPPED_STEPS steps in a row were not finite, and the message names the examples of the last
            one; or a weight is not finite. Weights are checked before every checkpoint, and the last step has one, so
            weights that are not finite are never saved or returned.
    """
    run_fingerprint = training_fingerprint(sequences, config, seed)
    costs = TrainingCosts(trainer.decoder.config, trainer.decoder.lora, trainer.decoder.embedding.element_size())
    schedule = plan_steps([len(sequence) for sequence in sequences], config, seed)
    checkpoint = load_newest(folder / "checkpoints", run_fingerprint)
    first_step = 0
    if checkpoint is not None:
        first_step, state = checkpoint
        trainer.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    recent_losses, num_skipped = _loss_history(folder / "metrics.jsonl", first_step)

    def packs_of_step(step: int) -> list[PackedBatch]:
        batch = [sequences[index] for index in schedule[step]]
        local_indices = partition_balanced([len(sequence) for sequence in batch], world_size())[rank()]
        return pack(
            [batch[i] for i in local_indices], config.max_tokens_per_pack, trainer.device, config.loss_reduction
        )

    with _open_metrics(folder / "metrics.jsonl", first_step) if rank() == 0 else open(os.devnull, "w") as metrics_file:
        started = time.perf_counter()
        for step, packs in _prefetch(packs_of_step, range(first_step, len(schedule))):
            torch.manual_seed(hash((seed, step)) + rank())
            rate = learning_rate(step, len(schedule), config)
            loss = grad_norm = dropped_mass = None
            batch = [sequences[index] for index in schedule[step]]
            try:
                result = trainer.step(packs, rate)
                loss, grad_norm, dropped_mass = result.loss, result.grad_norm, result.dropped_mass
                num_skipped = 0
                note = _spike_note(loss, recent_losses)
                recent_losses.append(loss)
            except NonFiniteStep as error:
                num_skipped += 1
                note = f"left out: {error}; examples of the step: {_example_names(batch)}"
                if num_skipped == MAX_SKIPPED_STEPS:
                    raise NonFiniteStep(f"step {step + 1}, the {num_skipped}rd in a row that was {note}") from None
            is_checkpoint = (step + 1) % config.checkpoint_every == 0 or step + 1 == len(schedule)
            if is_checkpoint:
                _check_weights(trainer, step)
            now = time.perf_counter()
            throughput = _throughput(costs, batch, now - started, trainer.device)
            metrics = StepMetrics(
                step + 1, len(schedule), loss, rate, grad_norm, **throughput, note=note, dropped_mass=dropped_mass
            )
            started = now
            metrics_file.write(json.dumps(asdict(metrics)) + "\n")
            metrics_file.flush()
            on_step(metrics)
            if is_checkpoint:
                if rank() == 0:  # after a power failure, no checkpoint may lack its steps' metrics
                    os.fsync(metrics_file.fileno())
                save_checkpoint(folder / "checkpoints", metrics.step, trainer.state_dict(), run_fingerprint)
    trainer.finish()


def _check_weights(trainer: "LocalTrainer | DeepSpeedTrainer", step: int) -> None:
    """Check that every trained weight is finite; raise a NonFiniteStep that names the step otherwise."""
    try:
        trainer.check_weights_finite()
    except NonFiniteStep as error:
        raise NonFiniteStep(f"step {step + 1}: {error}") from None


def _throughput(
    costs: TrainingCosts, batch: Sequence[TrainingSequence], seconds: float, device: torch.device
) -> dict[str, float | None]:
    """Return the fields of StepMetrics for tokens, time, rates and memory.

    Args:
        batch: sequences of the step on all ranks.
        seconds: wall time of the step.
        device: device of this rank.
    """
    counts, hardware = _token_counts(batch), hardware_of(device)
    reference_counts = _token_counts([sequence for sequence in batch if sequence.use_reference_kl])
    flops = costs.model_flops(counts) + costs.reference_flops(reference_counts)
    return {
        "tokens": counts.tokens,
        "seconds": seconds,
        "tokens_per_second": counts.tokens / seconds,
        "flop": flops,
        "mfu": flops / seconds / world_size() / hardware.peak_flop_per_second if hardware else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _token_counts(batch: Sequence[TrainingSequence]) -> TokenCounts:
    """Return the token counts of all sequences together."""
    lengths = [len(sequence) for sequence in batch]
    return TokenCounts(sum(lengths), sum(sequence.num_targets for sequence in batch), causal_pairs(lengths))


def _prefetch(make: Callable[[int], T], steps: range) -> Iterator[tuple[int, T]]:
    """Yield each step with `make(step)`; a thread makes the next step's value while the caller uses this one. An error
    in `make` is raised here at its step.

    SimpleQueue is written in C, and we never join the thread. Ctrl-C may leave a Python-level lock locked, and code
    that waits for such a lock (concurrent.futures does) would hang.
    """
    requests, results = SimpleQueue(), SimpleQueue()

    def serve_requests() -> None:
        for step in iter(requests.get, None):
            try:
                results.put((make(step), None))
            except Exception as error:
                results.put((None, error))
        results.put(None)

    threading.Thread(target=serve_requests, daemon=True).start()
    try:
        for step in steps[:1]:
            requests.put(step)
        for step, next_step in zip_longest(steps, steps[1:]):
            value, error = results.get()
            if error is not None:
                raise error
            if next_step is not None:
                requests.put(next_step)
            yield step, value
    finally:
        requests.put(None)
        while results.get(timeout=60) is not None:  # at exit, a thread inside torch would abort the interpreter
            pass


def _spike_note(loss: float, recent_losses: Sequence[float]) -> str:
    """Return a note if the loss is more than SPIKE_SIGMA standard deviations above the mean of the recent losses; an
    empty string if it is not, or if fewer than half of SPIKE_WINDOW losses are known."""
    if len(recent_losses) < SPIKE_WINDOW // 2:
        return ""
    mean, deviation = statistics.mean(recent_losses), statistics.stdev(recent_losses)
    return f"loss spike: {loss:.3g}, usually {mean:.3g}" if loss > mean + SPIKE_SIGMA * deviation else ""


def _example_names(batch: Sequence[TrainingSequence]) -> str:
    """Return the names (`TrainingSequence.name`) of the first MAX_NAMED_EXAMPLES examples of a step, with commas, and
    the number of the others if there are any: `a, b and 5 more`."""
    names = ", ".join(sequence.name for sequence in batch[:MAX_NAMED_EXAMPLES])
    return names + (f" and {len(batch) - MAX_NAMED_EXAMPLES} more" if len(batch) > MAX_NAMED_EXAMPLES else "")


def _loss_history(file: Path, first_step: int) -> tuple[deque[float], int]:
    """Return the last SPIKE_WINDOW losses of the first `first_step` steps in a metrics.jsonl, and the number of steps
    in a row at their end that were left out."""
    past_steps = [metrics for metrics in read_metrics(file) if metrics.step <= first_step]
    losses = [metrics.loss for metrics in past_steps if metrics.loss is not None]
    num_skipped = next(
        (n for n, metrics in enumerate(reversed(past_steps)) if metrics.loss is not None), len(past_steps)
    )
    return deque(losses, maxlen=SPIKE_WINDOW), num_skipped


def read_metrics(file: Path) -> Iterator[StepMetrics]:
    """Yield the steps of a metrics.jsonl, up to the first line that a kill or a power failure has torn; nothing if the
    file is missing."""
    if not file.exists():
        return
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            metrics = StepMetrics(**json.loads(line))
        except (ValueError, TypeError):
            return
        if line.endswith(b"\n"):
            yield metrics


def _open_metrics(file: Path, first_step: int):
    """Return a metrics.jsonl opened for appending, cut off after the line of step `first_step`, because later steps run
    again. A missing file is created."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    num_kept = sum(metrics.step <= first_step for metrics in read_metrics(file))
    stream = file.open("a")
    stream.truncate(sum(map(len, lines[:num_kept])))
    return stream
