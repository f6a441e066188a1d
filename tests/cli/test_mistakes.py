"""Mistakes: each gives one line that names file or key. An interrupt, a changed file or a full disk loses no record."""

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
from thinksafe import pipeline
from thinksafe.cli.__main__ import main
from thinksafe.paths import bundled_recipes
from thinksafe.pipeline.responses import sample_responses
from thinksafe.training.local_trainer import LocalTrainer

__all__ = ["call", "world"]  # fixtures


def broken_model(world, tmp_path, family="qwen3", **files) -> str:
    """Copy a checkpoint with files replaced (text or bytes), changed (a function of bytes) or removed (None)."""
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
    "recipe without a name": lambda w, t: (["report", "--recipe", ""], "--recipe: no file ''"),
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
        ["generate", SET, broken_model(w, t, config=config_with(model_type="gptj"))],
        "model_type 'gptj' is not supported",
    ),
    "no config": lambda w, t: (["generate", SET, broken_model(w, t, config=None)], "config.json"),
    "bad config": lambda w, t: (["generate", SET, broken_model(w, t, config="{")], "config.json: not valid JSON"),
    "quantized": lambda w, t: (
        ["generate", SET, broken_model(w, t, config=config_with(quantization_config={"bits": 4}))],
        "quantized checkpoints are not supported",
    ),
    "missing weights": lambda w, t: (["generate", SET, broken_model(w, t, model=None)], "weights are missing"),
    "corrupt weights": lambda w, t: (
        ["generate", SET, broken_model(w, t, model=lambda data: data[:-99])],
        "corrupt safetensors",
    ),
    "no weights in the file": lambda w, t: (["generate", SET, broken_model(w, t, model="")], "corrupt safetensors"),
    "weights of another size": lambda w, t: (
        ["generate", SET, broken_model(w, t, config=config_with(num_hidden_layers=9, layer_types=None))],
        "config.json requires 9 layers, but the weights have",
    ),
    "no tokenizer": lambda w, t: (["generate", SET, broken_model(w, t, tokenizer=None)], "tokenizer"),
    "bad tokenizer": lambda w, t: (["generate", SET, broken_model(w, t, tokenizer="{")], "no usable tokenizer"),
    "no template": lambda w, t: (["generate", SET, broken_model(w, t, chat_template=None)], "no chat template"),
    "tiny cache": lambda w, t: (["generate", SET, "sampler.kv_cache_gib=1e-9"], "sampler.kv_cache_gib"),
    "no GPU": lambda w, t: (["generate", SET, "device=cuda"], "torch finds none"),
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
        "mistral does not fit guard.kind ",
    ),
    "nothing to train on": lambda w, t: (["train"], "run `thinksafe filter` first"),
    "no examples": lambda w, t: (["train", "--data", write_jsonl(t / "d.jsonl", [])], "d.jsonl: empty"),
    "examples without think block": lambda w, t: (
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
    "diverging learning rate": lambda w, t: (
        ["train", "--data", w / "examples.jsonl", SET, "training.learning_rate=1e38", SET, "training.epochs=9"],
        "training stopped at step",
    ),
    "no evaluation set": lambda w, t: (["evaluate", SET, "evaluation.sets=[]"], "names no evaluation set"),
    "missing evaluation set": lambda w, t: (
        ["evaluate", SET, "evaluation.sets=[{name: a, source: gone.jsonl, kind: harmful}]"],
        "gone.jsonl",
    ),
    "reasoning set without answers": lambda w, t: (
        ["evaluate", SET, f"evaluation.sets=[{{name: a, source: {w / 'prompts.jsonl'}, kind: reasoning}}]"],
        "a reasoning set needs 'answer'",
    ),
    "no recipe": lambda w, t: (
        ["report"],
        "run: contains no run to resume; use --recipe with a file or one of ",
    ),
    "file instead of folder": lambda w, t: (["report", "--out", write_jsonl(t / "file", [])], "is a file"),
    "folder below a file": lambda w, t: (["report", "--out", write_jsonl(t / "file", []) / "run"], "file"),
    "foreign folder": lambda w, t: (["report", "--out", w / "guard"], "not empty and not a run directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gives_a_one_line_error(world, tmp_path, call, mistake):
    arguments, message = MISTAKES[mistake](world, tmp_path)
    recipe = "--recipe" not in arguments and mistake != "no recipe"
    status, printed, errors = call(*arguments, recipe=recipe, out="--out" not in arguments)
    assert status == 2 and printed == ""
    *before, line = errors
    assert line.startswith("thinksafe: ") and message in line, errors
    assert all(" left out: " in note for note in before), "training reports each skipped step before it stops"


LATE_STAGE_MISTAKES = {
    "missing evaluation set": (["evaluation.sets=[{name: a, source: gone.jsonl, kind: harmful}]"], "gone.jsonl"),
    "no such projection": (["lora.target_modules=[query]"], "query"),
    "no guard": (["guard.model=./gone"], "gone"),
    "guard of another kind": (["guard.model={world}/mistral"], "mistral does not fit guard.kind "),
}


@pytest.mark.parametrize("mistake", LATE_STAGE_MISTAKES)
def test_run_reports_mistakes_of_late_stages_before_sampling(world, tmp_path, call, mistake):
    settings, message = LATE_STAGE_MISTAKES[mistake]
    status, _, errors = call("run", SET, *(setting.replace("{world}", str(world)) for setting in settings))
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert not list((tmp_path / "run").glob("responses*"))


CORRECTED_COMMANDS = {
    "model": (["generate"], ["model=./gone"], []),
    "prompts": (["generate"], ["prompts=./gone.jsonl"], []),
    "guard": (["filter", "--responses", "responses.jsonl"], ["guard.model=./gone"], []),
    "projections": (
        ["train", "--data", "examples.jsonl"],
        ["lora.target_modules=[query]"],
        ["lora.target_modules=[k_proj]"],
    ),
}


@pytest.mark.parametrize("mistake", CORRECTED_COMMANDS)
def test_corrected_command_may_use_the_same_folder(world, tmp_path, call, mistake, monkeypatch):
    monkeypatch.chdir(world)
    command, wrong, right = CORRECTED_COMMANDS[mistake]
    assert call(*command, *(word for setting in wrong for word in (SET, setting)))[0] == 2
    status, _, errors = call(*command, *(word for setting in right for word in (SET, setting)))
    assert status == 0, errors


def test_folder_is_usable_after_a_broken_prompts_file(world, tmp_path, call):
    broken_file = tmp_path / "broken_file.jsonl"
    broken_file.write_text((world / "prompts.jsonl").read_text() + '{"instruction": "How')
    status, _, errors = call("generate", "--prompts", broken_file)
    assert status == 2 and len(errors) == 1 and f"{broken_file}: line 5 is not valid JSON" in errors[0]
    assert call("generate")[0] == 0


def test_evaluate_reports_a_mistake_in_any_set_before_sampling_the_first(world, tmp_path, call):
    first = f"{{name: a, source: {world / 'prompts.jsonl'}, kind: harmful}}"
    setting = f"evaluation.sets=[{first}, {{name: b, source: gone.jsonl, kind: harmful}}]"
    status, _, errors = call("evaluate", SET, setting)
    assert status == 2 and len(errors) == 1 and "gone.jsonl" in errors[0]
    assert not (tmp_path / "run" / "evaluation").exists()


def test_folder_with_results_rejects_another_recipe(call):
    assert call("generate")[0] == 0
    status, _, errors = call("generate", "--seed", 5)
    assert status == 2 and len(errors) == 1 and "another recipe (seed: 5 instead of 0)" in errors[0]


def test_folder_with_records_rejects_other_records(world, tmp_path, call):
    assert call("filter", "--responses", world / "responses.jsonl")[0] == 0
    other_responses = write_jsonl(tmp_path / "r.jsonl", RESPONSES[:1])
    status, _, errors = call("filter", "--responses", other_responses)
    assert status == 2 and len(errors) == 1 and "already has other records" in errors[0]
    status, _, errors = call("train", "--data", write_jsonl(tmp_path / "d.jsonl", EXAMPLES * 2))
    assert status == 2 and len(errors) == 1 and "already has other records" in errors[0]


def test_missing_or_damaged_file_of_a_finished_stage_is_named(world, tmp_path, call):
    sets = f"evaluation.sets=[{{name: a, source: {world / 'prompts.jsonl'}, kind: harmful}}]"
    assert call("filter", SET, sets, "--responses", world / "responses.jsonl")[0] == 0
    assert call("evaluate", SET, sets)[0] == 0
    (tmp_path / "run" / "responses.jsonl").unlink()
    (tmp_path / "run" / "evaluation" / "before.json").write_text("[{")
    for command, message in (
        (["export-data", "--to", tmp_path / "data"], "responses.jsonl: no such file"),
        (["report"], "before.json: is not valid JSON"),
    ):
        status, _, errors = call(*command, recipe=False)
        assert status == 2 and len(errors) == 1 and message in errors[0], errors
    assert not list(tmp_path.glob("*data*")), "the folder of an export that failed is gone"


def test_folder_with_imported_records_samples_none_itself(world, tmp_path, call):
    """Otherwise the report would say that all of them were sampled, or judged, in this run."""
    judged, trained, sampling = (tmp_path / name for name in ("judged", "trained", "sampling"))
    filter_command = ["filter", "--responses", world / "responses.jsonl"]
    assert call(*filter_command, "--out", judged)[0] == 0
    assert call("train", "--data", write_jsonl(tmp_path / "d.jsonl", EXAMPLES), "--out", trained)[0] == 0
    sampling.mkdir()
    shutil.copy(judged / "recipe.yaml", sampling)
    (sampling / "prompts.jsonl").write_text("{}")  # killed before the first response
    for command, message in (
        (["generate", "--out", judged], "responses.jsonl: was imported; continue with `thinksafe filter`"),
        (["run", "--out", judged], "responses.jsonl: was imported"),
        ([*filter_command, "--out", trained], "accepted.jsonl: was imported for training"),
        ([*filter_command, "--out", sampling], "sampling already samples responses"),
    ):
        status, _, errors = call(*command)
        assert status == 2 and len(errors) == 1 and message in errors[0], errors
    assert call(*filter_command, "--out", judged)[0] == 0, "the same import continues the run"


@pytest.mark.parametrize("command, shard", [("filter", "responses.jsonl"), ("train", "accepted.jsonl")])
def test_stage_rejects_changed_input(world, tmp_path, call, command, shard):
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


def test_changed_prompts_of_an_interrupted_run_are_an_error(world, tmp_path, call):
    prompts = write_jsonl(tmp_path / "p.jsonl", ROWS)
    assert call("generate", "--prompts", prompts)[0] == 0
    (tmp_path / "run" / "manifest.json").unlink()
    write_jsonl(prompts, ROWS[1:])
    status, _, errors = call("generate", "--prompts", prompts)
    assert status == 2 and len(errors) == 1 and "holds responses to other prompts" in errors[0]


def test_broken_weights_are_never_saved(world, tmp_path, call):
    """One step at this rate gives weights that are finite but whose squares are not."""
    settings = [SET, "training.learning_rate=1e30", SET, "training.batch_size=3"]
    status, printed, errors = call("train", "--data", world / "examples.jsonl", *settings)
    assert status == 2 and printed == "" and len(errors) == 1
    assert "training stopped at step 1: the norm of the weights" in errors[0] and "training.learning_rate" in errors[0]
    assert not list((tmp_path / "run").rglob("*.safetensors"))


INTERRUPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores SIGINT by default
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
from thinksafe.cli.__main__ import main
sys.exit(main(["run", "--recipe", "organism", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("module", ["argparse", "thinksafe.errors", "thinksafe.paths", "torch", "thinksafe.pipeline"])
def test_interrupt_during_imports_is_quiet(tmp_path, module):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", INTERRUPT, module, str(tmp_path / "run")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["recipe", pytest.param("estimate", marks=pytest.mark.exhaustive)])
def test_closed_output_pipe_is_no_error(command):
    (reader, writer), environment = os.pipe(), {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    os.close(reader)
    arguments = [sys.executable, "-m", "thinksafe.cli", command, "--recipe", "qwen3-0.6b"]
    process = subprocess.run(arguments, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, "")


def test_interrupt_says_that_nothing_is_lost(call, monkeypatch):
    def interrupted(run, models):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate_responses", interrupted)
    status, _, errors = call("generate")
    assert status == 130 and errors[-1].endswith("no finished work is lost, run the same command again to continue")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_disk_error_is_one_line(call, monkeypatch, number):
    def failing(run, models):
        raise OSError(number, os.strerror(number), "responses.jsonl")

    monkeypatch.setattr(pipeline, "generate_responses", failing)
    status, _, errors = call("generate")
    assert status == 2 and errors == [
        f"thinksafe: {os.strerror(number)} (responses.jsonl); fix this and run the same command again"
    ]


@pytest.mark.parametrize(
    "error, cause",
    [(OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"), (MemoryError(), "no memory left")],
    ids=["ENOMEM", "MemoryError"],
)
def test_full_host_memory_is_one_line_with_settings(call, monkeypatch, error, cause):
    def failing(run, models):
        raise error

    monkeypatch.setattr(pipeline, "generate_responses", failing)
    status, _, (line,) = call("generate")
    assert status == 2 and line.startswith("thinksafe: out of memory: ")
    assert cause in line and "sampler.kv_cache_gib" in line


def test_responses_from_before_a_full_disk_are_kept(world, tmp_path, call, monkeypatch):
    """A real limit of 12 KiB for each file, which holds half of the responses."""
    samples = ["--set", "generation.samples=12"]
    assert call("generate", *samples, "--out", tmp_path / "whole")[0] == 0
    previous_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 1024, previous_limits[1]))
    try:
        status, _, errors = call("generate", *samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert status == 2 and f"File too large ({tmp_path / 'run'})" in errors[-1]
    sampled_tasks = []

    def counting(engine, chat, tasks, *rest):
        return sample_responses(engine, chat, (sampled_tasks.append(task) or task for task in tasks), *rest)

    monkeypatch.setattr("thinksafe.pipeline.generate.sample_responses", counting)
    assert call("generate", *samples)[0] == 0 and 0 < len(sampled_tasks) < 40
    assert (tmp_path / "run/responses.jsonl").read_bytes() == (tmp_path / "whole/responses.jsonl").read_bytes()


def test_disk_error_of_safetensors_is_one_line(world, tmp_path, call):
    """A real limit of 4 KiB for each file: it stops the checkpoint's tensors, but not the records."""
    previous_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, previous_limits[1]))
    try:
        status, _, errors = call("train", "--data", world / "examples.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    message = f"thinksafe: File too large ({tmp_path / 'run'}); fix this and run the same command again"
    assert status == 2 and errors[-1:] == [message]
    assert call("train", "--data", world / "examples.jsonl")[0] == 0


def test_defect_keeps_its_traceback(call, monkeypatch):
    def defect(run, models):
        raise RuntimeError("defect")

    monkeypatch.setattr(pipeline, "generate_responses", defect)
    with pytest.raises(RuntimeError, match="defect"):
        call("generate")


def test_organism_is_not_built_into_a_full_folder(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["organism", "build", "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_wrong_recipe_is_reported_before_torch_is_imported(tmp_path, command):
    code = f"import sys; sys.modules['torch'] = None; from thinksafe.cli.__main__ import main; main([{command!r}, "
    process = subprocess.run(
        [sys.executable, "-c", code + "'--recipe', 'nowhere'])"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert process.stderr.startswith("thinksafe: --recipe: no file 'nowhere'") and process.stderr.count("\n") == 1


@pytest.mark.slow
def test_program_prints_one_line_and_exits_with_2(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.run(
        [sys.executable, "-m", "thinksafe.cli", "run", "--recipe", "nowhere"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert all(name in process.stderr for name in ("nowhere", *bundled_recipes()))
    assert list(tmp_path.iterdir()) == []


def test_changed_checkpoint_is_an_error(world, tmp_path, capsys):
    model = tmp_path / "model"
    make_checkpoint("qwen3", model)
    arguments = ["--recipe", str(world / "recipe.yaml"), "--set", f"model={model}", "--out", str(tmp_path / "run")]
    assert main(["generate", *arguments]) == 0
    make_checkpoint("qwen3", model, seed=1)
    assert main(["train", "--data", str(world / "examples.jsonl"), *arguments]) == 2
    assert "model: was changed since this run began" in capsys.readouterr().err


def test_changed_evaluation_set_is_an_error(world, tmp_path, call):
    questions = write_jsonl(tmp_path / "q.jsonl", [{"text": "What is 1 + 1?", "answer": "2"}])
    small = [SET, f"evaluation.sets=[{{name: sums, source: {questions}, kind: reasoning}}]"]
    assert call("evaluate", *small)[0] == 0
    assert call("train", "--data", world / "examples.jsonl", *small)[0] == 0
    write_jsonl(questions, [{"text": "What is 1 + 1?", "answer": "3"}])
    status, _, errors = call("evaluate", *small)
    assert status == 2 and "evaluation set sums: was changed since this run began" in errors[-1]


def test_training_out_of_memory_names_settings_that_need_less(world, call, monkeypatch):
    steps, step = [], LocalTrainer.step

    def step_out_of_memory(engine, packs, rate):
        steps.append(len(packs))
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")
        return step(engine, packs, rate)

    monkeypatch.setattr(LocalTrainer, "step", step_out_of_memory)
    training = ["train", "--data", world / "examples.jsonl", SET, "training.epochs=2"]
    training += [SET, "training.batch_size=2", SET, "training.checkpoint_every=1"]
    status, _, (line,) = call(*training)
    assert status == 2 and line.startswith("thinksafe: out of memory in training: CUDA out of memory. Tried")
    for setting in ("training.max_tokens_per_pack", "activation_checkpointing=full", "zero.offload_optimizer=true"):
        assert setting in line
    assert re.search(
        r"\d+\.\d GiB for weights and optimizer, and \d+\.\d to \d+\.\d GiB for a pack of \d+ tokens", line
    ), line
    smaller = [SET, "training.max_tokens_per_pack=1", SET, "training.activation_checkpointing=full"]
    packs = steps.copy()
    steps[:3] = []
    monkeypatch.setattr(LocalTrainer, "step", lambda *arguments: steps.append(len(arguments[1])) or step(*arguments))
    status, _, errors = call(*training, *smaller)
    assert status == 0, errors
    total = 2 * -(-len(EXAMPLES) // 2)
    assert len(steps) == total - 2, "two steps were done before"
    assert max(packs) == 1 < max(steps), "one sequence a pack"
