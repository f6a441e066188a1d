"""The student learns from what was accepted."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from thinksafe.distributed.ranks import join
from thinksafe.errors import UserError, is_out_of_memory
from thinksafe.kernels.packed_attention import keeps_grouped_heads
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach, check_targets, name_base, save_adapter
from thinksafe.model.weights import fingerprint, load_config, save_decoder
from thinksafe.paths import expand
from thinksafe.pipeline.accept import examples_file
from thinksafe.pipeline.examples import training_sequences
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.progress import TokenBar
from thinksafe.training.cost_model import TrainingCosts
from thinksafe.training.local_engine import NonFiniteStep, SingleEngine
from thinksafe.training.loop import StepMetrics, TrainingConfig, plan_steps
from thinksafe.training.loop import train as run_training
from thinksafe.training.memory_plan import average_pack, described, keeping_on, largest_pack, recorded_on, sharding_on
from thinksafe.training.packing import TrainingSequence
from thinksafe.training.trackers import tracking
from thinksafe.training.zero_config import ZeroConfig, require_deepspeed

if TYPE_CHECKING:
    from thinksafe.training.deepspeed_engine import ZeroEngine


def train(run: RunDir, models: Models) -> None:
    """Fine-tune the student on the accepted examples, prompts without steering."""
    checkpoints = run.path / "training" / "checkpoints"
    if run.is_done("train"):
        if run.workers.leads:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return
    recipe, clock, ranks = run.recipe, run.clock("train"), run.workers.count
    config = recipe.training
    accepted = examples_file(run)
    sequences, dropped = training_sequences(accepted, recipe, models)
    if not sequences:
        raise UserError(f"{accepted}: no example is fit for training: {_counted(dropped)}")
    if dropped and run.workers.leads:
        total = len(sequences) + dropped.total()
        print(f"{'dropped':>30}: {dropped.total():,} of {total:,} examples: {_counted(dropped)}", file=sys.stderr)
    models.forget_guard()
    shape, lora = load_config(models.base)[0], recipe.lora if config.method == "lora" else None
    if lora is not None:
        check_targets(shape, lora)
    run.remember_input("model", fingerprint(models.base))
    lengths = [len(sequence) for sequence in sequences]
    with_reference = any(sequence.keeps_to_reference for sequence in sequences)
    fp8 = config.frozen_weights == "fp8"
    grouped_heads = keeps_grouped_heads(models.dtype)
    costs = TrainingCosts(shape, lora, models.dtype.itemsize, with_reference, fp8, grouped_heads)
    largest = largest_pack(lengths, config.batch_size, config.batch_tokens, config.max_tokens_per_pack)
    sharding = _sharding(run, models, costs, largest)
    with _explaining_memory(costs, sharding, ranks, largest):
        decoder = _student(run, models, costs, sharding, largest)
        recorded = 0
        if sharding is None and config.cuda_graphs == "auto":
            average = average_pack(lengths, config.batch_size, config.batch_tokens, config.max_tokens_per_pack)
            recorded = recorded_on(models.device, costs, decoder.keeping, largest, average)
        if recorded:
            print(f"{'CUDA graphs':>30}: for packs of up to {recorded:,} tokens", file=sys.stderr)
        engine = _training_engine(decoder, config, sharding, with_reference, models.device, recorded)
        _run_training(run, engine, sequences, clock)
    files = run.workers.once(lambda: [str(file) for file in _save_student(run, models, decoder)])
    engine.close()  # an evaluation may follow, which wants the device's memory
    run.finish_stage(
        "train",
        [*map(Path, files), run.path / "training" / "metrics.jsonl"],
        clock,
        tokens=config.epochs * sum(map(len, sequences)),
        records=len(sequences),
        dropped=dict(dropped),
        steps=len(plan_steps(lengths, config, recipe.seed)),
    )
    if run.workers.leads:
        shutil.rmtree(checkpoints)  # only now: until the manifest knows them, they are what a restart goes on from
    models.forget_student()


def _sharding(run: RunDir, models: Models, costs: TrainingCosts, largest: int) -> ZeroConfig | None:
    """How the workers share the training out, said aloud; None for one process without DeepSpeed."""
    zero, ranks = run.recipe.zero, run.workers.count
    if not zero.is_needed(ranks):
        return None
    require_deepspeed()
    join(models.device, run.workers)
    sharding = sharding_on(models.device, zero, costs, largest, ranks)
    if run.workers.leads:
        print(f"{'sharded':>30}: ZeRO stage {sharding.stage} over {ranks} process{'es' * (ranks > 1)}", file=sys.stderr)
    return sharding


def _student(run: RunDir, models: Models, costs: TrainingCosts, sharding: ZeroConfig | None, largest: int) -> Decoder:
    """The base model with what is to be trained, and how much each layer keeps for its backward pass, said aloud."""
    config = run.recipe.training
    decoder = models.student(sharding is not None and sharding.stage == 3, config.frozen_weights)
    if config.method == "lora":
        attach(decoder, run.recipe.lora, run.recipe.seed)
        decoder.pass_gradients()
    else:
        decoder.requires_grad_(True)
    setting, ranks = config.activation_checkpointing, run.workers.count
    decoder.keeping = keeping_on(models.device, setting, costs, largest, sharding, ranks)
    if run.workers.leads and set(decoder.keeping) != {"none"}:
        again = f"{described(decoder.keeping)}, for packs of {largest:,} tokens"
        print(f"{'computed again':>30}: {again}", file=sys.stderr)
    return decoder


def _training_engine(
    decoder: Decoder,
    config: TrainingConfig,
    sharding: ZeroConfig | None,
    with_reference: bool,
    device: torch.device,
    recorded: int,
) -> "SingleEngine | ZeroEngine":
    if sharding is None:
        return SingleEngine(decoder, config.max_grad_norm, config.weight_decay, with_reference, recorded)
    from thinksafe.training.deepspeed_engine import (
        ZeroEngine,  # DeepSpeed takes seconds to import, and need not be installed
    )

    return ZeroEngine(decoder, config.max_grad_norm, config.weight_decay, sharding, with_reference, device)


def _run_training(
    run: RunDir, engine: "SingleEngine | ZeroEngine", sequences: Sequence[TrainingSequence], clock: StageClock
) -> None:
    """The loop, watched: a bar and the recipe's trackers."""
    recipe, folder = run.recipe, run.path / "training"
    steps = len(plan_steps([len(sequence) for sequence in sequences], recipe.training, recipe.seed))
    watched = tracking(recipe.trackers if run.workers.leads else (), folder, recipe.name, asdict(recipe))
    with watched as trackers, TokenBar("train", steps, "steps", workers=run.workers) as bar:

        def on_step(metrics):
            clock.tick()
            for tracker in trackers:
                tracker.log(metrics)
            if run.workers.leads:  # a step is the work of all
                if metrics.note:
                    bar.say(f"step {metrics.step} {metrics.note}")
                bar.update(metrics.tokens, metrics.step, **in_figures(metrics))

        try:
            run_training(engine, sequences, recipe.training, recipe.seed, folder, on_step)
        except NonFiniteStep as error:
            remedy = "lower training.learning_rate, or look at those examples in accepted.jsonl"
            raise UserError(f"training stopped, {error}; {remedy}") from None


