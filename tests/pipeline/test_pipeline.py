"""The whole method on the bundled world, small: it works, it repeats nothing, and no kill changes what comes out."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.emulation.taped_graphs import tape_passes
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, Prompt, Response, Verdict
from thinksafe.data.sources import load_prompts
from thinksafe.paths import expand
from thinksafe.pipeline.examples import training_sequences
from thinksafe.pipeline.responses import Task, request_seed
from thinksafe.recipe.loading import load_recipe
from thinksafe.run import checkpoints as models_module
from thinksafe.run.checkpoints import Models
from thinksafe.run.directory import StageClock
from thinksafe.run.journal import Journal
from thinksafe.training.local_engine import SingleEngine
from thinksafe.training.loop import read_metrics

ROOT = Path(__file__).parents[2]


def settings(folder: Path, prompts: int, evaluated: int) -> list[str]:
    """Arguments for a run on the first so many prompts of the bundled sets, copied into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("organism")
    sets = []
    for entry in recipe.evaluation.sets:
        lines = expand(entry.file).read_text().splitlines(keepends=True)[:evaluated]
        (folder / f"{entry.name}.jsonl").write_text("".join(lines))
        sets.append(
            f"{{name: {entry.name}, file: {folder / entry.name}.jsonl, kind: {entry.kind}, answer: {entry.answer}}}"
        )
    lines = expand(recipe.prompts).read_text().splitlines(keepends=True)
    harmful = [line for line in lines if '"harmful"' in line][: prompts // 2]
    benign = [line for line in lines if '"benign"' in line][: prompts - len(harmful)]
    (folder / "prompts.jsonl").write_text("".join(harmful + benign))
    changes = {
        "prompts": folder / "prompts.jsonl",
        "evaluation.sets": f"[{', '.join(sets)}]",
        "generation.unsteered_probe": 3,
        "training.epochs": 2,
        "training.batch_size": 4,
        "training.checkpoint_every": 2,
        "sampler": "{max_running: 8, max_step_tokens: 64, kv_cache_gib: 0.02}",
    }
    return ["--recipe", "organism", *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]


def run(out: Path, arguments: list[str]) -> None:
    assert main(["run", *arguments, "--out", str(out)]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run directory, arguments) of a run without interruptions."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = settings(folder / "sets", prompts=24, evaluated=4)
    run(folder / "run", arguments)
    return folder / "run", arguments


def test_training_with_recorded_passes_says_so_and_learns_the_same(finished, tmp_path, monkeypatch, capsys):
    path, arguments = finished
    data = ["--data", str(path / "accepted.jsonl"), "--set", "lora.dropout=0"]
    tape_passes(monkeypatch)
    monkeypatch.setattr("thinksafe.pipeline.train.recorded_on", lambda *of_the_run: 256)
    losses = {}
    for setting in ("auto", "none"):
        capsys.readouterr()
        out = tmp_path / setting
        assert main(["train", *arguments, *data, "--set", f"training.cuda_graphs={setting}", "--out", str(out)]) == 0
        assert ("CUDA graphs: for packs of up to 256 tokens" in capsys.readouterr().err) == (setting == "auto")
        losses[setting] = [step.loss for step in read_metrics(out / "training/metrics.jsonl")]
    assert losses["auto"] == pytest.approx(losses["none"], rel=1e-4)


def test_a_student_that_samples_in_e4m3_is_trained_in_full_precision(tmp_path):
    """Weights and cache in e4m3 and batch-invariant, from prompts to the adapted student."""
    arguments = settings(tmp_path / "sets", prompts=12, evaluated=4)
    arguments += ["--set", "sampler.weights=fp8", "--set", "sampler.kv_cache_dtype=fp8"]
    run(tmp_path / "run", [*arguments, "--set", "sampler.batch_invariant=true"])
    responses = read(tmp_path / "run" / "responses.jsonl", Response)
    assert {response.finish_reason for response in responses} == {"stop"}
    assert len(read(tmp_path / "run" / "accepted.jsonl", Example)) >= 10
    assert all(metrics.grad_norm > 0 for metrics in read_metrics(tmp_path / "run/training/metrics.jsonl"))


def read(file: Path, kind: type) -> list:
    return list(read_records(file, kind))


def by_key(records: list) -> list:
    """In one order whatever the order of writing; nothing twice."""
    keys = [(record.prompt_id, record.sample) for record in records]
    assert len(set(keys)) == len(keys), "a record is there twice"
    return [record for _, record in sorted(zip(keys, records, strict=True), key=lambda pair: pair[0])]


def outcome(out: Path) -> dict:
    """Everything that a run has found, without the seconds it took."""
    found = {
        "prompts": list(load_prompts(str(out / "prompts.jsonl"))),
        "accepted": read(out / "accepted.jsonl", Example),
        "metrics": [
            (m.step, m.loss, m.grad_norm, m.learning_rate) for m in read_metrics(out / "training/metrics.jsonl")
        ],
        "before": json.loads((out / "evaluation/before.json").read_text()),
        "after": json.loads((out / "evaluation/after.json").read_text()),
        "adapter": {
            name: tensor.tolist() for name, tensor in load_file(out / "adapter/adapter_model.safetensors").items()
        },
    }
    for file in sorted(out.rglob("*.jsonl")):
        if file.name.endswith("verdicts.jsonl"):
            found[str(file.relative_to(out))] = by_key(read(file, Verdict))
        elif file.name.endswith("responses.jsonl") or file.name == "unsteered.jsonl":
            found[str(file.relative_to(out))] = by_key(read(file, Response))
    return found


def assert_same(out: Path, expected: Path) -> None:
    found, wanted = outcome(out), outcome(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], name
    files, wanted_files = (
        {str(f.relative_to(o)) for o_ in [o] for f in o_.rglob("*") if f.is_file()} for o in (out, expected)
    )
    assert files == wanted_files, "something was left behind or is missing"


def test_a_run_leaves_every_record_and_a_report(finished):
    out, _ = finished
    prompts = list(load_prompts(str(out / "prompts.jsonl")))
    responses, verdicts = read(out / "responses.jsonl", Response), read(out / "verdicts.jsonl", Verdict)
    assert len(prompts) == 24
    assert (
        Counter(r.prompt_id for r in responses)
        == Counter(v.prompt_id for v in verdicts)
        == Counter(p.id for p in prompts)
    )
    steering = load_recipe("organism").generation.steering
    assert {(r.label, r.steering) for r in responses} == {("harmful", steering), ("benign", None)}
    probe = read(out / "unsteered.jsonl", Response)
    assert len(probe) == 3 and all(r.label == "harmful" and r.steering is None for r in probe)
    safe = {(v.prompt_id, v.sample) for v in verdicts if v.decision == "safe"}
    accepted = read(out / "accepted.jsonl", Example)
    assert [e.prompt_id for e in accepted] == sorted(prompt_id for prompt_id, _ in safe) and len(accepted) > 12
    manifest = json.loads((out / "manifest.json").read_text())
    names = ["generate", "probe", "filter", "accept", "evaluate_before", "train", "evaluate_after"]
    assert list(manifest["stages"]) == names
    digests = manifest["inputs"].values()  # an exported card prints them as SHA-256
    assert len(digests) >= 2 and {len(digest) for digest in digests} == {64}
    assert (out / "report.html").stat().st_size > 10_000
    adapter = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (Path(adapter["base_model_name_or_path"]) / "config.json").exists(), "peft must find the base by this name"
    report = json.loads((out / "report.json").read_text())
    kept = report["filter"]["kept"]
    assert sum(kept.values()) == len(accepted) and kept.get("benign", 0) + kept.get("harmful", 0) == len(accepted)
    assert report["training"]["steps"] == 2 * -(-len(accepted) // 4)


def test_the_steering_instruction_is_sampled_with_but_never_trained_on(finished):
    """The words that only the instruction has occur in no token that the student is trained on."""
    out, arguments = finished
    overrides = arguments[3::2]
    recipe = load_recipe("organism", overrides)
    instruction = " ".join(recipe.generation.steering.replace("{prompt}", "").split())
    models = Models(recipe)
    chat = models.chat
    sequences, dropped = training_sequences(out / "accepted.jsonl", recipe, models)
    accepted = read(out / "accepted.jsonl", Example)
    assert len(sequences) == len(accepted) and not dropped
    texts = [" ".join(chat.tokenizer.decode(sequence.input_ids.tolist()).split()) for sequence in sequences]
    assert any(example.label == "harmful" for example in accepted)
    for text, example in zip(texts, accepted, strict=True):
        assert example.prompt in text and instruction not in text
        assert "the following prompt" not in text
    for file in ("prompts.jsonl", "accepted.jsonl"):
        assert instruction not in (out / file).read_text()


def test_a_finished_run_given_again_computes_nothing(finished, monkeypatch):
    out, arguments = finished

    def never(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models_module, "load_decoder", never)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.rglob("*") if file.is_file()}
    run(out, arguments)
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.rglob("*") if file.is_file()}
    assert after.keys() == before.keys()
    changed = {file.name for file in before if before[file] != after[file]}
    assert changed <= {"report.html", "report.json", ".lock"}


