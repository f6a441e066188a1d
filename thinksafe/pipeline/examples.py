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
    """Return the examples of a JSONL file as training sequences, and the number of dropped examples by reason.

    An example is dropped if its response has a problem (the reason is the code of `parse_response`), or if it has more
    tokens than `training.max_length` or the model's context (`longer_than_N_tokens`). No example is truncated. If
    `training.benign_loss` is `kl`, benign examples have the KL loss.

    Raises:
        UserError: a line is not an example.
    """
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
    """Return an example as a training sequence: prompt ids, then response ids, of which only the latter have a loss.

    The sequence has the cross-entropy loss, the example's weight, and its prompt id as its name.

    Raises:
        ValueError: the response has a problem, see `parse_response`.
    """
    prompt = chat.prompt_ids(example.prompt)
    ids = np.array(prompt + chat.response_ids(example.response), dtype=np.int32)
    return TrainingSequence(ids, len(prompt), example.prompt_id, example.weight)
