"""The train suite: all peers take the same optimizer step, and the suite runs without them."""

import numpy as np
import pytest
import torch

from benchmarks import train
from benchmarks.models import random_decoder, transformers_copy
from tests.emulation.taped_graphs import use_taped_graphs
from thinksafe.model.weights import hugging_face_name
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.packing import pack
from thinksafe.training.sequence import TrainingSequence

SETTINGS = {
    "the paper's": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
    "the best": {"per_device_train_batch_size": 8, "gradient_checkpointing": False},
}


@pytest.fixture
def ours_and_transformers():
    """Our decoder, the same model in transformers, and the sequences of one step."""
    decoder = random_decoder("cpu-0.3m", torch.device("cpu"), torch.float32)
    transformers_model = transformers_copy(decoder, "cpu-0.3m")
    rng = np.random.default_rng(0)
    sequences = [TrainingSequence(rng.integers(0, 512, 12 + 3 * i, dtype=np.int32), 9) for i in range(8)]
    decoder.requires_grad_(True)
    return decoder, transformers_model.train(), sequences


def sign_agreement(decoder, transformers_model, sequences, epoch) -> dict[str, float]:
    """Return, for each parameter, the share of elements that our step and the peer's step move in one direction."""
    initial = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    epoch()
    LocalTrainer(decoder, 1.0, 0.0).step(pack(sequences, 10**6, "cpu"), 1e-5)
    stepped_parameters = dict(transformers_model.named_parameters())
    shares = {}
    for name, parameter in decoder.named_parameters():
        our_step, their_step = (
            stepped.detach() - initial[name] for stepped in (parameter, stepped_parameters[hugging_face_name(name)])
        )
        assert our_step.abs().max() > 0.9e-5
        shares[name] = (our_step.sign() == their_step.sign()).float().mean().item()
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_trl_takes_the_same_step(ours_and_transformers, settings):
    """AdamW's first step is the sign of the gradient, so another loss would move many weights the other way."""
    _, transformers_model, sequences = ours_and_transformers
    shares = sign_agreement(
        *ours_and_transformers, train._trl_epoch(transformers_model, sequences, SETTINGS[settings], "sdpa")
    )
    assert min(shares.values()) > 0.99, shares


def test_padded_loop_takes_the_same_step(ours_and_transformers):
    _, transformers_model, sequences = ours_and_transformers
    assert (
        min(sign_agreement(*ours_and_transformers, train._padded_epoch(transformers_model, sequences)).values()) > 0.99
    )


@pytest.mark.slow
def test_missing_peers_are_named_and_left_out(monkeypatch):
    monkeypatch.setattr(train, "import_peer", lambda module, notes: notes.append(f"absent: {module}"))
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * count)
    notes = []
    rows = train._measure_case("cpu-0.3m", "lora", 1, notes)
    assert "ms a step of 16 tokens" not in rows[1]
    assert [row["variant"] for row in rows] == ["ThinkSafe", "ThinkSafe, +KL on half of the sequences"]
    assert "absent: peft" in notes
    rows = train._measure_case("cpu-0.3m", "full", 1, notes)
    assert [row["variant"] for row in rows] == ["ThinkSafe", "transformers, padded batches"]
    assert "absent: trl" in notes and "absent: datasets" in notes
    assert (
        0 < rows[0]["host ms a layer"] < rows[0]["ms a step of 16 tokens"]
        and rows[0]["TFLOP/s"] > 0
        and rows[1]["ThinkSafe is faster by"] > 0
    )


@pytest.mark.slow
def test_passes_with_and_without_graphs_are_measured(monkeypatch):
    use_taped_graphs(monkeypatch)
    monkeypatch.setattr(train, "import_peer", lambda module, notes: None)
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * 8)
    monkeypatch.setattr(train, "choose_max_cuda_graph_tokens", lambda *arguments: 1024)
    rows = {row["variant"]: row for row in train._measure_case("cpu-0.3m", "lora", 1, [])}
    assert list(rows)[:2] == ["ThinkSafe", "ThinkSafe, launched kernel by kernel"]
    assert all(row["ms a step of 16 tokens"] > 0 for row in list(rows.values())[:2])
