"""SmolLM2-135M-Instruct: greedy answers equal those of transformers, and its commands work from end to end.

The model has no think block. So all its responses are dropped, and counted; it is trained on given examples.
"""

import json
from collections import Counter

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.real.install import SMOLLM2
from tests.support.small_world import write_jsonl
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Verdict
from thinksafe.model.weights import load_decoder
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request
from thinksafe.text.chat import Chat

pytestmark = pytest.mark.real
NEEDS = (SMOLLM2,)

QUESTIONS = [
    "What is the capital of France?", "How do I fold a paper boat?", "What is 7 + 5?", "Name three colors.",
    "Write a Python function that adds two numbers.", "Pourquoi le ciel est-il bleu ?", "Tell me a joke about boats.",
    "Translate 'good morning' to Spanish.", "What comes after Tuesday?", "List the planets.", "Who wrote Hamlet?",
    "Explain rain to a child.", "What is the opposite of cold?", "Give me a synonym of quick.", "水是什么?",
    "How many legs does a spider have?", "Write a haiku about a red sail.", "Is 17 a prime number?",
    "What do bees make?", "How do I boil an egg?",
]  # fmt: skip
EXAMPLES = [
    {
        "prompt": f"What is {n} + {n}?",
        "response": f"<think>\nTwice {n} is {2 * n}.\n</think>\n\nThe final answer is {2 * n}.",
        "label": "benign",
    }
    for n in range(2, 12)
]
RECIPE = {
    "name": "smollm2",
    "model": str(SMOLLM2),
    "prompts": "prompts.jsonl",
    "guard": {"kind": "oracle"},
    "generation": {"num_unsteered_prompts": 2, "sampling": {"max_tokens": 16}},
    "sampler": {"max_num_seqs": 8, "kv_cache_gib": 0.2},
    "training": {"learning_rate": 3e-3, "batch_size": 5, "epochs": 2},
    "lora": {"dropout": 0.0},
    "evaluation": {
        "sampling": {"temperature": 0.0, "max_tokens": 24},
        "sets": [
            {"name": "sums", "source": "sums.jsonl", "kind": "reasoning"},
            {"name": "boats", "source": "boats.jsonl", "kind": "over_refusal"},
        ],
    },
}


def test_greedy_answers_are_those_of_transformers():
    """Each token, and the end, is the likeliest one after the tokens before it."""
    chat = Chat(SMOLLM2)
    sampling = SamplingConfig(temperature=0, max_tokens=32)
    requests = {text: Request(text, tuple(chat.prompt_ids(text)), sampling, 0, chat.stop_ids) for text in QUESTIONS}
    engine = Engine(load_decoder(SMOLLM2, torch.float32, "cpu"), EngineConfig(max_num_seqs=20, kv_cache_gib=0.3))
    reference = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    answers = {completion.request_id: completion for completion in engine.generate(requests.values())}
    assert answers.keys() == requests.keys()
    for text, answer in answers.items():
        prompt = requests[text].prompt
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *answer.tokens]])).logits[0, len(prompt) - 1 :]
        *likeliest, after_answer = logits.argmax(-1).tolist()
        assert list(answer.tokens) == likeliest
        assert after_answer in chat.stop_ids if answer.finish_reason == "stop" else len(likeliest) == 32
    assert "Paris" in chat.decode(answers[QUESTIONS[0]].tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recipe, prompts, examples and evaluation sets."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    labels = ["harmful", "harmful", "benign", "benign", "benign", "benign"]
    write_jsonl(folder / "prompts.jsonl", [{"text": t, "label": k} for t, k in zip(QUESTIONS, labels, strict=False)])
    write_jsonl(folder / "examples.jsonl", EXAMPLES)
    rows = [{"text": f"What is {n} + {n}?", "answer": str(2 * n), "label": "benign"} for n in (3, 5, 7, 30)]
    write_jsonl(folder / "sums.jsonl", rows)
    write_jsonl(folder / "boats.jsonl", [{"text": text, "label": "benign"} for text in QUESTIONS[:2]])
    return folder


def test_responses_without_a_think_block_are_dropped_and_counted(folder, capsys):
    options = ["--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    assert main(["generate", *options]) == 0
    assert main(["filter", *options]) == 0
    verdicts = list(read_records(folder / "run" / "verdicts.jsonl", Verdict))
    assert len(verdicts) == 6 and {verdict.decision for verdict in verdicts} == {"dropped"}
    assert {verdict.reason for verdict in verdicts} <= {"no_think_block", "truncated"}
    reasons = Counter(verdict.reason for verdict in verdicts)
    printed = capsys.readouterr().err
    assert "harmful 0 of 2" in printed and "benign 0 of 4" in printed
    assert f"no think block {reasons['no_think_block']}" in printed


def test_training_on_given_examples_and_evaluation(folder):
    out = folder / "trained"
    options = ["--recipe", str(folder / "recipe.yaml"), "--out", str(out)]
    assert main(["train", *options, "--data", str(folder / "examples.jsonl")]) == 0
    losses = [json.loads(line)["loss"] for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert main(["evaluate", *options]) == 0
    assert main(["report", *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["training"]["examples"] == 10 and report["training"]["dropped"] == {}
    figures = {figure["name"]: figure for figure in report["sets"]}
    assert figures["sums"]["n"] == 4 and figures["boats"]["n"] == 2
    assert all(0 <= figures["sums"][when] <= 1 for when in ("before", "after"))
