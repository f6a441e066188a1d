"""Loss, gradient and steps: those of transformers, peft and torch's AdamW for every packing, with fp32 masters."""

import dataclasses
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import make_checkpoint
from tests.support.training_runs import CPU, LORA, SEQUENCES, gradients, make_trainer, sequence
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import adapter_parameters, attach, save_adapter
from thinksafe.model.weights import hugging_face_name, load_decoder
from thinksafe.training.config import TrainingConfig
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import prefetch, train
from thinksafe.training.metrics import read_metrics
from thinksafe.training.packing import collate, pack
from thinksafe.training.sequence import TrainingSequence
from thinksafe.training.trainer import StepResult

PACKINGS = [1, 40, 100, 10**6]


pytest_plugins = ["tests.support.training_runs"]


@pytest.fixture
def decoder(student_folder):
    return load_decoder(student_folder, torch.float32, CPU)


def textbook_gradients(model, sequences):
    """Return (loss, gradients by parameter) of a transformers model, one sequence at a time, no packing, no chunks."""
    model.zero_grad()
    num_targets = sum(sequence.num_targets for sequence in sequences)
    total = 0.0
    for example in sequences:
        ids = torch.from_numpy(example.input_ids).long()
        start = example.num_prompt_tokens
        logits = model(ids[None]).logits[0, start - 1 : -1]
        loss = F.cross_entropy(logits, ids[start:], reduction="sum") / num_targets
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
        scale = gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def make_peft_model(decoder, student_folder, tmp_path):
    """Return the same model with the same adapter, computed by transformers and peft."""
    save_adapter(decoder, LORA, tmp_path / "adapter", str(student_folder))
    base = AutoModelForCausalLM.from_pretrained(student_folder)
    return peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)


# Loss and gradient


@pytest.mark.parametrize("max_tokens", PACKINGS)
@pytest.mark.parametrize("use_kl", [False, True])
def test_advantage_is_a_signed_factor_that_the_mean_ignores(student_folder, max_tokens, use_kl):
    """The oracle adds the gradients of single sequences, each with its advantage and its share of the targets."""
    base = [dataclasses.replace(example, use_reference_kl=use_kl) for example in SEQUENCES[:3]]
    advantages, num_targets = (-1.5, 0.0, 2.0), sum(example.num_targets for example in base)
    decoder = load_decoder(student_folder, torch.float32, CPU)
    trainer = make_trainer(decoder, with_reference=use_kl)
    signed = [
        dataclasses.replace(example, advantage=advantage) for example, advantage in zip(base, advantages, strict=True)
    ]
    loss, actual = gradients(trainer, pack(signed, max_tokens, CPU))
    expected_loss, expected = 0.0, {}
    for example, advantage in zip(base, advantages, strict=True):
        share = advantage * example.num_targets / num_targets
        single_loss, single = gradients(trainer, pack([example], max_tokens, CPU))
        expected_loss += share * single_loss
        expected = {name: expected.get(name, 0) + share * gradient for name, gradient in single.items()}
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert_close(actual, expected)


@pytest.mark.parametrize("max_tokens", PACKINGS)
def test_adapter_loss_and_gradients_match_peft_for_every_packing(decoder, student_folder, tmp_path, max_tokens):
    trainer = make_trainer(decoder)
    peft_model = make_peft_model(decoder, student_folder, tmp_path)
    expected_loss, expected_gradients = textbook_gradients(peft_model, SEQUENCES)
    loss, actual = gradients(trainer, pack(SEQUENCES, max_tokens, CPU))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    path = {id(parameter): name for name, parameter in adapter_parameters(decoder).items()}
    actual = {path[id(trainer.parameters[name])]: gradient for name, gradient in actual.items()}
    assert_close(actual, {name.replace(".default", ""): gradient for name, gradient in expected_gradients.items()})


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_full_loss_and_gradients_match_transformers(tmp_path, family, max_tokens):
    student_folder = make_checkpoint(family, tmp_path)
    expected_loss, expected_gradients = textbook_gradients(
        AutoModelForCausalLM.from_pretrained(student_folder), SEQUENCES
    )
    trainer = make_trainer(load_decoder(student_folder, torch.float32, CPU), "full")
    loss, actual = gradients(trainer, pack(SEQUENCES, max_tokens, CPU))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close({hugging_face_name(name): gradient for name, gradient in actual.items()}, expected_gradients)


def textbook_kl_gradients(model, sequences, reduction):
    """Return (loss, gradients by parameter) of weighted cross-entropy or full KL(base ‖ adapted), by definition."""
    model.zero_grad()
    losses, weights = [], []
    for example in sequences:
        ids, start = torch.from_numpy(example.input_ids).long(), example.num_prompt_tokens
        logprobs = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        if example.use_reference_kl:
            with torch.no_grad(), model.disable_adapter():
                reference = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            tokens = (reference.exp() * (reference - logprobs)).sum(-1)
        else:
            tokens = -logprobs.gather(-1, ids[start:, None])[:, 0]
        losses.append(example.weight * (tokens.sum() if reduction == "token" else tokens.mean()))
        weights.append(example.weight * (len(tokens) if reduction == "token" else 1))
    loss = sum(losses) / sum(weights)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("max_tokens", PACKINGS)
