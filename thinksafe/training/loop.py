"""The training loop: pick the step's sequences, pack them, step, log, now and then save.

Order, packing, learning rate and dropout are functions of (seed, step) alone, so a run that was killed goes on as if
nothing had happened, bit for bit on a CPU. The next step's packs are made while the device computes this one's.

A step whose loss or gradient is not finite changes nothing and is left out, with the names of the examples that were in
it; after three in a row the run stops.
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
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch

from thinksafe.distributed.ranks import balanced, rank, world_size
from thinksafe.hardware import hardware_of
from thinksafe.model.weights import WeightDtype
from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.cost_model import TrainingCosts, Work, causal_pairs
from thinksafe.training.local_engine import NonFiniteStep, SingleEngine
from thinksafe.training.packing import PackedBatch, Reduction, TrainingSequence, pack

if TYPE_CHECKING:
    from thinksafe.training.deepspeed_engine import ZeroEngine


T = TypeVar("T")
_SKIPS_AT_MOST = 3
"""Steps in a row that are not finite, after which there is more wrong than an example."""
_RECENT = 50
_NAMED = 16
_FAR_OUT = 6.0
"""A loss so many standard deviations above the mean of the _RECENT ones is worth a look."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to fine-tune. The defaults are the paper's.

    Attributes:
        method: train adapters or every weight.
        epochs: passes over the accepted examples.
        batch_size: sequences an optimiser step.
        batch_tokens: tokens of prompts and responses an optimiser step at most, in place of batch_size; 0 for none. A
            longer sequence is a step of its own.
        loss_reduction: whether in a step every response `token` counts alike, or every `sequence`.
        benign_loss: on benign responses `cross_entropy`, or `kl`, the divergence of the whole next-token distribution
            from the untrained student's: the paper's +KL. It costs that student's forward pass over these tokens.
        frozen_weights: `fp8` multiplies with the frozen projections in e4m3, forward and for the gradients that pass
            through them; adapters, norms, embedding and head stay as they are, and the adapter is one for the base as
            the checkpoint has it. For `lora`; takes as much memory, and a GPU of compute capability 8.9 or more.
        learning_rate: its peak, after a linear warm-up; then a cosine to 0.
        warmup_ratio: share of all steps that warm up.
        weight_decay: AdamW's.
        max_grad_norm: a longer gradient is scaled down to this norm.
        max_length: tokens; a longer example is dropped and counted.
        max_tokens_per_pack: tokens in one forward pass; what memory allows.
        activation_checkpointing: what the backward pass computes again instead of keeping it: `none`; `selective`, what
            is cheap to compute; `full`, whole layers; or `auto`, layer by layer as little as a GPU's memory allows.
        cuda_graphs: `auto` records the passes of a model so small that a GPU would wait for its launches, where it has
            memory for them; or `none`.
        checkpoint_every: optimiser steps between two checkpoints.
    """

    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["lora", "full"] = "lora"
    epochs: int = 3
    batch_size: int = 8
    batch_tokens: int = 0
    loss_reduction: Reduction = "token"
    benign_loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    frozen_weights: WeightDtype = "auto"
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
        if self.frozen_weights == "fp8" and self.method == "full":
            raise ValueError("frozen_weights: fp8 is for method lora; full fine-tuning freezes no weight")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError("warmup_ratio must lie between 0 and 1")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("learning_rate and max_grad_norm must be positive")
        if self.weight_decay < 0 or self.batch_tokens < 0:
            raise ValueError("weight_decay and batch_tokens must not be negative")


OF_MEMORY = ("max_tokens_per_pack", "activation_checkpointing", "cuda_graphs")
"""Settings that change what a step needs, and not what it learns: they may change in the middle of a run."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        loss, grad_norm: in nats a token, and before clipping; None for a step that was left out.
        tokens: of all ranks, prompts included.
        seconds: wall time of the step.
        flop: useful ones of all ranks, as training/costs.py counts them; nothing that is computed again.
        mfu: their share of what the ranks' GPUs promise; None where that is not known.
        peak_bytes: of this rank's GPU so far; None on a CPU.
        note: why the step was left out, or what else was odd.
        dropped_mass: largest share of a pack's gradient mass at a frozen head that was skipped as too small to matter,
            see kernels/linear_cross_entropy.py; None for a step that was left out.
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
    """Linear warm-up, then a half cosine to 0. Steps count from 0."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def plan_steps(lengths: Sequence[int], config: TrainingConfig, seed: int) -> list[np.ndarray]:
    """The indices of each step's sequences: each epoch is a fresh permutation, cut into batches in its order.

    A batch has `batch_size` sequences, the last of an epoch what is left; or as many as `batch_tokens` hold.
    """
    steps = []
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        if config.batch_tokens:
            steps += np.split(order, _cuts([lengths[index] for index in order], config.batch_tokens))
        else:
            steps += np.split(order, range(config.batch_size, len(order), config.batch_size))
    return steps


def _cuts(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Where a batch is full and the next one begins."""
    cuts, held = [], 0
    for index, length in enumerate(lengths):
        if held and held + length > max_tokens:
            cuts.append(index)
            held = 0
        held += length
    return cuts


