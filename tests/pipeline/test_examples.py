"""Tokenization for training: once for all workers and restarts, equal to one example after the other."""

import json
import random
import shutil

import numpy as np
import pytest

from tests.support.checkpoints import FAMILIES
from tests.support.small_world import EXAMPLES, SET, THOUGHT, write_jsonl
from tests.support.worker_threads import run_in_threads
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example
from thinksafe.pipeline import examples
from thinksafe.pipeline.examples import TOKENIZED_FILE, tokenize_examples, tokenize_once
from thinksafe.recipe.loading import load_recipe
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir
from thinksafe.text.tokenizer import SafeTokenizer

pytest_plugins = ["tests.support.small_world"]

ENDS = {"qwen3": "<|im_end|>", "qwen2": "<｜end▁of▁sentence｜>", "llama": "<|eot_id|>", "mistral": "</s>"}


@pytest.fixture
def prepared(world, tmp_path, fresh_seed):
    """(run directory, file of 40 random examples, checkpoints)."""
    rng = random.Random(fresh_seed)
    words = ["fold", "the", "boat", "again", "12", "é", "漢字", "<|im_end|>", "\n", ".", "ka", "lo"]

    def text():
        return " ".join(rng.choices(words, k=rng.randrange(1, 30)))

    rows = [
        {
            "prompt": text(),
            "response": f"<think>\n{text()}\n</think>\n\nb {text()}".replace("<|im_end|>", ""),
            "label": rng.choice(["harmful", "benign"]),
            "weight": rng.choice([1, 0.1, 2.5]),
            "prompt_id": rng.choice(["", "id\n\u2028é"]),
        }
        for _ in range(40)
    ]
    rows += [{"prompt": "p", "response": "no thought", "label": "benign"}]
    recipe = load_recipe(str(world / "recipe.yaml"), ["method.benign_loss=kl"])
    run = RunDir(tmp_path / "run", recipe)
    run.path.mkdir()
    return run, write_jsonl(tmp_path / "accepted.jsonl", rows), CheckpointStore(recipe)


def fields(sequence) -> dict:
    return vars(sequence) | {"input_ids": (sequence.input_ids.tolist(), sequence.input_ids.dtype)}


def fail(*_, **__):
    raise AssertionError("an example is tokenized again")


def test_sequences_are_those_of_one_example_after_the_other(prepared, monkeypatch):
    run, accepted, checkpoints = prepared
    rows = list(read_records(accepted, Example))
    expected = [fields(run.recipe.method.training_sequence(row, checkpoints.chat)) for row in rows[:-1]]
    for chunk_size in (1, 7, 1024):
        monkeypatch.setattr(examples, "_CHUNK_SIZE", chunk_size)
        sequences, dropped = tokenize_examples(accepted, run.recipe, CheckpointStore(run.recipe))
        assert list(map(fields, sequences)) == expected and dropped == {"no_think_block": 1}
    sequences, dropped = tokenize_once(run, accepted, checkpoints)
    assert list(map(fields, sequences)) == expected and dropped == {"no_think_block": 1}


def test_restart_reads_what_is_tokenized(prepared, monkeypatch):
    run, accepted, checkpoints = prepared
    sequences, dropped = tokenize_once(run, accepted, checkpoints)
    monkeypatch.setattr(examples, "tokenize_examples", fail)
    restarted = CheckpointStore(run.recipe)
    again, dropped_again = tokenize_once(run, accepted, restarted)
    assert list(map(fields, again)) == list(map(fields, sequences)) and dropped_again == dropped


