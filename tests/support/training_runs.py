"""A handful of sequences, engines on a tiny student, and runs that can be killed at a step. A test file takes the
students with `pytest_plugins = ["tests.support.training_runs"]`.
"""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach
from thinksafe.model.weights import load_decoder
from thinksafe.training.local_engine import SingleEngine
from thinksafe.training.loop import TrainingConfig, read_metrics, train
from thinksafe.training.packing import TrainingSequence

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
CPU = torch.device("cpu")
RUN = TrainingConfig(epochs=3, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)
STEPS = 9
DROPOUT = dataclasses.replace(LORA, dropout=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A student whose head is not its embedding, so that a poisoned token harms only the sequences that hold it."""
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


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


def gradients(engine: SingleEngine, packs):
    """(loss, gradients by parameter) of one step that does not step."""
    found = {}
    optimizer_step = engine.optimizer.step
    engine.optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in engine.masters.items()})
    loss = engine.step(packs, 1e-3).loss
    engine.optimizer.step = optimizer_step
    return loss, found


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