def fingerprint(sequences: Sequence[TrainingSequence], config: TrainingConfig, seed: int) -> str:
    """Identifies a training run: a checkpoint of another one is not taken up. What only memory decides is left out."""
    settings = {key: value for key, value in asdict(config).items() if key not in OF_MEMORY}
    digest = hashlib.sha256(json.dumps([settings, seed]).encode())
    for sequence in sequences:
        digest.update(np.int64([len(sequence), sequence.response_start, sequence.keeps_to_reference]).tobytes())
        digest.update(np.float64(sequence.weight).tobytes())
        digest.update(sequence.input_ids.tobytes())
    return digest.hexdigest()


def train(
    engine: "SingleEngine | ZeroEngine",
    sequences: Sequence[TrainingSequence],
    config: TrainingConfig,
    seed: int,
    folder: Path,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
) -> None:
    """Run to the end, from the newest checkpoint if there is one, and leave the decoder ready to be saved.

    All ranks call it with the same arguments; each trains its share of every step's sequences.

    Args:
        sequences: at least one; their order is part of the run's identity.
        folder: gets metrics.jsonl and checkpoints/; the same for all ranks.
        on_step: called after every step, for progress; on every rank.

    Raises:
        NonFiniteStep: several steps in a row were, and it names the examples in the last one; or a weight is. Weights
            are looked at before a checkpoint, so none is saved that is not finite, and training never ends with such.
    """
    identity = fingerprint(sequences, config, seed)
    costs = TrainingCosts(engine.decoder.config, engine.decoder.lora, engine.decoder.embedding.element_size())
    schedule = plan_steps([len(sequence) for sequence in sequences], config, seed)
    newest = load_newest(folder / "checkpoints", identity)
    first_step = 0
    if newest is not None:
        first_step, state = newest
        engine.load_tensors(state)
    folder.mkdir(parents=True, exist_ok=True)
    recent, skips = _history(folder / "metrics.jsonl", first_step)

    def packs_of(step: int) -> list[PackedBatch]:
        batch = [sequences[index] for index in schedule[step]]
        mine = balanced([len(sequence) for sequence in batch], world_size())[rank()]
        return pack([batch[i] for i in mine], config.max_tokens_per_pack, engine.device, config.loss_reduction)

    with _metrics_from(folder / "metrics.jsonl", first_step) if rank() == 0 else open(os.devnull, "w") as metrics_file:
        started = time.perf_counter()
        for step, packs in _one_ahead(packs_of, range(first_step, len(schedule))):
            torch.manual_seed(hash((seed, step)) + rank())
            rate = learning_rate(step, len(schedule), config)
            loss = grad_norm = dropped_mass = None
            batch = [sequences[index] for index in schedule[step]]
            try:
                result = engine.step(packs, rate)
                loss, grad_norm, dropped_mass, skips = result.loss, result.grad_norm, result.dropped_mass, 0
                note = _spike(loss, recent)
                recent.append(loss)
            except NonFiniteStep as error:
                skips += 1
                note = f"left out: {error}; in it {_names(batch)}"
                if skips == _SKIPS_AT_MOST:
                    raise NonFiniteStep(f"step {step + 1}, the {skips}rd in a row {note}") from None
            saves = (step + 1) % config.checkpoint_every == 0 or step + 1 == len(schedule)
            if saves:
                _check_weights(engine, step)
            now = time.perf_counter()
            speed = _speed(costs, batch, now - started, engine.device)
            metrics = StepMetrics(
                step + 1, len(schedule), loss, rate, grad_norm, **speed, note=note, dropped_mass=dropped_mass
            )
            started = now
            metrics_file.write(json.dumps(asdict(metrics)) + "\n")
            metrics_file.flush()
            on_step(metrics)
            if saves:
                if rank() == 0:  # so that not even a power failure leaves a checkpoint without its steps' metrics
                    os.fsync(metrics_file.fileno())
                save_checkpoint(folder / "checkpoints", metrics.step, engine.tensors(), identity)
    engine.finish()


