"""DPO's loss, the key sentence without its prompt and SafeKey's heads, against transformers and peft."""

import dataclasses
import itertools

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.support.training_runs import (
    CPU,
    LORA,
    Killed,
    assert_same_run,
    fresh_trainer,
    gradients,
    make_trainer,
    sequence,
)
from thinksafe.model.lora import adapter_parameters, attach, save_adapter
from thinksafe.model.weights import hugging_face_name, load_decoder
from thinksafe.training.config import TrainingConfig
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import PlannedBatches, train, training_fingerprint
from thinksafe.training.losses import SafetyHeads
from thinksafe.training.packing import collate, pack
from thinksafe.training.sequence import LateLosses, PreferencePair, SafetySpan, TrainingSequence

pytest_plugins = ["tests.support.training_runs"]

BETA = 0.3
PAIRS = [
    PreferencePair(dataclasses.replace(sequence(20, 9, 1), weight=2.0), sequence(33, 22, 2), BETA),
    PreferencePair(sequence(14, 3, 3), sequence(12, 1, 4), BETA),
    PreferencePair(dataclasses.replace(sequence(9, 4, 5), weight=0.5), sequence(40, 35, 6), BETA),
]
SINGLES = [sequence(30, 12, 7), dataclasses.replace(sequence(17, 11, 8), use_reference_kl=True)]


def token_logprobs(model, item: TrainingSequence) -> torch.Tensor:
    ids = torch.from_numpy(item.input_ids).long()
    logprobs = model(ids[None]).logits[0, item.num_prompt_tokens - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[item.num_prompt_tokens :, None])[:, 0]


def textbook_loss(model, items, reduction):
    """Return the mean loss of a step by definition, from a peft model in fp64."""
    total, weights = 0.0, 0.0
    for item in items:
        if isinstance(item, PreferencePair):
            chosen, rejected = (token_logprobs(model, half).sum() for half in item.sequences)
            with torch.no_grad(), model.disable_adapter():
                chosen_reference, rejected_reference = (token_logprobs(model, half).sum() for half in item.sequences)
            margin = (chosen - chosen_reference) - (rejected - rejected_reference)
            total = total - item.chosen.weight * F.logsigmoid(item.beta * margin)
            weights += item.chosen.weight
            continue
        if item.use_reference_kl:
            ids = torch.from_numpy(item.input_ids).long()
            rows = slice(item.num_prompt_tokens - 1, -1)
            with torch.no_grad(), model.disable_adapter():
                reference = model(ids[None]).logits[0, rows].log_softmax(-1)
            losses = (reference.exp() * (reference - model(ids[None]).logits[0, rows].log_softmax(-1))).sum(-1)
        else:
            losses = -token_logprobs(model, item)
        total = total + item.weight * (losses.sum() if reduction == "token" else losses.mean())
        weights += item.is_in_mean * item.weight * (len(losses) if reduction == "token" else 1)
    return total / weights


def compare_with_peft(student_folder, tmp_path, items, max_tokens, reduction):
    decoder = load_decoder(student_folder, torch.float32, CPU)
    trainer = make_trainer(decoder, with_reference=True)
    save_adapter(decoder, LORA, tmp_path / "adapter", str(student_folder))
    base = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double()
    expected = textbook_loss(model, items, reduction)
    expected.backward()
    loss, actual = gradients(trainer, pack(items, max_tokens, CPU, reduction))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    path = {id(parameter): name for name, parameter in adapter_parameters(decoder).items()}
    of_peft = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(of_peft) == len(actual)
    for name, gradient in actual.items():
        reference = of_peft[path[id(trainer.parameters[name])]]
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("max_tokens", [1, 60, 10**6])
@pytest.mark.parametrize("items", [PAIRS, [SINGLES[0], *PAIRS, SINGLES[1]]], ids=["pairs", "mixed"])
def test_preference_loss_and_gradients_match_peft(student_folder, tmp_path, items, max_tokens, reduction):
    compare_with_peft(student_folder, tmp_path, items, max_tokens, reduction)