def test_stages_one_by_one_give_what_a_whole_run_gives(finished, tmp_path):
    out, arguments = finished
    for command in ("generate", "filter", "train", "evaluate", "report"):
        assert main([command, *arguments, "--out", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", out)


DRAWS = st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.sampled_from([None, "risk"]), st.integers(0, 3))


@given(st.lists(DRAWS))
def test_every_response_is_drawn_from_noise_of_its_own(wanted):
    def noise(seed: int, text: str, steering: str | None, sample: int) -> int:
        return request_seed(seed, Task(Prompt(text, text, "harmful"), steering, sample))

    assert len({noise(*one) for one in wanted}) == len(set(wanted))
    assert all(0 <= noise(*one) < 2**63 for one in wanted)


class Killed(BaseException):
    pass


def hook(monkeypatch, events: list[str], kill_at: int | None = None, after: bool = False) -> None:
    """Count what a run does to the disk and to the weights, and die at, or right after, one of these events."""

    def counted(name, function):
        def wrapper(*arguments, **keywords):
            events.append(name)
            here = len(events) - 1 == kill_at
            if here and not after:
                raise Killed
            result = function(*arguments, **keywords)
            if here:
                raise Killed
            return result

        return wrapper

    monkeypatch.setattr(StageClock, "tick", lambda clock: None)  # once a second is not every time the same
    for owner, name in ((os, "replace"), (shutil, "rmtree"), (Journal, "append"), (SingleEngine, "step")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))


