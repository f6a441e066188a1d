"""Small runs on the model organism: they write all records, never repeat finished work, and survive kills.

The oracle is a run without interruption.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.emulation.taped_graphs import use_taped_graphs
from tests.support.forked import ForkedProcess
from tests.support.organism_runs import record_bytes, run_arguments, run_pipeline
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, Prompt, Response, Verdict
from thinksafe.data.sources import load_prompts
from thinksafe.pipeline.examples import tokenize_examples
from thinksafe.pipeline.responses import SamplingTask, request_seed
from thinksafe.recipe.loading import load_recipe
from thinksafe.run import checkpoints as checkpoints_module
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import StageClock
from thinksafe.run.journal import Journal
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run directory, arguments) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = run_arguments(folder / "sets", num_prompts=24, num_evaluated=4)
    run_pipeline(folder / "run", arguments)
    return folder / "run", arguments


@pytest.mark.slow
def test_training_with_cuda_graphs_gives_the_same_losses(finished, tmp_path, monkeypatch, capsys):
    path, arguments = finished
    data = ["--data", str(path / "accepted.jsonl"), "--set", "lora.dropout=0"]
    use_taped_graphs(monkeypatch)
    monkeypatch.setattr("thinksafe.pipeline.train.choose_max_cuda_graph_tokens", lambda *_: 256)
    losses = {}
    for setting in ("auto", "none"):
        capsys.readouterr()
        out = tmp_path / setting
        assert main(["train", *arguments, *data, "--set", f"training.cuda_graphs={setting}", "--out", str(out)]) == 0
        assert ("CUDA graphs: for packs of up to 256 tokens" in capsys.readouterr().err) == (setting == "auto")
        losses[setting] = [step.loss for step in read_metrics(out / "training/metrics.jsonl")]
    assert losses["auto"] == pytest.approx(losses["none"], rel=1e-4)


@pytest.mark.slow
def test_student_sampled_in_fp8_is_trained_in_full_precision(tmp_path):
    """Weights and cache are in e4m3 and sampling is batch-invariant, in a whole run."""
    arguments = run_arguments(tmp_path / "sets", num_prompts=12, num_evaluated=4)
    arguments += ["--set", "sampler.weight_dtype=fp8", "--set", "sampler.kv_cache_dtype=fp8"]
    run_pipeline(tmp_path / "run", [*arguments, "--set", "sampler.batch_invariant=true"])
    responses = read(tmp_path / "run" / "responses.jsonl", Response)
    assert {response.finish_reason for response in responses} == {"stop"}
    assert len(read(tmp_path / "run" / "accepted.jsonl", Example)) >= 10
    assert all(metrics.grad_norm > 0 for metrics in read_metrics(tmp_path / "run/training/metrics.jsonl"))


def read(file: Path, kind: type) -> list:
    return list(read_records(file, kind))


def by_key(records: list) -> list:
    """Sort records by prompt and sample, and check that no record occurs twice."""
    keys = [(record.prompt_id, record.sample) for record in records]
    assert len(set(keys)) == len(keys), "a record occurs twice"
    return [record for _, record in sorted(zip(keys, records, strict=True), key=lambda pair: pair[0])]


def results_of(out: Path) -> dict:
    """Return all results of a run, without its times."""
    results = {
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
            results[str(file.relative_to(out))] = by_key(read(file, Verdict))
        elif file.name.endswith("responses.jsonl") or file.name == "unsteered.jsonl":
            results[str(file.relative_to(out))] = by_key(read(file, Response))
    return results


def assert_same(out: Path, expected: Path) -> None:
    results, expected_results = results_of(out), results_of(expected)
    assert results.keys() == expected_results.keys()
    for name in expected_results:
        assert results[name] == expected_results[name], name
    files, expected_files = (
        {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} for folder in (out, expected)
    )
    assert files == expected_files, "a file is left over or missing"


def test_run_writes_all_records_and_a_report(finished):
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
    digests = manifest["inputs"].values()  # the card of an exported data set prints them as SHA-256
    assert len(digests) >= 2 and {len(digest) for digest in digests} == {64}
    assert (out / "report.html").stat().st_size > 10_000
    adapter = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (Path(adapter["base_model_name_or_path"]) / "config.json").exists(), (
        "PEFT must find the base model by this name"
    )
    report = json.loads((out / "report.json").read_text())
    kept = report["filter"]["kept"]
    assert sum(kept.values()) == len(accepted) and kept.get("benign", 0) + kept.get("harmful", 0) == len(accepted)
    assert report["training"]["steps"] == 2 * -(-len(accepted) // 4)


def test_steering_instruction_is_never_trained_on(finished):
    """No text of a training sequence contains the words of the instruction."""
    out, arguments = finished
    overrides = arguments[3::2]
    recipe = load_recipe("organism", overrides)
    instruction = " ".join(recipe.generation.steering.replace("{prompt}", "").split())
    checkpoints = CheckpointStore(recipe)
    chat = checkpoints.chat
    sequences, dropped = tokenize_examples(out / "accepted.jsonl", recipe, checkpoints)
    accepted = read(out / "accepted.jsonl", Example)
    assert len(sequences) == len(accepted) and not dropped
    texts = [" ".join(chat.tokenizer.decode(sequence.input_ids.tolist()).split()) for sequence in sequences]
    assert any(example.label == "harmful" for example in accepted)
    for text, example in zip(texts, accepted, strict=True):
        assert example.prompt in text and instruction not in text
        assert "the following prompt" not in text
    for file in ("prompts.jsonl", "accepted.jsonl"):
        assert instruction not in (out / file).read_text()


def test_repeating_a_finished_run_computes_nothing(finished, monkeypatch):
    out, arguments = finished

    def fail(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(checkpoints_module, "load_decoder", fail)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.rglob("*") if file.is_file()}
    run_pipeline(out, arguments)
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.rglob("*") if file.is_file()}
    assert after.keys() == before.keys()
    changed = {file.name for file in before if before[file] != after[file]}
    assert changed <= {"report.html", "report.json", ".lock"}


@pytest.mark.slow
def test_single_stages_give_the_results_of_a_run(finished, tmp_path):
    out, arguments = finished
    for command in ("generate", "filter", "train", "evaluate", "report"):
        assert main([command, *arguments, "--out", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", out)


DRAWS = st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.sampled_from([None, "risk"]), st.integers(0, 3))


@given(st.lists(DRAWS))
def test_every_response_has_a_different_seed(draws):
    def seed_of(seed: int, text: str, steering: str | None, sample: int) -> int:
        return request_seed(seed, SamplingTask(Prompt(text, text, "harmful"), steering, sample))

    assert len({seed_of(*draw) for draw in draws}) == len(set(draws))
    assert all(0 <= seed_of(*draw) < 2**63 for draw in draws)


class Killed(BaseException):
    pass


def kill_at_event(monkeypatch, events: list[str], kill_at: int | None = None, after: bool = False) -> None:
    """Append the name of each event (rename, removal, appended record, training step) to `events`.

    Raise Killed at the event with index `kill_at`, or right after it.
    """

    def counted(name, function):
        def wrapper(*arguments, **keywords):
            events.append(name)
            is_kill_point = len(events) - 1 == kill_at
            if is_kill_point and not after:
                raise Killed
            result = function(*arguments, **keywords)
            if is_kill_point:
                raise Killed
            return result

        return wrapper

    monkeypatch.setattr(StageClock, "tick", lambda clock: None)  # it depends on the time, so the events would differ
    for owner, name in ((os, "replace"), (shutil, "rmtree"), (Journal, "append"), (LocalTrainer, "step")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """(run directory, arguments, names of all events) of a run with few prompts."""
    folder, events = tmp_path_factory.mktemp("small run"), []
    arguments = run_arguments(folder / "sets", num_prompts=6, num_evaluated=2)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_event(patch, events)
        run_pipeline(folder / "run", arguments)
    assert {"replace", "rmtree", "append", "step"} == set(events)
    return folder / "run", arguments, events


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_rare, num_frequent", [(2, 2), pytest.param(24, 12, marks=pytest.mark.exhaustive)], ids=["4", "36"]
)
def test_kill_at_any_event_does_not_change_the_results(small_run, tmp_path, fresh_seed, num_rare, num_frequent):
    """Events are drawn: `num_rare` renames or removals, and `num_frequent` appended records or optimizer steps."""
    whole, arguments, events = small_run
    rng = random.Random(fresh_seed)
    rare_events = [event for event, name in enumerate(events) if name in ("replace", "rmtree")]
    frequent_events = [event for event, name in enumerate(events) if name in ("append", "step")]
    for event in sorted(rng.sample(rare_events, num_rare) + rng.sample(frequent_events, num_frequent)):
        out, after = tmp_path / f"killed at {event}", rng.random() < 0.5
        with pytest.MonkeyPatch.context() as patch:
            kill_at_event(patch, [], event, after)
            with pytest.raises(Killed):
                main(["run", *arguments, "--out", str(out)])
        run_pipeline(out, arguments)
        assert_same(out, whole)
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [2, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_repeated_kills_of_a_process_do_not_change_the_results(finished, tmp_path, fresh_seed, num_kills):
    whole, arguments = finished
    killed, rng, num_killed = tmp_path / "killed", random.Random(fresh_seed), 0
    for target in sorted(rng.uniform(0.02, 0.98) * record_bytes(whole) for _ in range(num_kills)):
        process = ForkedProcess(main, ["run", *arguments, "--out", str(killed)])
        while process.returncode is None and record_bytes(killed) < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        num_killed += process.returncode == -signal.SIGKILL
    assert num_killed >= num_kills - 1, "the process ended before the kills"
    run_pipeline(killed, arguments)
    assert_same(killed, whole)