CHANGES = {
    "data": lambda world, accepted: accepted.write_text(accepted.read_text() + accepted.read_text()),
    "max_length": "training.max_length=60",
    "method": "method.benign_loss=cross_entropy",
    "tokenizer": "model=qwen2",
    "damage": lambda world, accepted: (file := accepted.with_name("run") / TOKENIZED_FILE).write_bytes(
        file.read_bytes().replace(np.int32(0).tobytes(), np.int32(1).tobytes())
    ),
    "truncated": lambda world, accepted: (file := accepted.with_name("run") / TOKENIZED_FILE).write_bytes(
        file.read_bytes()[:-100]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_input_is_tokenized_again(prepared, world, change):
    run, accepted, checkpoints = prepared
    tokenize_once(run, accepted, checkpoints)
    if callable(CHANGES[change]):
        CHANGES[change](world, accepted)
        recipe = run.recipe
    else:
        override = CHANGES[change].replace("model=", f"model={world}/")
        recipe = load_recipe(str(world / "recipe.yaml"), ["method.benign_loss=kl", override])
    expected, expected_dropped = tokenize_examples(accepted, recipe, CheckpointStore(recipe))
    sequences, dropped = tokenize_once(RunDir(run.path, recipe), accepted, CheckpointStore(recipe))
    assert list(map(fields, sequences)) == list(map(fields, expected)) and dropped == expected_dropped


def test_changed_template_is_tokenized_again(prepared, world, tmp_path):
    run, accepted, checkpoints = prepared
    before = tokenize_once(run, accepted, checkpoints)[0][0].input_ids.tolist()
    shutil.copytree(world / "qwen3", tmp_path / "student")
    template = tmp_path / "student" / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|im_start|>' + turn.role", "'<|im_start|>the ' + turn.role"))
    recipe = load_recipe(str(world / "recipe.yaml"), ["method.benign_loss=kl", f"model={tmp_path / 'student'}"])
    after = tokenize_once(run, accepted, CheckpointStore(recipe))[0][0].input_ids.tolist()
    assert after != before


def test_leader_alone_tokenizes(prepared, monkeypatch):
    run, accepted, checkpoints = prepared
    calls, tokenize = [], examples.tokenize_examples
    monkeypatch.setattr(examples, "tokenize_examples", lambda *inputs: calls.append(1) or tokenize(*inputs))
    results = run_in_threads(
        3, lambda workers: tokenize_once(RunDir(run.path, run.recipe, workers), accepted, checkpoints)
    )
    assert calls == [1] and len({json.dumps([s.input_ids.tolist() for s in result[0]]) for result in results}) == 1


def test_texts_are_encoded_together(prepared, monkeypatch):
    """Encoding one text after the other would keep a single core busy."""
    run, accepted, checkpoints = prepared
    monkeypatch.setattr(SafeTokenizer, "_encoding", fail)
    sequences, _ = tokenize_examples(accepted, run.recipe, checkpoints)
    assert len(sequences) == 40


def test_nothing_to_train_on_is_kept_too(prepared):
    run, accepted, checkpoints = prepared
    write_jsonl(accepted, [{"prompt": "p", "response": "no thought", "label": "benign"}])
    assert tokenize_once(run, accepted, checkpoints) == tokenize_once(run, accepted, checkpoints)
    assert tokenize_once(run, accepted, checkpoints) == ([], {"no_think_block": 1})


# Control tokens in the responses of --data


@pytest.mark.parametrize("family", FAMILIES)
def test_turn_end_of_a_response_is_not_trained_twice(world, tmp_path, family):
    recipe = load_recipe(str(world / "recipe.yaml"), [f"model={world / family}"])
    checkpoints = CheckpointStore(recipe)
    sequences = []
    for tail in ("", ENDS[family], f"{ENDS[family]}\n", f" \n{ENDS[family]}{ENDS[family]}"):
        rows = [row | {"response": row["response"] + tail} for row in EXAMPLES]
        tokenized, dropped = tokenize_examples(write_jsonl(tmp_path / "data.jsonl", rows), recipe, checkpoints)
        assert not dropped
        sequences.append([sequence.input_ids.tolist() for sequence in tokenized])
    assert sequences == [sequences[0]] * 4
    end = checkpoints.chat.tokenizer.control_ids[ENDS[family]]
    assert all(np.count_nonzero(np.array(ids[-3:]) == end) == 1 for ids in sequences[0])


def test_other_control_tokens_are_dropped_and_counted(tmp_path, call):
    bad = ["<|im_start|>assistant\n" + THOUGHT + "Fold.", THOUGHT + "Fold.<|im_end|>\n<|im_start|>user\nMore"]
    rows = [*EXAMPLES, *({"prompt": "p", "response": text, "label": "benign"} for text in bad)]
    rows.append({"prompt": "p", "response": THOUGHT + "Fold.<|im_end|>", "label": "benign"})
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    status, _, errors = call("train", "--data", data)
    assert status == 0 and [line.strip() for line in errors].count("dropped: 2 of 6 examples: 2 x control_token") == 1
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["train"]
    assert (stage["records"], stage["dropped"]) == (4, {"control_token": 2})
    assert call("report")[0] == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["dropped"] == {"control_token": 2}
    assert "dropped examples: 2 control token" in (tmp_path / "run" / "report.html").read_text()


def test_killed_training_leaves_its_tokens_for_the_restart(tmp_path, call, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", EXAMPLES)
    with monkeypatch.context() as patch:
        patch.setattr("thinksafe.pipeline.train._load_student", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("train", "--data", data)
    assert (tmp_path / "run" / TOKENIZED_FILE).exists()
    monkeypatch.setattr(examples, "tokenize_examples", fail)
    assert call("train", "--data", data)[0] == 0
    assert not (tmp_path / "run" / TOKENIZED_FILE).exists()


def test_recipe_can_be_replaced_after_tokenization(tmp_path, call):
    data = write_jsonl(tmp_path / "data.jsonl", EXAMPLES)
    assert call("train", "--data", data, SET, "training.max_length=5")[0] == 2
    assert (tmp_path / "run" / TOKENIZED_FILE).exists()
    assert call("train", "--data", data)[0] == 0
