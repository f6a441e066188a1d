"""A run step by step: what is trained when, and how far; what is written down of it; and steps that break."""

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

from tests.support.training_runs import CPU, DROPOUT, RUN, SEQUENCES, STEPS, Killed, engine, run, untimed
from thinksafe.model.weights import load_config, load_decoder
from thinksafe.pipeline.train import _training_engine
from thinksafe.training import losses
from thinksafe.training.cost_model import TrainingCosts, Work, causal_pairs
from thinksafe.training.local_engine import NonFiniteStep, SingleEngine, StepResult
from thinksafe.training.loop import TrainingConfig, learning_rate, plan_steps, read_metrics, train
from thinksafe.training.packing import TrainingSequence, collate, first_fit_decreasing, pack
from thinksafe.training.zero_config import ZeroConfig

pytest_plugins = ["tests.support.training_runs"]


# Steps that are not finite, and losses far out


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_counts(untied, method, value, dtype):
    decoder = load_decoder(untied, dtype, CPU)
    good, bad = [collate([one], CPU) for one in (SEQUENCES[0], SEQUENCES[2])]
    only_in_bad = next(id_ for id_ in bad.input_ids.tolist() if id_ not in good.input_ids.tolist())
    ours = engine(decoder, method, clip=1.0)
    ours.step([good], 1e-3)
    with torch.no_grad():
        weight = decoder.embedding[only_in_bad, 0].clone()
        decoder.embedding[only_in_bad, 0] = value
    before = {name: tensor.clone() for name, tensor in ours.tensors().items()}
    with pytest.raises(NonFiniteStep):
        ours.step([good, bad], 1e-3)
    after = ours.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) or "embedding" in name for name in before)
    with torch.no_grad():
        decoder.embedding[only_in_bad, 0] = weight
    if method == "full" and dtype == torch.float32:  # elsewhere the master weight was never poisoned
        ours.masters["embedding"].data[only_in_bad, 0] = weight
    assert math.isfinite(ours.step([good], 1e-3).loss)
    assert all(torch.isfinite(tensor).all() for tensor in ours.tensors().values())


@pytest.mark.parametrize(
    "what, said", [("loss", r"loss inf, .* \d+\.\d+, from an"), ("gradient", r"loss \d.*, .*(nan|inf)$")]
)
def test_a_step_whose_loss_or_gradient_alone_is_not_finite_changes_nothing(folder, monkeypatch, what, said):
    """Of a gradient no example is named, since no loss tells of one."""
    ours, original = engine(load_decoder(folder, torch.float32, CPU)), losses.linear_cross_entropy_with_stats

    def broken(hidden, *arguments, **options):
        if what == "gradient":
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        rows, stats = original(hidden, *arguments, **options)
        return rows + (torch.inf if what == "loss" else 0), stats

    before = {name: tensor.clone() for name, tensor in ours.tensors().items()}
    monkeypatch.setattr(losses, "linear_cross_entropy_with_stats", broken)
    with pytest.raises(NonFiniteStep, match=said):
        ours.step(pack(SEQUENCES, 64, CPU), 1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.tensors().items())
    monkeypatch.setattr(losses, "linear_cross_entropy_with_stats", original)
    assert math.isfinite(ours.step(pack(SEQUENCES, 64, CPU), 1e-3).grad_norm)


def poisoned(folder, names: str) -> tuple[SingleEngine, list[TrainingSequence]]:
    """An engine and sequences in this order, where an upper-case name is of one whose every loss is NaN."""
    decoder = load_decoder(folder, torch.float32, CPU)
    with torch.no_grad():
        decoder.embedding[POISON] = math.nan
    sequences = []
    for seed, name in enumerate(names):
        ids = np.random.default_rng(seed).integers(0, POISON, 12).astype(np.int32)
        ids[3] = POISON if name.isupper() else ids[3]
        sequences.append(TrainingSequence(ids, 5, name))
    return engine(decoder, "lora", DROPOUT, clip=1.0), sequences


POISON = 379
ONE_BY_ONE = TrainingConfig(epochs=1, batch_size=1, learning_rate=1e-2, checkpoint_every=2)


def in_order(names: str, seed: int) -> str:
    """Names so placed that a run with this seed trains them in the order given."""
    order = np.concatenate(plan_steps([12] * len(names), ONE_BY_ONE, seed))
    return "".join(name for _, name in sorted(zip(order, names, strict=True)))


def test_a_step_that_is_not_finite_is_left_out_and_its_examples_are_named(untied, tmp_path):
    names = "aBcDEfg"
    ours, sequences = poisoned(untied, in_order(names, 3))
    train(ours, sequences, ONE_BY_ONE, 3, tmp_path)
    steps = list(read_metrics(tmp_path / "metrics.jsonl"))
    for step, name in zip(steps, names, strict=True):
        assert (step.loss is None) == (step.grad_norm is None) == name.isupper()
        assert step.note == (
            f"left out: loss nan, gradient norm nan, from {name}; in it {name}" if name.isupper() else ""
        )
    assert all(torch.isfinite(tensor).all() for tensor in ours.tensors().values())


