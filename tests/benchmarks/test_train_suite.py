"""The train suite: all sides train the same thing, and it runs where peers are missing."""

import numpy as np
import pytest
import torch

from benchmarks import train
from benchmarks.models import in_transformers, random_decoder
from tests.emulation.taped_graphs import tape_passes
from thinksafe.model.weights import hugging_face_name
from thinksafe.training.local_engine import SingleEngine
from thinksafe.training.packing import TrainingSequence, pack

SETTINGS = {
    "the paper's": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
    "the best": {"per_device_train_batch_size": 8, "gradient_checkpointing": False},
}


@pytest.fixture
def twins():
    """(our decoder, the same model in transformers, one step's sequences)."""
    ours = random_decoder("cpu-0.3m", torch.device("cpu"), torch.float32)
    theirs = in_transformers(ours, "cpu-0.3m")
    rng = np.random.default_rng(0)
    sequences = [TrainingSequence(rng.integers(0, 512, 12 + 3 * i, dtype=np.int32), 9) for i in range(8)]
    ours.requires_grad_(True)
    return ours, theirs.train(), sequences


def agreement(ours, theirs, sequences, epoch) -> dict[str, float]:
    """Share of each parameter that a step of theirs moves the way that ours does."""
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    epoch()
    SingleEngine(ours, 1.0, 0.0).step(pack(sequences, 10**6, "cpu"), 1e-5)
    moved = dict(theirs.named_parameters())
    shares = {}
    for name, parameter in ours.named_parameters():
        mine, other = (one.detach() - before[name] for one in (parameter, moved[hugging_face_name(name)]))
        assert mine.abs().max() > 0.9e-5
        shares[name] = (mine.sign() == other.sign()).float().mean().item()
    return shares


@pytest.mark.parametrize("settings", SETTINGS)
def test_trl_takes_the_step_that_we_take(twins, settings):
    """AdamW's first step is the gradient's sign, so with another loss many a weight moves the other way."""
    _, theirs, sequences = twins
    shares = agreement(*twins, train._with_trl(theirs, sequences, SETTINGS[settings], "sdpa"))
    assert min(shares.values()) > 0.99, shares


def test_the_padded_loop_takes_it_too(twins):
    _, theirs, sequences = twins
    assert min(agreement(*twins, train._padded(theirs, sequences)).values()) > 0.99


def test_absent_peers_are_named_and_left_out(monkeypatch):
    monkeypatch.setattr(train, "peer", lambda module, notes: notes.append(f"absent: {module}"))
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * count)
    notes = []
    rows = train._case("cpu-0.3m", "lora", 6, notes)
    assert "ms a step of 16 tokens" not in rows[1]
    assert [row["variant"] for row in rows] == ["ThinkSafe", "ThinkSafe, +KL on half of the sequences"]
    assert "absent: peft" in notes
    rows = train._case("cpu-0.3m", "full", 6, notes)
    assert [row["variant"] for row in rows] == ["ThinkSafe", "transformers, padded batches"]
    assert "absent: trl" in notes and "absent: datasets" in notes
    assert (
        0 < rows[0]["host ms a layer"] < rows[0]["ms a step of 16 tokens"]
        and rows[0]["TFLOP/s"] > 0
        and rows[1]["ThinkSafe is faster by"] > 0
    )


def test_recorded_passes_stand_beside_those_that_are_not(monkeypatch):
    tape_passes(monkeypatch)
    monkeypatch.setattr(train, "peer", lambda module, notes: None)
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * 8)
    monkeypatch.setattr(train, "recorded_on", lambda *of_the_case: 1024)
    rows = {row["variant"]: row for row in train._case("cpu-0.3m", "lora", 1, [])}
    assert list(rows)[:2] == ["ThinkSafe", "ThinkSafe, launched kernel by kernel"]
    assert all(row["ms a step of 16 tokens"] > 0 for row in list(rows.values())[:2])
