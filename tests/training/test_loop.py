"""The training loop: schedule, settings, metrics, and steps whose loss or gradient is not finite."""

import dataclasses
import math
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training_runs import (
    CPU,
    LORA_WITH_DROPOUT,
    NUM_STEPS,
    SEQUENCES,
    TRAINING_CONFIG,
    Killed,
    make_trainer,
    metrics_without_times,
    train_until,
)
from thinksafe.distributed.workers import SINGLE_PROCESS
from thinksafe.model.weights import load_config, load_decoder
from thinksafe.pipeline.train import _make_trainer, _MemoryPlan
from thinksafe.training import losses
from thinksafe.training.config import TrainingConfig, ZeroConfig
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import learning_rate, plan_steps, train
from thinksafe.training.metrics import read_metrics
from thinksafe.training.packing import collate, first_fit_decreasing, pack
from thinksafe.training.sequence import TrainingSequence
from thinksafe.training.trainer import NonFiniteStep, StepResult

pytest_plugins = ["tests.support.training_runs"]


# Non-finite steps and loss spikes


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_step_changes_nothing_and_the_next_one_counts(untied_student, method, value, dtype):
    decoder = load_decoder(untied_student, dtype, CPU)
    good, bad = [collate([sequence], CPU) for sequence in (SEQUENCES[0], SEQUENCES[2])]
    only_in_bad = next(id_ for id_ in bad.input_ids.tolist() if id_ not in good.input_ids.tolist())
    trainer = make_trainer(decoder, method, clip=1.0)
    trainer.step([good], 1e-3)
    with torch.no_grad():
        weight = decoder.embedding[only_in_bad, 0].clone()
        decoder.embedding[only_in_bad, 0] = value
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    with pytest.raises(NonFiniteStep):
        trainer.step([good, bad], 1e-3)
    after = trainer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) or "embedding" in name for name in before)
    with torch.no_grad():
        decoder.embedding[only_in_bad, 0] = weight
    if method == "full" and dtype == torch.float32:  # elsewhere the master weight was never poisoned
        trainer.masters["embedding"].data[only_in_bad, 0] = weight
    assert math.isfinite(trainer.step([good], 1e-3).loss)
    assert all(torch.isfinite(tensor).all() for tensor in trainer.state_dict().values())


@pytest.mark.parametrize(
    "source, message", [("loss", r"loss inf, .* \d+\.\d+, from an"), ("gradient", r"loss \d.*, .*(nan|inf)$")]
)
def test_nonfinite_loss_or_gradient_alone_changes_nothing(student_folder, monkeypatch, source, message):
    """A bad gradient alone names no example: an example is found by its loss."""
    trainer, original = (
        make_trainer(load_decoder(student_folder, torch.float32, CPU)),
        losses.linear_cross_entropy,
    )

    def broken(hidden, *arguments, **options):
        if source == "gradient":
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        rows, stats = original(hidden, *arguments, **options)
        return rows + (torch.inf if source == "loss" else 0), stats

    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    monkeypatch.setattr(losses, "linear_cross_entropy", broken)
    with pytest.raises(NonFiniteStep, match=message):
        trainer.step(pack(SEQUENCES, 64, CPU), 1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state_dict().items())
    monkeypatch.setattr(losses, "linear_cross_entropy", original)
    assert math.isfinite(trainer.step(pack(SEQUENCES, 64, CPU), 1e-3).grad_norm)


def poisoned_trainer(student_folder, names: str) -> tuple[LocalTrainer, list[TrainingSequence]]:
    """Return a trainer, and one sequence per letter; those with upper-case letters have a NaN loss."""
    decoder = load_decoder(student_folder, torch.float32, CPU)
    with torch.no_grad():
        decoder.embedding[POISON_TOKEN] = math.nan
    sequences = []
    for seed, name in enumerate(names):
        ids = np.random.default_rng(seed).integers(0, POISON_TOKEN, 12).astype(np.int32)
        ids[3] = POISON_TOKEN if name.isupper() else ids[3]
        sequences.append(TrainingSequence(ids, 5, name))
    return make_trainer(decoder, "lora", LORA_WITH_DROPOUT, clip=1.0), sequences