def test_of_a_large_step_that_broke_the_first_examples_are_named(untied, tmp_path):
    ours, sequences = poisoned(untied, "abcdefghijklmnopqrsT")
    train(ours, sequences, dataclasses.replace(ONE_BY_ONE, batch_size=20), 3, tmp_path)
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    found = re.fullmatch(r"left out: .*, from T; in it ((\w, ){15}\w) and 4 more", step.note)
    assert found and len(set(found[1].split(", "))) == 16


def test_the_example_that_broke_a_step_is_told_from_those_beside_it(untied, tmp_path):
    """In packs of two and more, with rows that keep to the reference in front."""
    ours, sequences = poisoned(untied, "abCdEf")
    ours = SingleEngine(ours.decoder, 1.0, 0.0, with_reference=True)
    sequences[3] = dataclasses.replace(sequences[3], keeps_to_reference=True)
    for broken, room in (("C", 10**6), ("C, E", 48), ("C, E", 12)):
        chosen = sequences if room < 100 else sequences[:4]
        with pytest.raises(NonFiniteStep, match=rf"^loss nan, gradient norm nan, from {broken}$"):
            ours.step(pack(chosen, room, CPU), 1e-3)
    sequences[2] = dataclasses.replace(sequences[2], keeps_to_reference=True)
    with pytest.raises(NonFiniteStep, match=r"from C$"):
        ours.step(pack(sequences[:4], 10**6, CPU), 1e-3)


def test_a_run_with_left_out_steps_goes_on_bit_for_bit(untied, tmp_path):
    """Also when the steps before the checkpoint, or all so far, were left out."""
    for names in ("aBcDEfg", "ABcdefg", "abCDeFg"):
        ours, sequences = poisoned(untied, in_order(names, 3))
        train(ours, sequences, ONE_BY_ONE, 3, tmp_path / names)
        for until in range(1, 7):
            out = tmp_path / f"{names} {until}"

            def on_step(metrics, until=until):
                if metrics.step == until:
                    raise Killed

            with pytest.raises(Killed):
                train(poisoned(untied, in_order(names, 3))[0], sequences, ONE_BY_ONE, 3, out, on_step)
            again = poisoned(untied, in_order(names, 3))[0]
            train(again, sequences, ONE_BY_ONE, 3, out)
            expected = ours.tensors()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in again.tensors().items())
            found, whole = (untimed(folder) for folder in (out, tmp_path / names))
            assert found == whole