def test_a_pair_stays_in_one_pack():
    packs = pack([*PAIRS, *SINGLES], 1, CPU)
    assert len(packs) == len(PAIRS) + len(SINGLES)
    assert [len(batch.names) for batch in packs].count(2) == len(PAIRS)


def test_untrained_student_has_the_loss_of_a_coin_toss(student_folder):
    """With B = 0 the student is its reference, so each pair has the loss log 2 and pulls its two responses apart."""
    trainer = fresh_trainer(student_folder, "lora", with_reference=True)
    with torch.no_grad():
        for name, parameter in adapter_parameters(trainer.decoder).items():
            if "lora_B" in name:
                parameter.zero_()
    losses, _ = trainer.loss(collate(PAIRS, CPU), True)
    assert losses.sum().item() == pytest.approx(np.log(2) * 3.5, rel=1e-5)


def test_preference_training_widens_the_margin(student_folder, tmp_path):
    trainer = make_trainer(load_decoder(student_folder, torch.float32, CPU), with_reference=True)
    config = TrainingConfig(epochs=20, batch_size=3, learning_rate=3e-3, warmup_ratio=0.0)
    losses = []
    train(trainer, PAIRS, config, 1, tmp_path, lambda metrics: losses.append(metrics.loss))
    assert losses[-1] < 0.5 * losses[0]


# SafeKey


def test_loss_that_is_added_does_not_count_in_the_mean(student_folder, tmp_path):
    added = dataclasses.replace(sequence(18, 6, 9), weight=0.2, is_in_mean=False)
    compare_with_peft(student_folder, tmp_path, [SINGLES[0], added, sequence(11, 5, 10)], 10**6, "sequence")


def test_key_sentence_alone_is_what_an_attention_mask_on_the_prompt_gives(student_folder):
    """The published training runs the whole text again and masks the prompt's tokens as keys. Rotary embeddings see
    distances only, so the tokens after the prompt, alone, give the same losses."""
    full, num_prompt, first, end = sequence(40, 28, 11), 12, 9, 15
    alone = TrainingSequence(full.input_ids[num_prompt : num_prompt + end], first)
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.from_numpy(full.input_ids).long()[None]
    mask = torch.ones_like(ids)
    mask[0, :num_prompt] = 0
    positions = torch.arange(ids.shape[1])[None]
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[0]
    rows = torch.arange(num_prompt + first - 1, num_prompt + end - 1)
    expected = F.cross_entropy(logits[rows], ids[0, rows + 1], reduction="none")
    trainer = make_trainer(load_decoder(student_folder, torch.float32, CPU), "full")
    losses, _ = trainer.loss(collate([alone], CPU), False)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def sequences_with_spans() -> list[TrainingSequence]:
    spans = [SafetySpan(12, 20, True, 0.2), SafetySpan(5, 9, False, 0.4), None, SafetySpan(25, 26, True, 0.2)]
    base = [sequence(40, 28, 12), sequence(16, 11, 13), sequence(9, 3, 14), sequence(30, 6, 15)]
    weights = [1.0, 2.0, 1.0, 0.5]
    return [
        dataclasses.replace(item, safety_span=span, weight=weight)
        for item, span, weight in zip(base, spans, weights, strict=True)
    ]


@pytest.mark.parametrize("max_tokens", [1, 50, 10**6])
def test_heads_and_gradients_match_transformers(student_folder, max_tokens):
    decoder = load_decoder(student_folder, torch.float32, CPU)
    decoder.safety_heads = SafetyHeads(decoder.config.hidden_size, CPU)
    trainer = make_trainer(decoder, "full")
    heads = torch.nn.Linear(decoder.config.hidden_size, 2).double()
    heads.load_state_dict(decoder.safety_heads.state_dict())
    model, total, items = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float64), 0, []
    for item in (items := sequences_with_spans()):
        ids = torch.from_numpy(item.input_ids).long()
        output = model(ids[None], output_hidden_states=True)
        loss = F.cross_entropy(output.logits[0, item.num_prompt_tokens - 1 : -1], ids[item.num_prompt_tokens :])
        if span := item.safety_span:
            states = output.hidden_states[-1][0]
            label = torch.tensor(float(span.is_harmful), dtype=torch.float64)
            summary = heads(states[span.start : span.end].mean(0))[0]
            context = heads(states[: span.end].mean(0))[1]
            loss = loss + span.weight * 0.5 * sum(
                F.binary_cross_entropy_with_logits(logit, label) for logit in (summary, context)
            )
        total = total + item.weight * loss
    expected = total / sum(item.weight for item in items)
    expected.backward()
    loss, actual = gradients(trainer, pack(items, max_tokens, CPU, "sequence"))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in actual.items():
        head, is_head = name.removeprefix("safety_heads."), name.startswith("safety_heads.")
        reference = (heads if is_head else model).get_parameter(head if is_head else hugging_face_name(name)).grad
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-5 * reference.abs().max().item())
    assert {"safety_heads.weight", "safety_heads.bias"} <= actual.keys()