@pytest.mark.slow
def test_dying_at_any_event_changes_nothing_in_the_end(tmp_path, fresh_seed):
    """Every rename and removal, and some of the many appended records and optimiser steps."""
    arguments = settings(tmp_path / "sets", prompts=6, evaluated=2)
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        hook(patch, events)
        run(tmp_path / "whole", arguments)
    assert {"replace", "rmtree", "append", "step"} == set(events)
    choose = random.Random(fresh_seed)
    rare = [place for place, name in enumerate(events) if name in ("replace", "rmtree")]
    often = [place for place, name in enumerate(events) if name in ("append", "step")]
    for place in sorted(choose.sample(rare, 8) + choose.sample(often, 3)):
        out, after = tmp_path / f"killed at {place}", choose.random() < 0.5
        with pytest.MonkeyPatch.context() as patch:
            hook(patch, [], place, after)
            with pytest.raises(Killed):
                main(["run", *arguments, "--out", str(out)])
        run(out, arguments)
        assert_same(out, tmp_path / "whole")
        shutil.rmtree(out)


def progress(out: Path) -> int:
    """Bytes of records written so far."""
    total = 0
    for folder, _, files in os.walk(out):
        for name in files:
            if ".jsonl" in name:
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # renamed just now
                    total += 0
    return total


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_as_if_it_never_was(tmp_path, fresh_seed):
    arguments = settings(tmp_path / "sets", prompts=40, evaluated=12)
    command = [sys.executable, "-m", "thinksafe.cli", "run", *arguments, "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen([*command, str(out)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    choose = random.Random(fresh_seed)
    kills = 0
    for target in sorted(choose.uniform(0.02, 0.98) * progress(whole) for _ in range(3)):
        process = start(killed)
        while process.poll() is None and progress(killed) < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2, "the test should have killed it"
    process = start(killed)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    assert_same(killed, whole)
