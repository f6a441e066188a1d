"""One clear line for every mistake; and what is interrupted, changed or full loses nothing that was finished."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.small_world import EXAMPLES, RESPONSES, ROWS, SET, call, world, write_jsonl
from thinksafe import pipeline as stages
from thinksafe.cli.__main__ import main
from thinksafe.paths import bundled_recipes
from thinksafe.pipeline.responses import respond
from thinksafe.training.local_engine import SingleEngine

__all__ = ["call", "world"]  # fixtures


def broken(world, tmp_path, family="qwen3", **files) -> str:
    """A copy of a checkpoint with files replaced (text or bytes), changed (a function of bytes) or removed (None)."""
    folder = tmp_path / "broken"
    shutil.copytree(world / family, folder)
    for name, content in files.items():
        file = next(path for path in folder.iterdir() if path.stem == name)
        if content is None:
            file.unlink()
        else:
            data = content(file.read_bytes()) if callable(content) else content
            file.write_bytes(data.encode() if isinstance(data, str) else data)
    return f"model={folder}"


def config_with(**entries):
    return lambda data: json.dumps(json.loads(data) | entries)


MISTAKES = {
    "unknown recipe": lambda w, t: (["run", "--recipe", "nowhere"], "the bundled recipes are: organism"),
    "unknown key": lambda w, t: (["run", SET, "training.epoch=1"], "did you mean training.epochs?"),
    "wrong value": lambda w, t: (["generate", SET, "training.epochs=few"], "training.epochs"),
    "no equals sign": lambda w, t: (["generate", SET, "training.epochs"], "expected key=value"),
    "no prompts": lambda w, t: (["generate", SET, "prompts=null"], "--prompts FILE"),
    "missing prompts": lambda w, t: (["generate", "--prompts", t / "gone.jsonl"], "gone.jsonl"),
    "prompts on a hub that is not there": lambda w, t: (["generate", "--prompts", "no-one/nothing"], "no-one/nothing"),
    "empty prompts": lambda w, t: (["generate", "--prompts", write_jsonl(t / "p.jsonl", [])], "p.jsonl: empty"),
    "bad line": lambda w, t: (["generate", "--prompts", write_jsonl(t / "p.jsonl", [ROWS[0], "x"])], "p.jsonl: line 2"),
    "missing model": lambda w, t: (["generate", SET, f"model={t / 'gone'}"], "gone"),
    "unknown family": lambda w, t: (
        ["generate", SET, broken(w, t, config=config_with(model_type="gptj"))],
        "model_type 'gptj' is not supported",
    ),
    "no config": lambda w, t: (["generate", SET, broken(w, t, config=None)], "config.json"),
    "bad config": lambda w, t: (["generate", SET, broken(w, t, config="{")], "config.json: not valid JSON"),
    "quantised": lambda w, t: (
        ["generate", SET, broken(w, t, config=config_with(quantization_config={"bits": 4}))],
        "quantised checkpoints are not supported",
    ),
    "missing weights": lambda w, t: (["generate", SET, broken(w, t, model=None)], "weights are missing"),
    "corrupt weights": lambda w, t: (["generate", SET, broken(w, t, model=lambda d: d[:-99])], "corrupt safetensors"),
    "no weights in the file": lambda w, t: (["generate", SET, broken(w, t, model="")], "corrupt safetensors"),
    "weights of another size": lambda w, t: (
        ["generate", SET, broken(w, t, config=config_with(num_hidden_layers=9))],
        "weights are missing",
    ),
    "no tokenizer": lambda w, t: (["generate", SET, broken(w, t, tokenizer=None)], "tokenizer"),
    "bad tokenizer": lambda w, t: (["generate", SET, broken(w, t, tokenizer="{")], "no usable tokenizer"),
    "no template": lambda w, t: (["generate", SET, broken(w, t, chat_template=None)], "no chat template"),
    "a tiny cache": lambda w, t: (["generate", SET, "sampler.kv_cache_gib=1e-9"], "sampler.kv_cache_gib"),
    "no GPU": lambda w, t: (["generate", SET, "device=cuda"], "no GPU"),
    "nothing to filter": lambda w, t: (["filter"], "run `thinksafe generate` first"),
    "missing responses": lambda w, t: (["filter", "--responses", t / "gone.jsonl"], "gone.jsonl"),
    "bad responses": lambda w, t: (
        ["filter", "--responses", write_jsonl(t / "r.jsonl", [RESPONSES[0], {"prompt": "p"}])],
        "r.jsonl: line 2: needs a string 'text'",
    ),
    "repeated responses": lambda w, t: (
        [
            "filter",
            "--responses",
            write_jsonl(t / "r.jsonl", [RESPONSES[0], RESPONSES[2], RESPONSES[0] | {"text": "x"}]),
        ],
        "record 3 is a second response with sample 0",
    ),
    "no guard": lambda w, t: (
        ["filter", "--responses", w / "responses.jsonl", SET, f"guard.model={t / 'gone'}"],
        "gone",
    ),
    "guard of another kind": lambda w, t: (
        ["filter", "--responses", w / "responses.jsonl", SET, f"guard.model={w / 'mistral'}"],
        "mistral is no ",
    ),
    "nothing to train on": lambda w, t: (["train"], "run `thinksafe filter` first"),
    "no examples": lambda w, t: (["train", "--data", write_jsonl(t / "d.jsonl", [])], "d.jsonl: empty"),
    "examples without thoughts": lambda w, t: (
        ["train", "--data", write_jsonl(t / "d.jsonl", [EXAMPLES[0] | {"response": "No thought."}])],
        "no example is fit for training: 1 x no_think_block",
    ),
    "examples too long": lambda w, t: (
        ["train", "--data", w / "examples.jsonl", SET, "training.max_length=5"],
        "no example is fit for training: 3 x longer_than_5_tokens",
    ),
    "no such projection": lambda w, t: (
        ["train", "--data", w / "examples.jsonl", SET, "lora.target_modules=[query]"],
        "query cannot carry an adapter",
    ),
    "a rate that breaks": lambda w, t: (
        ["train", "--data", w / "examples.jsonl", SET, "training.learning_rate=1e38", SET, "training.epochs=9"],
        "training stopped, step",
    ),
    "no evaluation set": lambda w, t: (["evaluate", SET, "evaluation.sets=[]"], "names no evaluation set"),
    "missing evaluation set": lambda w, t: (
        ["evaluate", SET, "evaluation.sets=[{name: a, file: gone.jsonl, kind: harmful}]"],
        "gone.jsonl",
    ),
    "sums without answers": lambda w, t: (
        ["evaluate", SET, f"evaluation.sets=[{{name: a, file: {w / 'prompts.jsonl'}, kind: reasoning}}]"],
        "a reasoning set needs 'answer'",
    ),
    "no recipe": lambda w, t: (["report"], "run: holds no run to go on with; give --recipe FILE or one of organism"),
    "a file for a folder": lambda w, t: (["report", "--out", write_jsonl(t / "file", [])], "is a file"),
    "below a file": lambda w, t: (["report", "--out", write_jsonl(t / "file", []) / "run"], "file"),
    "foreign folder": lambda w, t: (["report", "--out", w / "guard"], "not empty and no run directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_line(world, tmp_path, call, mistake):
    arguments, words = MISTAKES[mistake](world, tmp_path)
    recipe = "--recipe" not in arguments and mistake != "no recipe"
    status, printed, errors = call(*arguments, recipe=recipe, out="--out" not in arguments)
    assert status == 2 and printed == ""
    *before, line = errors
    assert line.startswith("thinksafe: ") and words in line, errors
    assert all(" left out: " in note for note in before), "training says so of a step before it gives up"


EARLY = {
    "missing evaluation set": (["evaluation.sets=[{name: a, file: gone.jsonl, kind: harmful}]"], "gone.jsonl"),
    "no such projection": (["lora.target_modules=[query]"], "query"),
    "no guard": (["guard.model=./gone"], "gone"),
    "guard of another kind": (["guard.model={world}/mistral"], "mistral is no "),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_a_whole_run_finds_late_mistakes_before_its_first_response(world, tmp_path, call, mistake):
    settings, words = EARLY[mistake]
    status, _, errors = call("run", SET, *(setting.replace("{world}", str(world)) for setting in settings))
    assert status == 2 and len(errors) == 1 and words in errors[0]
    assert not list((tmp_path / "run").glob("responses*"))


CORRECTED = {
    "model": (["generate"], ["model=./gone"], []),
    "prompts": (["generate"], ["prompts=./gone.jsonl"], []),
    "guard": (["filter", "--responses", "responses.jsonl"], ["guard.model=./gone"], []),
    "projections": (
        ["train", "--data", "examples.jsonl"],
        ["lora.target_modules=[query]"],
        ["lora.target_modules=[k_proj]"],
    ),
}


@pytest.mark.parametrize("mistake", CORRECTED)
def test_a_corrected_command_may_use_the_same_folder(world, tmp_path, call, mistake, monkeypatch):
    monkeypatch.chdir(world)
    command, wrong, right = CORRECTED[mistake]
    assert call(*command, *(word for setting in wrong for word in (SET, setting)))[0] == 2
    status, _, errors = call(*command, *(word for setting in right for word in (SET, setting)))
    assert status == 0, errors


def test_after_a_broken_line_another_file_of_prompts_may_use_the_same_folder(world, tmp_path, call):
    broken = tmp_path / "broken.jsonl"
    broken.write_text((world / "prompts.jsonl").read_text() + '{"instruction": "How')
    status, _, errors = call("generate", "--prompts", broken)
    assert status == 2 and len(errors) == 1 and f"{broken}: line 5 is not valid JSON" in errors[0]
    assert call("generate")[0] == 0


def test_a_folder_with_results_is_not_used_for_another_recipe(call):
    assert call("generate")[0] == 0
    status, _, errors = call("generate", "--seed", 5)
    assert status == 2 and len(errors) == 1 and "another recipe (seed: 5, there 0)" in errors[0]


def test_other_records_are_not_mixed_with_those_of_the_run(world, tmp_path, call):
    assert call("filter", "--responses", world / "responses.jsonl")[0] == 0
    others = write_jsonl(tmp_path / "r.jsonl", RESPONSES[:1])
    status, _, errors = call("filter", "--responses", others)
    assert status == 2 and len(errors) == 1 and "already has other records" in errors[0]
    status, _, errors = call("train", "--data", write_jsonl(tmp_path / "d.jsonl", EXAMPLES * 2))
    assert status == 2 and len(errors) == 1 and "already has other records" in errors[0]


def test_a_folder_whose_records_came_from_elsewhere_adds_none_of_its_own(world, tmp_path, call):
    """Or it would tell of all of them that they were sampled, or judged, here."""
    judged, trained, sampling = (tmp_path / name for name in ("judged", "trained", "sampling"))
    given = ["filter", "--responses", world / "responses.jsonl"]
    assert call(*given, "--out", judged)[0] == 0
    assert call("train", "--data", write_jsonl(tmp_path / "d.jsonl", EXAMPLES), "--out", trained)[0] == 0
    sampling.mkdir()
    shutil.copy(judged / "recipe.yaml", sampling)
    (sampling / "prompts.jsonl").write_text("{}")  # killed before the first response
    for command, words in (
        (["generate", "--out", judged], "responses.jsonl: came from elsewhere, so go on with `thinksafe filter`"),
        (["run", "--out", judged], "responses.jsonl: came from elsewhere"),
        ([*given, "--out", trained], "accepted.jsonl: came from elsewhere, to be trained on"),
        ([*given, "--out", sampling], "sampling samples responses of its own"),
    ):
        status, _, errors = call(*command)
        assert status == 2 and len(errors) == 1 and words in errors[0], errors
    assert call(*given, "--out", judged)[0] == 0, "and goes on with what it has"


@pytest.mark.parametrize("command, shard", [("filter", "responses.jsonl"), ("train", "accepted.jsonl")])
def test_a_stage_refuses_what_was_changed_behind_its_back(world, tmp_path, call, command, shard):
    assert call("generate")[0] == 0
    assert call("filter")[0] == 0
    (tmp_path / "run" / "manifest.json").write_text(
        json.dumps(drop_stage(json.loads((tmp_path / "run" / "manifest.json").read_text()), command))
    )
    with (tmp_path / "run" / shard).open("a") as file:
        file.write("\n")
    status, _, errors = call(command)
    assert status == 2 and len(errors) == 1 and f"{shard}: was changed since stage" in errors[0]


def drop_stage(manifest, stage):
    manifest["stages"].pop(stage, None)
    return manifest


def test_prompts_that_changed_under_an_interrupted_run_are_noticed(world, tmp_path, call):
    prompts = write_jsonl(tmp_path / "p.jsonl", ROWS)
    assert call("generate", "--prompts", prompts)[0] == 0
    (tmp_path / "run" / "manifest.json").unlink()
    write_jsonl(prompts, ROWS[1:])
    status, _, errors = call("generate", "--prompts", prompts)
    assert status == 2 and len(errors) == 1 and "answers prompts that are not asked any more" in errors[0]


def test_weights_that_broke_are_never_saved(world, tmp_path, call):
    """One step at such a rate leaves numbers that are finite, but whose squares are not."""
    settings = [SET, "training.learning_rate=1e30", SET, "training.batch_size=3"]
    status, printed, errors = call("train", "--data", world / "examples.jsonl", *settings)
    assert status == 2 and printed == "" and len(errors) == 1
    assert "training stopped, step 1: the norm of the weights" in errors[0] and "training.learning_rate" in errors[0]
    assert not list((tmp_path / "run").rglob("*.safetensors"))


INTERRUPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a process in the background has is to ignore it
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
from thinksafe.cli.__main__ import main
sys.exit(main(["run", "--recipe", "organism", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("module", ["argparse", "thinksafe.errors", "thinksafe.paths", "torch", "thinksafe.pipeline"])
def test_an_interrupt_during_imports_is_quiet(tmp_path, module):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", INTERRUPT, module, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["recipe", "estimate"])
def test_a_reader_of_the_output_that_has_had_enough_is_no_error(command):
    (reader, writer), environment = os.pipe(), {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    os.close(reader)
    arguments = [sys.executable, "-m", "thinksafe.cli", command, "--recipe", "qwen3-0.6b"]
    done = subprocess.run(arguments, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_says_that_nothing_is_lost(call, monkeypatch):
    def interrupted(run, models):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "generate", interrupted)
    status, _, errors = call("generate")
    assert status == 130 and "nothing finished is lost" in errors[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_closed_disk_is_one_line(call, monkeypatch, number):
    def failing(run, models):
        raise OSError(number, os.strerror(number), "responses.jsonl")

    monkeypatch.setattr(stages, "generate", failing)
    status, _, errors = call("generate")
    assert status == 2 and errors == [
        f"thinksafe: {os.strerror(number)} (responses.jsonl); mend that and give the same command again"
    ]


def test_what_was_answered_before_the_disk_was_full_is_answered_once(world, tmp_path, call, monkeypatch):
    """Of 12 KiB a file, which is half of the responses; a real limit, not a stand-in."""
    many = ["--set", "generation.samples=12"]
    assert call("generate", *many, "--out", tmp_path / "whole")[0] == 0
    settings = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 1024, settings[1]))
    try:
        status, _, errors = call("generate", *many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, settings)
        signal.signal(signal.SIGXFSZ, ignored)
    assert status == 2 and f"File too large ({tmp_path / 'run'})" in errors[-1]
    asked = []

    def counted(engine, chat, tasks, *rest):
        return respond(engine, chat, (asked.append(task) or task for task in tasks), *rest)

    monkeypatch.setattr("thinksafe.pipeline.generate.respond", counted)
    assert call("generate", *many)[0] == 0 and 0 < len(asked) < 40
    assert (tmp_path / "run/responses.jsonl").read_bytes() == (tmp_path / "whole/responses.jsonl").read_bytes()


def test_a_disk_that_is_full_for_weights_is_one_line_too(world, tmp_path, call):
    """Of 4 KiB a file, which stops the checkpoint's tensors and not the records; a real limit, not a stand-in."""
    settings = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, settings[1]))
    try:
        status, _, errors = call("train", "--data", world / "examples.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, settings)
        signal.signal(signal.SIGXFSZ, ignored)
    full = f"thinksafe: File too large ({tmp_path / 'run'}); mend that and give the same command again"
    assert status == 2 and errors[-1:] == [full]
    assert call("train", "--data", world / "examples.jsonl")[0] == 0


def test_a_defect_of_ours_is_not_hidden(call, monkeypatch):
    def defect(run, models):
        raise RuntimeError("ours")

    monkeypatch.setattr(stages, "generate", defect)
    with pytest.raises(RuntimeError, match="ours"):
        call("generate")


def test_the_organism_is_not_built_over_something_else(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["organism", "build", "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_installed_program_prints_one_line_and_exits_with_2(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "thinksafe.cli", "run", "--recipe", "nowhere"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert all(name in done.stderr for name in ("nowhere", *bundled_recipes()))
    assert list(tmp_path.iterdir()) == []


def test_another_checkpoint_under_the_same_name_is_refused(world, tmp_path, capsys):
    model = tmp_path / "model"
    make_checkpoint("qwen3", model)
    arguments = ["--recipe", str(world / "recipe.yaml"), "--set", f"model={model}", "--out", str(tmp_path / "run")]
    assert main(["generate", *arguments]) == 0
    make_checkpoint("qwen3", model, seed=1)
    assert main(["train", "--data", str(world / "examples.jsonl"), *arguments]) == 2
    assert "model: was changed since this run began" in capsys.readouterr().err


def test_an_evaluation_set_that_changed_between_before_and_after_is_refused(world, tmp_path, call):
    questions = write_jsonl(tmp_path / "q.jsonl", [{"text": "What is 1 + 1?", "answer": "2"}])
    small = [SET, f"evaluation.sets=[{{name: sums, file: {questions}, kind: reasoning}}]"]
    assert call("evaluate", *small)[0] == 0
    assert call("train", "--data", world / "examples.jsonl", *small)[0] == 0
    write_jsonl(questions, [{"text": "What is 1 + 1?", "answer": "3"}])
    status, _, errors = call("evaluate", *small)
    assert status == 2 and "evaluation set sums: was changed since this run began" in errors[-1]


def test_a_run_that_is_out_of_memory_in_training_says_what_needs_less_and_goes_on_with_it(world, call, monkeypatch):
    steps, step = [], SingleEngine.step

    def full(engine, packs, rate):
        steps.append(len(packs))
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
        return step(engine, packs, rate)

    monkeypatch.setattr(SingleEngine, "step", full)
    training = ["train", "--data", world / "examples.jsonl", SET, "training.epochs=2"]
    training += [SET, "training.batch_size=2", SET, "training.checkpoint_every=1"]
    status, _, (line,) = call(*training)
    assert status == 2 and line.startswith("thinksafe: out of memory in training: CUDA out of memory. Tried")
    for setting in ("training.max_tokens_per_pack", "activation_checkpointing=full", "zero.offload_optimizer=true"):
        assert setting in line
    assert re.search(r"weights and optimiser were counted as \d+\.\d GiB, a pack of \d+ tokens as \d", line), line
    smaller = [SET, "training.max_tokens_per_pack=1", SET, "training.activation_checkpointing=full"]
    packs = steps.copy()
    steps[:3] = []
    monkeypatch.setattr(SingleEngine, "step", lambda *arguments: steps.append(len(arguments[1])) or step(*arguments))
    status, _, errors = call(*training, *smaller)
    assert status == 0, errors
    total = 2 * -(-len(EXAMPLES) // 2)
    assert len(steps) == total - 2, "two steps were done"
    assert max(packs) == 1 < max(steps), "one sequence a pack"
