"""The training loop: choose a step's sequences, pack them, step, log, and save a checkpoint at intervals.

Order, packing, learning rate and dropout are functions of (seed, step) alone, so a killed run resumes as if it had not
stopped, bit for bit on a CPU. A thread makes the next step's packs while the device computes the current step, unless
an online method samples them from the current weights.

A step whose loss or gradient is not finite is left out: it changes nothing, and the log names its examples. After three
such steps in a row the run stops.
"""

import hashlib
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from itertools import count, zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.config import TrainingConfig
from thinksafe.training.metrics import MetricsLog, StepMetrics
from thinksafe.training.packing import PackedBatch, pack, partition_balanced
from thinksafe.training.sequence import LateLosses, PreferencePair, TrainingItem, TrainingSequence
from thinksafe.training.trainer import NonFiniteStep, Trainer

T = TypeVar("T")


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


class Batches(Protocol):
    """The items of every optimizer step. They are a function of the step and, for an online method, of the weights
    before it, so a killed run makes the same ones again.

    Attributes:
        num_steps: number of steps of the training.
        is_online: whether the sequences depend on the weights, so that they cannot be made one step ahead.
        fingerprint: hex hash that identifies them together with the settings of the training.
    """

    num_steps: int
    is_online: bool
    fingerprint: str

    def of_step(self, step: int) -> Sequence[TrainingSequence | PreferencePair]:
        """Return the items of all ranks for a step, counted from 0; all ranks call this with the same steps."""


class PlannedBatches:
    """Batches of fixed items: every epoch is another permutation of them."""

    is_online = False

    def __init__(self, items: Sequence[TrainingItem], config: TrainingConfig, seed: int):
        """Plan all steps.

        Args:
            items: at least one; their order is part of the run's identity.
            seed: seed of the run; with the number of the epoch, it determines the permutation.
        """
        self._items = items
        self._plan = plan_steps([len(item) for item in items], config, seed)
        self._epochs = (np.cumsum([len(indices) for indices in self._plan]) - 1) // len(items)
        self.num_steps = len(self._plan)
        self.fingerprint = training_fingerprint(items, config, seed)

    def of_step(self, step: int) -> list[TrainingSequence | PreferencePair]:
        batch, epochs_left = [], int(self._epochs[-1] - self._epochs[step] + 1)
        for index in self._plan[step]:
            item = self._items[index]
            batch += item.in_epoch(epochs_left) if isinstance(item, LateLosses) else [item]
        return batch


def plan_steps(lengths: Sequence[int], config: TrainingConfig, seed: int) -> list[np.ndarray]:
    """Return the indices of each step's sequences, one int array for each step of all epochs.

    Each epoch is a new permutation, cut into batches in its order; if `steps` is set, it replaces `epochs`. A batch has
    `batch_size` sequences, the last one of an epoch possibly fewer. If `tokens_per_step` is set, it replaces
    `batch_size`: a batch then has the sequences that fit into that many tokens together, or a single longer one.

    Args:
        lengths: number of tokens of each sequence.
        seed: seed of the run; with the number of the epoch, it determines the permutation.
    """
    steps: list[np.ndarray] = []
    for epoch in range(config.epochs) if config.steps is None else count():
        if config.steps is not None and len(steps) >= config.steps:
            break
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
        if config.tokens_per_step:
            steps += np.split(order, _batch_boundaries([lengths[index] for index in order], config.tokens_per_step))
        else:
            steps += np.split(order, range(config.batch_size, len(order), config.batch_size))
    return steps[: config.steps]


