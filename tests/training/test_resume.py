"""Kills and torn files do not change a run: it ends bit for bit like an uninterrupted run."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.training_runs import (
    NUM_STEPS,
    SEQUENCES,
    TRAINING_CONFIG,
    assert_same_run,
    metrics_without_times,
    sequence,
    train_until,
)
from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.config import TrainingConfig
from thinksafe.training.loop import training_fingerprint
from thinksafe.training.metrics import read_metrics
from thinksafe.training.sequence import TrainingSequence

pytest_plugins = ["tests.support.training_runs"]


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [2, pytest.param(NUM_STEPS - 1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "method, dtype", [("lora", torch.float32), ("full", torch.float32), ("full", torch.bfloat16)], ids=str
)
def test_run_killed_at_any_step_resumes_bit_for_bit(student_folder, tmp_path, fresh_seed, method, dtype, num_kills):
    """The steps are drawn."""
    expected = train_until(student_folder, tmp_path / "whole", method, dtype=dtype)
    for step in random.Random(fresh_seed).sample(range(1, NUM_STEPS), num_kills):
        out = tmp_path / f"killed at {step}"
        assert train_until(student_folder, out, method, step, dtype) is None
        assert_same_run(out, train_until(student_folder, out, method, dtype=dtype), tmp_path / "whole", expected)
    out = tmp_path / "killed thrice"
    for step in (3, 4, 8):
        train_until(student_folder, out, method, step, dtype)
    assert_same_run(out, train_until(student_folder, out, method, dtype=dtype), tmp_path / "whole", expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_run_keeps_its_initial_reference(student_folder, tmp_path, method):
    """In full fine-tuning the reference is a copy, and a restart must not make it from the checkpoint."""
    mixed_sequences = [
        dataclasses.replace(sequence, use_reference_kl=index % 2 == 0, weight=1.0 + index)
        for index, sequence in enumerate(SEQUENCES)
    ]
    config = dataclasses.replace(TRAINING_CONFIG, method=method, tokens_per_step=70, loss_reduction="sequence")
    options = {"method": method, "sequences": mixed_sequences, "config": config}
    expected = train_until(student_folder, tmp_path / "whole", **options)
    steps = len(metrics_without_times(tmp_path / "whole"))
    for step in (1, steps // 2, steps - 1):
        out = tmp_path / f"killed at {step}"
        assert train_until(student_folder, out, until=step, **options) is None
        assert_same_run(out, train_until(student_folder, out, **options), tmp_path / "whole", expected)


def test_finished_run_takes_no_further_step(student_folder, tmp_path):
    expected = train_until(student_folder, tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    weights = train_until(student_folder, tmp_path)
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
def test_torn_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"weight": torch.full((8,), float(step))}, "mine")
    DAMAGES[damage](tmp_path / "step-00000004")
    step, tensors = load_newest(tmp_path, "mine")
    assert step == 2 and tensors["weight"].tolist() == [2.0] * 8


@pytest.mark.parametrize(
    "damage, reason",
    [
        ("nothing", ""),
        ("tensors truncated", "state-0.safetensors is damaged"),
        ("tensors missing", "state-0.safetensors is missing"),
        ("record missing", "state.json is missing"),
        ("record garbage", "state.json is damaged"),
        ("other settings", "belongs to other examples or other settings"),
    ],
)
def test_checkpoint_that_is_passed_over_is_named(student_folder, tmp_path, capsys, damage, reason):
    train_until(student_folder, tmp_path, until=7)
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    other = {"config": dataclasses.replace(TRAINING_CONFIG, weight_decay=0.3)} if damage == "other settings" else {}
    if damage in DAMAGES:
        DAMAGES[damage](checkpoints[-1])
    capsys.readouterr()
    train_until(student_folder, tmp_path, **other)
    lines = capsys.readouterr().err.splitlines()
    unusable = {"nothing": [], "other settings": checkpoints[::-1]}.get(damage, checkpoints[1:])
    step = 0 if other else 4
    assert lines == [f"checkpoint {path}: {reason}; training continues after step {step}" for path in unusable]


def test_run_restarts_if_every_checkpoint_is_torn(student_folder, tmp_path):
    expected = train_until(student_folder, tmp_path / "whole")
    out = tmp_path / "torn"
    train_until(student_folder, out, until=7)
    for file in out.glob("checkpoints/*/state-0.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert_same_run(out, train_until(student_folder, out), tmp_path / "whole", expected)


def test_partial_checkpoint_is_ignored(student_folder, tmp_path):
    expected = train_until(student_folder, tmp_path / "whole")
    out = tmp_path / "killed"
    train_until(student_folder, out, until=5)
    (out / "checkpoints" / "step-00000004").rename(out / "checkpoints" / "step-00000004.partial")
    assert load_newest(out / "checkpoints", training_fingerprint(SEQUENCES, TRAINING_CONFIG, 11))[0] == 2
    assert_same_run(out, train_until(student_folder, out), tmp_path / "whole", expected)


def test_two_checkpoints_are_kept(student_folder, tmp_path):
    train_until(student_folder, tmp_path, until=7)
    kept = sorted(checkpoint.name for checkpoint in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


OTHER_RUNS = {
    "other data": {"sequences": [*SEQUENCES[1:], sequence(30, 12, 9)]},
    "other order of the data": {"sequences": SEQUENCES[::-1]},
    "other settings": {"config": dataclasses.replace(TRAINING_CONFIG, learning_rate=2e-2)},
}


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_checkpoint_of_another_run_is_ignored_and_replaced(student_folder, tmp_path, other):
    expected = train_until(student_folder, tmp_path / "alone", **OTHER_RUNS[other])
    out = tmp_path / "shared"
    train_until(student_folder, out)  # leaves a checkpoint of step 8 and of step 9
    train_until(student_folder, out, until=5, **OTHER_RUNS[other])
    assert newest_step(out) == 4
    assert_same_run(out, train_until(student_folder, out, **OTHER_RUNS[other]), tmp_path / "alone", expected)


def test_fingerprint_covers_everything_that_affects_the_result():
    fingerprints = {training_fingerprint(SEQUENCES, TRAINING_CONFIG, 11)}
    changed, *others = SEQUENCES
    variants = [
        (SEQUENCES, TRAINING_CONFIG, 12),
        (others, TRAINING_CONFIG, 11),
        ([*others, changed], TRAINING_CONFIG, 11),
        ([TrainingSequence(changed.input_ids, changed.num_prompt_tokens + 1), *others], TRAINING_CONFIG, 11),
        ([TrainingSequence(changed.input_ids + 1, changed.num_prompt_tokens), *others], TRAINING_CONFIG, 11),
        ([dataclasses.replace(changed, weight=2.0), *others], TRAINING_CONFIG, 11),
        ([dataclasses.replace(changed, use_reference_kl=True), *others], TRAINING_CONFIG, 11),
        ([dataclasses.replace(changed, advantage=-1.0), *others], TRAINING_CONFIG, 11),
        *[(SEQUENCES, dataclasses.replace(TRAINING_CONFIG, **{name: value}), 11) for name, value in [
            ("epochs", 4), ("batch_size", 4), ("learning_rate", 1.0), ("warmup_ratio", 0.5), ("weight_decay", 0.1),
            ("max_grad_norm", 2.0), ("method", "full"),
            ("tokens_per_step", 99), ("loss_reduction", "sequence"),
        ]],
    ]  # fmt: skip
    for variant in variants:
        fingerprints.add(training_fingerprint(*variant))
    assert len(fingerprints) == 1 + len(variants)
    memory_only = {"max_tokens_per_pack": 99, "activation_checkpointing": "full", "cuda_graphs": "none"}
    assert memory_only.keys() == set(TrainingConfig.MEMORY_ONLY_FIELDS)
    assert (
        training_fingerprint(list(SEQUENCES), dataclasses.replace(TRAINING_CONFIG, **memory_only), 11) in fingerprints
    )


def test_torn_line_of_metrics_is_rewritten(student_folder, tmp_path):
    expected = train_until(student_folder, tmp_path / "whole")
    out = tmp_path / "torn"
    train_until(student_folder, out, until=5)
    file = out / "metrics.jsonl"
    file.write_text(file.read_text() + json.dumps({"step": 6})[:-3])
    assert len(list(read_metrics(file))) == 5
    assert_same_run(out, train_until(student_folder, out), tmp_path / "whole", expected)


@pytest.mark.parametrize("torn", [b"\0" * 300, b"\0" * 300 + b"\n", b'{"step": 6}\n', b"\xff\n"])
def test_metrics_torn_by_power_failure_are_rewritten(student_folder, tmp_path, torn):
    expected = train_until(student_folder, tmp_path / "whole")
    out = tmp_path / "torn"
    train_until(student_folder, out, until=4)
    with (out / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    assert_same_run(out, train_until(student_folder, out), tmp_path / "whole", expected)


def test_metrics_reach_the_disk_before_their_checkpoint(student_folder, tmp_path, monkeypatch):
    """The test assumes that the system loses every file and folder that was not synchronized."""
    durable, original_fsync, original_replace, saved = {}, os.fsync, os.replace, []

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        durable[path] = [entry.name for entry in path.iterdir()] if path.is_dir() else path.read_bytes()
        original_fsync(descriptor)

    def replace(source, target):
        saved.append(int(target.name[-8:]))
        assert durable[tmp_path / "metrics.jsonl"].count(b"\n") == saved[-1]
        assert {"state.json", "state-0.safetensors"} <= set(durable[source])
        original_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    train_until(student_folder, tmp_path)
    assert saved == [2, 4, 6, 8, 9]
    assert {"metrics.jsonl", "checkpoints"} <= set(durable[tmp_path]) and "step-00000009" in durable[
        tmp_path / "checkpoints"
    ]
