"""What test_zero.py runs on several ranks: `torchrun zero_ranks.py SCENARIO STUDENT OUT [ARGUMENT ...]`."""

import dataclasses
import json
import os
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from thinksafe.distributed.ranks import balanced, barrier, gather, join, rank, world_size
from thinksafe.distributed.workers import Workers
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach, save_adapter
from thinksafe.model.weights import load_config, load_decoder, save_decoder
from thinksafe.training import checkpoint, losses
from thinksafe.training.local_engine import NonFiniteStep
from thinksafe.training.loop import TrainingConfig, train
from thinksafe.training.losses import PackLoss
from thinksafe.training.packing import TrainingSequence, pack
from thinksafe.training.zero_config import ZeroConfig

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
DROPOUT = dataclasses.replace(LORA, dropout=0.2)
CLIP, DECAY = 0.5, 0.1
RATES = (1e-2, 3e-3, 1e-2, 1e-2)
RUN = TrainingConfig(epochs=2, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)
MIXED_RUN = dataclasses.replace(RUN, batch_tokens=70, loss_reduction="sequence", benign_loss="kl")
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
}
MIXED = {"lora-2-kl": ("lora", ZeroConfig(2)), "full-3-kl": ("full", ZeroConfig(3))}
"""Set-ups of the runs that are interrupted. The first one also meets a poisoned token of its frozen base."""
KEEPING = {"lora-3": "full", "lora-3-offloaded": "selective", "full-3": "selective"}
"""What layers keep for the backward pass: sharded weights are gathered again where it is computed again."""


def sequence(length: int, response: int) -> TrainingSequence:
    ids = np.random.default_rng(length).integers(0, 380, length).astype(np.int32)
    return TrainingSequence(ids, length - response)


SEQUENCES = [sequence(*sizes) for sizes in [(30, 12), (7, 1), (55, 54), (16, 8), (31, 29), (2, 1), (41, 3)]]
BATCHES = [SEQUENCES, SEQUENCES[2:3], SEQUENCES[1:], SEQUENCES[4:]]
"""In the second one rank has nothing to do, in the others the ranks have different numbers of packs."""
GOOD, BAD = SEQUENCES[0], SEQUENCES[2]
POISON = next(id_ for id_ in BAD.input_ids.tolist() if id_ not in GOOD.input_ids)


def mixed() -> list[TrainingSequence]:
    """Some that keep to the reference, no two with the same weight."""
    return [dataclasses.replace(one, keeps_to_reference=len(one) % 2 == 1, weight=1 + len(one)) for one in SEQUENCES]


def batches(setup: str) -> list[list[TrainingSequence]]:
    """What a set-up trains on, step by step."""
    if not setup.endswith("kl"):
        return BATCHES
    return [mixed(), mixed()[2:3], mixed()[4:], mixed()[:1]]


def student(folder: Path, method: str, dtype=torch.float32, lora=LORA):
    """A decoder to be trained, its adapter not zero: with B = 0 the gradient of A is."""
    decoder = load_decoder(folder, dtype, CPU, weights="fp8" if method == "lora fp8" else "auto")
    if method == "full":
        return decoder.requires_grad_(True)
    attach(decoder, lora, seed=0)
    decoder.pass_gradients()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(decoder).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder


def my_packs(batch):
    return packs_of(batch, rank(), world_size())


def packs_of(batch, rank, ranks):
    mine = balanced([len(one) for one in batch], ranks)[rank]
    return pack([batch[index] for index in mine], 64, CPU)


def zero_engine(decoder, config, keep_gathered=False, with_reference=False):
    """By default with nothing kept gathered: DeepSpeed's own settings would never shard a model so small."""
    from thinksafe.training import deepspeed_engine as zero

    if keep_gathered:
        return zero.ZeroEngine(decoder, CLIP, DECAY, config, with_reference)
    original = zero.deepspeed_settings

    def settings(*arguments):
        made = original(*arguments)
        for key in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold"):
            made["zero_optimization"][f"stage3_{key}"] = 0
        return made

    zero.deepspeed_settings = settings
    try:
        return zero.ZeroEngine(decoder, CLIP, DECAY, config, with_reference)
    finally:
        zero.deepspeed_settings = original