@pytest.mark.parametrize("killed", [None, 2, 3])
def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(untied, tmp_path, killed):
    """Whether or not a restart lies between them."""

    def on_step(metrics):
        if metrics.step == killed:
            raise Killed

    ours, sequences = poisoned(untied, in_order("aBCDefg", 3))
    if killed:
        with pytest.raises(Killed):
            train(ours, sequences, dataclasses.replace(ONE_BY_ONE, checkpoint_every=1), 3, tmp_path, on_step)
        ours, _ = poisoned(untied, in_order("aBCDefg", 3))
    with pytest.raises(NonFiniteStep, match=r"^step 4, the 3rd in a row left out: loss nan, .*, from D; in it D$"):
        train(ours, sequences, dataclasses.replace(ONE_BY_ONE, checkpoint_every=1), 3, tmp_path)
    assert [step.step for step in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def losing(folder, losses: list[float]) -> SingleEngine:
    """An engine whose steps have these losses."""
    ours = engine(load_decoder(folder, torch.float32, CPU))
    ours.step = lambda packs, rate: StepResult(losses.pop(0), 1.0, 0.0)
    return ours


@pytest.mark.parametrize("known", [24, 25])
def test_a_loss_is_far_above_the_others_only_where_enough_are_known(folder, tmp_path, known):
    losses = [1.0 + 0.1 * (step % 2) for step in range(known)] + [9.0]
    train(losing(folder, losses), SEQUENCES[:1], TrainingConfig(epochs=known + 1, batch_size=1), 0, tmp_path)
    *others, last = read_metrics(tmp_path / "metrics.jsonl")
    assert not any(step.note for step in others) and bool(last.note) == (known == 25)


def test_a_loss_far_above_the_recent_ones_is_noted(folder, tmp_path):
    """Whether or not a restart lies between them."""
    config = TrainingConfig(epochs=74, batch_size=1, checkpoint_every=70)

    def on_step(metrics):
        if metrics.step == 71:
            raise Killed

    losses = [1.0, 50.0] * 10 + [1.0, 1.2] * 25 + [1.3, 9.0, 1.1, 1.2]
    train(losing(folder, losses[:]), SEQUENCES[:1], config, 0, tmp_path / "whole")
    with pytest.raises(Killed):
        train(losing(folder, losses[:]), SEQUENCES[:1], config, 0, tmp_path / "killed", on_step)
    train(losing(folder, losses[70:]), SEQUENCES[:1], config, 0, tmp_path / "killed")
    for out in (tmp_path / "whole", tmp_path / "killed"):
        notes = {step.step: step.note for step in read_metrics(out / "metrics.jsonl") if step.note}
        assert notes == {72: "loss spike: 9, usually 1.11"}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("step, saved", [(2, None), (5, "step-00000004")])
def test_weights_that_are_not_finite_are_never_saved(folder, tmp_path, method, value, step, saved):
    """At a checkpoint, and at the end, which here is none."""
    ours = engine(load_decoder(folder, torch.float32, CPU), method)
    config = TrainingConfig(method=method, epochs=5, batch_size=7, checkpoint_every=2)
    optimizer_step, steps = ours.optimizer.step, []

    def break_one():
        optimizer_step()
        steps.append(None)
        if len(steps) == step:
            with torch.no_grad():
                next(reversed(ours.masters.values())).view(-1)[-1] = value

    ours.optimizer.step = break_one
    with pytest.raises(NonFiniteStep, match=rf"^step {step}: the norm of the weights is (nan|inf)$"):
        train(ours, SEQUENCES, config, 0, tmp_path)
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == step - 1
    found = max((one.name for one in (tmp_path / "checkpoints").glob("*")), default=None)
    assert found == saved


# Settings


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_run_weighs_tokens_and_sequences_as_it_is_told(folder, tmp_path, reduction):
    config = TrainingConfig(epochs=1, batch_size=7, loss_reduction=reduction, max_tokens_per_pack=60)
    train(engine(load_decoder(folder, torch.float32, CPU)), SEQUENCES, config, 0, tmp_path)
    (step,) = read_metrics(tmp_path / "metrics.jsonl")
    expected = {
        one: engine(load_decoder(folder, torch.float32, CPU)).step(pack(SEQUENCES, 10**6, CPU, one), 1e-3).loss
        for one in ("token", "sequence")
    }
    assert step.loss == pytest.approx(expected[reduction], rel=1e-5)
    assert expected["token"] != pytest.approx(expected["sequence"], rel=1e-3)


def test_clipping_and_decay_of_the_recipe_reach_either_engine(folder, monkeypatch):
    decoder, config = load_decoder(folder, torch.float32, CPU), TrainingConfig(max_grad_norm=0.7, weight_decay=0.3)
    decoder.requires_grad_(True)
    single = _training_engine(decoder, config, None, False, CPU, 0)
    assert (single.max_grad_norm, single.optimizer.param_groups[0]["weight_decay"]) == (0.7, 0.3)
    recorder = SimpleNamespace(ZeroEngine=lambda *options: options)
    monkeypatch.setitem(sys.modules, "thinksafe.training.deepspeed_engine", recorder)
    options = _training_engine(decoder, config, ZeroConfig(2), True, CPU, 0)
    assert options == (decoder, 0.7, 0.3, ZeroConfig(2), True, CPU)


# Schedule


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    config = TrainingConfig(learning_rate=2.0, warmup_ratio=0.2)
    found = [learning_rate(step, 12, config) for step in range(12)]
    cosine = [1 + math.cos(math.pi * step / 9) for step in range(9)]
    assert found == pytest.approx([2 / 3, 4 / 3, 2.0, *cosine])
    assert learning_rate(0, 10, dataclasses.replace(config, warmup_ratio=0.0)) == 2.0
    assert learning_rate(9, 10, dataclasses.replace(config, warmup_ratio=1.0)) == 2.0


@given(total=st.integers(1, 500), ratio=st.floats(0, 1))
def test_the_learning_rate_is_positive_rises_then_falls(total, ratio):
    config = TrainingConfig(learning_rate=1e-5, warmup_ratio=ratio)
    rates = [learning_rate(step, total, config) for step in range(total)]
    peak = rates.index(max(rates))
    assert min(rates) > 0 and rates[peak] == pytest.approx(1e-5)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@given(count=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_takes_each_sequence_once(count, batch, seed):
    steps = plan_steps([5] * count, TrainingConfig(batch_size=batch), seed)
    per_epoch, epochs = math.ceil(count / batch), []
    assert len(steps) == 3 * per_epoch
    for first in range(0, len(steps), per_epoch):
        chosen = steps[first : first + per_epoch]
        assert all(len(step) == batch for step in chosen[:-1]) and len(chosen[-1]) > 0
        epochs.append(np.concatenate(chosen).tolist())
        assert sorted(epochs[-1]) == list(range(count))
    if count > 20:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(count))
        another = np.concatenate(plan_steps([5] * count, TrainingConfig(epochs=1, batch_size=batch), seed ^ 1))
        assert epochs[0] != another.tolist()


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40), room=st.integers(1, 200))
def test_steps_of_a_token_budget_are_as_full_as_their_order_allows(lengths, room):
    by_tokens = plan_steps(lengths, TrainingConfig(epochs=2, batch_tokens=room), 7)
    one_by_one = plan_steps(lengths, TrainingConfig(epochs=2, batch_size=1), 7)
    assert np.concatenate(by_tokens).tolist() == np.concatenate(one_by_one).tolist()
    sums = [sum(lengths[index] for index in step) for step in by_tokens]
    assert min(sums) > 0, "no step is empty"
    assert all(total <= room or len(step) == 1 for total, step in zip(sums, by_tokens, strict=True))
    taken = 0
    for total, step, following in zip(sums, by_tokens, by_tokens[1:], strict=False):
        taken += len(step)
        assert taken == len(lengths) or total + lengths[following[0]] > room


