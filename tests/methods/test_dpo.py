"""DPO on own responses: which pairs are made of a run, and what they are trained as."""

import json

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.instant_run import instant_checkpoints, instant_sampling
from thinksafe import pipeline
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response
from thinksafe.errors import UserError
from thinksafe.methods.dpo import Dpo, PreferenceExample
from thinksafe.paths import expand_path
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir
from thinksafe.text.chat import Chat


def write_prompts(file, num_harmful: int, num_benign: int) -> None:
    prompts = [("harmful", n) for n in range(num_harmful)] + [("benign", n) for n in range(num_benign)]
    file.write_text("".join(json.dumps({"text": f"{label} {n}", "label": label}) + "\n" for label, n in prompts))


def test_pairs_are_prompts_with_a_safe_steered_and_an_unsafe_unsteered_response(tmp_path, monkeypatch):
    """The guard of this test rejects unsteered responses to even prompts and steered ones to prompt 3."""

    def is_safe(response: Response) -> bool:
        number = int(response.prompt.split()[1])
        return number != 3 if response.steering else number % 2 == 1

    write_prompts(tmp_path / "prompts.jsonl", 8, 3)
    recipe = load_recipe("organism", [f"prompts={tmp_path / 'prompts.jsonl'}"], "dpo")
    monkeypatch.setattr("thinksafe.pipeline.generate.checkpoint_fingerprint", lambda base: "")
    with RunDir.open(tmp_path / "run", recipe) as run, instant_sampling():
        pipeline.make_examples(run, instant_checkpoints(is_safe))
    examples = list(read_records(run.path / "accepted.jsonl", PreferenceExample))
    assert sorted(example.prompt for example in examples) == [f"harmful {n}" for n in (0, 2, 4, 6)]
    unsteered = list(read_records(run.path / "unsteered.jsonl", Response))
    assert len(unsteered) == 8  # all harmful prompts
    for example in examples:
        assert example.response != example.rejected and example.rejected.endswith("None")  # sampled without steering


def test_a_pair_has_the_same_prompt_and_two_whole_responses(tmp_path):
    chat = Chat(make_checkpoint("qwen3", tmp_path / "qwen3"))
    texts = [f"<think>\nhm .\n</think>\n\n{answer} ." for answer in ("no", "yes , here is the boat")]
    example = PreferenceExample("fold", texts[0], "harmful", weight=2.0, rejected=texts[1])
    pair = Dpo(beta=0.3).training_sequence(example, chat)
    prompt = chat.prompt_ids("fold")
    for half, text in zip(pair.sequences, texts, strict=True):
        assert half.input_ids.tolist() == prompt + chat.response_ids(text)
        assert half.num_prompt_tokens == len(prompt)
    assert (pair.beta, pair.chosen.weight, pair.name) == (0.3, 2.0, example.prompt_id)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.method=full", r"training\.method: method dpo needs lora"),
        ("generation.steering=null", r"generation: method dpo needs steered and unsteered responses"),
        ("generation.num_unsteered_prompts=0", r"generation: method dpo needs steered and unsteered responses"),
        ("method.beta=0", r"method\.beta: must be above 0"),
    ],
)
def test_contradicting_setting_is_an_error(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("organism", [override], "dpo")


@pytest.mark.slow
def test_whole_run_trains_on_pairs(tmp_path):
    lines = expand_path(load_recipe("organism").prompts).read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join([line for line in lines if '"harmful"' in line][:8]))
    settings = {"prompts": tmp_path / "prompts.jsonl", "evaluation.sets": "[]", "training.epochs": 6}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "run"
    assert main(["run", "--recipe", "organism", "--method", "dpo", "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["examples"] == 8
    losses = [loss for _, loss in report["training"]["loss"]]
    assert losses[0] == pytest.approx(0.693, abs=0.01) and losses[-1] < 0.5