def export(decoder, method, folder, base):
    if method != "full":
        save_adapter(decoder, LORA, folder, "base")
    else:
        save_decoder(decoder, load_config(base)[1], folder)


def whole_state(engine) -> dict[str, torch.Tensor]:
    parts = gather(engine.tensors())
    assert sum(map(len, parts)) == len(set().union(*parts)), "parts overlap"
    return {name: tensor for part in parts for name, tensor in part.items()}


def steps(folder: Path, out: Path) -> None:
    """Some steps with every set-up: results, state and export."""
    reads, reference_states = [], PackLoss._reference_states
    PackLoss._reference_states = lambda self, pack: reads.append(pack) or reference_states(self, pack)
    cross_entropy = losses.linear_cross_entropy_with_stats

    def skipping(*args, **options):
        """As if a GPU had skipped gradients, the more the higher the rank."""
        rows, stats = cross_entropy(*args, **options)
        return rows, stats._replace(dropped_mass=torch.tensor(rank() / 8))

    losses.linear_cross_entropy_with_stats = skipping
    for name, (method, config) in SETUPS.items():
        reads.clear()
        decoder = student(folder, method)
        decoder.keeping = (KEEPING.get(name, "none"),) * decoder.config.num_layers
        engine = zero_engine(decoder, config, with_reference=name.endswith("kl"))
        results = [
            dataclasses.astuple(engine.step(my_packs(batch), rate))
            for batch, rate in zip(batches(name), RATES, strict=True)
        ]
        assert decoder.training, "dropout would be off"
        sharded = sum(parameter.numel() for parameter in decoder.parameters()) == 0
        engine.check_weights()
        parts = gather(sum(tensor.nbytes for tensor in engine.tensors().values()))
        state, everyones = whole_state(engine), gather(results)
        engine.finish()
        if rank() == 0:
            save_file(state, out / f"{name}.safetensors")
            export(decoder, method, out / name, folder)
        state_of_adamw = engine.engine.optimizer.optimizer.state
        held = [weakref.ref(tensor) for one in state_of_adamw.values() for tensor in one.values()]
        held += [weakref.ref(master) for master in engine._flat_masters()]
        shards = [parameter.ds_tensor for parameter in decoder.parameters() if hasattr(parameter, "ds_tensor")]
        held += [weakref.ref(shard) for shard in shards]
        engine.close()
        del decoder, engine, state_of_adamw, shards
        alive = gather(sum(reference() is not None for reference in held))
        if rank() == 0:
            found = {"results": everyones, "sharded": sharded, "parts": parts, "alive": alive, "held": len(held)}
            found["reads"] = len(reads)
            (out / f"{name}.json").write_text(json.dumps(found))
    bf16_steps(folder, out)


def bf16_steps(folder: Path, out: Path) -> None:
    """Some below the resolution of bf16."""
    decoder = student(folder, "lora", torch.bfloat16)
    engine = zero_engine(decoder, ZeroConfig(3))
    for _ in range(5):
        engine.step(my_packs(SEQUENCES), 1e-5)
    state = whole_state(engine)
    engine.finish()
    if rank() == 0:
        save_file(state, out / "bf16.safetensors")
        export(decoder, "lora", out / "bf16", folder)


def not_finite(folder: Path, out: Path) -> None:
    """Between two good steps some that break on one rank alone: an activation, the loss alone, the gradient alone."""
    cross_entropy = losses.linear_cross_entropy_with_stats

    def infinite_loss(*args, **options):
        rows, stats = cross_entropy(*args, **options)
        return rows + torch.inf, stats

    def nan_gradient(hidden, *args, **options):
        hidden.register_hook(lambda gradient: gradient * torch.nan)
        return cross_entropy(hidden, *args, **options)

    found = {}
    for name, (method, config) in SETUPS.items():
        decoder = student(folder, method)
        with torch.no_grad():
            decoder.embedding[POISON] = torch.nan
        engine = zero_engine(decoder, config)
        engine.step(my_packs([GOOD]), 1e-2)
        before = whole_state(engine)
        messages = [_message(engine.step, my_packs([GOOD, BAD]), 1e-2)]
        for broken in (infinite_loss, nan_gradient):
            losses.linear_cross_entropy_with_stats = broken if rank() == 1 else cross_entropy
            messages.append(_message(engine.step, my_packs([GOOD, GOOD]), 1e-2))
        losses.linear_cross_entropy_with_stats = cross_entropy
        after = whole_state(engine)
        same = all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
        engine.step(my_packs([GOOD]), 1e-2)
        results, state = gather((messages, same, _message(engine.check_weights))), whole_state(engine)
        found[name] = results
        if rank() == 0:
            save_file(state, out / f"{name}.safetensors")
    if rank() == 0:
        (out / "found.json").write_text(json.dumps(found))