def test_kl_loss_and_gradients_match_definition_for_every_packing(student_folder, tmp_path, max_tokens, reduction):
    decoder = load_decoder(student_folder, torch.float32, CPU)
    trainer = make_trainer(decoder)
    mixed = [
        dataclasses.replace(sequence, use_reference_kl=index % 2 == 1, weight=1.0 + index)
        for index, sequence in enumerate(SEQUENCES)
    ]
    expected_loss, expected_gradients = textbook_kl_gradients(
        make_peft_model(decoder, student_folder, tmp_path), mixed, reduction
    )
    loss, actual = gradients(trainer, pack(mixed, max_tokens, CPU, reduction))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    path = {id(parameter): name for name, parameter in adapter_parameters(decoder).items()}
    actual = {path[id(trainer.parameters[name])]: gradient for name, gradient in actual.items()}
    assert_close(actual, {name.replace(".default", ""): gradient for name, gradient in expected_gradients.items()})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_kl_is_zero_at_the_reference_and_returns_to_it(student_folder, method):
    """The reference is the student at the creation of the trainer, also in full fine-tuning."""
    decoder = load_decoder(student_folder, torch.float32, CPU)
    if method == "lora":
        attach(decoder, LORA, seed=0)
    else:
        decoder.requires_grad_(True)
    trainer = LocalTrainer(decoder, 1e9, 0.0, with_reference=True)
    kl_packs = pack([dataclasses.replace(sequence, use_reference_kl=True) for sequence in SEQUENCES], 64, CPU)
    result = trainer.step(kl_packs, 1e-2)
    assert result == StepResult(0.0, 0.0, 0.0)
    trainer.step(pack(SEQUENCES, 64, CPU), 1e-2)
    first_loss = trainer.step(kl_packs, 1e-3).loss
    losses = [trainer.step(kl_packs, 1e-3).loss for _ in range(20)]
    assert 0 < losses[-1] < 0.5 * first_loss


def test_reference_runs_over_kl_sequences_only(decoder):
    """A pass costs a third of a step, and on other sequences it would have no effect."""
    trainer, lengths, forward = make_trainer(decoder), [], decoder.forward
    decoder.forward = lambda ids, *inputs: lengths.append(len(ids)) or forward(ids, *inputs)
    kl_sequence, *other_sequences = SEQUENCES
    trainer.step(pack([dataclasses.replace(kl_sequence, use_reference_kl=True), *other_sequences], 1, CPU), 1e-3)
    assert sorted(lengths) == sorted([len(kl_sequence), *map(len, SEQUENCES)])


