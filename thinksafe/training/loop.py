"""The training loop: pick the step's sequences, pack them, step, log, now and then save.

Order, packing, learning rate and dropout are functions of (seed, step) alone, so a run that was killed goes on as if
nothing had happened, bit for bit on a CPU.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from thinksafe.hardware import hardware_of
from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.costs import TrainingCosts, Work, causal_pairs
from thinksafe.training.distributed import balanced, rank, world_size
from thinksafe.training.engine import NonFiniteStep, SingleEngine
from thinksafe.training.packing import TrainingSequence, pack

if TYPE_CHECKING:
    from thinksafe.training.zero import ZeroEngine


@dataclass(frozen=True)
class TrainingConfig:
    """How to fine-tune. The defaults are the paper's.

    Attributes:
        method: train adapters or every weight.
        epochs: passes over the accepted examples.
        batch_size: sequences an optimiser step.
        learning_rate: its peak, after a linear warm-up; then a cosine to 0.
        warmup_ratio: share of all steps that warm up.
        weight_decay: AdamW's.
        max_grad_norm: a longer gradient is scaled down to this norm.
        max_length: tokens; a longer example is dropped and counted.
        max_tokens_per_pack: tokens in one forward pass; what memory allows.
        activation_checkpointing: what the backward pass computes again instead of keeping it: `none`; `selective`, what
            is cheap to compute; `full`, whole layers; or `auto`, layer by layer as little as a GPU's memory allows.
        checkpoint_every: optimiser steps between two checkpoints.
    """

    __pydantic_config__ = {"extra": "forbid"}

    method: Literal["lora", "full"] = "lora"
    epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 16_384
    max_tokens_per_pack: int = 16_384
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    checkpoint_every: int = 100

    def __post_init__(self):
        for name in ("epochs", "batch_size", "max_length", "max_tokens_per_pack", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError("warmup_ratio must lie between 0 and 1")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("learning_rate and max_grad_norm must be positive")
        if self.weight_decay < 0:
            raise ValueError("weight_decay must not be negative")


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        loss: in nats a token.
        tokens: of all ranks, prompts included.
        seconds: wall time of the step.
        flop: useful ones of all ranks, as training/costs.py counts them; nothing that is computed again.
        mfu: their share of what the ranks' GPUs promise; None where that is not known.
        peak_bytes: of this rank's GPU so far; None on a CPU.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    tokens_per_second: float
    flop: float
    mfu: float | None
    peak_bytes: int | None


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a half cosine to 0. Steps count from 0."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def step_indices(step: int, num_sequences: int, batch_size: int, seed: int) -> np.ndarray:
    """The sequences of one step: each epoch is a fresh permutation, its last batch may be short."""
    steps_per_epoch = math.ceil(num_sequences / batch_size)
    epoch, offset = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_sequences)
    return order[offset * batch_size : (offset + 1) * batch_size]


def fingerprint(sequences: Sequence[TrainingSequence], config: TrainingConfig, seed: int) -> str:
    """Identifies a training run: a checkpoint of another one is not taken up."""
    digest = hashlib.sha256(json.dumps([asdict(config), seed]).encode())
    for sequence in sequences:
        digest.update(np.int64([len(sequence), sequence.response_start]).tobytes())
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
        NonFiniteStep: names the step and the sequences in it. Weights are looked at before a checkpoint, so none is
            saved that is not finite, and training never ends with such weights.
    """
    identity = fingerprint(sequences, config, seed)
    costs = TrainingCosts(engine.decoder.config, engine.decoder.lora, engine.decoder.embedding.element_size())
    total_steps = config.epochs * math.ceil(len(sequences) / config.batch_size)
    newest = load_newest(folder / "checkpoints", identity)
    first_step = 0
    if newest is not None:
        first_step, state = newest
        engine.load_tensors(state)
    folder.mkdir(parents=True, exist_ok=True)
    with _metrics_from(folder / "metrics.jsonl", first_step) if rank() == 0 else open(os.devnull, "w") as metrics_file:
        for step in range(first_step, total_steps):
            started = time.perf_counter()
            torch.manual_seed(hash((seed, step)) + rank())
            chosen = step_indices(step, len(sequences), config.batch_size, seed)
            batch = [sequences[index] for index in chosen]
            mine = [batch[index] for index in balanced([len(sequence) for sequence in batch], world_size())[rank()]]
            rate = learning_rate(step, total_steps, config)
            try:
                result = engine.step(pack(mine, config.max_tokens_per_pack, engine.device), rate)
                saves = (step + 1) % config.checkpoint_every == 0 or step + 1 == total_steps
                if saves:
                    engine.check_weights()
            except NonFiniteStep as error:
                raise NonFiniteStep(f"step {step + 1}, sequences {chosen.tolist()}: {error}") from None
            seconds = time.perf_counter() - started
            speed = _speed(costs, batch, seconds, engine.device)
            metrics = StepMetrics(step + 1, total_steps, result.loss, rate, result.grad_norm, **speed)
            metrics_file.write(json.dumps(asdict(metrics)) + "\n")
            metrics_file.flush()
            on_step(metrics)
            if saves:
                save_checkpoint(folder / "checkpoints", metrics.step, engine.tensors(), identity)
    engine.finish()


def _speed(
    costs: TrainingCosts, batch: Sequence[TrainingSequence], seconds: float, device: torch.device
) -> dict[str, float | None]:
    """What a step's work and time say of the hardware, as in StepMetrics."""
    lengths = [len(sequence) for sequence in batch]
    targets = sum(sequence.num_targets for sequence in batch)
    flop, hardware = costs.useful_flop(Work(sum(lengths), targets, causal_pairs(lengths))), hardware_of(device)
    return {
        "tokens": sum(lengths),
        "seconds": seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "flop": flop,
        "mfu": flop / seconds / world_size() / hardware.peak_flop_per_second if hardware else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def read_metrics(file: Path) -> Iterator[StepMetrics]:
    """The steps of a metrics.jsonl; a last line torn by a kill is left out."""
    if not file.exists():
        return
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield StepMetrics(**json.loads(line))


def _metrics_from(file: Path, first_step: int):
    """Open for appending, with the lines of steps that will be run again cut off: they are the last ones."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = sum(metrics.step <= first_step for metrics in read_metrics(file))
    stream = file.open("a")
    stream.truncate(sum(map(len, lines[:kept])))
    return stream
