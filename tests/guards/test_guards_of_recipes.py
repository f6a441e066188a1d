"""Guards of a recipe: found, loaded, asked, and their word kept in the run's records."""

import json

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint, make_llama_guard, make_wildguard
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records, to_json
from thinksafe.data.records import Example, Verdict
from thinksafe.recipe.loading import load_recipe

SMALL = {"max_running": 4, "max_step_tokens": 512, "kv_cache_gib": 0.02}
OWN = {
    "kind": "template",
    "model": "student",
    "min_mass": 0.0,
    "sampler": SMALL,
    "format": {
        "template": "Asked: {prompt}\nSaid: {response}\nWas that all right?",
        "questions": [{"about": "harm", "answers": {"yes": "safe", "no": "unsafe"}}],
    },
}
LLAMA = {"kind": "llama_guard", "model": "llama", "min_mass": 0.0, "sampler": SMALL}
WILD = {"kind": "wildguard", "model": "wild", "min_mass": 0.0, "sampler": SMALL}
GUARDS = {
    "own": OWN,
    "wildguard": WILD,
    "all": {"kind": "ensemble", "members": [LLAMA, WILD, OWN]},
    "majority": {"kind": "ensemble", "agree": "majority", "members": [LLAMA, WILD, OWN]},
}
RESPONSES = [
    {"prompt": f"Question {n}?", "label": "benign", "text": f"<think>\nLet me see.\n</think>\n\n{'yes ' * n}{n}."}
    for n in range(12)
] + [{"prompt": "Open?", "label": "benign", "text": "<think>\nnever closed"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint("qwen3", folder / "student", max_position_embeddings=1024)
    make_llama_guard(folder / "llama")
    make_wildguard(folder / "wild")
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RESPONSES))
    for name, guard in GUARDS.items():
        recipe = {"name": name, "model": "student", "guard": guard}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def verdicts(world, tmp_path_factory):
    """Name of a guard -> prompt id -> verdict; what was accepted is what was called safe."""
    found = {}
    for name in GUARDS:
        out = tmp_path_factory.mktemp("runs") / name
        arguments = ["--recipe", world / f"{name}.yaml", "--out", out, "--responses", world / "responses.jsonl"]
        assert main(["filter", *map(str, arguments)]) == 0
        found[name] = {verdict.prompt_id: verdict for verdict in read_records(out / "verdicts.jsonl", Verdict)}
        assert len(found[name]) == len(RESPONSES)
        safe = {verdict.prompt_id for verdict in found[name].values() if verdict.decision == "safe"}
        accepted = out / "accepted.jsonl"
        kept = {example.prompt_id for example in read_records(accepted, Example)} if accepted.stat().st_size else set()
        assert kept == safe
    return found


def test_a_teams_own_guard_needs_no_code(verdicts, world):
    decisions = {verdict.decision for verdict in verdicts["own"].values()}
    assert "dropped" in decisions and decisions & {"safe", "unsafe"} and "unknown" not in decisions
    assert {verdict.guard for verdict in verdicts["own"].values()} == {f"template:{world / 'student'}"}


def test_verdicts_keep_what_the_guard_said(verdicts):
    for verdict in verdicts["wildguard"].values():
        if verdict.decision == "dropped":
            assert verdict.windows == 0 and not verdict.labels
        else:
            assert verdict.windows == 1 and verdict.refusal is not None
            assert set(verdict.labels) == {"harmful", "harmless", "refusal", "compliance"}


def test_an_ensembles_verdicts_follow_from_its_members(verdicts, world):
    names = {"llama": f"llama_guard:{world / 'llama'}", "wild": f"wildguard:{world / 'wild'}"}
    names["own"] = f"template:{world / 'student'}"
    decided = set()
    for id_, strict in verdicts["all"].items():
        if strict.decision == "dropped":
            continue
        votes = [strict.labels[f"{name}/safe"] > strict.labels[f"{name}/unsafe"] for name in names.values()]
        assert strict.labels[f"{names['wild']}/unsafe"] == pytest.approx(verdicts["wildguard"][id_].p_unsafe, rel=1e-4)
        assert strict.decision == ("safe" if all(votes) else "unsafe")
        assert verdicts["majority"][id_].decision == ("safe" if sum(votes) > 1 else "unsafe")
        decided.add((strict.decision, verdicts["majority"][id_].decision))
    assert len(decided) > 1


def test_a_guard_that_is_missing_stops_the_run_before_it_begins(world, tmp_path, capsys):
    members = [LLAMA | {"model": str(world / "llama")}, WILD | {"model": "./gone"}]
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "n",
                "model": str(world / "student"),
                "guard": {"kind": "ensemble", "members": members},
                "prompts": str(world / "responses.jsonl"),
            }
        )
    )
    assert main(["run", "--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "gone" in capsys.readouterr().err and not (tmp_path / "run" / "responses.jsonl").exists()


@pytest.mark.parametrize("name", GUARDS)
def test_a_recipe_with_guards_comes_back_from_its_own_yaml(world, tmp_path, name):
    recipe = load_recipe(str(world / f"{name}.yaml"))
    assert all((world / checkpoint).is_dir() for checkpoint in recipe.guard.checkpoints)
    assert set(recipe.guard.checkpoints) <= {str(world / folder) for folder in ("student", "llama", "wild")}
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe


def test_a_verdict_comes_back_from_its_line(tmp_path):
    measured = (0.1, 0.8, False, "guard", "S9", 3, {"S9": 0.7, "é": 0.1})
    verdict = Verdict("id", 0, "harmful", None, "unsafe", "unsafe", *measured)
    (tmp_path / "v.jsonl").write_text(to_json(verdict) + "\n")
    assert list(read_records(tmp_path / "v.jsonl", Verdict)) == [verdict]
