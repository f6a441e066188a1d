"""Tokenization of accepted examples for training: once for all workers and restarts, on all cores."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from thinksafe.data.atomic import atomic_path, sha256
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Example, content_hash
from thinksafe.model.weights import load_config
from thinksafe.recipe.schema import Recipe
from thinksafe.run.checkpoints import CheckpointStore
from thinksafe.run.directory import RunDir, environment
from thinksafe.run.journal import write_on_leader
from thinksafe.text.chat import Chat, parse_response
from thinksafe.training.sequence import TrainingSequence

TOKENIZED_FILE = "tokenized.npz"
_CHUNK_SIZE = 1024
"""Number of examples that are encoded at once."""


def tokenize_once(
    run: RunDir, accepted: Path, checkpoints: CheckpointStore
) -> tuple[list[TrainingSequence], Counter[str]]:
    """Return the result of `tokenize_examples` for a run: the leader writes it to TOKENIZED_FILE, unless it is
    there for the same examples, settings and versions, and all workers read it. They call this together."""
    file = run.path / TOKENIZED_FILE

    def write() -> None:
        settings = [asdict(run.recipe.method), _max_length(run.recipe, checkpoints), environment()]
        key = content_hash([sha256(accepted), checkpoints.chat.fingerprint, json.dumps(settings)])
        if not _is_current(file, key):
            _write(file, key, *tokenize_examples(accepted, run.recipe, checkpoints))

    return _read(write_on_leader(file, run.workers, write))


def tokenize_examples(
    file: Path, recipe: Recipe, checkpoints: CheckpointStore
) -> tuple[list[TrainingSequence], Counter[str]]:
    """Return the examples of a JSONL file as training sequences of the recipe's method, in order, and the number of
    dropped examples by reason.

    Stop tokens at the end of a response are cut off, because `Chat.response_ids` adds the end of the turn. An example
    is dropped if its response has another control token (`control_token`) or a format problem (its code, see
    `parse_response`), or if it has more tokens than `training.max_length` or the model's context
    (`longer_than_N_tokens`). No example is truncated.

    Raises:
        UserError: a line is not an example.
    """
    chat, max_length = checkpoints.chat, _max_length(recipe, checkpoints)
    sequences, dropped, examples = [], Counter(), read_records(file, Example)
    while chunk := list(islice(examples, _CHUNK_SIZE)):
        chunk = [replace(example, response=chat.without_turn_end(example.response)) for example in chunk]
        problems = [_problem(example, chat) for example in chunk]
        well_formed = [example for example, problem in zip(chunk, problems, strict=True) if not problem]
        dropped.update(filter(None, problems))
        chat.encode_ahead((example.prompt, example.response) for example in well_formed)
        for example in well_formed:
            sequence = recipe.method.training_sequence(example, chat)
            if len(sequence) <= max_length:
                sequences.append(sequence)
            else:
                dropped[f"longer_than_{max_length}_tokens"] += 1
    return sequences, dropped


def _problem(example: Example, chat: Chat) -> str | None:
    """Return the reason why the response of an example cannot be trained on, or None."""
    if chat.has_control_token(example.response):
        return "control_token"
    parsed = parse_response(example.response)
    return parsed if isinstance(parsed, str) else None


def _max_length(recipe: Recipe, checkpoints: CheckpointStore) -> int:
    return min(recipe.training.max_length, load_config(checkpoints.base)[0].max_seq_len)


def _write(file: Path, key: str, sequences: Sequence[TrainingSequence], dropped: Counter[str]) -> None:
    """Write sequences with the key of their origin: all ids end to end, and the other fields as columns in JSON."""
    names = [field.name for field in fields(TrainingSequence) if field.name != "input_ids"]
    columns = {name: [getattr(sequence, name) for sequence in sequences] for name in names}
    arrays = {
        "key": np.array(key),
        "input_ids": np.concatenate([np.empty(0, np.int32), *(sequence.input_ids for sequence in sequences)]),
        "lengths": np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        "columns": np.array(json.dumps(columns).encode()),
        "dropped": np.array(json.dumps(dropped).encode()),
    }
    with atomic_path(file) as partial_file, partial_file.open("wb") as stream:
        np.savez(stream, **arrays)


def _is_current(file: Path, key: str) -> bool:
    """Return whether a file exists, is not damaged and has this key."""
    try:
        with np.load(file) as arrays:
            return arrays["key"] == key and arrays.zip.testzip() is None
    except (OSError, ValueError, KeyError, BadZipFile):
        return False


def _read(file: Path) -> tuple[list[TrainingSequence], Counter[str]]:
    """Return what `_write` has written."""
    with np.load(file) as arrays:
        input_ids, lengths = arrays["input_ids"], arrays["lengths"]
        columns, dropped = (json.loads(arrays[name].item()) for name in ("columns", "dropped"))
    ids = np.split(input_ids, lengths.cumsum()[:-1]) if len(lengths) else []
    sequences = [
        TrainingSequence(sequence_ids, **dict(zip(columns, values, strict=True)))
        for sequence_ids, *values in zip(ids, *columns.values(), strict=True)
    ]
    return sequences, Counter(dropped)
