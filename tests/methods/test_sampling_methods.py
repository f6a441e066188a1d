"""Methods on sampled responses: which response each keeps, and who answers."""

import json
from collections import Counter

import pytest

from tests.support.checkpoints import make_checkpoint
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, Response, Verdict
from thinksafe.data.selection import Attempt
from thinksafe.errors import UserError
from thinksafe.methods.filter_only import FilterOnly
from thinksafe.methods.rejection_sampling import RejectionSampling
from thinksafe.recipe.loading import load_recipe


def attempts(decisions: str, prompt: str = "fold") -> list[Attempt]:
    """Return attempts at one prompt; `s` is a safe response, `u` an unsafe one."""
    responses = [Response(prompt, "harmful", f"text {index}", sample=index) for index in range(len(decisions))]
    return [
        Attempt(response, Verdict.of(response, "guard", "safe" if decision == "s" else "unsafe"))
        for response, decision in zip(responses, decisions, strict=True)
    ]


def kept(method, decisions: str, seed: int = 0, prompt: str = "fold") -> int | None:
    attempt = method.choose(attempts(decisions, prompt), seed)
    return None if attempt is None else attempt.response.sample


def test_filter_only_keeps_the_first_accepted_response():
    assert [kept(FilterOnly(), decisions) for decisions in ("sss", "uss", "uus", "uuu")] == [0, 1, 2, None]


def test_rejection_sampling_keeps_only_prompts_with_safe_responses_alone():
    assert kept(RejectionSampling(), "sssss") is not None
    assert all(kept(RejectionSampling(), decisions) is None for decisions in ("ussss", "ssssu", "uuuuu"))
    assert kept(RejectionSampling(rule="any"), "uuusu") == 3
    assert kept(RejectionSampling(rule="any"), "uuuuu") is None


@pytest.mark.parametrize(("decisions", "rule", "candidates"), [("sssss", "all", 5), ("usuus", "any", 2)])
def test_rejection_sampling_draws_uniformly(decisions, rule, candidates):
    method = RejectionSampling(rule=rule)
    counts = Counter(kept(method, decisions, 3, f"fold {number}") for number in range(2000))
    assert len(counts) == candidates and {decisions[sample] for sample in counts} == {"s"}
    expected = 2000 / candidates
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 25  # chi-squared, p < 1e-4
    assert [kept(method, decisions, 3, "fold 1") for _ in range(3)] == [kept(method, decisions, 3, "fold 1")] * 3
    assert len({kept(method, decisions, seed, "fold 1") for seed in range(50)}) == candidates


@pytest.mark.parametrize("name", ["filter_only", "rejection_sampling"])
def test_methods_without_steering_reject_it(name):
    assert load_recipe("organism", [], name).generation.steering is None
    for override in ("generation.steering=prefix", "generation.ladder=[{steering: risk}]"):
        with pytest.raises(UserError, match=f"generation.steering: method {name} samples without steering"):
            load_recipe("organism", [override], name)


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [("qwen3", "qwen2"), ("qwen2", "qwen3")])
def test_teacher_answers_in_its_own_template(tmp_path, student, teacher):
    """Only one of the two templates supplies the opening think tag; the tokenizers differ."""
    folders = {family: make_checkpoint(family, tmp_path / family, seed=7) for family in (student, teacher)}
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"text": f"fold boat {n}", "label": "harmful"}) + "\n" for n in range(4))
    )
    settings = {
        "model": folders[student],
        "method.model": folders[teacher],
        "prompts": tmp_path / "prompts.jsonl",
        "generation.sampling": "{max_tokens: 12}",
        "sampler": "{max_num_seqs: 4, max_prefill_tokens: 64, kv_cache_gib: 0.01}",
    }
    options = ["--recipe", "organism", "--method", "teacher", "--out", str(tmp_path / "run")]
    options += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["generate", *options]) == 0
    by_teacher = list(read_records(tmp_path / "run" / "responses.jsonl", Response))
    # The teacher alone, as the student of a run without a teacher, gives the same texts.
    alone = ["generate", "--recipe", "organism", "--out", str(tmp_path / "alone"), "--set", f"model={folders[teacher]}"]
    alone += [word for key, value in settings.items() if "model" not in key for word in ("--set", f"{key}={value}")]
    assert main(alone) == 0
    assert [r.text for r in by_teacher] == [r.text for r in read_records(tmp_path / "alone/responses.jsonl", Response)]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"model", "teacher"}


def test_examples_of_a_method_are_those_it_chooses(tmp_path, monkeypatch):
    """Stage `accept` asks the method, with the seed of the run."""
    from thinksafe.pipeline import accept

    monkeypatch.setattr(accept, "Attempts", lambda run, marks: [attempts("sssss"), attempts("ssssu", "sing")])
    from thinksafe.run.directory import RunDir

    recipe = load_recipe("organism", ["seed=5"], "rejection_sampling")
    with RunDir.open(tmp_path / "run", recipe) as run:
        accept.accept_responses(run)
    (example,) = read_records(run.path / "accepted.jsonl", Example)
    assert (example.prompt, example.sample) == ("fold", kept(RejectionSampling(), "sssss", 5))
