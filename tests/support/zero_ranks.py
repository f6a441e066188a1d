"""The ranks of test_deepspeed_trainer.py: each runs `main(SCENARIO, STUDENT, OUT, ARGUMENT ...)`."""

import dataclasses
import json
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.support.forked import shorten_waits
from thinksafe.distributed import liveness
from thinksafe.distributed.workers import SINGLE_PROCESS, Workers
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import adapter_parameters, attach, save_adapter
from thinksafe.model.weights import load_config, load_decoder, save_decoder
from thinksafe.training import checkpoint, losses
from thinksafe.training.config import TrainingConfig, ZeroConfig
from thinksafe.training.loop import train
from thinksafe.training.losses import PackLoss, SafetyHeads
from thinksafe.training.packing import pack, partition_balanced
from thinksafe.training.sequence import PreferencePair, SafetySpan, TrainingSequence
from thinksafe.training.trainer import NonFiniteStep

CPU = torch.device("cpu")
workers = SINGLE_PROCESS
"""The ranks of the scenario; `main` sets it."""
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
LORA_WITH_DROPOUT = dataclasses.replace(LORA, dropout=0.2)
CLIP, DECAY = 0.5, 0.1
"""Maximum norm of the gradient, and weight decay."""
RATES = (1e-2, 3e-3, 1e-2, 1e-2)
"""Learning rate of each of the four steps."""
TRAINING_CONFIG = TrainingConfig(epochs=2, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)
MIXED_CONFIG = dataclasses.replace(TRAINING_CONFIG, tokens_per_step=70, loss_reduction="sequence")
SEED = 11
SETUPS = {
    "lora-3": ("lora", ZeroConfig(3)),
    "lora-3-offloaded": ("lora", ZeroConfig(3, offload_optimizer=True, offload_parameters=True)),
    "lora-2-offloaded": ("lora", ZeroConfig(2, offload_optimizer=True)),
    "lora-1": ("lora", ZeroConfig(1)),
    "lora-2-fp8": ("lora fp8", ZeroConfig(2)),
    "full-3": ("full", ZeroConfig(3)),
    "full-2": ("full", ZeroConfig(2)),
    "lora-3-kl": ("lora", ZeroConfig(3)),
    "lora-2-kl": ("lora", ZeroConfig(2)),
    "full-3-kl": ("full", ZeroConfig(3)),
    "lora-2-pairs": ("lora heads", ZeroConfig(2)),
    "lora-3-pairs": ("lora heads", ZeroConfig(3)),
}
"""{name: (method, sharding)}: `lora`, `lora fp8` (frozen weights in fp8), `lora heads` (SafeKey's heads too) or `full`.
The end of a name, `kl` or `pairs`, says which losses the batches have besides cross-entropy."""
MAIN_SETUPS = ("lora-3-offloaded", "lora-1", "lora-2-fp8", "full-3", "full-2", "lora-2-kl", "lora-3-pairs")
"""Setups that every test run covers: each stage, method and loss. The others run in exhaustive tests."""
INTERRUPTED_SETUPS = {"lora-2-kl": ("lora", ZeroConfig(2)), "full-3-kl": ("full", ZeroConfig(3))}
"""Setups of the interrupted runs. The frozen base of the first one also has a poisoned token."""
CHECKPOINTING = {"lora-3": "full", "lora-3-offloaded": "selective", "full-3": "selective"}
"""Activation checkpointing of some setups: recomputation must gather sharded weights again."""


def sequence(length: int, response: int) -> TrainingSequence:
    """Return a sequence of `length` random tokens, of which the last `response` tokens are the response."""
    ids = np.random.default_rng(length).integers(0, 380, length).astype(np.int32)
    return TrainingSequence(ids, length - response)


SEQUENCES = [sequence(*sizes) for sizes in [(30, 12), (7, 1), (55, 54), (16, 8), (31, 29), (2, 1), (41, 3)]]
BATCHES = [SEQUENCES, SEQUENCES[2:3], SEQUENCES[1:], SEQUENCES[4:]]
"""In the second batch one rank has no pack; in the others the ranks have different numbers of packs."""
GOOD, POISONED = SEQUENCES[0], SEQUENCES[2]
POISON_TOKEN = next(id_ for id_ in POISONED.input_ids.tolist() if id_ not in GOOD.input_ids)
"""A token of POISONED that GOOD lacks; tests set its embedding to NaN."""


def mixed_sequences() -> list[TrainingSequence]:
    """Return SEQUENCES with different loss weights, of which some have a KL loss."""
    return [
        dataclasses.replace(sequence, use_reference_kl=len(sequence) % 2 == 1, weight=1 + len(sequence))
        for sequence in SEQUENCES
    ]


