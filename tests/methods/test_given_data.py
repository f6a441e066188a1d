"""Methods that train on given data sets: which rows become which examples, and what a data set must have."""

import json

import numpy as np
import pytest

from tests.support.checkpoints import make_checkpoint
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import Row, read_records
from thinksafe.data.records import Example, content_id
from thinksafe.errors import UserError
from thinksafe.methods.direct_refusal import DirectRefusal
from thinksafe.methods.safechain import SafeChain
from thinksafe.methods.safepath import SafePath
from thinksafe.methods.sft import Sft
from thinksafe.methods.star1 import Star1
from thinksafe.pipeline import load_examples
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.directory import RunDir
from thinksafe.text.chat import Chat

RESPONSE = "<think>\nhm .\n</think>\n\nno ."


def example_of(method, **values) -> Example | str:
    return method.example_of(Row("row 1", values))


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("Question: fold a boat?\nAnswer: I would rather not.", "fold a boat?", "I would rather not."),
        ("question:fold\na boat \n\n answer:  no .  ", "fold\na boat", "no ."),
        ("Question: what is Answer: for?\nAnswer: nothing", "what is", "for?\nAnswer: nothing"),
    ],
)
def test_direct_refusal_has_one_thought(text, prompt, answer):
    example = example_of(DirectRefusal(), refusal=text)
    assert (example.prompt, example.label) == (prompt, "harmful")
    assert example.response == f"<think>\nI should not answer this question!\n</think>\n\n{answer}"


@pytest.mark.parametrize("text", ["fold a boat", "Question: fold", "Question:  Answer: no", "Question: fold Answer:  "])
def test_direct_refusal_leaves_out_other_texts(text):
    assert example_of(DirectRefusal(), refusal=text) == "no_question_and_answer"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (RESPONSE, RESPONSE),
        ("hm .\n</think>\nno .", RESPONSE),
        ("<think>hm .</think>no .\n", RESPONSE),
        ("<think>\nhm .", "no_think_block"),
        ("no .", "no_think_block"),
        ("hm .\n</think>\nno .</think>", "nested_think"),
        ("<think>\nhm .\n</think>\n", "empty_answer"),
    ],
)
def test_reasoning_becomes_one_closed_think_block(response, expected):
    for method, values in [
        (SafeChain(), {"instruction": "fold", "label": "vanilla_harmful"}),
        (Star1(), {"question": "fold"}),
        (Sft(source="x"), {"prompt": "fold", "label": "harmful"}),
    ]:
        example = example_of(method, response=response, **values)
        assert example == (Example("fold", expected, "harmful") if "\n" in expected else expected)


def test_label_is_the_row_s():
    assert example_of(SafeChain(), instruction="a", response=RESPONSE, label="adversarial_benign").label == "benign"
    with pytest.raises(UserError, match="row 1: 'label' must be harmful or benign"):
        example_of(SafeChain(), instruction="a", response=RESPONSE, label="other")


@pytest.mark.parametrize("value", [None, 3, "", " \n"])
def test_column_without_text_names_the_row(value):
    with pytest.raises(UserError, match=r"row 1: 'question' must be a text, found"):
        example_of(Star1(), question=value, response=RESPONSE)


def test_safepath_takes_the_prompt_of_the_row_s_kind():
    rows = [
        {"data_type": "vanilla_harmful", "vanilla": "fold", "adversarial": ""},
        {"data_type": "adversarial_harmful", "vanilla": "fold", "adversarial": "in a play , fold"},
        {"data_type": "adversarial_benign", "vanilla": "", "adversarial": "in a play , sing"},
        {"data_type": "other", "vanilla": "", "adversarial": ""},
    ]
    primer = SafePath().primer
    assert [example_of(SafePath(), **row) for row in rows] == [
        Example("fold", primer, "harmful"),
        Example("in a play , fold", primer, "harmful"),
        "benign_prompt",
        "unknown_data_type",
    ]


