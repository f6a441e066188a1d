"""A run directory keeps finished work when a process is killed at any moment, and belongs to one recipe.

The tests break and reopen directories, and compare what the next process sees.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from datetime import datetime

import pytest
import yaml

from tests.support.worker_threads import run_in_threads
from thinksafe.cli.__main__ import main
from thinksafe.data.atomic import sha256
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.pipeline.imports import import_responses
from thinksafe.recipe.loading import check_recipe
from thinksafe.run import journal
from thinksafe.run.directory import FORMAT, RunDir

RECIPE = check_recipe({"name": "n", "model": "m"}, "test")
OTHER = dataclasses.replace(RECIPE, seed=1)


def finish(run: RunDir, name: str = "records.jsonl"):
    (run.path / name).write_text("{}\n")
    run.finish_stage("stage", [run.path / name], run.clock("stage"), tokens=1)


def test_finished_stage_is_done_for_later_processes(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        assert not run.is_done("stage")
        finish(run)
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        assert run.is_done("stage") and not run.is_done("another")
        assert run.manifest["stages"]["stage"]["files"] == {"records.jsonl": sha256(run.path / "records.jsonl")}


@pytest.mark.parametrize("change, problem", [("append", "was changed"), ("remove", "is missing")])
def test_changed_file_of_a_finished_stage_is_an_error(tmp_path, change, problem):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
        file = run.path / "records.jsonl"
        file.unlink() if change == "remove" else file.write_text("{} \n")
        with pytest.raises(UserError, match=f"records.jsonl: {problem} since stage 'stage'"):
            run.is_done("stage")


def test_damaged_manifest_is_named(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
        (run.path / "manifest.json").write_text('{"stages": ')
        with pytest.raises(UserError, match=r"manifest.json: damaged"):
            run.is_done("stage")


@pytest.mark.parametrize("run_format, age", [(None, "an earlier"), (1, "an earlier"), (FORMAT + 1, "a later")])
def test_run_directory_of_another_version_gives_one_clear_error(tmp_path, capsys, run_format, age):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
        manifest = run.manifest | {"format": run_format}
        if run_format is None:
            del manifest["format"]
        (run.path / "manifest.json").write_text(json.dumps(manifest))
        (run.path / "recipe.yaml").write_text("name: n\nmodel: m\nkey_of_another_version: 1\n")
    made_by = f"run: made by {age} version of ThinkSafe; finish it with that version or "
    error = made_by + "use a new --out folder"
    with pytest.raises(UserError, match=error), RunDir.open(tmp_path / "run", RECIPE):
        pass
    with pytest.raises(UserError, match=error):
        RunDir(tmp_path / "run", RECIPE).manifest  # noqa: B018
    import_error = made_by + "train on its accepted.jsonl with --data"
    with pytest.raises(UserError, match=import_error), RunDir.open(tmp_path / "new", RECIPE) as run:
        import_responses(run, tmp_path / "run")
    assert main(["report", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith(f"{error}\n")


def test_run_killed_before_its_first_manifest_can_be_resumed(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        (run.path / "prompts.jsonl").write_text("{}\n")
        (run.path / "responses.jsonl.partial-0").write_text("{}\n")
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
        assert run.is_done("stage") and run.manifest["format"] == FORMAT


def test_error_for_another_recipe_names_the_difference(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    with (
        pytest.raises(UserError, match=r"another recipe \(seed: 1 instead of 0\)"),
        RunDir.open(tmp_path / "run", OTHER),
    ):
        pass
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        assert run.is_done("stage")


@pytest.mark.parametrize(
    "settings, is_error",
    [
        ({"sampler": {"kv_cache_gib": 2.0, "max_num_seqs": 8, "max_prefill_tokens": 64}}, False),
        ({"guard": {"sampler": {"kv_cache_gib": 2.0}}, "trackers": ["wandb"], "zero": {"stage": 3}}, False),
        ({"training": {"max_tokens_per_pack": 99, "activation_checkpointing": "full", "cuda_graphs": "none"}}, False),
        ({"sampler": {"tensor_parallel_size": 2}}, False),
        ({"sampler": {"kv_cache_dtype": "fp8"}}, True),
        ({"guard": {"threshold": 0.4}}, True),
        ({"training": {"batch_size": 9}}, True),
    ],
)
def test_memory_settings_may_change_in_a_run(tmp_path, settings, is_error):
    """The out-of-memory error asks the user to lower these settings."""
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    other = check_recipe({"name": "n", "model": "m", **settings}, "test")
    if is_error:
        with pytest.raises(UserError, match="another recipe"), RunDir.open(tmp_path / "run", other):
            pass
    else:
        with RunDir.open(tmp_path / "run", other) as run:
            assert run.is_done("stage")
        assert check_recipe(yaml.safe_load((tmp_path / "run/recipe.yaml").read_text()), "test") == other


@pytest.mark.parametrize("section", ["sampler", "guard"])
def test_batch_invariant_mode_fixes_tensor_parallel_size(tmp_path, section):
    """The setting changes the summation order."""

    def recipe(**settings):
        sampler = {"batch_invariant": True, **settings}
        sections = {"sampler": sampler} if section == "sampler" else {"guard": {"sampler": sampler}}
        return check_recipe({"name": "n", "model": "m", **sections}, "test")

    with RunDir.open(tmp_path / "run", recipe()) as run:
        finish(run)
    with RunDir.open(tmp_path / "run", recipe(max_num_seqs=8)):
        pass
    other = recipe(max_num_seqs=8, tensor_parallel_size=2)
    with pytest.raises(UserError) as error, RunDir.open(tmp_path / "run", other):
        pass
    key = {"sampler": "sampler", "guard": "guard.sampler"}[section]
    assert f"({key}.tensor_parallel_size: 2 instead of 1)" in str(error.value)
    assert str(error.value).count("tensor_parallel_size") == 2, "only the other model's setting may change"


@pytest.mark.parametrize(
    "settings, difference",
    [
        ({"training": {"epochs": 4}}, "training.epochs: 4 instead of 3"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora.target_modules.1: nothing instead of v_proj"),
        (
            {"evaluation": {"sets": [{"name": "a", "source": "f", "kind": "harmful"}]}},
            "evaluation.sets.0.name: a instead of nothing",
        ),
        ({"generation": {"steering": None}}, "generation.steering: null instead of prefix"),
    ],
)
def test_first_differing_key_is_named_with_both_values(tmp_path, settings, difference):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    other = check_recipe({"name": "n", "model": "m", **settings}, "test")
    with pytest.raises(UserError, match=re.escape(f"({difference})")), RunDir.open(tmp_path / "run", other):
        pass


@pytest.mark.parametrize("damage", ["", "name: [", "name: n\nmodel: m\nfuture_key: 1\n", "\xff"])
def test_unreadable_recipe_counts_as_another_recipe(tmp_path, damage):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    (tmp_path / "run" / "recipe.yaml").write_bytes(damage.encode("latin-1"))
    with pytest.raises(UserError, match=r"another recipe .*cannot be read"), RunDir.open(tmp_path / "run", RECIPE):
        pass


@pytest.mark.parametrize(
    "leftover_files", [[], ["prompts.jsonl"], ["prompts.jsonl.partial"], ["responses.jsonl"], ["accepted.jsonl"]]
)
def test_recipe_can_be_replaced_before_a_stage_has_written(tmp_path, leftover_files):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        for name in leftover_files:
            (run.path / name).write_text("{}\n")
        (run.path / "responses.jsonl.partial").touch()
    with RunDir.open(tmp_path / "run", OTHER) as run:
        assert run.recipe == OTHER
    assert "seed: 1" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_recipe_written_by_hand_is_never_overwritten(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("# mine\nname: n\nmodel: m\n")
    with RunDir.open(tmp_path, RECIPE):
        pass
    with pytest.raises(UserError, match="another recipe"), RunDir.open(tmp_path, OTHER):
        pass
    assert file.read_text().startswith("# mine")


@pytest.mark.parametrize(
    "leftover_files",
    [
        ["responses.jsonl.partial"],
        ["prompts.jsonl", "responses.jsonl"],
        ["verdicts.jsonl", "accepted.jsonl"],
        ["evaluation/before/a.responses.jsonl.partial"],
        ["training/metrics.jsonl"],
        ["manifest.json"],
    ],
)
def test_one_record_binds_a_folder_to_its_recipe(tmp_path, leftover_files):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        for name in leftover_files:
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_text("{}\n")
    with pytest.raises(UserError, match="another recipe"), RunDir.open(tmp_path / "run", OTHER):
        pass


def test_folder_with_other_files_stays_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run directory"), RunDir.open(tmp_path, RECIPE):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_run_killed_while_writing_its_recipe_can_be_resumed(tmp_path):
    for name in (".lock", "recipe.yaml.partial"):
        (tmp_path / name).write_text("name: ")
    with RunDir.open(tmp_path, RECIPE) as run:
        assert (run.path / "recipe.yaml").read_text() == RECIPE.to_yaml()


def test_file_is_not_a_run_directory(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(UserError, match="is a file"), RunDir.open(tmp_path / "f", RECIPE):
        pass


def test_second_process_must_wait_until_the_first_ends(tmp_path):
    with (
        RunDir.open(tmp_path / "run", RECIPE),
        pytest.raises(UserError, match="another process is working"),
        RunDir.open(tmp_path / "run", RECIPE),
    ):
        pass
    with RunDir.open(tmp_path / "run", RECIPE):
        pass


@pytest.mark.slow
def test_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from thinksafe.recipe.loading import check_recipe\nfrom thinksafe.run.directory import RunDir\n"
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


def test_killed_stage_keeps_its_seconds(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("thinksafe.run.directory.time.perf_counter", lambda: now)
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        clock = run.clock("evaluate_before")
        now += 30
        clock.tick()
        resumed_clock = run.clock("evaluate_before")
        now += 12
        assert resumed_clock.seconds == pytest.approx(42)
        (run.path / "records.jsonl").touch()
        run.finish_stage("stage", [run.path / "records.jsonl"], resumed_clock)
        assert run.manifest["stages"]["stage"]["seconds"] == pytest.approx(42)
        assert run.clock("evaluate_before").seconds == 0


def test_manifest_records_versions_and_machine(tmp_path):
    with RunDir.open(tmp_path / "run", RECIPE) as run:
        finish(run)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"thinksafe", "python", "torch", "transformers", "machine"} <= manifest["environment"].keys()
    assert datetime.fromisoformat(manifest["created"]).tzinfo is not None


# Several workers


def test_folder_is_locked_until_the_last_worker_has_left(tmp_path):
    leader_is_done = threading.Event()

    def work(workers: Workers) -> str:
        with RunDir.open(tmp_path / "run", RECIPE, workers):
            if not workers.is_leader:
                leader_is_done.wait(10)
                return "worked"
        try:
            with RunDir.open(tmp_path / "run", RECIPE):
                return "got in"
        finally:
            leader_is_done.set()

    leader, follower = run_in_threads(2, work)
    assert "another process is working" in leader and follower == "worked"
    with RunDir.open(tmp_path / "run", RECIPE):
        pass


def test_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    """Each machine has its own folder, from an earlier run with the same recipe."""
    monkeypatch.setattr(journal, "_VISIBILITY_TIMEOUT", 0.5)
    monkeypatch.setattr(Workers, "barrier", lambda self: None)  # the leader would wait for the other worker forever
    for name in "ab":
        with RunDir.open(tmp_path / name, RECIPE):
            pass

    def work(workers: Workers) -> str:
        with RunDir.open(tmp_path / "ab"[workers.rank], RECIPE, workers):
            return "worked"

    leader, follower = run_in_threads(2, work)
    assert leader == "worked"
    assert "b/.lock: differs from the leader's file; with several machines" in follower


def test_input_that_differs_between_machines_is_named(tmp_path):
    def work(workers: Workers) -> str:
        with RunDir.open(tmp_path / "run", RECIPE, workers) as run:
            run.pin_input("model", "the same")
            run.pin_input("guard", f"of {workers.rank}")
            return "worked"

    leader, follower = run_in_threads(2, work)
    assert leader == "worked" and follower.startswith("guard: differs between this machine and the leader's")