@given(lengths=st.lists(st.integers(1, 100), max_size=40), room=st.integers(1, 150))
def test_packs_hold_every_sequence_once_and_are_as_full_as_they_can_be(lengths, room):
    groups = first_fit_decreasing(lengths, room)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in group) for group in groups]
    assert all(total <= room or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    assert all(one + other > room for place, one in enumerate(sums) for other in sums[:place])


# Metrics


def test_the_largest_share_of_gradient_that_was_skipped_is_on_record(folder, tmp_path, monkeypatch):
    """On a CPU nothing is skipped, so the operator is made to say so, and the step of NaN to say nothing."""
    shares = iter([0.25, 0.5, 0.125])
    original = losses.linear_cross_entropy_with_stats

    def skipping(*arguments, **options):
        rows, stats = original(*arguments, **options)
        return rows, stats._replace(dropped_mass=torch.tensor(next(shares)))

    run(folder, tmp_path / "exact")
    assert {step.dropped_mass for step in read_metrics(tmp_path / "exact" / "metrics.jsonl")} == {0.0}
    monkeypatch.setattr(losses, "linear_cross_entropy_with_stats", skipping)
    config = TrainingConfig(epochs=1, batch_size=7, max_tokens_per_pack=70)
    run(folder, tmp_path / "skipping", config=config)
    (step,) = read_metrics(tmp_path / "skipping" / "metrics.jsonl")
    assert step.dropped_mass == 0.5 and next(shares, None) is None


def test_every_step_draws_masks_of_its_own(folder, tmp_path):
    run(folder, tmp_path, config=TrainingConfig(epochs=3, batch_size=7, learning_rate=1e-30))
    assert len({metrics.loss for metrics in read_metrics(tmp_path / "metrics.jsonl")}) == 3


def test_the_references_pass_counts_as_work(folder, tmp_path):
    kept, config = [dataclasses.replace(one, keeps_to_reference=True) for one in SEQUENCES], TrainingConfig(epochs=1)
    flop = {}
    for name, sequences in (("plain", SEQUENCES), ("kept", kept)):
        run(folder, tmp_path / name, sequences=sequences, config=config)
        (step,) = read_metrics(tmp_path / name / "metrics.jsonl")
        flop[name] = step.flop
    assert 1.2 * flop["plain"] < flop["kept"] < 1.6 * flop["plain"]


def test_what_fits_to_the_token_is_not_put_off():
    assert [len(step) for step in plan_steps([5] * 4, TrainingConfig(epochs=1, batch_tokens=10), 0)] == [2, 2]
    assert sorted(map(len, first_fit_decreasing([5, 10, 5], 10))) == [1, 2]


def test_metrics_count_what_was_trained(folder, tmp_path):
    before = time.perf_counter()
    run(folder, tmp_path)
    elapsed = time.perf_counter() - before
    steps = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert sum(metrics.tokens for metrics in steps) == 3 * sum(map(len, SEQUENCES))
    assert {metrics.total_steps for metrics in steps} == {STEPS}
    assert [metrics.learning_rate for metrics in steps] == [learning_rate(step, STEPS, RUN) for step in range(STEPS)]
    assert all(metrics.seconds > 0 and metrics.grad_norm > 0 for metrics in steps)
    assert sum(metrics.seconds for metrics in steps) < elapsed
    lengths, targets = [len(one) for one in SEQUENCES], sum(one.num_targets for one in SEQUENCES)
    shape, work = load_config(folder)[0], Work(sum(lengths), targets, causal_pairs(lengths))
    assert sum(metrics.flop for metrics in steps) == 3 * TrainingCosts(shape, DROPOUT).useful_flop(work)
