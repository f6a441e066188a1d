"""SafeKey: the tokens of the key sentence and of the summary are exactly those of the data set's characters."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.checkpoints import make_checkpoint
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import Row
from thinksafe.errors import UserError
from thinksafe.methods.safekey import KeySentenceExample, SafeKey
from thinksafe.recipe.loading import load_recipe
from thinksafe.text.chat import Chat
from thinksafe.training.sequence import LateLosses

SUMMARY, KEY, REST = "Okay, the user wants a boat.", " I should not fold it.", " So I explain why."
RESPONSE = f"<think>\n{SUMMARY}{KEY}{REST}\n</think>\n\nNo boat."
START = len("<think>\n")
ROW = {
    "question": "How do I fold a boat?",
    "response": RESPONSE,
    "source": "alert",
    "summary_end_idx": START + len(SUMMARY),
    "next_sentence_end_idx": START + len(SUMMARY) + len(KEY),
}


def example_of(**changes) -> KeySentenceExample | str:
    return SafeKey(source="x").example_of(Row("row 3", ROW | changes))


def items(chat, example) -> LateLosses:
    return SafeKey(source="x").training_sequence(example, chat)


def test_benign_rows_are_the_rewritten_ones():
    assert example_of().label == "harmful"
    assert example_of(source="4o_rewrite").label == "benign"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"response": "<think>open"}, "no_think_block"),
        ({"summary_end_idx": START}, "no_key_sentence"),  # no summary
        ({"next_sentence_end_idx": ROW["summary_end_idx"]}, "no_key_sentence"),
        ({"next_sentence_end_idx": len(RESPONSE)}, "no_key_sentence"),  # beyond the thought
    ],
)
def test_rows_without_a_key_sentence_are_left_out(changes, expected):
    assert example_of(**changes) == expected


@pytest.mark.parametrize("value", [None, "12", 12.5, True])
def test_index_of_another_kind_names_the_row(value):
    with pytest.raises(UserError, match="row 3: summary_end_idx and next_sentence_end_idx must be whole numbers"):
        example_of(summary_end_idx=value)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "mistral"])
def test_tokens_are_those_of_the_characters(tmp_path, family):
    """A mask that is one token late, or that begins a token early, gives another text."""
    chat = Chat(make_checkpoint(family, tmp_path / family))
    item = items(chat, example_of())
    full, key = item.late
    start, span = full.num_prompt_tokens, full.safety_span
    assert full.input_ids.tolist() == item.early.input_ids.tolist() and item.early.safety_span is None
    assert chat.tokenizer.decode(key.input_ids[key.num_prompt_tokens :].tolist()).strip() == KEY.strip()
    assert chat.decode(full.input_ids[span.start : span.end].tolist()) == f"<think>\n{SUMMARY}"
    # The pass without the prompt ends with the key sentence.
    assert key.input_ids.tolist() == full.input_ids[start : start + len(key)].tolist()
    assert (span.start, span.end) == (start, start + key.num_prompt_tokens)


def test_tokens_cover_the_key_sentence_for_any_cut(tmp_path):
    """Cut at any character, also inside a word: the trained tokens hold each character of the key sentence, and all but
    the first token begin inside it."""
    chat = Chat(make_checkpoint("qwen3", tmp_path / "qwen3"))
    rng = np.random.default_rng(3)
    think_end = RESPONSE.index("\n</think>")
    for _ in range(60):
        first, end = sorted(rng.choice(np.arange(START + 1, think_end), 2, replace=False).tolist())
        _, key = items(chat, example_of(summary_end_idx=first, next_sentence_end_idx=end)).late
        before = len(chat.decode(key.input_ids[: key.num_prompt_tokens].tolist()))
        until = len(chat.decode(key.input_ids.tolist()))
        one_less = len(chat.decode(key.input_ids[:-1].tolist()))
        one_more = len(chat.decode(key.input_ids[: key.num_prompt_tokens + 1].tolist()))
        assert before <= first < one_more and one_less < end <= until


def test_losses_have_the_published_weights(tmp_path):
    chat = Chat(make_checkpoint("qwen3", tmp_path / "qwen3"))
    full, key = items(chat, example_of()).late
    assert (full.weight, full.is_in_mean, full.safety_span.weight, full.safety_span.is_harmful) == (1, True, 0.2, True)
    assert (key.weight, key.is_in_mean, key.safety_span) == (0.2, False, None)
    benign, _ = items(chat, example_of(source="4o_rewrite")).late
    assert not benign.safety_span.is_harmful  # with one label alone the heads would learn nothing


def test_data_set_must_be_named():
    with pytest.raises(UserError, match=r"method\.source: missing; download .*sft_mix_2k.* eric-ai-lab/SafeKey"):
        load_recipe("qwen3-0.6b", [], "safekey")


def test_mean_over_each_example_is_required():
    with pytest.raises(UserError, match=r"training\.loss_reduction: method safekey needs sequence"):
        load_recipe("organism", ["method.source=x", "training.loss_reduction=token"], "safekey")


@pytest.mark.slow
@pytest.mark.parametrize("training", ["lora", "full"])
def test_whole_run_saves_the_student_without_heads(tmp_path, training):
    rows = [ROW | {"question": f"fold {n}", "source": "4o_rewrite" if n % 2 else "alert"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"method.source": tmp_path / "rows.jsonl", "evaluation.sets": "[]", "training.epochs": 3}
    settings |= {"training.method": training, "training.batch_size": 2}

    def losses_of(out, **changes) -> list[float]:
        options = [word for key, value in (settings | changes).items() for word in ("--set", f"{key}={value}")]
        assert main(["run", "--recipe", "organism", "--method", "safekey", "--out", str(out), *options]) == 0
        return [json.loads(line)["loss"] for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]

    out = tmp_path / "run"
    losses = losses_of(out)
    without = losses_of(tmp_path / "without", **{"method.key_weight": 0, "method.head_weight": 0})
    assert len(losses) == 9 and losses[:3] == without[:3]  # the first of three epochs has no further losses
    assert losses[3] > without[3] + 0.1  # the heads alone add about 0.2 log 2 to an example
    file = out / "adapter" / "adapter_model.safetensors" if training == "lora" else out / "model" / "model.safetensors"
    assert not any("safety" in name for name in load_file(file))
