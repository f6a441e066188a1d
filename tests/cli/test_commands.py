"""The commands: each stage works alone, on checkpoints of every model family. Oracles: peft and transformers."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.checkpoints import FAMILIES, make_checkpoint
from tests.support.small_world import EXAMPLES, ROWS, SET, THOUGHT, call, world, write_jsonl
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, Response, Verdict
from thinksafe.data.sources import load_prompts
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import load_decoder

__all__ = ["call", "world"]  # fixtures


def read(file, kind):
    return list(read_records(file, kind))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", ["prompts.jsonl", "prompts.parquet"])
def test_generate_alone(world, tmp_path, call, family, prompts):
    out = tmp_path / "run"
    status, printed, _ = call("generate", "--prompts", world / prompts, "--set", f"model={world / family}")
    assert status == 0 and printed.strip() == str(out / "responses.jsonl")
    responses = read(out / "responses.jsonl", Response)
    assert sorted((r.prompt, r.label) for r in responses) == sorted(
        (row["instruction"], "harmful" if "harmful" in row["label"] else "benign") for row in ROWS
    )
    assert {r.label: r.steering for r in responses} == {"harmful": "prefix", "benign": None}
    assert all(0 < r.num_tokens <= 12 or r.finish_reason == "stop" for r in responses)
    assert all(r.num_prompt_tokens > 10 for r in responses)
    assert {r.prompt_id for r in responses} == {prompt.id for prompt in list(load_prompts(str(out / "prompts.jsonl")))}
    (probed,) = read(out / "unsteered.jsonl", Response)
    assert probed.label == "harmful" and probed.steering is None


def test_repeated_prompts_are_dropped_and_counted(tmp_path, call):
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(json.dumps({"text": "hm", "label": label}) + "\n" for label in ("benign", "benign")))
    status, _, errors = call("generate", "--prompts", twice)
    assert status == 0 and len(read(tmp_path / "run" / "responses.jsonl", Response)) == 1
    warning = f"prompts: dropped 1 with the same text and label as an earlier prompt, first {twice}: line 2"
    assert warning in "\n".join(errors)


def test_seed_determines_the_responses(tmp_path, call):
    responses_of_run = []
    for number, seed in enumerate((0, 0, 1)):
        assert call("generate", "--seed", seed)[0] == 0
        responses_of_run.append(sorted(read(tmp_path / "run" / "responses.jsonl", Response), key=lambda r: r.prompt_id))
        (tmp_path / "run").rename(tmp_path / str(number))
    assert responses_of_run[0] == responses_of_run[1]
    assert [r.text for r in responses_of_run[0]] != [r.text for r in responses_of_run[2]]


def test_several_samples_of_a_prompt_differ(tmp_path, call):
    status, _, errors = call("generate", "--set", "generation.samples=3", "--set", "max_prompts=2")
    assert status == 0
    responses = read(tmp_path / "run" / "responses.jsonl", Response)
    shared = r" generate: prefix caching shared ([\d,]+) prompt tokens, 0 preemptions"
    (shared_tokens,) = re.findall(shared, "\n".join(errors))
    in_full_pages = sum((r.num_prompt_tokens - 1) // 16 * 16 for r in responses if r.sample)
    assert in_full_pages <= int(shared_tokens.replace(",", "")) < sum(r.num_prompt_tokens for r in responses)
    assert Counter(r.sample for r in responses) == {0: 2, 1: 2, 2: 2}
    assert len({r.text for r in responses}) == len({r.seed for r in responses}) == 6


def test_unfinished_responses_are_counted_at_once(world, tmp_path, call, monkeypatch):
    """One model gives NaN for a token of one prompt, another repeats itself from the first token on."""

    def poisoned(folder: Path, *options) -> Decoder:
        decoder = load_decoder(folder, *options)
        broken = AutoTokenizer.from_pretrained(folder)("Z", add_special_tokens=False)["input_ids"][-1]
        with torch.no_grad():
            decoder.embedding[broken] = torch.nan
        return decoder

    prompts = write_jsonl(tmp_path / "prompts.jsonl", [*ROWS, {"text": "Fold a Z.", "label": "benign"}])
    with monkeypatch.context() as patch:
        patch.setattr("thinksafe.run.checkpoints.load_decoder", poisoned)
        status, _, errors = call("generate", "--prompts", prompts, "--set", f"model={world / 'llama'}")
    ends = Counter(response.finish_reason for response in read(tmp_path / "run" / "responses.jsonl", Response))
    assert status == 0 and ends["nan"] == 1 and ends["length"] >= 2
    message = f"{5 - ends['stop']} of 5 responses are unfinished: {ends['length']} at the token limit"
    assert f"generate: {message}, 1 stopped because of NaN logits" in "\n".join(errors)

    model = shutil.copytree(world / "qwen3", tmp_path / "without context")
    (file,) = model.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
    save_file(weights, file, metadata={"format": "pt"})
    sampling = "{temperature: 0, max_tokens: 200, stop_on_repetition: true}"
    options = ["--set", f"model={model}", "--set", f"generation.sampling={sampling}"]
    status, _, errors = call("generate", *options, "--out", tmp_path / "loops")
    assert status == 0 and "4 of 4 responses are unfinished: 4 stopped because of repetition" in "\n".join(errors)


def test_too_long_prompt_is_an_error_before_sampling(tmp_path, call):
    long = {"text": "word " * 3000, "label": "harmful"}
    status, _, errors = call("generate", "--prompts", write_jsonl(tmp_path / "p.jsonl", [ROWS[0], long]))
    assert status == 2 and len(errors) == 1
    assert "'word word" in errors[0] and "is longer than the context" in errors[0] and "511 fit" in errors[0]
    assert (tmp_path / "run" / "responses.jsonl.partial").read_text() == ""
    assert call("generate", "--prompts", write_jsonl(tmp_path / "p.jsonl", [ROWS[0]]))[0] == 0
    status, _, errors = call("generate", "--set", "sampler.kv_cache_gib=2e-5", "--out", tmp_path / "small")
    assert status == 2 and re.search(r"longer than the page cache: .*; raise sampler.kv_cache_gib$", errors[-1])


def test_filter_alone(world, tmp_path, call):
    status, printed, _ = call("filter", "--responses", world / "responses.jsonl")
    out = tmp_path / "run"
    assert status == 0 and printed.strip() == str(out / "accepted.jsonl")
    responses = read(world / "responses.jsonl", Response)
    verdicts = {(v.prompt_id, v.sample): v for v in read(out / "verdicts.jsonl", Verdict)}
    assert verdicts.keys() == {(r.prompt_id, r.sample) for r in responses} and len(responses) == 4
    for response in responses:
        verdict = verdicts[response.prompt_id, response.sample]
        if response.text == "No thought.":
            assert (verdict.decision, verdict.reason, verdict.p_safe) == ("dropped", "no_think_block", None)
        else:
            assert verdict.decision == ("safe" if verdict.p_safe > verdict.p_unsafe else "unsafe")
            assert verdict.reason == ("" if verdict.decision == "safe" else "unsafe")
    safe = {key for key, verdict in verdicts.items() if verdict.decision == "safe"}
    accepted = read(out / "accepted.jsonl", Example) if safe else []
    assert Counter((e.prompt, e.response) for e in accepted) == Counter(
        (r.prompt, r.text) for r in responses if (r.prompt_id, r.sample) in safe
    )


def test_guard_without_verdicts_accepts_nothing(world, tmp_path, call):
    unsure = ["--set", "guard.min_verdict_probability=0.5"]
    assert call("filter", "--responses", world / "responses.jsonl", *unsure)[0] == 0
    verdicts = read(tmp_path / "run" / "verdicts.jsonl", Verdict)
    assert Counter((v.decision, v.reason) for v in verdicts) == {
        ("unknown", "no_verdict"): 3,
        ("dropped", "no_think_block"): 1,
    }
    assert (tmp_path / "run" / "accepted.jsonl").read_text() == ""
    status, _, errors = call("train", *unsure)
    assert status == 2 and len(errors) == 1 and "no response was accepted" in errors[0]
    assert call("report", *unsure)[0] == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["filter"]["dropped"] == {
        "benign": {"no_verdict": 2},
        "harmful": {"no_verdict": 1, "no_think_block": 1},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_train_alone_writes_an_adapter_that_peft_loads(world, tmp_path, call, family):
    status, printed, _ = call("train", "--data", world / "examples.jsonl", "--set", f"model={world / family}")
    adapter = tmp_path / "run" / "adapter"
    assert status == 0 and printed.strip() == str(adapter)
    model = AutoModelForCausalLM.from_pretrained(world / family)
    tuned = peft.PeftModel.from_pretrained(model, adapter)
    assert tuned.peft_config["default"].r == 2
    assert all(parameter.abs().max() > 0 for name, parameter in tuned.named_parameters() if "lora_B" in name)
    assert not (tmp_path / "run" / "training" / "checkpoints").exists()


def test_too_long_examples_are_dropped_and_counted(world, tmp_path, call):
    long = {"prompt": "Fold it.", "response": THOUGHT + "Once more. " * 200, "label": "benign"}
    data = write_jsonl(tmp_path / "data.jsonl", [*EXAMPLES, long])
    status, _, errors = call("train", "--data", data, SET, "training.max_length=200")
    assert status == 0 and any(
        line.strip() == "dropped: 1 of 4 examples: 1 x longer_than_200_tokens" for line in errors
    ), errors
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["train"]
    assert (stage["records"], stage["dropped"]) == (3, {"longer_than_200_tokens": 1})
    assert not any("dropped" in line for line in call("train", "--data", data, SET, "training.max_length=200")[2])


def test_full_fine_tuning_changes_every_weight_and_the_responses(world, tmp_path, call):
    full = ["--set", "training.method=full"]
    status, printed, _ = call("train", "--data", world / "examples.jsonl", *full)
    folder = tmp_path / "run" / "model"
    assert status == 0 and printed.strip() == str(folder)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (world / "qwen3", folder))
    changed = [not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(changed)
    assert not (tmp_path / "run" / "adapter").exists()
    assert (folder / "chat_template.jinja").exists()
    assert call("evaluate", *full)[0] == 0
    texts = [
        [r.text for r in sorted(read(file, Response), key=lambda r: (r.prompt_id, r.sample))]
        for moment in ("before", "after")
        for file in [tmp_path / "run" / "evaluation" / moment / "refusal.responses.jsonl"]
    ]
    assert texts[0] != texts[1]


def test_adapter_of_another_run_is_evaluated(world, tmp_path, call):
    assert call("train", "--data", world / "examples.jsonl")[0] == 0
    (tmp_path / "run").rename(tmp_path / "trained")
    status, printed, _ = call("evaluate", "--adapter", tmp_path / "trained" / "adapter")
    assert status == 0 and "before" in printed and "after" in printed and printed.rstrip().endswith("report.html")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    sets = {row["name"]: row for row in report["sets"]}
    assert sets.keys() == {"harm", "refusal", "sums"}
    assert (sets["harm"]["n"], sets["refusal"]["samples"], sets["sums"]["n"]) == (4, 2, 2)
    responses = read(tmp_path / "run" / "evaluation" / "after" / "sums.responses.jsonl", Response)
    assert {r.prompt for r in responses} == {"What is 1 + 1?", "What is 2 + 1?"}
    assert {r.steering for r in responses} == {"Think. {prompt}"}
    assert call("report", recipe=False)[0] == 0


def test_adapter_is_rejected_for_another_base_of_its_shape(world, tmp_path, call):
    other = make_checkpoint("qwen3", tmp_path / "other", seed=1)
    assert call("train", "--data", world / "examples.jsonl")[0] == 0
    adapter = (tmp_path / "run").rename(tmp_path / "trained") / "adapter"
    status, _, (error,) = call("evaluate", "--adapter", adapter, "--set", f"model={other}")
    assert status == 2 and f"this adapter was trained on {world / 'qwen3'}, and {other} holds other weights" in error
    assert not (tmp_path / "run" / "evaluation").exists()
    (adapter / "base.json").unlink()
    assert call("evaluate", "--adapter", adapter, "--set", f"model={other}")[0] == 0


def test_evaluation_does_not_mix_two_adapters(world, tmp_path, call):
    for number in (1, 2):
        assert call("train", "--data", world / "examples.jsonl", "--seed", number)[0] == 0
        (tmp_path / "run").rename(tmp_path / f"trained{number}")
    adapter, other_adapter = (tmp_path / f"trained{number}" / "adapter" for number in (1, 2))
    small = ["--set", "evaluation.sets=[{name: a, source: %s, kind: reasoning}]" % (world / "questions.jsonl")]
    assert call("evaluate", "--adapter", adapter, *small)[0] == 0
    assert call("evaluate", "--adapter", adapter, *small)[0] == 0
    status, _, errors = call("evaluate", "--adapter", other_adapter, *small)
    assert status == 2 and len(errors) == 1 and "other weights" in errors[0]


def test_recipe_prints_a_recipe_that_runs(tmp_path, call):
    status, printed, errors = call("recipe", SET, "training.epochs=7", out=False)
    assert status == 0 and errors == []
    assert "# Passes over the examples. Default: 3\n  epochs: 7\n" in printed
    (tmp_path / "mine.yaml").write_text(printed)
    assert call("generate", "--recipe", tmp_path / "mine.yaml", recipe=False)[0] == 0
    assert "model: Qwen/Qwen3-0.6B" in call("recipe", recipe=False, out=False)[1]
