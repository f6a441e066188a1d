"""The exported student: transformers computes the same logits as PEFT with base model and adapter."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.checkpoints import make_checkpoint
from thinksafe.cli.__main__ import main
from thinksafe.data.jsonl import to_json
from thinksafe.data.records import Example
from thinksafe.paths import expand_path
from thinksafe.training.metrics import read_metrics

EXAMPLES = [
    Example(f"how do i make a {noun} ?", f"<think>\nthat is harmful .\n</think>\n\ni refuse {noun} .", "harmful")
    for noun in ("balomi", "tarevo", "kisune")
]


def train(folder, base, *changes: str) -> list[str]:
    """Train for a few steps, and return the arguments that name the run."""
    data = folder / "data.jsonl"
    data.write_text("".join(to_json(example) + "\n" for example in EXAMPLES))
    settings = [f"model={base}", "training.learning_rate=0.02", "training.epochs=4", "training.batch_size=2", *changes]
    run = ["--recipe", "organism", "--out", str(folder / "run")]
    run += [word for setting in settings for word in ("--set", setting)]
    assert main(["train", *run, "--data", str(data)]) == 0
    return run


@pytest.fixture
def base(tmp_path):
    return make_checkpoint("qwen3", tmp_path / "base")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_student_has_the_logits_of_the_peft_adapter(base, tmp_path, capsys, dtype):
    if dtype == "bfloat16":
        file, config = base / "model.safetensors", base / "config.json"
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": dtype}))
    run = train(tmp_path, base)
    capsys.readouterr()
    assert main(["export-model", *run, "--to", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.arange(5, 25)[None]).logits.float()

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
    change = (logits(adapted) - plain).abs().max()
    assert change > 0.1
    error = (logits(merged) - logits(adapted)).abs().max()
    assert error < (1e-4 if dtype == "float32" else 0.1 * change)
    text = "how do i make a balomi ?"
    merged_tokenizer, base_tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", base))
    assert (
        merged_tokenizer(text).input_ids == base_tokenizer(text).input_ids
        and merged_tokenizer.chat_template == base_tokenizer.chat_template
    )


def test_merged_student_can_be_trained_further(base, tmp_path):
    """Its first loss is well below the first loss of the base model."""
    arguments = train(tmp_path, base, "training.epochs=20")
    assert main(["export-model", *arguments, "--to", str(tmp_path / "merged")]) == 0
    train(tmp_path / "merged", tmp_path / "merged", "training.epochs=1")
    runs = (tmp_path / "run", tmp_path / "merged" / "run")
    first_loss, second_loss = (next(read_metrics(run / "training" / "metrics.jsonl")).loss for run in runs)
    assert second_loss < 0.5 * first_loss


def test_impossible_export_is_a_one_line_error(base, tmp_path, capsys):
    def assert_fails(arguments, message):
        assert main(["export-model", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    untrained = ["--recipe", "organism", "--out", str(tmp_path / "untrained"), "--to", str(tmp_path / "merged")]
    assert_fails(untrained, "nothing is trained yet; run `thinksafe train` first")
    run = train(tmp_path, base)
    capsys.readouterr()
    assert_fails([*run, "--to", str(base)], f"--to {base}: is not empty; use a new folder")
    config = base / "config.json"
    config.write_text(config.read_text() + " ")
    assert_fails([*run, "--to", str(tmp_path / "merged")], "model: was changed since this run began")
    assert not (tmp_path / "merged").exists()

    (tmp_path / "full").mkdir()
    full = train(tmp_path / "full", expand_path("package:organism/bundle/model"), "training.method=full")
    capsys.readouterr()
    assert_fails([*full, "--to", str(tmp_path / "merged")], "is already a whole checkpoint")