@contextmanager
def _explaining_memory(costs: TrainingCosts, sharding: ZeroConfig | None, ranks: int, largest: int) -> Iterator[None]:
    """Raises: UserError: in place of running out of memory; it says what is needed and which settings need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or ["the host has no more"])[0]
        state = costs.state_bytes(sharding, ranks) / 2**30
        layers = costs.model.num_layers
        least, most = (costs.step_bytes((kept,) * layers, largest, largest) / 2**30 for kept in ("full", "none"))
        raise UserError(
            f"out of memory in training: {said}; weights and optimiser were counted as {state:.1f} GiB, a pack of "
            f"{largest:,} tokens as {least:.1f} to {most:.1f}; lower training.max_tokens_per_pack, set "
            "training.activation_checkpointing=full, zero.offload_optimizer=true or, with more GPUs, zero.stage=3; "
            "the run goes on from its last checkpoint"
        ) from None


def _save_student(run: RunDir, models: Models, decoder: Decoder) -> list[Path]:
    """Write the adapter, or the whole model after full fine-tuning, under a temporary name and rename it; its files."""
    lora = run.recipe.training.method == "lora"
    folder = run.path / ("adapter" if lora else "model")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if lora:
        here = expand(run.recipe.model)
        base_model = str(here) if here.is_dir() else run.recipe.model
        save_adapter(decoder, run.recipe.lora, partial, base_model)
        name_base(partial, base_model, models.base)
    else:
        save_decoder(decoder, load_config(models.base)[1], partial)
        models.chat.tokenizer.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return sorted(folder.iterdir())


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def in_figures(metrics: StepMetrics) -> dict[str, str]:
    """What a bar shows of a training step, beside its rate: what is known of loss, MFU and memory."""
    shown = {} if metrics.loss is None else {"loss": f"{metrics.loss:.3f}"}
    if metrics.mfu is not None:
        shown["MFU"] = f"{metrics.mfu:.0%}"
    if metrics.peak_bytes is not None:
        shown["memory"] = f"{metrics.peak_bytes / 2**30:.1f} GiB"
    return shown
