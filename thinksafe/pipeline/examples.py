"""Tokenization of accepted examples for training."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example
from thinksafe.model.weights import load_config
from thinksafe.recipe.schema import Recipe
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.text.chat import Chat, parse_response
from thinksafe.training.packing import TrainingSequence


def tokenize_examples(
    file: Path, recipe: Recipe, checkpoints: CheckpointStore
) -> tuple[list[TrainingSequence], Counter[str]]:
    """Return the tokenized examples, and the number of dropped examples by reason. No example is truncated."""
    max_length = min(recipe.training.max_length, load_config(checkpoints.base)[0].max_seq_len)
    sequences, dropped = [], Counter()
    for example in read_records(file, Example):
        problem = parse_response(example.response)
        if isinstance(problem, str):
            dropped[problem] += 1
            continue
        sequence = tokenize_example(checkpoints.chat, example)
        if recipe.training.benign_loss == "kl" and example.label == "benign":
            sequence = replace(sequence, use_reference_kl=True)
        if len(sequence) > max_length:
            dropped[f"longer_than_{max_length}_tokens"] += 1
        else:
            sequences.append(sequence)
    return sequences, dropped


def tokenize_example(chat: Chat, example: Example) -> TrainingSequence:
    """Return prompt ids followed by response ids; the loss covers the response ids only."""
    prompt = chat.prompt_ids(example.prompt)
    ids = np.array(prompt + chat.response_ids(example.response), dtype=np.int32)
    return TrainingSequence(ids, len(prompt), example.prompt_id, example.weight)
