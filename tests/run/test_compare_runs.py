"""tools/compare_runs.py finds runs equal whose names and times alone differ, and names every other difference.

The oracle is a pair of small folders, written by hand: one with the names before format 2 and one with the new names.
"""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tools.compare_runs import first_difference, main

SUFFIXES = {
    "old": ("judged=think", "judged=answer min_mass=0.5"),
    "new": ("scope=think", "scope=answer min_verdict_probability=0.5"),
}


def write_run(folder, version):
    """Write a run directory with the names of a version: "old" or "new"."""
    is_old = version == "old"
    guard = f"all({', '.join(f'Guard[{suffix}]' for suffix in SUFFIXES[version])})"
    sampler = {"max_running" if is_old else "max_num_seqs": 8, "page_size": 0 if is_old else None}
    recipe = {
        "name": "n",
        "model": "m",
        "limit" if is_old else "max_prompts": None,
        "sampler": sampler,
        "guard": {"members": [{"judged" if is_old else "scope": "think", "sampler": sampler}]},
        "evaluation": {
            "sets": [{"file" if is_old else "source": "f", "answer" if is_old else "answer_matcher": "math"}]
        },
        "training": {"epochs": 1, "benign_loss": "kl"} if is_old else {"epochs": 1},
    }
    if not is_old:
        recipe["method"] = {"type": "thinksafe", "benign_loss": "kl"}
    repetition = "loop" if is_old else "repetition"
    reason = "forged_frame" if is_old else "delimiter_injection"
    outcomes = ["kept", "spare" if is_old else "not_needed", repetition]
    records = {
        "responses.jsonl": [{"text": "loop", "finish_reason": "stop"}, {"text": "t", "finish_reason": repetition}],
        "verdicts.jsonl": [{"guard": guard, "reason": reason, "p_safe": 0.25}],
        "audit.jsonl": [{"attempts": [{"fate" if is_old else "outcome": outcome} for outcome in outcomes]}],
        "training/metrics.jsonl": [{"step": 1, "loss": 0.5, "seconds": 1.0 if is_old else 2.0}],
    }
    stage = {"seconds": 3.5 if is_old else 4.5, "tokens": 7, "files": {"audit.jsonl": version}}
    memory = {"optimiser" if is_old else "optimizer": 5}
    documents = {
        "evaluation/after.json": [{"judge": guard, "value": 0.125, "values": [0.0, 0.25]}],
        "estimate.json": {"least_seconds" if is_old else "roofline_seconds": 1.5, "memory": memory},
        "manifest.json": {"created": version, "stages": {"accept": stage}} | ({} if is_old else {"format": 2}),
        "report.json": {"run_dir": version, "filter": {"dropped": {"harmful": {repetition: 1, reason: 2}}}},
        "adapter/adapter_config.json": {"base_model_name_or_path": version, "r": 2},
    }
    for name in (*records, *documents):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, lines in records.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in documents.items():
        (folder / name).write_text(json.dumps(value))
    save_file({"lora_A": torch.arange(6.0).view(2, 3)}, folder / "adapter/adapter_model.safetensors")
    (folder / "report.html").write_text(version)


@pytest.fixture
def runs(tmp_path):
    for version in ("old", "new"):
        write_run(tmp_path / version, version)
    return tmp_path / "old", tmp_path / "new"


def compare(runs, capsys) -> tuple[int, list[str]]:
    """Return the exit status and the lines about files that differ."""
    status = main([str(run) for run in runs])
    *table, summary = capsys.readouterr().out.splitlines()
    differences = [" ".join(line.split()) for line in table if "differs at" in line or "missing in" in line]
    assert summary == f"{len(differences)} of {len(table)} files differ"
    return status, differences


def test_new_names_times_and_versions_are_no_difference(runs, capsys):
    assert compare(runs, capsys) == (0, [])


