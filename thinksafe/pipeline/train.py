"""Stage train: fine-tune the student on the method's examples."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from thinksafe.data.atomic import atomic_path
from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.errors import UserError, is_out_of_memory
from thinksafe.kernels.packed_attention import supports_grouped_heads
from thinksafe.methods.base import OnlineMethod
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach, check_targets, save_adapter, write_base_record
from thinksafe.model.weights import checkpoint_fingerprint, load_config, save_decoder
from thinksafe.paths import expand_path
from thinksafe.pipeline.accept import require_accepted_examples
from thinksafe.pipeline.examples import TOKENIZED_FILE, tokenize_once
from thinksafe.pipeline.rollouts import OnlineBatches, StudentRollouts
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.run.progress import TokenBar, print_note
from thinksafe.run.stage import Stage, run_stage
from thinksafe.training.config import TrainingConfig, ZeroConfig, require_deepspeed
from thinksafe.training.cost_model import TrainingCosts
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import Batches, PlannedBatches, train_on_batches
from thinksafe.training.losses import SafetyHeads
from thinksafe.training.memory_plan import (
    DeviceMemory,
    choose_checkpointing,
    choose_max_cuda_graph_tokens,
    choose_zero_stage,
    describe_checkpointing,
    pack_sizes,
)
from thinksafe.training.metrics import StepMetrics, read_metrics
from thinksafe.training.trackers import open_trackers
from thinksafe.training.trainer import NonFiniteStep, Trainer


def train_student(run: RunDir, checkpoints: CheckpointStore) -> None:
    """Fine-tune the student on the accepted examples, whose prompts are without steering, or as an online method does.

    It writes training/metrics.jsonl and the folder `adapter`, or `model` after full fine-tuning. A killed training
    resumes from its newest checkpoint. All workers call this together.

    Raises:
        UserError: there is no accepted or no usable example, DeepSpeed is needed but not installed, memory is
            exhausted, too many steps or the weights are not finite, or the recipe's checkpoint has changed since the
            run began.
    """
    folder = run.path / "training"
    if not run.is_done("train"):
        with run_stage(run, "train") as stage:
            data = _load_data(stage, checkpoints)
            plan = _plan_memory(run, checkpoints, data)
            run.pin_input("model", checkpoint_fingerprint(checkpoints.base))
            with _explain_out_of_memory(plan, run.workers.world_size):
                decoder = _load_student(run, checkpoints, plan)
                trainer = _make_trainer(decoder, run.recipe.training, plan, checkpoints.device, run.workers)
                batches = data.make_batches(decoder)
                _run_training(stage, trainer, batches, folder)
            student_files = run.workers.on_leader(lambda: _save_student(run, checkpoints, decoder))
            trainer.close()  # frees device memory for an evaluation
            stage.files = [*map(Path, student_files), folder / "metrics.jsonl"]
            stage.tokens = sum(step.tokens for step in read_metrics(folder / "metrics.jsonl"))
            stage.figures["steps"] = batches.num_steps
            checkpoints.release_student()
    if run.workers.is_leader:  # a restart needs them until the manifest lists the stage
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (run.path / TOKENIZED_FILE).unlink(missing_ok=True)


class _Data(NamedTuple):
    """What a student is trained on.

    Attributes:
        lengths: number of tokens of each sequence; for an online method, of the longest possible one.
        with_reference: whether a sequence has the KL loss.
        make_batches: returns the batches for the loaded decoder.
    """

    lengths: list[int]
    with_reference: bool
    make_batches: Callable[[Decoder], Batches]


def _load_data(stage: Stage, checkpoints: CheckpointStore) -> _Data:
    """Return what the recipe's method trains on, and enter the number of records in the stage."""
    run, recipe = stage.run, stage.run.recipe
    config, method = recipe.training, recipe.method
    if isinstance(method, OnlineMethod):

        def make_batches(decoder: Decoder) -> Batches:
            return OnlineBatches(method, StudentRollouts(run, checkpoints, decoder), recipe.to_yaml())

        max_length = min(config.max_length, load_config(checkpoints.base)[0].max_seq_len)
        return _Data([max_length], False, make_batches)
    accepted = require_accepted_examples(run)
    sequences, dropped = tokenize_once(run, accepted, checkpoints)
    counts = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    if not sequences:
        raise UserError(f"{accepted}: no example is fit for training: {counts}")
    if dropped and run.workers.is_leader:
        total = len(sequences) + dropped.total()
        print_note("dropped", f"{dropped.total():,} of {total:,} examples: {counts}")
    checkpoints.release_guard()
    stage.records, stage.figures["dropped"] = len(sequences), dict(dropped)
    lengths = [len(sequence) for sequence in sequences]
    with_reference = any(sequence.needs_reference for sequence in sequences)
    return _Data(lengths, with_reference, lambda decoder: PlannedBatches(sequences, config, recipe.seed))