POISON_TOKEN = 379
ONE_SEQUENCE_A_STEP = TrainingConfig(epochs=1, batch_size=1, learning_rate=1e-2, checkpoint_every=2)


def in_training_order(names: str, seed: int) -> str:
    """Return the names in an order from which a run with this seed trains on them in the given order."""
    order = np.concatenate(plan_steps([12] * len(names), ONE_SEQUENCE_A_STEP, seed))
    return "".join(name for _, name in sorted(zip(order, names, strict=True)))


def test_nonfinite_step_is_left_out_and_its_examples_named(untied_student, tmp_path):
    names = "aBcDEfg"
    trainer, sequences = poisoned_trainer(untied_student, in_training_order(names, 3))
    train(trainer, sequences, ONE_SEQUENCE_A_STEP, 3, tmp_path)
    steps = list(read_metrics(tmp_path / "metrics.jsonl"))
    for step, name in zip(steps, names, strict=True):
        assert (step.loss is None) == (step.grad_norm is None) == name.isupper()
        message = f"left out: loss nan, gradient norm nan, from {name}; examples of the step: {name}"
        assert step.note == (message if name.isupper() else "")
    assert all(torch.isfinite(tensor).all() for tensor in trainer.state_dict().values())


def test_note_names_the_first_examples_of_a_large_step(untied_student, tmp_path):
    trainer, sequences = poisoned_trainer(untied_student, "abcdefghijklmnopqrsT")
    train(trainer, sequences, dataclasses.replace(ONE_SEQUENCE_A_STEP, batch_size=20), 3, tmp_path)
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    match = re.fullmatch(r"left out: .*, from T; examples of the step: ((\w, ){15}\w) and 4 more", step.note)
    assert match and len(set(match[1].split(", "))) == 16


def test_nonfinite_example_is_identified_in_its_pack(untied_student, tmp_path):
    """Packs have two and more sequences, and rows with a KL loss come first."""
    trainer, sequences = poisoned_trainer(untied_student, "abCdEf")
    trainer = LocalTrainer(trainer.decoder, 1.0, 0.0, with_reference=True)
    sequences[3] = dataclasses.replace(sequences[3], use_reference_kl=True)
    for examples, max_tokens in (("C", 10**6), ("C, E", 48), ("C, E", 12)):
        chosen = sequences if max_tokens < 100 else sequences[:4]
        with pytest.raises(NonFiniteStep, match=rf"^loss nan, gradient norm nan, from {examples}$"):
            trainer.step(pack(chosen, max_tokens, CPU), 1e-3)
    sequences[2] = dataclasses.replace(sequences[2], use_reference_kl=True)
    with pytest.raises(NonFiniteStep, match=r"from C$"):
        trainer.step(pack(sequences[:4], 10**6, CPU), 1e-3)


@pytest.mark.slow
def test_run_with_left_out_steps_resumes_bit_for_bit(untied_student, tmp_path):
    """It does so too if the steps before the checkpoint, or all steps so far, were left out."""
    for names in ("aBcDEfg", "ABcdefg", "abCDeFg"):
        trainer, sequences = poisoned_trainer(untied_student, in_training_order(names, 3))
        train(trainer, sequences, ONE_SEQUENCE_A_STEP, 3, tmp_path / names)
        for until in range(1, 7):
            out = tmp_path / f"{names} {until}"

            def on_step(metrics, until=until):
                if metrics.step == until:
                    raise Killed

            with pytest.raises(Killed):
                train(
                    poisoned_trainer(untied_student, in_training_order(names, 3))[0],
                    sequences,
                    ONE_SEQUENCE_A_STEP,
                    3,
                    out,
                    on_step,
                )
            resumed = poisoned_trainer(untied_student, in_training_order(names, 3))[0]
            train(resumed, sequences, ONE_SEQUENCE_A_STEP, 3, out)
            expected = trainer.state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
            actual, uninterrupted = (metrics_without_times(folder) for folder in (out, tmp_path / names))
            assert actual == uninterrupted


