"""Tokenize accepted examples for training."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example
from thinksafe.model.weights import load_config
from thinksafe.recipe.schema import Recipe
from thinksafe.run.checkpoints import Models
from thinksafe.text.chat import Chat, parse_response
from thinksafe.training.packing import TrainingSequence


def training_sequences(file: Path, recipe: Recipe, models: Models) -> tuple[list[TrainingSequence], Counter[str]]:
    """The examples as tokens, and how many were dropped for which reason. Nothing is cut."""
    limit = min(recipe.training.max_length, load_config(models.base)[0].max_seq_len)
    sequences, dropped = [], Counter()
    for example in read_records(file, Example):
        problem = parse_response(example.response)
        if isinstance(problem, str):
            dropped[problem] += 1
            continue
        sequence = training_sequence(models.chat, example)
        if recipe.training.benign_loss == "kl" and example.label == "benign":
            sequence = replace(sequence, keeps_to_reference=True)
        if len(sequence) > limit:
            dropped[f"longer_than_{limit}_tokens"] += 1
        else:
            sequences.append(sequence)
    return sequences, dropped


def training_sequence(chat: Chat, example: Example) -> TrainingSequence:
    """Return prompt ids followed by response ids; the loss covers the response ids only."""
    prompt = chat.prompt_ids(example.prompt)
    ids = np.array(prompt + chat.response_ids(example.response), dtype=np.int32)
    return TrainingSequence(ids, len(prompt), example.prompt_id, example.weight)