@dataclass(frozen=True)
class _MemoryPlan:
    """What a training needs, and how it is sharded.

    Attributes:
        largest_pack, mean_pack: number of tokens, see `pack_sizes`.
        zero: sharding with a stage of 1, 2 or 3; None if one process trains without DeepSpeed.
    """

    costs: TrainingCosts
    with_reference: bool
    largest_pack: int
    mean_pack: float
    zero: ZeroConfig | None = None


def _plan_memory(run: RunDir, checkpoints: CheckpointStore, data: _Data) -> _MemoryPlan:
    """Return the plan of the training. With ZeRO, also connect the workers; the leader prints the stage of ZeRO.

    Raises:
        UserError: DeepSpeed is needed but not installed, or the model has no module for a LoRA target.
    """
    config, zero, ranks = run.recipe.training, run.recipe.zero, run.workers.world_size
    model, lora = load_config(checkpoints.base)[0], run.recipe.lora if config.method == "lora" else None
    if lora is not None:
        check_targets(model, lora)
    fp8, grouped_heads = config.frozen_weight_dtype == "fp8", supports_grouped_heads(checkpoints.dtype)
    costs = TrainingCosts(model, lora, checkpoints.dtype.itemsize, data.with_reference, fp8, grouped_heads)
    sizes = pack_sizes(data.lengths, config.batch_size, config.tokens_per_step, config.max_tokens_per_pack)
    plan = _MemoryPlan(costs, data.with_reference, *sizes)
    if not zero.is_needed(ranks):
        return plan
    require_deepspeed()
    run.workers.connect(checkpoints.device)
    zero = choose_zero_stage(DeviceMemory.of(checkpoints.device), zero, costs, plan.largest_pack, ranks)
    if run.workers.is_leader:
        print_note("sharding", f"ZeRO stage {zero.stage} over {ranks} process{'es' * (ranks > 1)}")
    return replace(plan, zero=zero)


def _load_student(run: RunDir, checkpoints: CheckpointStore, plan: _MemoryPlan) -> Decoder:
    """Return the decoder to train: the base model with new adapters, or with all weights trainable.

    This also chooses its activation checkpointing, which the leader prints if a layer recomputes anything.

    Raises:
        UserError: the largest pack does not fit the GPU even if all layers are recomputed.
    """
    config = run.recipe.training
    decoder = checkpoints.student(plan.zero is not None and plan.zero.stage == 3, config.frozen_weight_dtype)
    if config.method == "lora":
        attach(decoder, run.recipe.lora, run.recipe.seed)
        decoder.prepare_fp8_backward()
    else:
        decoder.requires_grad_(True)
    if run.recipe.method.has_safety_heads:
        with torch.random.fork_rng([]):
            torch.manual_seed(run.recipe.seed)
            decoder.safety_heads = SafetyHeads(decoder.config.hidden_size, decoder.embedding.device)
    memory, setting = DeviceMemory.of(checkpoints.device), config.activation_checkpointing
    modes = choose_checkpointing(memory, setting, plan.costs, plan.largest_pack, plan.zero, run.workers)
    if run.workers.is_leader and set(modes) != {"none"}:
        text = f"{describe_checkpointing(modes)}, for packs of {plan.largest_pack:,} tokens"
        print_note("activation checkpointing", text)
    decoder.checkpointing = modes
    return decoder


