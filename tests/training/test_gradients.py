"""Training: the gradient of the textbook whatever the packing, in fp32 also where weights are not."""

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
from tests.support.training_runs import CPU, LORA, SEQUENCES, engine, gradients, sequence
from thinksafe.model.attention import PackedAttention
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach, save_adapter
from thinksafe.model.weights import hugging_face_name, load_decoder
from thinksafe.training.local_engine import SingleEngine, StepResult
from thinksafe.training.loop import TrainingConfig, _one_ahead, read_metrics, train
from thinksafe.training.packing import TrainingSequence, collate, pack

PACKINGS = [1, 40, 100, 10**6]


pytest_plugins = ["tests.support.training_runs"]


@pytest.fixture
def decoder(folder):
    return load_decoder(folder, torch.float32, CPU)


def textbook(model, sequences):
    """(loss, gradients by parameter) of a transformers model, one sequence at a time, no packing, no chunks."""
    model.zero_grad()
    targets = sum(one.num_targets for one in sequences)
    total = 0.0
    for one in sequences:
        ids = torch.from_numpy(one.input_ids).long()
        start = one.response_start
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
    for one in sequences:
        ids, start = torch.from_numpy(one.input_ids).long(), one.response_start
        logprobs = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        if one.keeps_to_reference:
            with torch.no_grad(), model.disable_adapter():
                reference = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            tokens = (reference.exp() * (reference - logprobs)).sum(-1)
        else:
            tokens = -logprobs.gather(-1, ids[start:, None])[:, 0]
        losses.append(one.weight * (tokens.sum() if reduction == "token" else tokens.mean()))
        weights.append(one.weight * (len(tokens) if reduction == "token" else 1))
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


def test_the_reference_reads_the_sequences_that_keep_to_it_and_no_other(decoder):
    """A pass costs a third of a step, and on other sequences it would change nothing."""
    ours, read, forward = engine(decoder), [], decoder.forward
    decoder.forward = lambda ids, *others: read.append(len(ids)) or forward(ids, *others)
    kept, *plain = SEQUENCES
    ours.step(pack([dataclasses.replace(kept, keeps_to_reference=True), *plain], 1, CPU), 1e-3)
    assert sorted(read) == sorted([len(kept), *map(len, SEQUENCES)])


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


_INTERRUPTED = """
import signal
from thinksafe.training.loop import _one_ahead

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for trial in range(300):
    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.00001 * trial)
    try:
        for step, made in _one_ahead(lambda step: step, range(10**9)):
            assert step == made
    except KeyboardInterrupt:
        pass
"""


def test_an_interrupt_at_any_moment_ends_the_loop():
    """A lock that it leaves taken would hold the thread that makes packs, and so whoever waits for that, for ever."""
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_packs_are_made_one_step_ahead_and_their_errors_come_in_turn():
    made = []

    def make(step: int) -> int:
        made.append(step)
        if step == 5:
            raise ValueError("of step 5")
        return 10 * step

    ahead = _one_ahead(make, range(2, 9))
    assert [next(ahead) for _ in range(2)] == [(2, 20), (3, 30)]
    assert next(ahead) == (4, 40)
    with pytest.raises(ValueError, match="of step 5"):
        next(ahead)
    assert made == [2, 3, 4, 5]
    assert list(_one_ahead(make, range(6, 8))) == [(6, 60), (7, 70)] and list(_one_ahead(make, range(0))) == []
