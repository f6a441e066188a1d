"""The run directory: whatever moment a process dies at, the next one finds what was finished and no more."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import yaml

from tests.run.test_journal import together
from thinksafe.data.atomic import sha256
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.recipe.loading import check_recipe
from thinksafe.run import journal as files
from thinksafe.run.directory import RunDir

RECIPE = check_recipe({"name": "n", "model": "m"}, "here")
OTHER = dataclasses.replace(RECIPE, seed=1)


def finish(run: RunDir, name: str = "shard.jsonl"):
    (run.path / name).write_text("{}\n")
    run.finish_stage("stage", [run.path / name], run.clock("stage"), tokens=1)


def test_a_finished_stage_is_done_for_every_later_process(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        assert not run.is_done("stage")
        finish(run)
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        assert run.is_done("stage") and not run.is_done("another")
        assert run.manifest["stages"]["stage"]["files"] == {"shard.jsonl": sha256(run.path / "shard.jsonl")}


@pytest.mark.parametrize("change, words", [("append", "was changed"), ("remove", "is missing")])
def test_a_finished_shard_that_is_not_as_it_was_is_refused(tmp_path, change, words):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
        file = run.path / "shard.jsonl"
        file.unlink() if change == "remove" else file.write_text("{} \n")
        with pytest.raises(UserError, match=f"shard.jsonl: {words} since stage 'stage'"):
            run.is_done("stage")


def test_a_damaged_manifest_is_named(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
        (run.path / "manifest.json").write_text('{"stages": ')
        with pytest.raises(UserError, match=r"manifest.json: damaged"):
            run.is_done("stage")


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    with pytest.raises(UserError, match=r"another recipe \(seed: 1, there 0\)"), RunDir.open(tmp_path / "run", OTHER):
        pass
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        assert run.is_done("stage")


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({"sampler": {"kv_cache_gib": 2.0, "max_running": 8, "max_step_tokens": 64}}, False),
        ({"guard": {"sampler": {"kv_cache_gib": 2.0}}, "trackers": ["wandb"], "zero": {"stage": 3}}, False),
        ({"training": {"max_tokens_per_pack": 99, "activation_checkpointing": "full", "cuda_graphs": "none"}}, False),
        ({"sampler": {"tensor_parallel": 2}}, False),
        ({"sampler": {"kv_cache_dtype": "fp8"}}, True),
        ({"guard": {"threshold": 0.4}}, True),
        ({"training": {"batch_size": 9}}, True),
    ],
)
def test_what_only_takes_other_room_is_the_same_run(tmp_path, settings, refused):
    """Whoever runs out of memory is told to lower these, and must be able to."""
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    other = check_recipe({"name": "n", "model": "m", **settings}, "here")
    if refused:
        with pytest.raises(UserError, match="another recipe"), RunDir.open(tmp_path / "run", other):
            pass
    else:
        with RunDir.open(tmp_path / "run", other) as run:
            assert run.is_done("stage")
        assert check_recipe(yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()), "there") == other


@pytest.mark.parametrize("section", ["sampler", "guard"])
def test_in_batch_invariant_mode_the_number_of_parts_is_no_matter_of_room(tmp_path, section):
    """It decides the last digits of every sum."""

    def recipe(**settings):
        sampler = {"batch_invariant": True, **settings}
        given = {"sampler": sampler} if section == "sampler" else {"guard": {"sampler": sampler}}
        return check_recipe({"name": "n", "model": "m", **given}, "here")

    with RunDir.open(tmp_path / "run", recipe()) as run:
        finish(run)
    with RunDir.open(tmp_path / "run", recipe(max_running=8)):
        pass
    other = recipe(max_running=8, tensor_parallel=2)
    with pytest.raises(UserError) as refusal, RunDir.open(tmp_path / "run", other):
        pass
    place = {"sampler": "sampler", "guard": "guard.sampler"}[section]
    assert f"({place}.tensor_parallel: 2, there 1)" in str(refusal.value)
    assert str(refusal.value).count("tensor_parallel") == 2, "only the other model's may change"


@pytest.mark.parametrize(
    "settings, difference",
    [
        ({"training": {"epochs": 4}}, "training.epochs: 4, there 3"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules.2: nothing, there v_proj"),
        (
            {"evaluation": {"sets": [{"name": "a", "file": "f", "kind": "harmful"}]}},
            "evaluation.sets.1.name: a, there nothing",
        ),
        ({"generation": {"steering": None}}, "generation.steering: None, there prefix"),
    ],
)
def test_the_first_key_that_differs_is_named_with_both_values(tmp_path, settings, difference):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    other = check_recipe({"name": "n", "model": "m", **settings}, "here")
    with pytest.raises(UserError, match=re.escape(f"({difference})")), RunDir.open(tmp_path / "run", other):
        pass


@pytest.mark.parametrize("damage", ["", "name: [", "name: n\nmodel: m\nfuture_key: 1\n", "\xff"])
def test_a_recipe_that_cannot_be_read_is_another_recipe(tmp_path, damage):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    (tmp_path / "run" / "recipe.yaml").write_bytes(damage.encode("latin-1"))
    with pytest.raises(UserError, match=r"another recipe .*cannot be read"), RunDir.open(tmp_path / "run", RECIPE):
        pass


@pytest.mark.parametrize(
    "left", [[], ["prompts.jsonl"], ["prompts.jsonl.partial"], ["responses.jsonl"], ["accepted.jsonl"]]
)
def test_a_recipe_can_be_corrected_until_a_stage_has_written_something(tmp_path, left):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        for name in left:
            (run.path / name).write_text("{}\n")
        (run.path / "responses.jsonl.partial").touch()
    with RunDir.open(tmp_path / "run", OTHER) as run:
        assert run.recipe == OTHER
    assert "seed: 1" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_recipe_that_somebody_wrote_by_hand_is_never_overwritten(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("# mine\nname: n\nmodel: m\n")
    with RunDir.open(tmp_path, RECIPE):
        pass
    with pytest.raises(UserError, match="another recipe"), RunDir.open(tmp_path, OTHER):
        pass
    assert file.read_text().startswith("# mine")


@pytest.mark.parametrize(
    "left",
    [
        ["responses.jsonl.partial"],
        ["prompts.jsonl", "responses.jsonl"],
        ["verdicts.jsonl", "accepted.jsonl"],
        ["evaluation/before/a.responses.jsonl.partial"],
        ["training/metrics.jsonl"],
        ["manifest.json"],
    ],
)
def test_one_record_is_enough_to_bind_a_folder_to_its_recipe(tmp_path, left):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        for name in left:
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_text("{}\n")
    with pytest.raises(UserError, match="another recipe"), RunDir.open(tmp_path / "run", OTHER):
        pass


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and no run directory"), RunDir.open(tmp_path, RECIPE):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_left_while_its_recipe_was_being_written_is_used(tmp_path):
    for name in (".lock", "recipe.yaml.partial"):
        (tmp_path / name).write_text("name: ")
    with RunDir.open(tmp_path, RECIPE) as run:
        assert (run.path / "recipe.yaml").read_text() == RECIPE.to_yaml()


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match="is a file"), RunDir.open(tmp_path / "f", RECIPE):
        pass


def test_two_at_once_are_refused_and_the_second_may_come_later(tmp_path):
    with (
        RunDir.open(tmp_path / "run", RECIPE),
        pytest.raises(UserError, match="another process is working"),
        RunDir.open(tmp_path / "run", RECIPE),
    ):
        pass
    with RunDir.open(tmp_path / "run", RECIPE):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from thinksafe.recipe.schema import check_recipe\nfrom thinksafe.run.directory import RunDir\n"
        "with RunDir.open(Path(sys.argv[1]), check_recipe({'name': 'n', 'model': 'm'}, '')):\n"
        "    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="another process is working"), RunDir.open(tmp_path / "run", RECIPE):
            pass
    finally:
        process.kill()
        process.communicate()
    with RunDir.open(tmp_path / "run", RECIPE):
        pass


def test_a_killed_stage_keeps_its_seconds(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("thinksafe.run.directory.time.perf_counter", lambda: now)
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        clock = run.clock("evaluate/before")
        now += 30
        clock.tick()
        again = run.clock("evaluate/before")
        now += 12
        assert again.seconds == pytest.approx(42)
        (run.path / "shard.jsonl").touch()
        run.finish_stage("stage", [run.path / "shard.jsonl"], again)
        assert run.manifest["stages"]["stage"]["seconds"] == pytest.approx(42)
        assert run.clock("evaluate/before").seconds == 0


def test_the_manifest_tells_what_made_the_run(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"thinksafe", "python", "torch", "transformers", "machine"} <= manifest["environment"].keys()
    assert manifest["created"].endswith("+00:00")


# Several workers


def test_the_folder_is_closed_to_others_until_the_last_worker_has_left(tmp_path):
    left = threading.Event()

    def work(workers: Workers) -> str:
        with RunDir.open(tmp_path / "run", RECIPE, workers):
            if not workers.leads:
                left.wait(10)
                return "worked"
        try:
            with RunDir.open(tmp_path / "run", RECIPE):
                return "got in"
        finally:
            left.set()

    first, second = together(2, work)
    assert "another process is working" in first and second == "worked"
    with RunDir.open(tmp_path / "run", RECIPE):
        pass


def test_a_folder_that_a_worker_does_not_see_is_named(tmp_path, monkeypatch):
    """Each machine has its own, from an earlier run with the same recipe."""
    monkeypatch.setattr(files, "_SEEN_WITHIN", 0.5)
    monkeypatch.setattr(Workers, "meet", lambda self: None)  # the first one would wait for the other for ever
    for name in "ab":
        with RunDir.open(tmp_path / name, RECIPE):
            pass

    def work(workers: Workers) -> str:
        with RunDir.open(tmp_path / "ab"[workers.rank], RECIPE, workers):
            return "worked"

    first, second = together(2, work)
    assert first == "worked" and "b/.lock: is not what the first worker wrote there; with several machines" in second


def test_an_input_that_differs_from_machine_to_machine_is_named(tmp_path):
    def work(workers: Workers) -> str:
        with RunDir.open(tmp_path / "run", RECIPE, workers) as run:
            run.remember_input("model", "the same")
            run.remember_input("guard", f"of {workers.rank}")
            return "worked"

    first, second = together(2, work)
    assert first == "worked" and second.startswith("guard: is another one here than on the first worker's machine")