def pairs_and_spans() -> list[TrainingSequence | PreferencePair]:
    """Return three preference pairs, and two sequences of which one has a span for SafeKey's heads."""
    pairs = [PreferencePair(*SEQUENCES[index : index + 2], 0.3) for index in (0, 2, 4)]
    return [*pairs, dataclasses.replace(SEQUENCES[6], safety_span=SafetySpan(20, 30, True, 0.5)), SEQUENCES[3]]


def batches(setup: str) -> list[list[TrainingSequence | PreferencePair]]:
    """Return the items of each of the four steps of a setup."""
    if setup.endswith("pairs"):
        items = pairs_and_spans()
        return [items, items[:1], items[3:], items[2:]]
    if not setup.endswith("kl"):
        return BATCHES
    return [mixed_sequences(), mixed_sequences()[2:3], mixed_sequences()[4:], mixed_sequences()[:1]]


def student(folder: Path, method: str, dtype=torch.float32, lora=LORA):
    """Return a decoder to train: all weights if `method` is `full`, else adapters over frozen weights.

    The adapters are not zero: B = 0 would make the gradient of A zero.

    Args:
        folder: folder of the checkpoint.
        method: method of a setup in SETUPS.
    """
    decoder = load_decoder(folder, dtype, CPU, weight_dtype="fp8" if method == "lora fp8" else "auto")
    if method == "full":
        return decoder.requires_grad_(True)
    attach(decoder, lora, seed=0)
    decoder.prepare_fp8_backward()
    if method == "lora heads":
        torch.manual_seed(2)
        decoder.safety_heads = SafetyHeads(decoder.config.hidden_size, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(decoder).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder


def local_packs(batch):
    """Return the packs of this rank's share of a batch of sequences."""
    return packs_of_rank(batch, workers.rank, workers.world_size)


def packs_of_rank(batch, rank, num_ranks):
    """Return the packs of a rank's share of a batch, at most 64 tokens each; the list may be empty."""
    indices = partition_balanced([len(sequence) for sequence in batch], num_ranks)[rank]
    return pack([batch[index] for index in indices], 64, CPU)


def make_trainer(decoder, config, keep_gathered=False, with_reference=False):
    """Return a DeepSpeedTrainer that shards even a tiny model.

    Args:
        config: how to shard.
        keep_gathered: keep DeepSpeed's default thresholds, below which stage 3 leaves all weights gathered. By default
            they are 0.
        with_reference: whether a sequence has the KL loss.
    """
    from thinksafe.training import deepspeed_trainer

    if keep_gathered:
        return deepspeed_trainer.DeepSpeedTrainer(decoder, CLIP, DECAY, config, with_reference, workers=workers)
    original_settings = deepspeed_trainer.deepspeed_settings

    def settings_without_thresholds(*arguments):
        changed = original_settings(*arguments)
        for key in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold"):
            changed["zero_optimization"][f"stage3_{key}"] = 0
        return changed

    deepspeed_trainer.deepspeed_settings = settings_without_thresholds
    try:
        return deepspeed_trainer.DeepSpeedTrainer(decoder, CLIP, DECAY, config, with_reference, workers=workers)
    finally:
        deepspeed_trainer.deepspeed_settings = original_settings


def export(decoder, method, folder, base):
    """Write the adapter to a folder, or the whole model for the method `full`; `base` is the checkpoint's folder."""
    if method != "full":
        save_adapter(decoder, LORA, folder, "base")
    else:
        save_decoder(decoder, load_config(base)[1], folder)


def whole_state(trainer) -> dict[str, torch.Tensor]:
    """Return the state of a trainer, joined from the parts of all ranks; check that the parts do not overlap."""
    parts = [None] * workers.world_size
    dist.all_gather_object(parts, trainer.state_dict())
    assert sum(map(len, parts)) == len(set().union(*parts)), "parts overlap"
    return {name: tensor for part in parts for name, tensor in part.items()}


def steps(folder: Path, out: Path, *names: str) -> None:
    """Take four steps with each of these setups; write OUT/SETUP.json, the state, and the exported weights.

    The JSON file has the results of the steps by rank, and how many tensors are still alive after the trainer is
    closed.

    Args:
        names: names of SETUPS.
    """
    reference_packs, reference_states = [], PackLoss._reference_states
    PackLoss._reference_states = lambda self, pack: reference_packs.append(pack) or reference_states(self, pack)
    cross_entropy = losses.linear_cross_entropy

    def skipping(*args, **options):
        """Report skipped gradient mass as a GPU would, more on a higher rank."""
        rows, stats = cross_entropy(*args, **options)
        return rows, stats._replace(dropped_mass=torch.tensor(workers.rank / 8))

    losses.linear_cross_entropy = skipping
    for name in names:
        method, config = SETUPS[name]
        reference_packs.clear()
        decoder = student(folder, method)
        decoder.checkpointing = (CHECKPOINTING.get(name, "none"),) * decoder.config.num_layers
        trainer = make_trainer(decoder, config, with_reference=name.endswith(("kl", "pairs")))
        results = [
            dataclasses.astuple(trainer.step(local_packs(batch), rate))
            for batch, rate in zip(batches(name), RATES, strict=True)
        ]
        assert decoder.training, "dropout would be off"
        sharded = sum(parameter.numel() for parameter in decoder.parameters()) == 0
        trainer.check_weights_finite()
        parts = workers.all_gather(sum(tensor.nbytes for tensor in trainer.state_dict().values()))
        state, all_results = whole_state(trainer), workers.all_gather(results)
        trainer.finish()
        if workers.rank == 0:
            save_file(state, out / f"{name}.safetensors")
            export(decoder, method, out / name, folder)
        adamw_state = trainer.engine.optimizer.optimizer.state
        references = [
            weakref.ref(tensor) for state_of_shard in adamw_state.values() for tensor in state_of_shard.values()
        ]
        references += [weakref.ref(master) for master in trainer._master_shards()]
        shards = [parameter.ds_tensor for parameter in decoder.parameters() if hasattr(parameter, "ds_tensor")]
        references += [weakref.ref(shard) for shard in shards]
        trainer.close()
        del decoder, trainer, adamw_state, shards
        alive = workers.all_gather(sum(reference() is not None for reference in references))
        if workers.rank == 0:
            summary = {
                "results": all_results,
                "sharded": sharded,
                "parts": parts,
                "num_alive": alive,
                "num_tensors": len(references),
            }
            summary["num_reference_passes"] = len(reference_packs)
            (out / f"{name}.json").write_text(json.dumps(summary))
    bf16_steps(folder, out)


def bf16_steps(folder: Path, out: Path) -> None:
    """Take five steps in bf16, each smaller than the resolution of bf16; write the state and the adapter."""
    decoder = student(folder, "lora", torch.bfloat16)
    trainer = make_trainer(decoder, ZeroConfig(3))
    for _ in range(5):
        trainer.step(local_packs(SEQUENCES), 1e-5)
    state = whole_state(trainer)
    trainer.finish()
    if workers.rank == 0:
        save_file(state, out / "bf16.safetensors")
        export(decoder, "lora", out / "bf16", folder)


def not_finite(folder: Path, out: Path, *names: str) -> None:
    """Between two good steps, break an activation, the loss alone and the gradient alone, each on one rank.

    For every setup, results.json gets by rank: the messages of the three steps, whether the state was unchanged by
    them, and the message of the check of the weights.
    """
    cross_entropy = losses.linear_cross_entropy

    def infinite_loss(*args, **options):
        rows, stats = cross_entropy(*args, **options)
        return rows + torch.inf, stats

    def nan_gradient(hidden, *args, **options):
        hidden.register_hook(lambda gradient: gradient * torch.nan)
        return cross_entropy(hidden, *args, **options)

    results_by_setup = {}
    for name in names:
        method, config = SETUPS[name]
        decoder = student(folder, method)
        with torch.no_grad():
            decoder.embedding[POISON_TOKEN] = torch.nan
        trainer = make_trainer(decoder, config)
        trainer.step(local_packs([GOOD]), 1e-2)
        before = whole_state(trainer)
        messages = [_message(trainer.step, local_packs([GOOD, POISONED]), 1e-2)]
        for broken in (infinite_loss, nan_gradient):
            losses.linear_cross_entropy = broken if workers.rank == 1 else cross_entropy
            messages.append(_message(trainer.step, local_packs([GOOD, GOOD]), 1e-2))
        losses.linear_cross_entropy = cross_entropy
        after = whole_state(trainer)
        same = all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
        trainer.step(local_packs([GOOD]), 1e-2)
        results, state = (
            workers.all_gather((messages, same, _message(trainer.check_weights_finite))),
            whole_state(trainer),
        )
        results_by_setup[name] = results
        if workers.rank == 0:
            save_file(state, out / f"{name}.safetensors")
    if workers.rank == 0:
        (out / "results.json").write_text(json.dumps(results_by_setup))


def _message(call, *args) -> str | None:
    """Return the message of the NonFiniteStep that a call raises, or None if it raises nothing."""
    try:
        call(*args)
    except NonFiniteStep as error:
        return str(error)


def make_loop_trainer(folder: Path, lora: LoraConfig):
    """Return a trainer with ZeRO stage 3; with DeepSpeed's default thresholds if `lora` has no dropout, else with 0.

    So the tests cover both.
    """
    return make_trainer(student(folder, "lora", lora=lora), ZeroConfig(3), keep_gathered=lora is LORA)


def killed(folder: Path, out: Path) -> None:
    """Train, and kill the last rank while it writes its part of the second checkpoint, which stays incomplete."""
    save, liveness.SILENCE_TIMEOUT = checkpoint.save_file, 8.0  # seconds until the other ranks notice

    def torn(tensors, file):
        save(tensors, file)
        if "step-00000004" in str(file) and workers.rank == workers.world_size - 1:
            os.truncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = torn
    train(make_loop_trainer(folder, LORA_WITH_DROPOUT), SEQUENCES, TRAINING_CONFIG, SEED, out)


def resumed(folder: Path, out: Path, *names: str) -> None:
    """Train in each folder OUT/NAME, from its newest checkpoint or, without one, from the start.

    The state is written to OUT/NAME.safetensors, and the first step and the random seeds of all ranks to OUT/NAME.json.

    Args:
        names: names of folders; a name that begins with `dropout` trains with dropout.
    """
    for name in names:
        trainer, done_steps = make_loop_trainer(folder, LORA_WITH_DROPOUT if name.startswith("dropout") else LORA), []

        def on_step(metrics, done_steps=done_steps):
            done_steps.append(metrics.step)

        train(trainer, SEQUENCES, TRAINING_CONFIG, SEED, out / name, on_step)
        state, seeds = whole_state(trainer), workers.all_gather(torch.initial_seed())
        if workers.rank == 0:
            save_file(state, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps({"first_step": done_steps[0], "seeds": seeds}))


class Interrupted(BaseException):
    """Stop of all ranks between the metrics of a step and its checkpoint."""


def interrupted(folder: Path, out: Path) -> None:
    """Run the loop with every kind of sequence: whole, and interrupted before and after its first checkpoint.

    For each setup, the state of the whole run is written, and a report by rank: whether the resumed runs have the same
    state, and which steps they took.
    """
    for name, (method, config) in INTERRUPTED_SETUPS.items():

        def run(folder_name: str, until: int = 0, name=name, method=method, config=config):
            """Return (state, numbers of the steps taken), or None if interrupted at step `until`; 0 interrupts none."""
            decoder, done_steps = mixed_student(folder, method), []

            def on_step(metrics):
                done_steps.append(metrics.step)
                if metrics.step == until:
                    raise Interrupted

            trainer = make_trainer(decoder, config, with_reference=True)
            try:
                train(trainer, mixed_sequences(), MIXED_CONFIG, SEED, out / name / folder_name, on_step)
            except Interrupted:
                return None
            return whole_state(trainer), done_steps

        state, _ = run("whole")
        workers.barrier()
        runs = {"no step left": run("whole")}
        for until in (1, 5):
            assert run(f"cut off at {until}", until) is None
            runs[f"cut off at {until}"] = run(f"cut off at {until}")
        same = {
            name_of_run: all(torch.equal(state[key], other[key]) for key in state)
            for name_of_run, (other, _) in runs.items()
        }
        report = {
            "same_state": same,
            "steps": {name_of_run: done_steps for name_of_run, (_, done_steps) in runs.items()},
        }
        if method == "lora":
            trainer = make_trainer(mixed_student(folder, method), config, with_reference=True)
            report["stop_message"] = _message(
                train, trainer, [POISONED], dataclasses.replace(TRAINING_CONFIG, epochs=4), SEED, out / "bad"
            )
        reports = workers.all_gather(report)
        if workers.rank == 0:
            save_file(state, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(reports))


def mixed_student(folder: Path, method: str):
    """Return a student; for `lora` POISON_TOKEN has the embedding NaN, so that steps with this token are left out."""
    decoder = student(folder, method)
    if method == "lora":
        with torch.no_grad():
            decoder.embedding[POISON_TOKEN] = torch.nan
    return decoder


def main(scenario: str, folder: Path, out: Path, *arguments: str) -> None:
    """Run a scenario, write the file OUT/done, and exit without destructors: a process group's destructor may fail.

    Args:
        scenario: name of a function of this file: `steps`, `not_finite`, `killed`, `resumed` or `interrupted`.
        folder: folder of the student's checkpoint.
        arguments: further arguments of the scenario.
    """
    scenarios = {"steps": steps, "not_finite": not_finite, "killed": killed, "resumed": resumed}
    scenarios["interrupted"] = interrupted
    global workers
    shorten_waits()
    with Workers.start() as workers:
        workers.connect(CPU)
        scenarios[scenario](folder, out, *arguments)
        workers.barrier()
        if workers.rank == 0:
            (out / "done").touch()
        os._exit(0)