def test_late_losses_are_those_of_the_last_epochs():
    late = LateLosses(sequence(10, 4, 1), (sequence(11, 4, 1), sequence(5, 2, 1)), 2)
    plain = sequence(12, 6, 2)
    config = TrainingConfig(epochs=4, batch_size=1)
    batches = PlannedBatches([late, plain], config, 3)
    lengths = [sorted(map(len, itertools.chain(batches.of_step(2 * e), batches.of_step(2 * e + 1)))) for e in range(4)]
    assert lengths == [[10, 12], [10, 12], [5, 11, 12], [5, 11, 12]]
    batches = PlannedBatches([late, plain], dataclasses.replace(config, steps=3), 3)  # an epoch and a half
    assert batches.num_steps == 3
    assert sorted(map(len, itertools.chain(*map(batches.of_step, range(2))))) == [5, 11, 12]


@pytest.mark.parametrize(
    "change",
    [
        {"early": sequence(10, 4, 9)},
        {"late": (sequence(11, 4, 1),)},
        {"num_epochs": 3},
        {"late": (dataclasses.replace(sequence(11, 4, 1), safety_span=SafetySpan(1, 3, False, 0.2)),)},
    ],
)
def test_fingerprint_holds_everything_that_is_trained(change):
    span = SafetySpan(1, 3, True, 0.2)
    item = LateLosses(sequence(10, 4, 1), (dataclasses.replace(sequence(11, 4, 1), safety_span=span),), 2)
    config = TrainingConfig()
    original = training_fingerprint([item, *PAIRS], config, 1)
    assert training_fingerprint([dataclasses.replace(item, **change), *PAIRS], config, 1) != original
    swapped = dataclasses.replace(PAIRS[0], chosen=PAIRS[0].rejected, rejected=PAIRS[0].chosen)
    assert training_fingerprint([item, swapped, *PAIRS[1:]], config, 1) != original
    assert training_fingerprint([item, dataclasses.replace(PAIRS[0], beta=0.1), *PAIRS[1:]], config, 1) != original


@pytest.mark.parametrize("killed_at", [2, 5])
def test_killed_training_with_pairs_and_heads_continues_bit_for_bit(student_folder, tmp_path, killed_at):
    late = [
        LateLosses(dataclasses.replace(item, safety_span=None), (item, sequence(8, 3, 20)), 2)
        for item in sequences_with_spans()
    ]
    items = [*PAIRS, *late]
    config = TrainingConfig(epochs=3, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)

    def run(out, until=None):
        decoder = load_decoder(student_folder, torch.float32, CPU)
        attach(decoder, LORA, seed=0)
        torch.manual_seed(5)
        decoder.safety_heads = SafetyHeads(decoder.config.hidden_size, CPU)
        trainer = LocalTrainer(decoder, 1.0, 0.0, with_reference=True)

        def on_step(metrics):
            if metrics.step == until:
                raise Killed

        try:
            train(trainer, items, config, 11, out, on_step)
        except Killed:
            return None
        return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "killed", killed_at) is None
    assert_same_run(tmp_path / "killed", run(tmp_path / "killed"), tmp_path / "whole", whole)
    assert "safety_heads.weight" in whole