def _make_trainer(
    decoder: Decoder, config: TrainingConfig, plan: _MemoryPlan, device: torch.device, workers: Workers = SINGLE_PROCESS
) -> Trainer:
    """Return a LocalTrainer, with CUDA graphs if they help and fit, or with ZeRO a DeepSpeedTrainer, which has none."""
    clip, decay, beta2 = config.max_grad_norm, config.weight_decay, config.beta2
    if plan.zero is not None:
        # DeepSpeed takes seconds to import, and need not be installed.
        from thinksafe.training.deepspeed_trainer import DeepSpeedTrainer

        return DeepSpeedTrainer(decoder, clip, decay, plan.zero, plan.with_reference, device, workers, beta2)
    graph_tokens = 0
    if config.cuda_graphs == "auto":
        memory, packs = DeviceMemory.of(device), (plan.largest_pack, plan.mean_pack)
        graph_tokens = choose_max_cuda_graph_tokens(memory, plan.costs, decoder.checkpointing, *packs)
    if graph_tokens:
        print_note("CUDA graphs", f"for packs of up to {graph_tokens:,} tokens")
    return LocalTrainer(decoder, clip, decay, plan.with_reference, graph_tokens, beta2)


def _run_training(stage: Stage, trainer: Trainer, batches: Batches, folder: Path) -> None:
    """Run the training loop to its end. The leader shows a progress bar and logs every step to the recipe's trackers.

    Raises:
        UserError: too many steps in a row, or the weights, were not finite; see `train_on_batches`.
    """
    recipe, workers = stage.run.recipe, stage.run.workers
    names = recipe.trackers if workers.is_leader else ()
    tracking = open_trackers(names, folder, recipe.name, asdict(recipe))
    with tracking as trackers, TokenBar("train", batches.num_steps, "steps", workers=workers) as bar:

        def on_step(metrics: StepMetrics) -> None:
            stage.clock.tick()
            for tracker in trackers:
                tracker.log(metrics)
            if workers.is_leader:  # all workers do each step together
                if metrics.note:
                    bar.print_line(f"step {metrics.step} {metrics.note}")
                bar.update(metrics.tokens, metrics.step, **format_metrics(metrics))

        try:
            train_on_batches(trainer, batches, recipe.training, recipe.seed, folder, on_step, bar.print_line)
        except NonFiniteStep as error:
            remedy = "lower training.learning_rate, or check the examples in accepted.jsonl"
            raise UserError(f"training stopped at {error}; {remedy}") from None


@contextmanager
def _explain_out_of_memory(plan: _MemoryPlan, ranks: int) -> Iterator[None]:
    """Replace an out-of-memory error of the body with a UserError that has the estimated sizes and the settings that
    need less memory; all other errors pass unchanged."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = (str(error).splitlines() or ["the host has no memory left"])[0]
        costs, tokens = plan.costs, plan.largest_pack
        state_gib = costs.state_bytes(plan.zero, ranks) / 2**30
        min_gib, max_gib = (
            costs.pack_bytes((mode,) * costs.model.num_layers, tokens, tokens) / 2**30 for mode in ("full", "none")
        )
        raise UserError(
            f"out of memory in training: {cause}; the estimate is {state_gib:.1f} GiB for weights and optimizer, and "
            f"{min_gib:.1f} to {max_gib:.1f} GiB for a pack of {tokens:,} tokens; lower "
            "training.max_tokens_per_pack, or set training.activation_checkpointing=full, zero.offload_optimizer=true "
            "or, with more GPUs, zero.stage=3; the run then resumes from its last checkpoint"
        ) from None


def _save_student(run: RunDir, checkpoints: CheckpointStore, decoder: Decoder) -> list[str]:
    """Write the folder `adapter`, or `model` after full fine-tuning, and return the paths of its files, sorted.

    The folder is written under a temporary name and then replaces an earlier one. The leader calls this alone.
    """
    folder, decoder.safety_heads = run.student_folder, None
    with atomic_path(folder) as staging:
        if run.recipe.training.method == "lora":
            local_folder = expand_path(run.recipe.model)
            base_model = str(local_folder) if local_folder.is_dir() else run.recipe.model
            save_adapter(decoder, run.recipe.lora, staging, base_model)
            write_base_record(staging, base_model, checkpoints.base)
        else:
            save_decoder(decoder, load_config(checkpoints.base)[1], staging)
            checkpoints.chat.save(staging)
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(map(str, folder.iterdir()))


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
