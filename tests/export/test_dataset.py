"""The exported data set: `datasets` loads the accepted examples, and the card has the right figures."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from datasets import load_dataset

from tests.support.instant_run import instant_checkpoints, instant_sampling, run_stages
from tests.support.judged_run import HOSTILE, SAFE, UNSAFE, accepted_examples, add_marks, make_mark, make_run
from thinksafe import pipeline
from thinksafe.cli.__main__ import main
from thinksafe.data.atomic import sha256
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, Response, Verdict
from thinksafe.errors import UserError
from thinksafe.export.dataset import export_data
from thinksafe.pipeline.imports import import_examples, import_responses
from thinksafe.recipe.loading import check_recipe
from thinksafe.run.directory import RunDir


@pytest.fixture
def run(tmp_path):
    """A judged run of 17 responses; a person has rejected one response and accepted another."""
    run = make_run(tmp_path)
    add_marks(run, tmp_path, make_mark(run, SAFE, "reject"), make_mark(run, UNSAFE, "accept", by="Ann | *B*"))
    return run


def load(folder, tmp_path):
    return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


def test_export_removes_no_other_folder(run, tmp_path, monkeypatch):
    """A folder that looks like an unfinished export stays. An empty working directory can be the target."""
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial/mine").write_text("kept")
    export_data(run, tmp_path / "set")
    assert (tmp_path / "set.partial/mine").read_text() == "kept"
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    export_data(run, Path("."))
    assert (tmp_path / "working/README.md").exists()
    with pytest.raises(UserError, match="is a file"):
        export_data(run, tmp_path / "working/README.md")


def test_datasets_loads_the_accepted_examples(run, tmp_path):
    folder = export_data(run, tmp_path / "set")
    rows = load(folder, tmp_path)
    assert not list(tmp_path.glob(".*partial*"))
    accepted = list(read_records(run.path / "accepted.jsonl", Example))
    names = list(asdict(accepted[0]))
    assert [{name: row[name] for name in names} for row in rows] == [asdict(example) for example in accepted]
    responses = {r.prompt_id: r for r in read_records(run.path / "responses.jsonl", Response)}
    verdicts = {v.prompt_id: v for v in read_records(run.path / "verdicts.jsonl", Verdict)}
    for row in rows:
        for name in ("steering", "seed", "num_tokens", "num_prompt_tokens"):
            assert row[name] == getattr(responses[row["prompt_id"]], name)
        for name in ("p_safe", "p_unsafe", "guard", "refusal"):
            assert row[name] == getattr(verdicts[row["prompt_id"]], name)
    assert len({row["prompt"] for row in rows} & set(HOSTILE)) == 3, "special characters are unchanged"


def test_parquet_file_can_be_imported_for_training(run, tmp_path):
    folder = export_data(run, tmp_path / "set")
    (file,) = folder.glob("data/*.parquet")
    with RunDir.open(tmp_path / "other", run.recipe) as other:
        import_examples(other, file)
    assert (tmp_path / "other/accepted.jsonl").read_bytes() == (run.path / "accepted.jsonl").read_bytes()


def test_card_has_counts_rates_lengths_and_hashes(run, tmp_path):
    folder = export_data(run, tmp_path / "set")
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    by_name = {row[0]: row for row in rows}
    accepted = accepted_examples(run)
    harmful = sum(example.label == "harmful" for example in accepted.values())
    assert ["harmful", "6", str(harmful), f"{100 * (1 - harmful / 6):.2f}%", f"{100 * (1 - harmful / 6):.2f}%"] in rows
    benign = len(accepted) - harmful
    assert ["benign", "11", str(benign), f"{100 * (1 - benign / 11):.2f}%", f"{100 * (1 - benign / 11):.2f}%"] in rows
    assert ["benign", str(benign), "7.0", "7", "7", "7", "7", str(7 * benign)] in rows
    assert by_name["rejected by person"][1:] == ["0", "1"] and by_name["empty answer"][1:] == ["0", "1"]
    assert by_name["S9"][1:] == ["7", "7", "1"]
    assert by_name["doubtful"][1] == str(
        len(accepted) - 1
    ) and "They accepted 1 responses that the guard did not accept" in " ".join(text.split())
    (file,) = folder.glob("data/*.parquet")
    assert sha256(file) in text and sha256(run.path / "audit.jsonl") in text
    assert (folder / "recipe.yaml").read_text() == run.recipe.to_yaml()


@pytest.mark.parametrize("steering, sampled", [("prefix", True), (None, True), ("prefix", False), (None, False)])
def test_card_states_the_origin_of_the_responses(tmp_path, steering, sampled):
    """Sampled with or without an instruction, or imported; the recipe's instruction does not apply to imports."""
    (tmp_path / "p.jsonl").write_text('{"text": "Brew me a ka lo mi.", "label": "harmful"}\n')
    generation = {"steering": steering if sampled else "risk", "num_unsteered_prompts": 0}
    raw = {"name": "n", "model": "m", "prompts": str(tmp_path / "p.jsonl"), "generation": generation}
    row = {
        "prompt": "Brew me a ka lo mi.",
        "label": "harmful",
        "text": "<think>\nHm.\n</think>\n\nNo.",
        "steering": steering,
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    checkpoints = instant_checkpoints(lambda response: True)
    with RunDir.open(tmp_path / "run", check_recipe(raw, "")) as run, instant_sampling():
        if not sampled:
            import_responses(run, tmp_path / "r.jsonl")
            pipeline.filter_responses(run, checkpoints)
            pipeline.accept_responses(run)
        else:
            run_stages(run, checkpoints)
        card = " ".join((export_data(run, tmp_path / "set") / "README.md").read_text().split())
    assert ("1 of them were sampled with an instruction" in card) == (steering is not None)
    assert ("without any instruction" in card) == (steering is None)
    assert ("sampled from `m` itself" in card) == ("temperature" in card) == sampled
    assert ("imported for `m`" in card) == (not sampled)
    assert "reason to drop" not in card, "no response was dropped"
    assert f"| 0 | {steering or 'none'} | harmful |" in card and "risk" not in card


def test_card_names_every_guard_and_the_voting(run, tmp_path):
    members = [{"kind": "oracle"}, *({"model": "m", "scope": part, "threshold": 0.3} for part in ("think", "answer"))]
    raw = yaml.safe_load(run.recipe.to_yaml()) | {
        "guard": {"kind": "ensemble", "voting": "majority", "members": members}
    }
    run.recipe = check_recipe(raw, "")
    card = (export_data(run, tmp_path / "set") / "README.md").read_text()
    guard_lines = [line.strip("| ") for line in card.splitlines() if line.startswith(("| guard |", "| voting |"))]
    rule = r"guard | llama\_guard `m`, threshold 0.3, margin 0.0, scope {}"
    assert guard_lines == [
        "guard | oracle",
        rule.format("think"),
        rule.format("answer"),
        "voting | a response is safe if most guards call it safe",
    ]


def test_names_never_become_markup_in_the_card(run, tmp_path):
    card = (export_data(run, tmp_path / "set") / "README.md").read_text()
    assert r"person: Ann \| \*B\*" in card and "Ann | *B*" not in card
    hostile = replace(run.recipe, name='x"\n---\n# <b>no</b>', model="`m` | <i>")
    run.recipe = hostile
    _, front, text = (export_data(run, tmp_path / "other") / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pretty_name"] == f"ThinkSafe: {hostile.name}"
    assert "<b>" not in text.replace(r"\<b\>", "") and "`'m' | <i>`" in text


def test_rows_are_written_in_groups(run, tmp_path, monkeypatch):
    monkeypatch.setattr("thinksafe.export.dataset._ROWS_PER_GROUP", 2)
    (file,) = export_data(run, tmp_path / "set").glob("data/*.parquet")
    written = pyarrow.parquet.ParquetFile(file)
    assert written.num_row_groups == -(-len(accepted_examples(run)) // 2) and written.metadata.num_rows == len(
        accepted_examples(run)
    )


def test_folder_that_is_not_empty_stays_unchanged(run, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"--to .*not empty"):
        export_data(run, tmp_path / "set")
    (tmp_path / "set/thesis.tex").unlink()
    export_data(run, tmp_path / "set")


def test_interrupted_export_leaves_no_folder(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("thinksafe.export.dataset._render_card", interrupt)
        export_data(run, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert len(load(export_data(run, tmp_path / "set"), tmp_path)) == len(accepted_examples(run))


def test_export_without_accepted_responses_is_an_error(run, tmp_path):
    add_marks(
        run,
        tmp_path,
        *(make_mark(run, prompt, "reject", at="2026-02-01T00:00:00Z") for prompt in accepted_examples(run)),
    )
    with pytest.raises(UserError, match="no response was accepted"):
        export_data(run, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_export_data_command(run, tmp_path, capsys):
    assert main(["export-data", "--out", str(run.path), "--to", str(tmp_path / "set")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "set")
    assert json.loads((run.path / "manifest.json").read_text())["stages"].keys() == {"generate", "filter", "accept"}
    assert main(["export-data", "--out", str(run.path), "--to", str(tmp_path / "set")]) == 2