CHANGES = {
    "a text": ("responses.jsonl", '"t"', '"u"', "line 2, text: 't' in OLD, 'u' in NEW"),
    "a finish reason": ("responses.jsonl", "repetition", "length", "line 2, finish_reason: 'repetition' in OLD"),
    "a text that is no finish reason": ("responses.jsonl", '"loop"', '"repetition"', "line 1, text: 'loop' in OLD"),
    "a probability": ("verdicts.jsonl", "0.25", "0.25000000000000006", "line 1, p_safe: 0.25 in OLD"),
    "a guard's policy": ("verdicts.jsonl", "scope=answer", "scope=both", "line 1, guard: "),
    "an outcome": ("audit.jsonl", "not_needed", "kept", "line 1, attempts.2.outcome: 'not_needed' in OLD"),
    "an additional record": ("audit.jsonl", "\n", "\n{}\n", "line 2: missing in OLD"),
    "a loss": ("training/metrics.jsonl", "0.5", "0.75", "line 1, loss: 0.5 in OLD"),
    "a figure": ("evaluation/after.json", "0.125", "0.5", "1.value: 0.125 in OLD, 0.5 in NEW"),
    "a missing figure": ("evaluation/after.json", "[0.0, 0.25]", "[0.0]", "1.values.2: 0.25 in OLD, missing in NEW"),
    "an expected time": ("estimate.json", "1.5", "1.25", "roofline_seconds: 1.5 in OLD"),
    "a count": ("report.json", '"repetition": 1', '"repetition": 3', "filter.dropped.harmful.repetition: 1 in OLD"),
    "a number of tokens": ("manifest.json", "7", "8", "stages.accept.tokens: 7 in OLD"),
    "a file of a stage": ("manifest.json", "audit.jsonl", "other", "stages.accept.files.1: 'audit.jsonl' in OLD"),
    "a setting": ("recipe.yaml", "scope: think", "scope: both", "guard.members.1.scope: 'think' in OLD"),
    "a setting that is 0": ("recipe.yaml", "max_prompts: null", "max_prompts: 0", "max_prompts: None in OLD"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_value_is_named_with_its_place(runs, capsys, change):
    name, old_text, new_text, difference = CHANGES[change]
    file = runs[1] / name
    assert old_text in file.read_text()
    file.write_text(file.read_text().replace(old_text, new_text))
    status, (line,) = compare(runs, capsys)
    assert status == 1 and line.startswith(f"{name} differs at {difference}")


@pytest.mark.parametrize(
    "change, difference",
    [
        (lambda a: a + torch.tensor([[0, 0, 1e-6], [0, 0, 0]]), "lora_A: 1 of 6 elements"),
        (lambda a: a.bfloat16(), "lora_A: torch.float32 (2, 3) in OLD, torch.bfloat16 (2, 3) in NEW"),
        (lambda a: a.view(3, 2), "lora_A: torch.float32 (2, 3) in OLD, torch.float32 (3, 2) in NEW"),
    ],
    ids=["one bit", "dtype", "shape"],
)
def test_changed_tensor_is_named(runs, capsys, change, difference):
    file = runs[1] / "adapter/adapter_model.safetensors"
    save_file({"lora_A": change(load_file(file)["lora_A"])}, file)
    status, lines = compare(runs, capsys)
    assert (status, lines) == (1, [f"adapter/adapter_model.safetensors differs at {difference}"])


def test_missing_file_is_a_difference(runs, capsys):
    (runs[1] / "audit.jsonl").unlink()
    (runs[0] / "adapter/adapter_model.safetensors").rename(runs[0] / "adapter/model.safetensors")
    status, lines = compare(runs, capsys)
    assert status == 1 and lines == [
        "adapter/adapter_model.safetensors missing in OLD",
        "adapter/model.safetensors missing in NEW",
        "audit.jsonl missing in NEW",
    ]


def test_folder_without_a_recipe_is_an_error(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path), str(runs[1])])
    assert error.value.code == 2 and "not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("old, new", [(1, 1.0), (1, True), (0.0, -0.0), (None, 0), ("1", 1), ([], {})])
def test_values_of_other_types_differ(old, new):
    assert first_difference({"a": old}, {"a": new}) and not first_difference({"a": old}, {"a": old})


def test_nan_equals_itself_and_key_order_does_not_count():
    assert not first_difference({"a": float("nan"), "b": 1}, {"b": 1, "a": float("nan")})
