"""Stage train: fine-tune the student on the accepted examples."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from thinksafe.data.atomic import atomic_path
from thinksafe.distributed.ranks import init_training_ranks
from thinksafe.errors import UserError, is_out_of_memory
from thinksafe.kernels.packed_attention import supports_grouped_heads
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach, check_targets, save_adapter, write_base_record
from thinksafe.model.weights import checkpoint_fingerprint, load_config, save_decoder
from thinksafe.paths import expand_path
from thinksafe.pipeline.accept import require_accepted_examples
from thinksafe.pipeline.examples import tokenize_examples
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir, StageClock
from thinksafe.run.progress import TokenBar
from thinksafe.training.config import TrainingConfig, ZeroConfig, require_deepspeed
from thinksafe.training.cost_model import TrainingCosts
from thinksafe.training.local_trainer import LocalTrainer, NonFiniteStep
from thinksafe.training.loop import StepMetrics, plan_steps
from thinksafe.training.loop import train as run_training
from thinksafe.training.memory_plan import (
    choose_checkpointing,
    choose_max_cuda_graph_tokens,
    choose_zero_stage,
    describe_checkpointing,
    max_pack_tokens,
    mean_pack_tokens,
)
from thinksafe.training.packing import TrainingSequence
from thinksafe.training.trackers import open_trackers

if TYPE_CHECKING:
    from thinksafe.training.deepspeed_trainer import DeepSpeedTrainer


def train_student(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Fine-tune the student on the accepted examples, whose prompts are without steering.

    It writes training/metrics.jsonl and the folder `adapter`, or `model` after full fine-tuning. A killed training
    resumes from its newest checkpoint. All workers call this together.

    Raises:
        UserError: there is no accepted or no usable example, DeepSpeed is needed but not installed, memory is
            exhausted, too many steps or the weights are not finite, or the recipe's checkpoint has changed since the
            run began.
    """
    checkpoint_folder = run.path / "training" / "checkpoints"
    if run.is_done("train"):
        if run.workers.is_leader:
            shutil.rmtree(checkpoint_folder, ignore_errors=True)
        return
    recipe, clock, ranks = run.recipe, run.clock("train"), run.workers.world_size
    config = recipe.training
    accepted = require_accepted_examples(run)
    sequences, dropped = tokenize_examples(accepted, recipe, checkpoints)
    if not sequences:
        raise UserError(f"{accepted}: no example is fit for training: {_format_counts(dropped)}")
    if dropped and run.workers.is_leader:
        total = len(sequences) + dropped.total()
        print(f"{'dropped':>30}: {dropped.total():,} of {total:,} examples: {_format_counts(dropped)}", file=sys.stderr)
    checkpoints.release_guard()
    model_config, lora = load_config(checkpoints.base)[0], recipe.lora if config.method == "lora" else None
    if lora is not None:
        check_targets(model_config, lora)
    run.pin_input("model", checkpoint_fingerprint(checkpoints.base))
    lengths = [len(sequence) for sequence in sequences]
    with_reference = any(sequence.use_reference_kl for sequence in sequences)
    fp8 = config.frozen_weight_dtype == "fp8"
    grouped_heads = supports_grouped_heads(checkpoints.dtype)
    costs = TrainingCosts(model_config, lora, checkpoints.dtype.itemsize, with_reference, fp8, grouped_heads)
    pack_limits = (config.batch_size, config.tokens_per_step, config.max_tokens_per_pack)
    largest_pack = max_pack_tokens(lengths, *pack_limits)
    sharding = _choose_sharding(run, checkpoints, costs, largest_pack)
    with _explain_out_of_memory(costs, sharding, ranks, largest_pack):
        decoder = _prepare_student(run, checkpoints, costs, sharding, largest_pack)
        graph_tokens = 0
        if sharding is None and config.cuda_graphs == "auto":
            average_pack = mean_pack_tokens(lengths, *pack_limits)
            graph_tokens = choose_max_cuda_graph_tokens(
                checkpoints.device, costs, decoder.checkpointing, largest_pack, average_pack
            )
        if graph_tokens:
            print(f"{'CUDA graphs':>30}: for packs of up to {graph_tokens:,} tokens", file=sys.stderr)
        trainer = _make_trainer(decoder, config, sharding, with_reference, checkpoints.device, graph_tokens)
        _run_training(run, trainer, sequences, clock)
    files = run.workers.on_leader(lambda: [str(file) for file in _save_student(run, checkpoints, decoder)])
    trainer.close()  # frees device memory for an evaluation
    run.finish_stage(
        "train",
        [*map(Path, files), run.path / "training" / "metrics.jsonl"],
        clock,
        tokens=config.epochs * sum(map(len, sequences)),
        records=len(sequences),
        dropped=dict(dropped),
        steps=len(plan_steps(lengths, config, recipe.seed)),
    )
    if run.workers.is_leader:
        shutil.rmtree(checkpoint_folder)  # a restart needs it until the manifest lists the stage
    checkpoints.release_student()


