"""Seven sequences, trainers of a tiny student, and runs that can be killed at a step.

A test file gets the fixtures with `pytest_plugins = ["tests.support.training_runs"]`.
"""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import adapter_parameters, attach
from thinksafe.model.weights import load_decoder
from thinksafe.training.config import TrainingConfig
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import train
from thinksafe.training.metrics import read_metrics
from thinksafe.training.sequence import TrainingSequence

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
CPU = torch.device("cpu")
TRAINING_CONFIG = TrainingConfig(epochs=3, batch_size=3, learning_rate=1e-2, max_tokens_per_pack=64, checkpoint_every=2)
NUM_STEPS = 9
"""Number of steps of a training with TRAINING_CONFIG on SEQUENCES."""
LORA_WITH_DROPOUT = dataclasses.replace(LORA, dropout=0.2)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    """Folder of a tiny student."""
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def untied_student(tmp_path_factory):
    """Folder of a student with an untied language-model head.

    So a poisoned token, one whose embedding is NaN, affects only the sequences that contain it.
    """
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("untied_student"), tie_word_embeddings=False)


def sequence(length: int, response: int, seed: int) -> TrainingSequence:
    """Return a sequence of `length` random tokens, of which the last `response` tokens are the response."""
    ids = np.random.default_rng([length, seed]).integers(0, 380, length).astype(np.int32)
    return TrainingSequence(ids, length - response)


SEQUENCES = [sequence(*sizes, 0) for sizes in [(30, 12), (7, 1), (55, 54), (16, 8), (30, 29), (2, 1), (41, 3)]]


def make_trainer(decoder, method="lora", config=LORA, clip=1e9, weight_decay=0.0, **options) -> LocalTrainer:
    """Return a trainer of random adapters, or of all weights if `method` is `full`.

    Args:
        config: configuration of the adapters.
        clip: maximum norm of the gradient; the default clips nothing.
        options: further arguments of LocalTrainer.
    """
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
    """Return (loss, {parameter: gradient after clipping}) of a step on packs; the weights are not updated."""
    gradients_by_name = {}
    optimizer_step = trainer.optimizer.step
    trainer.optimizer.step = lambda: gradients_by_name.update(
        {name: p.grad.clone() for name, p in trainer.masters.items()}
    )
    loss = trainer.step(packs, 1e-3).loss
    trainer.optimizer.step = optimizer_step
    return loss, gradients_by_name


class Killed(BaseException):
    """The end of a training that a kill stands for; `train_until` raises and catches it."""


def metrics_without_times(training_folder):
    """Return the steps in metrics.jsonl with all times set to 0."""
    return [
        dataclasses.replace(step, seconds=0, tokens_per_second=0)
        for step in read_metrics(training_folder / "metrics.jsonl")
    ]


def fresh_trainer(student_folder, method, dtype=torch.float32, with_reference=False):
    """Return a trainer as a new process makes it, with dropout in the adapters and gradients clipped at norm 1."""
    return make_trainer(
        load_decoder(student_folder, dtype, CPU), method, LORA_WITH_DROPOUT, clip=1.0, with_reference=with_reference
    )


def train_until(
    student_folder, out, method="lora", until=None, dtype=torch.float32, sequences=SEQUENCES, config=TRAINING_CONFIG
):
    """Train into the folder `out`, from its newest checkpoint if there is one, and return {parameter: weights}.

    Args:
        until: step at which the training is killed, after its metrics and before its checkpoint; the result is then
            None. None: train to the end.
    """
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
    """Check that two trainings gave the same weights bit for bit, and the same metrics of all steps except times."""
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    actual, expected = (metrics_without_times(training_folder) for training_folder in (out, expected_out))
    assert actual == expected and [metrics.step for metrics in actual] == list(range(1, actual[0].total_steps + 1))
