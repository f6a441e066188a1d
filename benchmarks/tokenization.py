"""Tokenization of training examples: on all cores, read from an earlier attempt, and one example after the other.

The texts are random words; the tokenizer is trained on them and splits text as Qwen3's does. The times are wall times
on all cores of the machine, because several cores save no CPU time.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import Row, Sections, add_speedups
from benchmarks.shapes import MODELS
from thinksafe.data.atomic import write_records
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example

CLAIM = "Examples are tokenized on all cores, and once for all workers and restarts."
_NUM_EXAMPLES, _NUM_ROUNDS = 2000, 7
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{%- for turn in messages -%}{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def sections(notes: list[str]) -> Sections:
    """Return the suite's only section.

    Args:
        notes: gets the number of tokens of an example.
    """
    return {"training examples": lambda: _measure(notes)}


def _measure(notes: list[str]) -> list[Row]:
    """Return the number of examples a second of each variant, the best of `_NUM_ROUNDS` in turns."""
    # They need pydantic, which a GPU machine may lack.
    from thinksafe.pipeline.examples import tokenize_examples, tokenize_once
    from thinksafe.recipe.schema import Recipe
    from thinksafe.run.checkpoints import CheckpointStore
    from thinksafe.run.directory import RunDir

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        examples, accepted = _random_examples(), folder / "accepted.jsonl"
        write_records(accepted, examples)
        _write_student(folder, examples)
        recipe = Recipe("tokenization", str(folder))
        run_directory, checkpoints = RunDir(folder, recipe), CheckpointStore(recipe)
        chat, method = checkpoints.chat, recipe.method
        runs: dict[str, Callable[[], object]] = {
            "ThinkSafe": lambda: tokenize_examples(accepted, recipe, checkpoints),
            "ThinkSafe, read by another worker": lambda: tokenize_once(run_directory, accepted, checkpoints),
            "one example after the other": lambda: [
                method.training_sequence(example, chat) for example in read_records(accepted, Example)
            ],
        }
        sequences, _ = tokenize_once(run_directory, accepted, checkpoints)
        rounds = [{variant: _wall_time(run) for variant, run in runs.items()} for _ in range(_NUM_ROUNDS)]
        seconds = {variant: min(times[variant] for times in rounds) for variant in runs}
    num_tokens = sum(map(len, sequences)) / len(sequences)
    notes.append(f"{len(examples):,} examples of {num_tokens:.0f} tokens on average")
    rows = [
        {"variant": variant, "seconds": fastest, "examples/s": len(examples) / fastest}
        for variant, fastest in seconds.items()
    ]
    add_speedups(rows, "examples/s")
    return rows


def _wall_time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _random_examples() -> list[Example]:
    """Return examples of about 500 tokens of random words."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 4000)]

    def text(num_words: int) -> str:
        return " ".join(rng.choice(words, num_words)) + "."

    return [
        Example(
            text(20), f"<think>\n{text(rng.integers(150, 350))}\n</think>\n\n{text(rng.integers(80, 150))}", "benign"
        )
        for _ in range(_NUM_EXAMPLES)
    ]


def _write_student(folder: Path, examples: list[Example]) -> None:
    """Write config.json of Qwen3-0.6B and a tokenizer, without weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([example.response for example in examples[:500]], trainer)
    control_tokens = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens([*control_tokens, AddedToken("<think>"), AddedToken("</think>")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=_TEMPLATE
    ).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MODELS["qwen3-0.6b"]))
