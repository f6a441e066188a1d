"""Training: the gradient of the textbook whatever the packing, and a run that a kill cannot change."""

import dataclasses
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from thinksafe.model.attention import PackedAttention
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach, save_adapter
from thinksafe.model.weights import hugging_face_name, load_decoder
from thinksafe.training import losses
from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.engine import NonFiniteStep, SingleEngine, StepResult
from thinksafe.training.loop import (
    OF_MEMORY,
    TrainingConfig,
    fingerprint,
    learning_rate,
    plan_steps,
    read_metrics,
    train,
)
from thinksafe.training.packing import TrainingSequence, collate, first_fit_decreasing, pack

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
CPU = torch.device("cpu")
PACKINGS = [1, 40, 100, 10**6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A student whose head is not its embedding, so that a poisoned token harms only the sequences that hold it."""
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


@pytest.fixture
def decoder(folder):
    return load_decoder(folder, torch.float32, CPU)


def sequence(length: int, response: int, seed: int) -> TrainingSequence:
    ids = np.random.default_rng([length, seed]).integers(0, 380, length).astype(np.int32)
    return TrainingSequence(ids, length - response)


SEQUENCES = [sequence(*sizes, 0) for sizes in [(30, 12), (7, 1), (55, 54), (16, 8), (30, 29), (2, 1), (41, 3)]]


def engine(decoder, method="lora", config=LORA, clip=1e9, weight_decay=0.0, **options) -> SingleEngine:
    if method == "lora":
        attach(decoder, config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # as if trained for a while: with B = 0 the gradient of A is zero
            for name, parameter in adapter_parameters(decoder).items():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    else:
        decoder.requires_grad_(True)
    return SingleEngine(decoder, clip, weight_decay, **options)


def gradients(engine: SingleEngine, packs, monkeypatch=None):
    """(loss, gradients by parameter) of one step that does not step."""
    found = {}
    optimizer_step = engine.optimizer.step
    engine.optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in engine.masters.items()})
    loss = engine.step(packs, 1e-3).loss
    engine.optimizer.step = optimizer_step
    return loss, found


def textbook(model, sequences):
    """(loss, gradients by parameter) of a transformers model, one sequence at a time, no packing, no chunks."""
    model.zero_grad()
    targets = sum(sequence.num_targets for sequence in sequences)
    total = 0.0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.input_ids).long()
        start = sequence.response_start
        logits = model(ids[None]).logits[0, start - 1 : -1]
        loss = F.cross_entropy(logits, ids[start:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def peft_twin(decoder, folder, tmp_path):
    """The same model with the same adapter, computed by transformers and peft."""
    save_adapter(decoder, LORA, tmp_path / "adapter", str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)


# Loss and gradient


@pytest.mark.parametrize("max_tokens", PACKINGS)
def test_loss_and_gradient_of_adapters_are_those_of_peft_whatever_the_packing(decoder, folder, tmp_path, max_tokens):
    ours = engine(decoder)
    twin = peft_twin(decoder, folder, tmp_path)
    expected_loss, theirs = textbook(twin, SEQUENCES)
    loss, found = gradients(ours, pack(SEQUENCES, max_tokens, CPU))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    path = {id(parameter): name for name, parameter in adapter_parameters(decoder).items()}
    found = {path[id(ours.parameters[name])]: gradient for name, gradient in found.items()}
    assert_close(found, {name.replace(".default", ""): gradient for name, gradient in theirs.items()})


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_loss_and_gradient_of_every_weight_are_those_of_transformers(tmp_path, family, max_tokens):
    folder = make_checkpoint(family, tmp_path)
    expected_loss, theirs = textbook(AutoModelForCausalLM.from_pretrained(folder), SEQUENCES)
    ours = engine(load_decoder(folder, torch.float32, CPU), "full")
    loss, found = gradients(ours, pack(SEQUENCES, max_tokens, CPU))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close({hugging_face_name(name): gradient for name, gradient in found.items()}, theirs)


def textbook_kl(model, sequences, reduction):
    """(loss, gradients by parameter): cross-entropy, or full-vocabulary KL(base ‖ adapted), weighted, by definition."""
    model.zero_grad()
    losses, weights = [], []
    for sequence in sequences:
        ids, start = torch.from_numpy(sequence.input_ids).long(), sequence.response_start
        logprobs = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        if sequence.keeps_to_reference:
            with torch.no_grad(), model.disable_adapter():
                reference = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            tokens = (reference.exp() * (reference - logprobs)).sum(-1)
        else:
            tokens = -logprobs.gather(-1, ids[start:, None])[:, 0]
        losses.append(sequence.weight * (tokens.sum() if reduction == "token" else tokens.mean()))
        weights.append(sequence.weight * (len(tokens) if reduction == "token" else 1))
    loss = sum(losses) / sum(weights)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("max_tokens", PACKINGS)
def test_benign_responses_keep_to_the_reference_whatever_the_packing(folder, tmp_path, max_tokens, reduction):
    decoder = load_decoder(folder, torch.float32, CPU)
    ours = engine(decoder)
    mixed = [
        dataclasses.replace(one, keeps_to_reference=index % 2 == 1, weight=1.0 + index)
        for index, one in enumerate(SEQUENCES)
    ]
    expected_loss, theirs = textbook_kl(peft_twin(decoder, folder, tmp_path), mixed, reduction)
    loss, found = gradients(ours, pack(mixed, max_tokens, CPU, reduction))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    path = {id(parameter): name for name, parameter in adapter_parameters(decoder).items()}
    found = {path[id(ours.parameters[name])]: gradient for name, gradient in found.items()}
    assert_close(found, {name.replace(".default", ""): gradient for name, gradient in theirs.items()})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_student_that_is_the_reference_has_no_loss_and_moves_only_away_from_its_copy(folder, method):
    """The reference is what the student was when the engine was made, also where every weight is trained."""
    decoder = load_decoder(folder, torch.float32, CPU)
    if method == "lora":
        attach(decoder, LORA, seed=0)
    else:
        decoder.requires_grad_(True)
    ours = SingleEngine(decoder, 1e9, 0.0, with_reference=True)
    kept = pack([dataclasses.replace(one, keeps_to_reference=True) for one in SEQUENCES], 64, CPU)
    result = ours.step(kept, 1e-2)
    assert result == StepResult(0.0, 0.0, 0.0)
    ours.step(pack(SEQUENCES, 64, CPU), 1e-2)
    first = ours.step(kept, 1e-3).loss
    losses = [ours.step(kept, 1e-3).loss for _ in range(20)]
    assert 0 < losses[-1] < 0.5 * first


def test_a_student_that_trains_every_weight_is_held_to_all_weights_it_had(untied):
    """Its head moves too: the copy's states go through the copy's head."""
    decoder, before = (load_decoder(untied, torch.float32, CPU) for _ in range(2))
    decoder.requires_grad_(True)
    ours = SingleEngine(decoder, 1e9, 0.0, with_reference=True)
    ours.step(pack(SEQUENCES, 64, CPU), 1e-2)

    @torch.no_grad()
    def logprobs(model, one: TrainingSequence) -> torch.Tensor:
        ids = torch.from_numpy(one.input_ids).long()
        hidden = model.eval()(ids, torch.arange(len(one)), PackedAttention.of([len(one)], CPU))
        return (hidden[one.response_start - 1 : -1] @ model.head.T).log_softmax(-1)

    pairs = [(logprobs(before, one), logprobs(decoder, one)) for one in SEQUENCES]
    tokens = torch.cat([(was.exp() * (was - now)).sum(-1) for was, now in pairs])
    kept = pack([dataclasses.replace(one, keeps_to_reference=True) for one in SEQUENCES], 64, CPU)
    assert ours.step(kept, 1e-3).loss == pytest.approx(tokens.mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_student_is_copied_only_where_a_copy_is_needed_and_the_copy_is_not_trained(decoder, method):
    """Memory that nothing else would show on a CPU."""
    assert engine(decoder, method).loss.copy is None
    copied = SingleEngine(decoder, 1e9, 0.0, with_reference=True).loss.copy
    assert (copied is not None) == (method == "full")
    assert copied is None or not any(weight.requires_grad for weight in copied.parameters())


def test_only_response_tokens_are_targets(decoder):
    batch = collate(SEQUENCES, CPU)
    expected = np.concatenate([sequence.input_ids[sequence.response_start :] for sequence in SEQUENCES])
    assert batch.targets.tolist() == expected.tolist()
    assert batch.input_ids[batch.target_rows + 1].tolist() == expected.tolist()
    assert len(batch.targets) == sum(sequence.num_targets for sequence in SEQUENCES)


def test_a_sequence_does_not_see_its_neighbours(decoder):
    """Its share of the gradient is the same beside any other sequence, before or behind it."""
    ours = engine(decoder)
    one = SEQUENCES[0]
    _, alone = gradients(ours, pack([one], 10**6, CPU))
    for other in (sequence(30, 12, 1), sequence(50, 3, 2), sequence(3, 2, 3)):
        _, beside = gradients(ours, pack([other], 10**6, CPU))
        for order in ([one, other], [other, one]):
            _, both = gradients(ours, [collate(order, CPU)])
            total = one.num_targets + other.num_targets
            shares = {name: (both[name] * total - beside[name] * other.num_targets) / one.num_targets for name in both}
            assert_close(shares, alone)


def test_steps_are_adamw_with_clipping_as_in_torch(decoder, folder, tmp_path):
    ours = engine(decoder, clip=0.5, weight_decay=0.1)
    twin = peft_twin(decoder, folder, tmp_path)
    weights = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    adamw = torch.optim.AdamW(weights.values(), lr=0.0, weight_decay=0.1)
    for step, rate in enumerate((1e-2, 3e-3, 1e-2)):
        batch = SEQUENCES[step:]
        result = ours.step(pack(batch, 64, CPU), rate)
        loss, _ = textbook(twin, batch)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        assert norm > 0.5, "the test should clip"
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in adapter_parameters(decoder).items():
        twin_parameter = weights[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(parameter.data, twin_parameter.data, rtol=1e-3, atol=1e-5)


def test_training_a_few_examples_over_and_over_learns_them(decoder, tmp_path):
    config = TrainingConfig(epochs=40, batch_size=2, learning_rate=2e-2, max_tokens_per_pack=64)
    attach(decoder, LoraConfig(rank=8, alpha=16.0, dropout=0.0, target_modules=tuple(decoder.config.projections)), 0)
    train(SingleEngine(decoder, 1.0, 0.0), SEQUENCES[3:6], config, 0, tmp_path)
    losses = [metrics.loss for metrics in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] > 3.0 and np.mean(losses[-4:]) < 0.2


# Non-finite steps and precision


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


def test_steps_below_the_resolution_of_bf16_add_up(folder):
    """At lr 1e-5 a bf16 weight of 0.1 does not move in a step; the fp32 master does, and after 100 steps it shows."""
    decoder = load_decoder(folder, torch.bfloat16, CPU)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    ours = engine(decoder, "full")
    packs = pack(SEQUENCES[:2], 10**6, CPU)
    ours.step(packs, 1e-5)
    moved = [(parameter != before[name]).float().mean() for name, parameter in decoder.named_parameters()]
    assert max(moved) < 0.9, "the test should begin with steps too small to see"
    for _ in range(99):
        ours.step(packs, 1e-5)
    weight, master = decoder.layers[0].up_proj, ours.masters["layers.0.up_proj"]
    assert master.dtype == torch.float32
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, ours.masters[name].to(torch.bfloat16)), name
    assert (master - before["layers.0.up_proj"].float()).abs().mean() > 3e-4
    large = before["layers.0.up_proj"].abs() > 0.1
    assert (weight != before["layers.0.up_proj"])[large].float().mean() > 0.3


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


# Resuming


RUN = TrainingConfig(epochs=3, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)
STEPS = 9
DROPOUT = dataclasses.replace(LORA, dropout=0.2)


class Killed(BaseException):
    pass


def untimed(folder):
    """What metrics.jsonl says but for the time it took."""
    return [dataclasses.replace(one, seconds=0, tokens_per_second=0) for one in read_metrics(folder / "metrics.jsonl")]


def fresh_engine(folder, method, dtype=torch.float32, with_reference=False):
    return engine(load_decoder(folder, dtype, CPU), method, DROPOUT, clip=1.0, with_reference=with_reference)


def run(folder, out, method="lora", until=None, dtype=torch.float32, sequences=SEQUENCES, config=RUN):
    """Train until a step and be killed there, after its metrics and before its checkpoint; the weights."""
    ours = fresh_engine(folder, method, dtype, any(sequence.keeps_to_reference for sequence in sequences))

    def on_step(metrics):
        if metrics.step == until:
            raise Killed

    try:
        train(ours, sequences, config, 11, out, on_step)
    except Killed:
        return None
    return {name: parameter.detach().clone() for name, parameter in ours.parameters.items()}


def assert_same_run(out, weights, expected_out, expected_weights):
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    found, expected = (untimed(folder) for folder in (out, expected_out))
    assert found == expected and [metrics.step for metrics in found] == list(range(1, found[0].total_steps + 1))


@pytest.mark.parametrize(
    "method, dtype", [("lora", torch.float32), ("full", torch.float32), ("full", torch.bfloat16)], ids=str
)
def test_a_run_killed_at_any_step_ends_bit_for_bit_as_one_that_was_not(folder, tmp_path, method, dtype):
    expected = run(folder, tmp_path / "whole", method, dtype=dtype)
    for step in range(1, STEPS):
        out = tmp_path / f"killed at {step}"
        assert run(folder, out, method, step, dtype) is None
        assert_same_run(out, run(folder, out, method, dtype=dtype), tmp_path / "whole", expected)
    out = tmp_path / "killed thrice"
    for step in (3, 4, 8):
        run(folder, out, method, step, dtype)
    assert_same_run(out, run(folder, out, method, dtype=dtype), tmp_path / "whole", expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_goes_on_with_the_reference_it_began_with(folder, tmp_path, method):
    """Where every weight is trained the reference is a copy, and a restart must not take it from the checkpoint."""
    mixed = [
        dataclasses.replace(one, keeps_to_reference=index % 2 == 0, weight=1.0 + index)
        for index, one in enumerate(SEQUENCES)
    ]
    config = dataclasses.replace(RUN, method=method, batch_tokens=70, loss_reduction="sequence", benign_loss="kl")
    options = {"method": method, "sequences": mixed, "config": config}
    expected = run(folder, tmp_path / "whole", **options)
    steps = len(untimed(tmp_path / "whole"))
    for step in (1, steps // 2, steps - 1):
        out = tmp_path / f"killed at {step}"
        assert run(folder, out, until=step, **options) is None
        assert_same_run(out, run(folder, out, **options), tmp_path / "whole", expected)


def test_a_finished_run_takes_no_further_step(folder, tmp_path):
    expected = run(folder, tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    weights = run(folder, tmp_path)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def newest_step(out):
    return int(sorted(out.glob("checkpoints/step-????????"))[-1].name[-8:])


DAMAGES = {
    "tensors truncated": lambda c: (f := c / "state-0.safetensors").write_bytes(f.read_bytes()[:-5]),
    "tensors empty": lambda c: (c / "state-0.safetensors").write_bytes(b""),
    "tensors changed": lambda c: (f := c / "state-0.safetensors").write_bytes(f.read_bytes()[:-1] + b"\1"),
    "tensors missing": lambda c: (c / "state-0.safetensors").unlink(),
    "record truncated": lambda c: (c / "state.json").write_text((c / "state.json").read_text()[:-9]),
    "record empty": lambda c: (c / "state.json").write_text(""),
    "record garbage": lambda c: (c / "state.json").write_bytes(b"\xff\xfe"),
    "record without keys": lambda c: (c / "state.json").write_text("{}"),
    "record a list": lambda c: (c / "state.json").write_text("[]"),
    "record missing": lambda c: (c / "state.json").unlink(),
    "not a folder": lambda c: (shutil.rmtree(c), c.write_text("")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"weight": torch.full((8,), float(step))}, "mine")
    DAMAGES[damage](tmp_path / "step-00000004")
    step, tensors = load_newest(tmp_path, "mine")
    assert step == 2 and tensors["weight"].tolist() == [2.0] * 8


def test_with_every_checkpoint_torn_a_run_begins_anew(folder, tmp_path):
    expected = run(folder, tmp_path / "whole")
    out = tmp_path / "torn"
    run(folder, out, until=7)
    for file in out.glob("checkpoints/*/state-0.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert_same_run(out, run(folder, out), tmp_path / "whole", expected)


def test_a_checkpoint_that_was_being_written_is_none(folder, tmp_path):
    expected = run(folder, tmp_path / "whole")
    out = tmp_path / "killed"
    run(folder, out, until=5)
    (out / "checkpoints" / "step-00000004").rename(out / "checkpoints" / "step-00000004.partial")
    assert load_newest(out / "checkpoints", fingerprint(SEQUENCES, RUN, 11))[0] == 2
    assert_same_run(out, run(folder, out), tmp_path / "whole", expected)


def test_two_checkpoints_are_kept(folder, tmp_path):
    run(folder, tmp_path, until=7)
    kept = sorted(checkpoint.name for checkpoint in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


OTHERS = {
    "other data": {"sequences": [*SEQUENCES[1:], sequence(30, 12, 9)]},
    "other order of the data": {"sequences": SEQUENCES[::-1]},
    "other settings": {"config": dataclasses.replace(RUN, learning_rate=2e-2)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_run_is_not_taken_up_and_does_not_stand_in_the_way(folder, tmp_path, other):
    expected = run(folder, tmp_path / "alone", **OTHERS[other])
    out = tmp_path / "shared"
    run(folder, out)  # leaves a checkpoint of step 8 and of step 9
    run(folder, out, until=5, **OTHERS[other])
    assert newest_step(out) == 4
    assert_same_run(out, run(folder, out, **OTHERS[other]), tmp_path / "alone", expected)


def test_everything_that_shapes_a_run_is_in_its_fingerprint():
    known = {fingerprint(SEQUENCES, RUN, 11)}
    one, *rest = SEQUENCES
    variants = [
        (SEQUENCES, RUN, 12),
        (rest, RUN, 11),
        ([*rest, one], RUN, 11),
        ([TrainingSequence(one.input_ids, one.response_start + 1), *rest], RUN, 11),
        ([TrainingSequence(one.input_ids + 1, one.response_start), *rest], RUN, 11),
        ([dataclasses.replace(one, weight=2.0), *rest], RUN, 11),
        ([dataclasses.replace(one, keeps_to_reference=True), *rest], RUN, 11),
        *[(SEQUENCES, dataclasses.replace(RUN, **{name: value}), 11) for name, value in [
            ("epochs", 4), ("batch_size", 4), ("learning_rate", 1.0), ("warmup_ratio", 0.5), ("weight_decay", 0.1),
            ("max_grad_norm", 2.0), ("method", "full"),
            ("batch_tokens", 99), ("loss_reduction", "sequence"), ("benign_loss", "kl"),
        ]],
    ]  # fmt: skip
    for variant in variants:
        known.add(fingerprint(*variant))
    assert len(known) == 1 + len(variants)
    of_memory = {"max_tokens_per_pack": 99, "activation_checkpointing": "full", "cuda_graphs": "none"}
    assert of_memory.keys() == set(OF_MEMORY)
    assert fingerprint(list(SEQUENCES), dataclasses.replace(RUN, **of_memory), 11) in known


def test_a_line_of_metrics_that_was_torn_is_written_again(folder, tmp_path):
    expected = run(folder, tmp_path / "whole")
    out = tmp_path / "torn"
    run(folder, out, until=5)
    file = out / "metrics.jsonl"
    file.write_text(file.read_text() + json.dumps({"step": 6})[:-3])
    assert len(list(read_metrics(file))) == 5
    assert_same_run(out, run(folder, out), tmp_path / "whole", expected)


@pytest.mark.parametrize("torn", [b"\0" * 300, b"\0" * 300 + b"\n", b'{"step": 6}\n', b"\xff\n"])
def test_what_a_power_failure_leaves_behind_a_checkpoint_is_written_again(folder, tmp_path, torn):
    expected = run(folder, tmp_path / "whole")
    out = tmp_path / "torn"
    run(folder, out, until=4)
    with (out / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    assert_same_run(out, run(folder, out), tmp_path / "whole", expected)


def test_a_checkpoint_is_on_the_disk_after_the_metrics_of_its_steps(folder, tmp_path, monkeypatch):
    """Whatever the system forgets that was not synchronised, files and folders alike."""
    safe, synchronise, replace, saved = {}, os.fsync, os.replace, []

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        safe[path] = [one.name for one in path.iterdir()] if path.is_dir() else path.read_bytes()
        synchronise(descriptor)

    def renamed(source, target):
        saved.append(int(target.name[-8:]))
        assert safe[tmp_path / "metrics.jsonl"].count(b"\n") == saved[-1]
        assert {"state.json", "state-0.safetensors"} <= set(safe[source])
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    run(folder, tmp_path)
    assert saved == [2, 4, 6, 8, 9]
    assert {"metrics.jsonl", "checkpoints"} <= set(safe[tmp_path]) and "step-00000009" in safe[tmp_path / "checkpoints"]


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