def _batch_boundaries(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Return the indices in `lengths` at which a new batch begins, except the 0 of the first batch. A sequence begins a
    new batch if the current batch would have more than `max_tokens` tokens with it."""
    boundaries, num_tokens = [], 0
    for index, length in enumerate(lengths):
        if num_tokens and num_tokens + length > max_tokens:
            boundaries.append(index)
            num_tokens = 0
        num_tokens += length
    return boundaries


def training_fingerprint(items: Sequence[TrainingItem], config: TrainingConfig, seed: int) -> str:
    """Return a hex hash of items, seed and settings other than MEMORY_ONLY_FIELDS. It identifies a training run: a
    checkpoint with another hash is passed over."""
    settings = {key: value for key, value in asdict(config).items() if key not in config.MEMORY_ONLY_FIELDS}
    digest = hashlib.sha256(json.dumps([settings, seed]).encode())
    for item in items:
        _hash(digest, item)
    return digest.hexdigest()


def print_to_stderr(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr)


def _hash(digest: Any, value: Any) -> None:
    """Add a training item, or a field of one, to a digest; names of examples do not count."""
    if isinstance(value, np.ndarray):
        digest.update(np.int64(value.shape).tobytes() + value.tobytes())
    elif isinstance(value, tuple):
        for entry in value:
            _hash(digest, entry)
    elif is_dataclass(value):
        digest.update(type(value).__name__.encode())
        for name, field in vars(value).items():
            if name != "name":
                _hash(digest, field)
    else:
        digest.update(f"{value!r};".encode())


def train(
    trainer: Trainer,
    items: Sequence[TrainingItem],
    config: TrainingConfig,
    seed: int,
    folder: Path,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
) -> None:
    """Train on fixed items; see `train_on_batches`."""
    train_on_batches(trainer, PlannedBatches(items, config, seed), config, seed, folder, on_step)


def train_on_batches(
    trainer: Trainer,
    batches: Batches,
    config: TrainingConfig,
    seed: int,
    folder: Path,
    on_step: Callable[[StepMetrics], None] = lambda metrics: None,
    on_note: Callable[[str], None] = print_to_stderr,
) -> None:
    """Train to the end, from the newest checkpoint if there is one, and leave the decoder ready to be saved.

    All ranks must call this with the same arguments; each trains on its share of every step's sequences.

    Args:
        folder: folder of metrics.jsonl and checkpoints/, the same on every rank.
        on_step: called on every rank after every step, for progress.
        on_note: called on the leader with a line for each checkpoint that is passed over, and the reason.

    Raises:
        NonFiniteStep: MAX_SKIPPED_STEPS steps in a row were not finite, and the message names the examples of the last
            one; or a weight is not finite. Weights are checked before every checkpoint, and the last step has one, so
            weights that are not finite are never saved or returned.
    """
    workers, num_steps, checkpoints = trainer.workers, batches.num_steps, folder / "checkpoints"
    problems: list[str] = []
    first_step, state = load_newest(checkpoints, batches.fingerprint, workers, problems.append) or (0, None)
    for problem in problems if workers.is_leader else ():
        on_note(f"checkpoint {problem}; training continues after step {first_step}")
    if state is not None:
        trainer.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)

    def make_step(step: int) -> tuple[Sequence[TrainingSequence | PreferencePair], list[PackedBatch]]:
        batch = batches.of_step(step)
        share = partition_balanced([len(item) for item in batch], workers.world_size)[workers.rank]
        return batch, pack(
            [batch[index] for index in share], config.max_tokens_per_pack, trainer.device, config.loss_reduction
        )

    steps = range(first_step, num_steps)
    made_steps = map(make_step, steps) if batches.is_online else prefetch(make_step, steps)
    with MetricsLog(folder / "metrics.jsonl", first_step, num_steps, trainer) as log:
        for step, (batch, packs) in zip(steps, made_steps, strict=True):
            torch.manual_seed(hash((seed, step)) + workers.rank)
            rate = learning_rate(step, num_steps, config)
            try:
                result = trainer.step(packs, rate)
            except NonFiniteStep as error:
                result = error
            is_checkpoint = (step + 1) % config.checkpoint_every == 0 or step + 1 == num_steps
            if is_checkpoint:
                _check_weights(trainer, step)
            on_step(log.add(step, rate, batch, result))
            if is_checkpoint:
                log.sync()
                save_checkpoint(checkpoints, step + 1, trainer.state_dict(), batches.fingerprint, workers)
    trainer.finish()


def _check_weights(trainer: Trainer, step: int) -> None:
    """Check that every trained weight is finite; raise a NonFiniteStep that names the step otherwise."""
    try:
        trainer.check_weights_finite()
    except NonFiniteStep as error:
        raise NonFiniteStep(f"step {step + 1}: {error}") from None


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """Yield `make(step)` of each step; a thread makes the next one while the caller uses this one. An error in `make`
    is raised here at its step.

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
        for _, next_step in zip_longest(steps, steps[1:]):
            value, error = results.get()
            if error is not None:
                raise error
            if next_step is not None:
                requests.put(next_step)
            yield value
    finally:
        requests.put(None)
        while results.get(timeout=60) is not None:  # at exit, a thread inside torch would abort the interpreter
            pass