def _check_weights(engine: "SingleEngine | ZeroEngine", step: int) -> None:
    try:
        engine.check_weights()
    except NonFiniteStep as error:
        raise NonFiniteStep(f"step {step + 1}: {error}") from None


def _speed(
    costs: TrainingCosts, batch: Sequence[TrainingSequence], seconds: float, device: torch.device
) -> dict[str, float | None]:
    """What a step's work and time say of the hardware, as in StepMetrics."""
    work, hardware = _work(batch), hardware_of(device)
    compared = _work([sequence for sequence in batch if sequence.keeps_to_reference])
    flop = costs.useful_flop(work) + costs.reference_flop(compared)
    return {
        "tokens": work.tokens,
        "seconds": seconds,
        "tokens_per_second": work.tokens / seconds,
        "flop": flop,
        "mfu": flop / seconds / world_size() / hardware.peak_flop_per_second if hardware else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _work(batch: Sequence[TrainingSequence]) -> Work:
    lengths = [len(sequence) for sequence in batch]
    return Work(sum(lengths), sum(sequence.num_targets for sequence in batch), causal_pairs(lengths))


def _one_ahead(make: Callable[[int], T], steps: range) -> Iterator[tuple[int, T]]:
    """Each step with what is made for it, the next one's while this one's is used.

    The queues are C's, and nobody joins the thread: Ctrl-C may come between taking a lock of Python's and knowing it,
    and whoever waits for that lock then, as concurrent.futures does, waits for ever.
    """
    asked, made = SimpleQueue(), SimpleQueue()

    def work() -> None:
        for step in iter(asked.get, None):
            try:
                made.put((make(step), None))
            except Exception as error:
                made.put((None, error))
        made.put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        for step in steps[:1]:
            asked.put(step)
        for step, following in zip_longest(steps, steps[1:]):
            value, error = made.get()
            if error is not None:
                raise error
            if following is not None:
                asked.put(following)
            yield step, value
    finally:
        asked.put(None)
        while made.get(timeout=60) is not None:  # a thread inside torch would abort the interpreter on its way out
            pass


def _spike(loss: float, recent: Sequence[float]) -> str:
    """What to say of a loss that is far above the recent ones; empty where it is not, or too few are known."""
    if len(recent) < _RECENT // 2:
        return ""
    usual, spread = statistics.mean(recent), statistics.stdev(recent)
    return f"loss spike: {loss:.3g}, usually {usual:.3g}" if loss > usual + _FAR_OUT * spread else ""


def _names(batch: Sequence[TrainingSequence]) -> str:
    """The examples of a step, the first few by name."""
    shown = ", ".join(sequence.name for sequence in batch[:_NAMED])
    return shown + (f" and {len(batch) - _NAMED} more" if len(batch) > _NAMED else "")


def _history(file: Path, first_step: int) -> tuple[deque[float], int]:
    """Of the steps already done: the recent losses, and how many at the end were left out."""
    done = [metrics for metrics in read_metrics(file) if metrics.step <= first_step]
    losses = [metrics.loss for metrics in done if metrics.loss is not None]
    skips = next((n for n, metrics in enumerate(reversed(done)) if metrics.loss is not None), len(done))
    return deque(losses, maxlen=_RECENT), skips


def read_metrics(file: Path) -> Iterator[StepMetrics]:
    """The steps of a metrics.jsonl, up to a line that a kill or a power failure has torn."""
    if not file.exists():
        return
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            metrics = StepMetrics(**json.loads(line))
        except (ValueError, TypeError):
            return
        if line.endswith(b"\n"):
            yield metrics


def _metrics_from(file: Path, first_step: int):
    """Open for appending, with the lines of steps that will be run again cut off: they are the last ones."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = sum(metrics.step <= first_step for metrics in read_metrics(file))
    stream = file.open("a")
    stream.truncate(sum(map(len, lines[:kept])))
    return stream
