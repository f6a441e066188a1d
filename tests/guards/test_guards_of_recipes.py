"""Guards of a recipe: a run loads them, calls them, and keeps their results in its records. Checkpoints are tiny."""

import json

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint, make_llama_guard, make_wildguard
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records, to_json
from thinksafe.data.records import Example, Verdict
from thinksafe.recipe.loading import load_recipe

SMALL_SAMPLER = {"max_num_seqs": 4, "max_prefill_tokens": 512, "kv_cache_gib": 0.02}
CUSTOM = {
    "kind": "template",
    "model": "student",
    "min_verdict_probability": 0.0,
    "sampler": SMALL_SAMPLER,
    "format": {
        "template": "Asked: {prompt}\nSaid: {response}\nWas that all right?",
        "questions": [{"topic": "harm", "answers": {"yes": "safe", "no": "unsafe"}}],
    },
}
LLAMA = {"kind": "llama_guard", "model": "llama", "min_verdict_probability": 0.0, "sampler": SMALL_SAMPLER}
WILD = {"kind": "wildguard", "model": "wild", "min_verdict_probability": 0.0, "sampler": SMALL_SAMPLER}
GUARDS = {
    "custom": CUSTOM,
    "wildguard": WILD,
    "all": {"kind": "ensemble", "members": [LLAMA, WILD, CUSTOM]},
    "majority": {"kind": "ensemble", "voting": "majority", "members": [LLAMA, WILD, CUSTOM]},
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
    """Return guard name -> prompt id -> verdict; check that exactly the safe responses are accepted."""
    verdicts_of_guard = {}
    for name in GUARDS:
        out = tmp_path_factory.mktemp("runs") / name
        arguments = ["--recipe", world / f"{name}.yaml", "--out", out, "--responses", world / "responses.jsonl"]
        assert main(["filter", *map(str, arguments)]) == 0
        verdicts_of_guard[name] = {
            verdict.prompt_id: verdict for verdict in read_records(out / "verdicts.jsonl", Verdict)
        }
        assert len(verdicts_of_guard[name]) == len(RESPONSES)
        safe_ids = {verdict.prompt_id for verdict in verdicts_of_guard[name].values() if verdict.decision == "safe"}
        accepted_file = out / "accepted.jsonl"
        accepted_ids = (
            {example.prompt_id for example in read_records(accepted_file, Example)}
            if accepted_file.stat().st_size
            else set()
        )
        assert accepted_ids == safe_ids
    return verdicts_of_guard


@pytest.mark.slow
def test_custom_guard_needs_no_code(verdicts, world):
    decisions = {verdict.decision for verdict in verdicts["custom"].values()}
    assert "dropped" in decisions and decisions & {"safe", "unsafe"} and "unknown" not in decisions
    assert {verdict.guard for verdict in verdicts["custom"].values()} == {f"template:{world / 'student'}"}


def test_verdicts_keep_the_guards_result(verdicts):
    for verdict in verdicts["wildguard"].values():
        if verdict.decision == "dropped":
            assert verdict.windows == 0 and not verdict.labels
        else:
            assert verdict.windows == 1 and verdict.refusal is not None
            assert set(verdict.labels) == {"harmful", "harmless", "refusal", "compliance"}


def test_ensemble_verdicts_follow_from_its_members(verdicts, world):
    names = {"llama": f"llama_guard:{world / 'llama'}", "wild": f"wildguard:{world / 'wild'}"}
    names["custom"] = f"template:{world / 'student'}"
    decision_pairs = set()
    for id_, verdict in verdicts["all"].items():
        if verdict.decision == "dropped":
            continue
        votes = [verdict.labels[f"{name}/safe"] > verdict.labels[f"{name}/unsafe"] for name in names.values()]
        assert verdict.labels[f"{names['wild']}/unsafe"] == pytest.approx(verdicts["wildguard"][id_].p_unsafe, rel=1e-4)
        assert verdict.decision == ("safe" if all(votes) else "unsafe")
        assert verdicts["majority"][id_].decision == ("safe" if sum(votes) > 1 else "unsafe")
        decision_pairs.add((verdict.decision, verdicts["majority"][id_].decision))
    assert len(decision_pairs) > 1


def test_missing_guard_stops_the_run_before_it_begins(world, tmp_path, capsys):
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
def test_recipe_with_guards_survives_a_yaml_round_trip(world, tmp_path, name):
    recipe = load_recipe(str(world / f"{name}.yaml"))
    assert all((world / checkpoint).is_dir() for checkpoint in recipe.guard.checkpoints)
    assert set(recipe.guard.checkpoints) <= {str(world / folder) for folder in ("student", "llama", "wild")}
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe


def test_verdict_survives_a_json_round_trip(tmp_path):
    fields = (0.1, 0.8, False, "guard", "S9", 3, {"S9": 0.7, "é": 0.1})
    verdict = Verdict("id", 0, "harmful", None, "unsafe", "unsafe", *fields)
    (tmp_path / "v.jsonl").write_text(to_json(verdict) + "\n")
    assert list(read_records(tmp_path / "v.jsonl", Verdict)) == [verdict]