def _message(call, *args) -> str | None:
    try:
        call(*args)
    except NonFiniteStep as error:
        return str(error)


def loop_engine(folder: Path, lora: LoraConfig):
    """Kept gathered without dropout, so that both ways are gone."""
    return zero_engine(student(folder, "lora", lora=lora), ZeroConfig(3), keep_gathered=lora is LORA)


def killed(folder: Path, out: Path) -> None:
    """Train, and let the last rank die while it writes its part of the second checkpoint."""
    save = checkpoint.save_file

    def torn(tensors, file):
        save(tensors, file)
        if "step-00000004" in str(file) and rank() == world_size() - 1:
            os.truncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = torn
    train(loop_engine(folder, DROPOUT), SEQUENCES, RUN, SEED, out)


def resumed(folder: Path, out: Path, *names: str) -> None:
    """Train in each folder, from the start or from where it stands."""
    for name in names:
        engine, seen = loop_engine(folder, DROPOUT if name.startswith("dropout") else LORA), []
        train(engine, SEQUENCES, RUN, SEED, out / name, lambda metrics, seen=seen: seen.append(metrics.step))
        state, seeds = whole_state(engine), gather(torch.initial_seed())
        if rank() == 0:
            save_file(state, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps({"first_step": seen[0], "seeds": seeds}))


class Interrupted(BaseException):
    """All ranks stop between the metrics of a step and its checkpoint."""


def interrupted(folder: Path, out: Path) -> None:
    """The loop with everything that may be in a run, whole and cut off before and after its first checkpoint."""
    for name, (method, config) in MIXED.items():

        def run(place: str, until: int = 0, name=name, method=method, config=config):
            """(state, steps taken), or None if cut off."""
            decoder, seen = mixed_student(folder, method), []

            def on_step(metrics):
                seen.append(metrics.step)
                if metrics.step == until:
                    raise Interrupted

            engine = zero_engine(decoder, config, with_reference=True)
            try:
                train(engine, mixed(), MIXED_RUN, SEED, out / name / place, on_step)
            except Interrupted:
                return None
            return whole_state(engine), seen

        state, _ = run("whole")
        barrier()
        found = {"no step left": run("whole")}
        for until in (1, 5):
            assert run(f"cut off at {until}", until) is None
            found[f"cut off at {until}"] = run(f"cut off at {until}")
        same = {place: all(torch.equal(state[key], other[key]) for key in state) for place, (other, _) in found.items()}
        report = {"same": same, "steps": {place: seen for place, (_, seen) in found.items()}}
        if method == "lora":
            engine = zero_engine(mixed_student(folder, method), config, with_reference=True)
            report["stopped"] = _message(train, engine, [BAD], dataclasses.replace(RUN, epochs=4), SEED, out / "bad")
        everyones = gather(report)
        if rank() == 0:
            save_file(state, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(everyones))


def mixed_student(folder: Path, method: str):
    """Where the base is frozen one of its tokens is poisoned, so that the steps that meet it are left out."""
    decoder = student(folder, method)
    if method == "lora":
        with torch.no_grad():
            decoder.embedding[POISON] = torch.nan
    return decoder


if __name__ == "__main__":
    scenario, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    scenarios = {"steps": steps, "not_finite": not_finite, "killed": killed, "resumed": resumed}
    scenarios["interrupted"] = interrupted
    with Workers.join() as workers:
        join(CPU, workers)
        scenarios[scenario](folder, out, *sys.argv[4:])
        barrier()
        if rank() == 0:
            (out / "done").touch()
        os._exit(0)  # a process group now and then fails in its destructor, after all is done