def _choose_sharding(
    run: RunDir, checkpoints: CheckpointStore, costs: TrainingCosts, largest_pack: int
) -> ZeroConfig | None:
    """Return how ZeRO shards the training, with its stage decided; None if one process trains without DeepSpeed.

    With ZeRO, this also creates the process group of all workers, and the leader prints the choice to stderr.

    Args:
        largest_pack: number of tokens of the largest pack.

    Raises:
        UserError: DeepSpeed is needed but not installed.
    """
    zero, ranks = run.recipe.zero, run.workers.world_size
    if not zero.is_needed(ranks):
        return None
    require_deepspeed()
    init_training_ranks(checkpoints.device, run.workers)
    sharding = choose_zero_stage(checkpoints.device, zero, costs, largest_pack, ranks)
    if run.workers.is_leader:
        description = f"ZeRO stage {sharding.stage} over {ranks} process{'es' * (ranks > 1)}"
        print(f"{'sharding':>30}: {description}", file=sys.stderr)
    return sharding


def _prepare_student(
    run: RunDir, checkpoints: CheckpointStore, costs: TrainingCosts, sharding: ZeroConfig | None, largest_pack: int
) -> Decoder:
    """Return the decoder to train: the base model with new adapters, or with all weights trainable.

    This also chooses its activation checkpointing, which the leader prints to stderr if a layer recomputes anything.

    Args:
        sharding: result of `_choose_sharding`.
        largest_pack: number of tokens of the largest pack.

    Raises:
        UserError: the largest pack does not fit the GPU even if all layers are recomputed.
    """
    config = run.recipe.training
    decoder = checkpoints.student(sharding is not None and sharding.stage == 3, config.frozen_weight_dtype)
    if config.method == "lora":
        attach(decoder, run.recipe.lora, run.recipe.seed)
        decoder.prepare_fp8_backward()
    else:
        decoder.requires_grad_(True)
    setting, ranks = config.activation_checkpointing, run.workers.world_size
    decoder.checkpointing = choose_checkpointing(checkpoints.device, setting, costs, largest_pack, sharding, ranks)
    if run.workers.is_leader and set(decoder.checkpointing) != {"none"}:
        description = f"{describe_checkpointing(decoder.checkpointing)}, for packs of {largest_pack:,} tokens"
        print(f"{'activation checkpointing':>30}: {description}", file=sys.stderr)
    return decoder


def _make_trainer(
    decoder: Decoder,
    config: TrainingConfig,
    sharding: ZeroConfig | None,
    with_reference: bool,
    device: torch.device,
    graph_tokens: int,
) -> "LocalTrainer | DeepSpeedTrainer":
    """Return the trainer of a decoder: a LocalTrainer if `sharding` is None, else a DeepSpeedTrainer.

    Args:
        with_reference: whether a sequence has the KL loss, which needs the untrained student.
        graph_tokens: number of tokens of the largest pack whose passes are captured as CUDA graphs; 0 for none. A
            DeepSpeedTrainer uses no CUDA graphs.
    """
    if sharding is None:
        return LocalTrainer(decoder, config.max_grad_norm, config.weight_decay, with_reference, graph_tokens)
    # DeepSpeed takes seconds to import, and need not be installed.
    from thinksafe.training.deepspeed_trainer import DeepSpeedTrainer

    return DeepSpeedTrainer(decoder, config.max_grad_norm, config.weight_decay, sharding, with_reference, device)


