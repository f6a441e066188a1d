"""Seven sequences, trainers of a tiny student, and runs that can be killed at a step.

A test file gets the fixtures with `pytest_plugins = ["tests.support.training_runs"]`.
"""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from thinksafe.model.lora import LoraConfig, adapter_parameters, attach
from thinksafe.model.weights import load_decoder
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import TrainingConfig, read_metrics, train
from thinksafe.training.packing import TrainingSequence

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
CPU = torch.device("cpu")
TRAINING_CONFIG = TrainingConfig(epochs=3, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)
NUM_STEPS = 9
LORA_WITH_DROPOUT = dataclasses.replace(LORA, dropout=0.2)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def untied_student(tmp_path_factory):
    """Student with an untied head, so that a poisoned token affects only the sequences that contain it."""
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("untied_student"), tie_word_embeddings=False)


def sequence(length: int, response: int, seed: int) -> TrainingSequence:
    ids = np.random.default_rng([length, seed]).integers(0, 380, length).astype(np.int32)
    return TrainingSequence(ids, length - response)


SEQUENCES = [sequence(*sizes, 0) for sizes in [(30, 12), (7, 1), (55, 54), (16, 8), (30, 29), (2, 1), (41, 3)]]


def make_trainer(decoder, method="lora", config=LORA, clip=1e9, weight_decay=0.0, **options) -> LocalTrainer:
    if method == "lora":
        attach(decoder, config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # B = 0, its value before training, would make the gradient of A zero
            for name, parameter in adapter_parameters(decoder).items():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    else:
        decoder.requires_grad_(True)
    return LocalTrainer(decoder, clip, weight_decay, **options)


def gradients(trainer: LocalTrainer, packs):
    """Return (loss, gradients by parameter) of a step that does not update the weights."""
    gradients_by_name = {}
    optimizer_step = trainer.optimizer.step
    trainer.optimizer.step = lambda: gradients_by_name.update(
        {name: p.grad.clone() for name, p in trainer.masters.items()}
    )
    loss = trainer.step(packs, 1e-3).loss
    trainer.optimizer.step = optimizer_step
    return loss, gradients_by_name


class Killed(BaseException):
    pass


def metrics_without_times(training_folder):
    """Return the steps in metrics.jsonl with all times set to 0."""
    return [
        dataclasses.replace(step, seconds=0, tokens_per_second=0)
        for step in read_metrics(training_folder / "metrics.jsonl")
    ]


def fresh_trainer(student_folder, method, dtype=torch.float32, with_reference=False):
    return make_trainer(
        load_decoder(student_folder, dtype, CPU), method, LORA_WITH_DROPOUT, clip=1.0, with_reference=with_reference
    )


def train_until(
    student_folder, out, method="lora", until=None, dtype=torch.float32, sequences=SEQUENCES, config=TRAINING_CONFIG
):
    """Train and return the weights; return None if killed at step `until`, after its metrics, before its checkpoint."""
    trainer = fresh_trainer(student_folder, method, dtype, any(sequence.use_reference_kl for sequence in sequences))

    def on_step(metrics):
        if metrics.step == until:
            raise Killed

    try:
        train(trainer, sequences, config, 11, out, on_step)
    except Killed:
        return None
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def assert_same_run(out, weights, expected_out, expected_weights):
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    actual, expected = (metrics_without_times(training_folder) for training_folder in (out, expected_out))
    assert actual == expected and [metrics.step for metrics in actual] == list(range(1, actual[0].total_steps + 1))
