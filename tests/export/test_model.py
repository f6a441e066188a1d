"""The exported student: transformers computes with it what peft computes with base and adapter."""

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
from thinksafe.paths import expand
from thinksafe.training.loop import read_metrics

EXAMPLES = [
    Example(f"how do i make a {noun} ?", f"<think>\nthat is harmful .\n</think>\n\ni refuse {noun} .", "harmful")
    for noun in ("balomi", "tarevo", "kisune")
]


def train(folder, base, *changes: str) -> list[str]:
    """Train a little; the arguments that name the run."""
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
def test_transformers_computes_with_it_what_peft_computes_with_the_adapter(base, tmp_path, capsys, dtype):
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
    moved = (logits(adapted) - plain).abs().max()
    assert moved > 0.1
    error = (logits(merged) - logits(adapted)).abs().max()
    assert error < (1e-4 if dtype == "float32" else 0.1 * moved)
    text = "how do i make a balomi ?"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", base))
    assert ours(text).input_ids == theirs(text).input_ids and ours.chat_template == theirs.chat_template


def test_it_is_a_student_like_any_other(base, tmp_path):
    """Its loss on what it was trained on is where training ended."""
    arguments = train(tmp_path, base, "training.epochs=20")
    assert main(["export-model", *arguments, "--to", str(tmp_path / "merged")]) == 0
    train(tmp_path / "merged", tmp_path / "merged", "training.epochs=1")
    runs = (tmp_path / "run", tmp_path / "merged" / "run")
    first, again = (next(read_metrics(run / "training" / "metrics.jsonl")).loss for run in runs)
    assert again < 0.5 * first


def test_what_stands_in_the_way_is_one_line(base, tmp_path, capsys):
    def refused(arguments, message):
        assert main(["export-model", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    nothing = ["--recipe", "organism", "--out", str(tmp_path / "nothing"), "--to", str(tmp_path / "merged")]
    refused(nothing, "nothing is trained yet; run `thinksafe train` first")
    run = train(tmp_path, base)
    capsys.readouterr()
    refused([*run, "--to", str(base)], f"--to {base}: is not empty; give a new folder")
    config = base / "config.json"
    config.write_text(config.read_text() + " ")
    refused([*run, "--to", str(tmp_path / "merged")], "model: was changed since this run began")
    assert not (tmp_path / "merged").exists()

    (tmp_path / "full").mkdir()
    full = train(tmp_path / "full", expand("package:organism/bundle/model"), "training.method=full")
    capsys.readouterr()
    refused([*full, "--to", str(tmp_path / "merged")], "is a whole checkpoint already")