def _run_training(
    run: RunDir, trainer: "LocalTrainer | DeepSpeedTrainer", sequences: Sequence[TrainingSequence], clock: StageClock
) -> None:
    """Run the training loop to its end. The leader shows a progress bar and logs every step to the recipe's trackers.

    Args:
        clock: clock of stage `train`; its time is saved during the training.

    Raises:
        UserError: too many steps in a row, or the weights, were not finite; see `thinksafe.training.loop.train`.
    """
    recipe, folder = run.recipe, run.path / "training"
    steps = len(plan_steps([len(sequence) for sequence in sequences], recipe.training, recipe.seed))
    tracker_context = open_trackers(
        recipe.trackers if run.workers.is_leader else (), folder, recipe.name, asdict(recipe)
    )
    with tracker_context as trackers, TokenBar("train", steps, "steps", workers=run.workers) as bar:

        def on_step(metrics):
            clock.tick()
            for tracker in trackers:
                tracker.log(metrics)
            if run.workers.is_leader:  # all workers do each step together
                if metrics.note:
                    bar.print_line(f"step {metrics.step} {metrics.note}")
                bar.update(metrics.tokens, metrics.step, **format_metrics(metrics))

        try:
            run_training(trainer, sequences, recipe.training, recipe.seed, folder, on_step)
        except NonFiniteStep as error:
            remedy = "lower training.learning_rate, or check the examples in accepted.jsonl"
            raise UserError(f"training stopped at {error}; {remedy}") from None


@contextmanager
def _explain_out_of_memory(
    costs: TrainingCosts, sharding: ZeroConfig | None, ranks: int, largest_pack: int
) -> Iterator[None]:
    """Replace an out-of-memory error inside the block with a UserError; all other errors pass unchanged.

    The message has the estimated sizes and the settings that need less memory.

    Args:
        sharding: result of `_choose_sharding`.
        ranks: number of training processes.
        largest_pack: number of tokens of the largest pack.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = (str(error).splitlines() or ["the host has no memory left"])[0]
        state_gib = costs.state_bytes(sharding, ranks) / 2**30
        layers = costs.model.num_layers
        min_gib, max_gib = (
            costs.pack_bytes((mode,) * layers, largest_pack, largest_pack) / 2**30 for mode in ("full", "none")
        )
        raise UserError(
            f"out of memory in training: {cause}; the estimate is {state_gib:.1f} GiB for weights and optimizer, and "
            f"{min_gib:.1f} to {max_gib:.1f} GiB for a pack of {largest_pack:,} tokens; lower "
            "training.max_tokens_per_pack, or set training.activation_checkpointing=full, zero.offload_optimizer=true "
            "or, with more GPUs, zero.stage=3; the run then resumes from its last checkpoint"
        ) from None


def _save_student(run: RunDir, checkpoints: CheckpointStore, decoder: Decoder) -> list[Path]:
    """Write the folder `adapter`, or `model` after full fine-tuning, and return the paths of its files, sorted.

    The folder is written under a temporary name and then replaces an earlier one. The leader calls this alone.
    """
    folder = run.student_folder
    with atomic_path(folder) as staging:
        if run.recipe.training.method == "lora":
            local_folder = expand_path(run.recipe.model)
            base_model = str(local_folder) if local_folder.is_dir() else run.recipe.model
            save_adapter(decoder, run.recipe.lora, staging, base_model)
            write_base_record(staging, base_model, checkpoints.base)
        else:
            save_decoder(decoder, load_config(checkpoints.base)[1], staging)
            checkpoints.chat.tokenizer.save(staging)
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(folder.iterdir())


def _format_counts(reasons: Counter[str]) -> str:
    """Return counts as text, most frequent first: `3 x empty_answer, 1 x no_think_block`."""
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def format_metrics(metrics: StepMetrics) -> dict[str, str]:
    """Return the texts that the progress bar shows for a training step, by name: `loss`, `MFU` and `memory`.

    A figure that is None in the metrics is left out.
    """
    fields = {} if metrics.loss is None else {"loss": f"{metrics.loss:.3f}"}
    if metrics.mfu is not None:
        fields["MFU"] = f"{metrics.mfu:.0%}"
    if metrics.peak_bytes is not None:
        fields["memory"] = f"{metrics.peak_bytes / 2**30:.1f} GiB"
    return fields