def test_full_fine_tuning_reference_keeps_all_initial_weights(untied_student):
    """The student's head changes too, so the copy's hidden states must go through the copy's head."""
    decoder, before = (load_decoder(untied_student, torch.float32, CPU) for _ in range(2))
    decoder.requires_grad_(True)
    trainer = LocalTrainer(decoder, 1e9, 0.0, with_reference=True)
    trainer.step(pack(SEQUENCES, 64, CPU), 1e-2)

    @torch.no_grad()
    def logprobs(model, sequence: TrainingSequence) -> torch.Tensor:
        ids = torch.from_numpy(sequence.input_ids).long()
        hidden = model.eval()(ids, torch.arange(len(sequence)), PackedAttention.of([len(sequence)], CPU))
        return (hidden[sequence.num_prompt_tokens - 1 : -1] @ model.head.T).log_softmax(-1)

    pairs = [(logprobs(before, sequence), logprobs(decoder, sequence)) for sequence in SEQUENCES]
    tokens = torch.cat([(reference.exp() * (reference - trained)).sum(-1) for reference, trained in pairs])
    kl_packs = pack([dataclasses.replace(sequence, use_reference_kl=True) for sequence in SEQUENCES], 64, CPU)
    assert trainer.step(kl_packs, 1e-3).loss == pytest.approx(tokens.mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_full_fine_tuning_has_a_frozen_reference_copy(decoder, method):
    """A needless copy would cost memory that no other test on a CPU would show."""
    assert make_trainer(decoder, method).loss.reference_copy is None
    reference_copy = LocalTrainer(decoder, 1e9, 0.0, with_reference=True).loss.reference_copy
    assert (reference_copy is not None) == (method == "full")
    assert reference_copy is None or not any(weight.requires_grad for weight in reference_copy.parameters())


def test_only_response_tokens_are_targets(decoder):
    batch = collate(SEQUENCES, CPU)
    expected = np.concatenate([sequence.input_ids[sequence.num_prompt_tokens :] for sequence in SEQUENCES])
    assert batch.targets.tolist() == expected.tolist()
    assert batch.input_ids[batch.target_rows + 1].tolist() == expected.tolist()
    assert len(batch.targets) == sum(sequence.num_targets for sequence in SEQUENCES)


def test_sequence_does_not_see_its_neighbors(decoder):
    """Its part of the gradient does not depend on the sequence before or after it."""
    trainer = make_trainer(decoder)
    examined = SEQUENCES[0]
    _, expected = gradients(trainer, pack([examined], 10**6, CPU))
    for neighbor in (sequence(30, 12, 1), sequence(50, 3, 2), sequence(3, 2, 3)):
        _, of_neighbor = gradients(trainer, pack([neighbor], 10**6, CPU))
        for order in ([examined, neighbor], [neighbor, examined]):
            _, of_both = gradients(trainer, [collate(order, CPU)])
            num_targets = examined.num_targets + neighbor.num_targets
            of_examined = {
                name: (of_both[name] * num_targets - of_neighbor[name] * neighbor.num_targets) / examined.num_targets
                for name in of_both
            }
            assert_close(of_examined, expected)


def test_steps_match_torch_adamw_with_clipping(decoder, student_folder, tmp_path):
    trainer = make_trainer(decoder, clip=0.5, weight_decay=0.1)
    peft_model = make_peft_model(decoder, student_folder, tmp_path)
    weights = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    adamw = torch.optim.AdamW(weights.values(), lr=0.0, weight_decay=0.1)
    for step, rate in enumerate((1e-2, 3e-3, 1e-2)):
        batch = SEQUENCES[step:]
        result = trainer.step(pack(batch, 64, CPU), rate)
        loss, _ = textbook_gradients(peft_model, batch)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        assert norm > 0.5, "the test should clip"
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in adapter_parameters(decoder).items():
        peft_parameter = weights[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(parameter.data, peft_parameter.data, rtol=1e-3, atol=1e-5)


def test_training_overfits_a_few_examples(decoder, tmp_path):
    config = TrainingConfig(epochs=40, batch_size=2, learning_rate=2e-2, max_tokens_per_pack=64)
    attach(decoder, LoraConfig(rank=8, alpha=16.0, dropout=0.0, target_modules=tuple(decoder.config.projections)), 0)
    train(LocalTrainer(decoder, 1.0, 0.0), SEQUENCES[3:6], config, 0, tmp_path)
    losses = [metrics.loss for metrics in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] > 3.0 and np.mean(losses[-4:]) < 0.2


def test_steps_below_bf16_resolution_add_up(student_folder):
    """At a learning rate of 1e-5 a bf16 weight of 0.1 stays the same in one step, but changes after 100 steps."""
    decoder = load_decoder(student_folder, torch.bfloat16, CPU)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    trainer = make_trainer(decoder, "full")
    packs = pack(SEQUENCES[:2], 10**6, CPU)
    trainer.step(packs, 1e-5)
    moved = [(parameter != before[name]).float().mean() for name, parameter in decoder.named_parameters()]
    assert max(moved) < 0.9, "the test should start with steps below the resolution"
    for _ in range(99):
        trainer.step(packs, 1e-5)
    weight, master = decoder.layers[0].up_proj.weight, trainer.masters["layers.0.up_proj.weight"]
    assert master.dtype == torch.float32
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, trainer.masters[name].to(torch.bfloat16)), name
    assert (master - before["layers.0.up_proj.weight"].float()).abs().mean() > 3e-4
    large = before["layers.0.up_proj.weight"].abs() > 0.1
    assert (weight != before["layers.0.up_proj.weight"])[large].float().mean() > 0.3


_INTERRUPT_SCRIPT = """
import signal
from thinksafe.training.loop import prefetch

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for trial in range(300):
    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.00001 * trial)
    try:
        for step, made in enumerate(prefetch(lambda step: step, range(10**9))):
            assert step == made
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.slow
def test_interrupt_at_any_moment_ends_the_loop():
    """A lock that the interrupt leaves locked would block the thread that makes packs, and the loop would hang."""
    process = subprocess.run([sys.executable, "-c", _INTERRUPT_SCRIPT], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")


def test_packs_are_made_one_step_ahead_and_errors_keep_order():
    made = []

    def make(step: int) -> int:
        made.append(step)
        if step == 5:
            raise ValueError("of step 5")
        return 10 * step

    prefetched = prefetch(make, range(2, 9))
    assert [next(prefetched) for _ in range(3)] == [20, 30, 40]
    with pytest.raises(ValueError, match="of step 5"):
        next(prefetched)
    assert made == [2, 3, 4, 5]
    assert list(prefetch(make, range(6, 8))) == [60, 70] and list(prefetch(make, range(0))) == []
