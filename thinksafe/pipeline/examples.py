"""Tokenization of accepted examples for training."""

from collections import Counter
from pathlib import Path

from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example
from thinksafe.model.weights import load_config
from thinksafe.recipe.schema import Recipe
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.text.chat import parse_response
from thinksafe.training.sequence import TrainingSequence


def tokenize_examples(
    file: Path, recipe: Recipe, checkpoints: CheckpointStore
) -> tuple[list[TrainingSequence], Counter[str]]:
    """Return the examples of a JSONL file as training sequences of the recipe's method, and the number of dropped
    examples by reason.

    An example is dropped if its response has a problem (the reason is the code of `parse_response`), or if it has more
    tokens than `training.max_length` or the model's context (`longer_than_N_tokens`). No example is truncated.

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
        sequence = recipe.method.training_sequence(example, checkpoints.chat)
        if len(sequence) > max_length:
            dropped[f"longer_than_{max_length}_tokens"] += 1
        else:
            sequences.append(sequence)
    return sequences, dropped