@pytest.mark.parametrize("killed_at", [None, 2, 3])
def test_three_nonfinite_steps_in_a_row_stop_the_run(untied_student, tmp_path, killed_at):
    """The run stops with or without a restart between these steps."""

    def on_step(metrics):
        if metrics.step == killed_at:
            raise Killed

    trainer, sequences = poisoned_trainer(untied_student, in_training_order("aBCDefg", 3))
    if killed_at:
        with pytest.raises(Killed):
            train(
                trainer, sequences, dataclasses.replace(ONE_SEQUENCE_A_STEP, checkpoint_every=1), 3, tmp_path, on_step
            )
        trainer, _ = poisoned_trainer(untied_student, in_training_order("aBCDefg", 3))
    message = r"^step 4, the 3rd in a row that was left out: loss nan, .*, from D; examples of the step: D$"
    with pytest.raises(NonFiniteStep, match=message):
        train(trainer, sequences, dataclasses.replace(ONE_SEQUENCE_A_STEP, checkpoint_every=1), 3, tmp_path)
    assert [step.step for step in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def trainer_with_losses(student_folder, losses: list[float]) -> LocalTrainer:
    """Return a trainer whose steps have these losses."""
    trainer = make_trainer(load_decoder(student_folder, torch.float32, CPU))
    trainer.step = lambda packs, rate: StepResult(losses.pop(0), 1.0, 0.0)
    return trainer


@pytest.mark.parametrize("num_known", [24, 25])
def test_loss_spike_is_noted_only_after_25_losses(student_folder, tmp_path, num_known):
    losses = [1.0 + 0.1 * (step % 2) for step in range(num_known)] + [9.0]
    train(
        trainer_with_losses(student_folder, losses),
        SEQUENCES[:1],
        TrainingConfig(epochs=num_known + 1, batch_size=1),
        0,
        tmp_path,
    )
    *others, last = read_metrics(tmp_path / "metrics.jsonl")
    assert not any(step.note for step in others) and bool(last.note) == (num_known == 25)


def test_loss_spike_is_noted_also_after_a_restart(student_folder, tmp_path):
    """The run stops with or without a restart between these steps."""
    config = TrainingConfig(epochs=74, batch_size=1, checkpoint_every=70)

    def on_step(metrics):
        if metrics.step == 71:
            raise Killed

    losses = [1.0, 50.0] * 10 + [1.0, 1.2] * 25 + [1.3, 9.0, 1.1, 1.2]
    train(trainer_with_losses(student_folder, losses[:]), SEQUENCES[:1], config, 0, tmp_path / "whole")
    with pytest.raises(Killed):
        train(trainer_with_losses(student_folder, losses[:]), SEQUENCES[:1], config, 0, tmp_path / "killed", on_step)
    train(trainer_with_losses(student_folder, losses[70:]), SEQUENCES[:1], config, 0, tmp_path / "killed")
    for out in (tmp_path / "whole", tmp_path / "killed"):
        notes = {step.step: step.note for step in read_metrics(out / "metrics.jsonl") if step.note}
        assert notes == {72: "loss spike: 9, usually 1.11"}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("step, saved", [(2, None), (5, "step-00000004")])
def test_nonfinite_weights_are_never_saved(student_folder, tmp_path, method, value, step, saved):
    """The weights break at a checkpoint, or at the last step, which is not a multiple of `checkpoint_every`."""
    trainer = make_trainer(load_decoder(student_folder, torch.float32, CPU), method)
    config = TrainingConfig(method=method, epochs=5, batch_size=7, checkpoint_every=2)
    optimizer_step, steps = trainer.optimizer.step, []

    def step_and_break_a_weight():
        optimizer_step()
        steps.append(None)
        if len(steps) == step:
            with torch.no_grad():
                next(reversed(trainer.masters.values())).view(-1)[-1] = value

    trainer.optimizer.step = step_and_break_a_weight
    with pytest.raises(NonFiniteStep, match=rf"^step {step}: the norm of the weights is (nan|inf)$"):
        train(trainer, SEQUENCES, config, 0, tmp_path)
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == step - 1
    newest = max((checkpoint.name for checkpoint in (tmp_path / "checkpoints").glob("*")), default=None)
    assert newest == saved


# Settings


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_loss_reduction_setting_decides_the_weights(student_folder, tmp_path, reduction):
    config = TrainingConfig(epochs=1, batch_size=7, loss_reduction=reduction, max_tokens_per_pack=60)
    train(make_trainer(load_decoder(student_folder, torch.float32, CPU)), SEQUENCES, config, 0, tmp_path)
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    expected = {
        name: make_trainer(load_decoder(student_folder, torch.float32, CPU))
        .step(pack(SEQUENCES, 10**6, CPU, name), 1e-3)
        .loss
        for name in ("token", "sequence")
    }
    assert step.loss == pytest.approx(expected[reduction], rel=1e-5)
    assert expected["token"] != pytest.approx(expected["sequence"], rel=1e-3)


def test_clipping_and_decay_of_the_recipe_reach_either_trainer(student_folder, monkeypatch):
    decoder, config = (
        load_decoder(student_folder, torch.float32, CPU),
        TrainingConfig(max_grad_norm=0.7, weight_decay=0.3, beta2=0.95),
    )
    decoder.requires_grad_(True)
    single = _make_trainer(decoder, config, _MemoryPlan(None, False, 9, 9), CPU)
    (group,) = single.optimizer.param_groups
    assert (single.max_grad_norm, group["weight_decay"], group["betas"]) == (0.7, 0.3, (0.9, 0.95))
    recorder = SimpleNamespace(DeepSpeedTrainer=lambda *options: options)
    monkeypatch.setitem(sys.modules, "thinksafe.training.deepspeed_trainer", recorder)
    options = _make_trainer(decoder, config, _MemoryPlan(None, True, 9, 9, ZeroConfig(2)), CPU)
    assert options == (decoder, 0.7, 0.3, ZeroConfig(2), True, CPU, SINGLE_PROCESS, 0.95)


# Schedule


def test_learning_rate_warms_up_linearly_and_falls_as_cosine():
    config = TrainingConfig(learning_rate=2.0, warmup_ratio=0.2)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    cosine = [1 + math.cos(math.pi * step / 9) for step in range(9)]
    assert rates == pytest.approx([2 / 3, 4 / 3, 2.0, *cosine])
    assert learning_rate(0, 10, dataclasses.replace(config, warmup_ratio=0.0)) == 2.0
    assert learning_rate(9, 10, dataclasses.replace(config, warmup_ratio=1.0)) == 2.0


@given(total=st.integers(1, 500), ratio=st.floats(0, 1))
def test_learning_rate_is_positive_rises_then_falls(total, ratio):
    config = TrainingConfig(learning_rate=1e-5, warmup_ratio=ratio)
    rates = [learning_rate(step, total, config) for step in range(total)]
    peak = rates.index(max(rates))
    assert min(rates) > 0 and rates[peak] == pytest.approx(1e-5)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@given(count=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_has_each_sequence_once(count, batch, seed):
    steps = plan_steps([5] * count, TrainingConfig(batch_size=batch), seed)
    per_epoch, epochs = math.ceil(count / batch), []
    assert len(steps) == 3 * per_epoch
    for start in range(0, len(steps), per_epoch):
        chosen = steps[start : start + per_epoch]
        assert all(len(step) == batch for step in chosen[:-1]) and len(chosen[-1]) > 0
        epochs.append(np.concatenate(chosen).tolist())
        assert sorted(epochs[-1]) == list(range(count))
    if count > 20:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(count))
        other_seed = np.concatenate(plan_steps([5] * count, TrainingConfig(epochs=1, batch_size=batch), seed ^ 1))
        assert epochs[0] != other_seed.tolist()


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40), max_tokens=st.integers(1, 200))
def test_token_budget_steps_are_as_full_as_order_allows(lengths, max_tokens):
    by_tokens = plan_steps(lengths, TrainingConfig(epochs=2, tokens_per_step=max_tokens), 7)
    one_a_step = plan_steps(lengths, TrainingConfig(epochs=2, batch_size=1), 7)
    assert np.concatenate(by_tokens).tolist() == np.concatenate(one_a_step).tolist()
    sums = [sum(lengths[index] for index in step) for step in by_tokens]
    assert min(sums) > 0, "no step is empty"
    assert all(total <= max_tokens or len(step) == 1 for total, step in zip(sums, by_tokens, strict=True))
    num_scheduled = 0
    for total, step, following in zip(sums, by_tokens, by_tokens[1:], strict=False):
        num_scheduled += len(step)
        assert num_scheduled == len(lengths) or total + lengths[following[0]] > max_tokens


