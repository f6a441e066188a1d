"""A run that a kill cannot change, nor a torn file: it ends bit for bit as one that went through."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.training_runs import RUN, SEQUENCES, STEPS, assert_same_run, run, sequence, untimed
from thinksafe.training.checkpoint import load_newest, save_checkpoint
from thinksafe.training.loop import OF_MEMORY, fingerprint, read_metrics
from thinksafe.training.packing import TrainingSequence

pytest_plugins = ["tests.support.training_runs"]


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