def test_safepath_selects_the_same_prompts_in_any_order():
    examples = [Example(f"fold boat {number}", "p", "harmful") for number in range(50)]
    chosen = {example.prompt_id for example in SafePath(max_examples=7).select(examples)}
    assert chosen == {example.prompt_id for example in SafePath(max_examples=7).select(examples[::-1])}
    assert chosen == set(sorted(content_id("harmful", example.prompt) for example in examples)[:7])


@pytest.mark.parametrize(("family", "supplies_think"), [("qwen3", False), ("qwen2", True), ("llama", False)])
def test_safepath_trains_the_primer_and_nothing_after_it(tmp_path, family, supplies_think):
    chat = Chat(make_checkpoint(family, tmp_path / family))
    assert chat.supplies_think == supplies_think
    sequence = SafePath().training_sequence(Example("fold a boat", SafePath().primer, "harmful"), chat)
    ids = sequence.input_ids.tolist()
    assert ids[: sequence.num_prompt_tokens] == chat.prompt_ids("fold a boat")
    targets = ids[sequence.num_prompt_tokens :]
    # An end of turn after the primer would teach the model to stop there, and a closing tag to think no further.
    assert not set(targets) & set(chat.stop_ids)
    opening = "" if supplies_think else "<think>\n"
    assert chat.tokenizer.decode(targets) == opening + SafePath().primer


def write_rows(file, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(tmp_path, name, rows) -> RunDir:
    write_rows(tmp_path / "rows.jsonl", rows)
    recipe = load_recipe("organism", [f"method.source={tmp_path / 'rows.jsonl'}"], name)
    with RunDir.open(tmp_path / "run", recipe) as run:
        load_examples(run)
    return run


def test_stage_writes_examples_and_counts_what_it_leaves_out(tmp_path, capsys):
    rows = [{"question": f"q {number}", "response": RESPONSE, "other": 1} for number in range(5)]
    run = load(tmp_path, "star1", [*rows, {"question": "r", "response": "<think>open"}])
    assert [example.prompt for example in read_records(run.path / "accepted.jsonl", Example)] == [
        f"q {number}" for number in range(5)
    ]
    stage = run.manifest["stages"]["load"]
    assert stage["records"] == 5 and stage["dropped"] == {"no_think_block": 1}
    printed = capsys.readouterr().err
    assert "6 rows of" in printed and "1 x no_think_block" in printed
    assert "the published data set of method star1 has 1,000 rows" in printed


def test_missing_column_names_the_row_and_the_columns(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl: line 1: no column response; there are answer, question"):
        load(tmp_path, "star1", [{"question": "q", "answer": "a"}])


def test_changed_examples_are_noticed(tmp_path):
    run = load(tmp_path, "star1", [{"question": "q", "response": RESPONSE}])
    (run.path / "accepted.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="was changed since stage 'load' wrote it"):
        load_examples(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["star1", "safepath"])
def test_whole_run_on_a_given_data_set(tmp_path, name):
    """`thinksafe run` trains on the data set, evaluates and reports, without sampling a training response."""
    prompts = [f"please tell me about the zibber {number}" for number in range(6)]
    rows = {
        "star1": [{"question": prompt, "response": RESPONSE} for prompt in prompts],
        "safepath": [{"data_type": "vanilla_harmful", "vanilla": prompt, "adversarial": ""} for prompt in prompts],
    }[name]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--recipe", "organism", "--method", name, "--out", str(tmp_path / "run")]
    for override in [f"method.source={tmp_path / 'rows.jsonl'}", "evaluation.sets=[]", "training.steps=3"]:
        options += ["--set", override]
    assert main(["run", *options]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["examples"] == 6 and report["training"]["steps"] == 3
    assert [stage["name"] for stage in report["stages"]] == ["load", "train"]
    assert main(["run", *options]) == 0  # nothing is done again
    assert not np.any([file.name.startswith("responses") for file in (tmp_path / "run").iterdir()])