@given(lengths=st.lists(st.integers(1, 100), max_size=40), max_tokens=st.integers(1, 150))
def test_packs_hold_every_sequence_once_and_no_two_fit_together(lengths, max_tokens):
    groups = first_fit_decreasing(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in group) for group in groups]
    assert all(total <= max_tokens or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    assert all(total + earlier_total > max_tokens for index, total in enumerate(sums) for earlier_total in sums[:index])


# Metrics


def test_metrics_record_the_largest_dropped_mass(student_folder, tmp_path, monkeypatch):
    """A CPU skips no gradient, so the operator is patched to report shares."""
    shares = iter([0.25, 0.5, 0.125])
    original = losses.linear_cross_entropy

    def skipping(*arguments, **options):
        rows, stats = original(*arguments, **options)
        return rows, stats._replace(dropped_mass=torch.tensor(next(shares)))

    train_until(student_folder, tmp_path / "exact")
    assert {step.dropped_mass for step in read_metrics(tmp_path / "exact" / "metrics.jsonl")} == {0.0}
    monkeypatch.setattr(losses, "linear_cross_entropy", skipping)
    config = TrainingConfig(epochs=1, batch_size=7, max_tokens_per_pack=70)
    train_until(student_folder, tmp_path / "skipping", config=config)
    (step,) = read_metrics(tmp_path / "skipping" / "metrics.jsonl")
    assert step.dropped_mass == 0.5 and next(shares, None) is None


def test_every_step_draws_new_dropout_masks(student_folder, tmp_path):
    train_until(student_folder, tmp_path, config=TrainingConfig(epochs=3, batch_size=7, learning_rate=1e-30))
    assert len({metrics.loss for metrics in read_metrics(tmp_path / "metrics.jsonl")}) == 3


def test_reference_pass_counts_as_flops(student_folder, tmp_path):
    config = TrainingConfig(epochs=1)
    kl_sequences = [dataclasses.replace(sequence, use_reference_kl=True) for sequence in SEQUENCES]
    flop = {}
    for name, sequences in (("plain", SEQUENCES), ("kl", kl_sequences)):
        train_until(student_folder, tmp_path / name, sequences=sequences, config=config)
        (step,) = read_metrics(tmp_path / name / "metrics.jsonl")
        flop[name] = step.flop
    assert 1.2 * flop["plain"] < flop["kl"] < 1.6 * flop["plain"]


def test_sequence_that_fits_exactly_joins_the_step_or_pack():
    assert [len(step) for step in plan_steps([5] * 4, TrainingConfig(epochs=1, tokens_per_step=10), 0)] == [2, 2]
    assert sorted(map(len, first_fit_decreasing([5, 10, 5], 10))) == [1, 2]


def test_metrics_count_tokens_and_flops_of_training(student_folder, tmp_path):
    before = time.perf_counter()
    train_until(student_folder, tmp_path)
    elapsed = time.perf_counter() - before
    steps = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert sum(metrics.tokens for metrics in steps) == 3 * sum(map(len, SEQUENCES))
    assert {metrics.total_steps for metrics in steps} == {NUM_STEPS}
    assert [metrics.learning_rate for metrics in steps] == [
        learning_rate(step, NUM_STEPS, TRAINING_CONFIG) for step in range(NUM_STEPS)
    ]
    assert all(metrics.seconds > 0 and metrics.grad_norm > 0 for metrics in steps)
    assert sum(metrics.seconds for metrics in steps) < elapsed
    lengths, targets = [len(sequence) for sequence in SEQUENCES], sum(sequence.num_targets for sequence in SEQUENCES)
    shape, counts = load_config(student_folder)[0], TokenCounts(sum(lengths), targets, causal_pairs(lengths))
    assert sum(metrics.flop for metrics in steps) == 3 * TrainingCosts(shape, LORA_WITH_DROPOUT).model_flops(counts)
