"""Tokenization of accepted examples for training: once for all workers and restarts, on all cores."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
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
from thinksafe.text.chat import Chat
from thinksafe.training.sequence import LateLosses, PreferencePair, SafetySpan, TrainingItem, TrainingSequence

TOKENIZED_FILE = "tokenized.npz"
_CHUNK_SIZE = 1024
"""Number of examples that are encoded at once."""
_ITEM_KINDS = {kind.__name__: kind for kind in (TrainingSequence, PreferencePair, LateLosses, SafetySpan)}


def tokenize_once(run: RunDir, accepted: Path, checkpoints: CheckpointStore) -> tuple[list[TrainingItem], Counter[str]]:
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
) -> tuple[list[TrainingItem], Counter[str]]:
    """Return the examples of a JSONL file as training sequences of the recipe's method, in order, and the number of
    dropped examples by reason.

    Stop tokens at the end of a response are cut off, because `Chat.response_ids` adds the end of the turn. An example
    is dropped if its response has another control token (`control_token`), if the method cannot use it (the reason is
    the message of the error that `Method.training_sequence` raises), or if it has more tokens than
    `training.max_length` or the model's context (`longer_than_N_tokens`). No example is truncated.

    Raises:
        UserError: a line is not an example.
    """
    chat, max_length = checkpoints.chat, _max_length(recipe, checkpoints)
    items, dropped, examples = [], Counter(), read_records(file, recipe.method.example_type)
    while chunk := list(islice(examples, _CHUNK_SIZE)):
        chunk = [replace(example, response=chat.without_turn_end(example.response)) for example in chunk]
        chat.encode_ahead((example.prompt, example.response) for example in chunk)
        for example in chunk:
            if isinstance(item := _training_item(example, recipe, chat, max_length), str):
                dropped[item] += 1
            else:
                items.append(item)
    return items, dropped


def _training_item(example: Example, recipe: Recipe, chat: Chat, max_length: int) -> TrainingItem | str:
    """Return an example as a training item, or the reason why it is dropped; see `tokenize_examples`."""
    if chat.has_control_token(example.response):
        return "control_token"
    try:
        item = recipe.method.training_sequence(example, chat)
    except ValueError as problem:
        return str(problem)
    return item if len(item) <= max_length else f"longer_than_{max_length}_tokens"


def _max_length(recipe: Recipe, checkpoints: CheckpointStore) -> int:
    return min(recipe.training.max_length, load_config(checkpoints.base)[0].max_seq_len)


def _write(file: Path, key: str, items: Sequence[TrainingItem], dropped: Counter[str]) -> None:
    """Write items with the key of their origin: all ids end to end, and everything else as JSON."""
    input_ids = [np.empty(0, np.int32)]
    described = [_describe(item, input_ids) for item in items]
    arrays = {
        "key": np.array(key),
        "input_ids": np.concatenate(input_ids),
        "items": np.array(json.dumps(described).encode()),
        "dropped": np.array(json.dumps(dropped).encode()),
    }
    with atomic_path(file) as partial_file, partial_file.open("wb") as stream:
        np.savez(stream, **arrays)


def _describe(value: Any, input_ids: list[np.ndarray]) -> Any:
    """Return an item, or a field of one, as JSON values: an array as its length, after it is appended to
    `input_ids`."""
    if isinstance(value, np.ndarray):
        input_ids.append(value)
        return len(value)
    if isinstance(value, tuple):
        return [_describe(entry, input_ids) for entry in value]
    if is_dataclass(value):
        described = {name: _describe(field, input_ids) for name, field in vars(value).items()}
        return described | {"kind": type(value).__name__}
    return value


def _is_current(file: Path, key: str) -> bool:
    """Return whether a file exists, is not damaged and has this key."""
    try:
        with np.load(file) as arrays:
            return arrays["key"] == key and arrays.zip.testzip() is None
    except (OSError, ValueError, KeyError, BadZipFile):
        return False


def _read(file: Path) -> tuple[list[TrainingItem], Counter[str]]:
    """Return what `_write` has written."""
    with np.load(file) as arrays:
        input_ids = arrays["input_ids"]
        described, dropped = (json.loads(arrays[name].item()) for name in ("items", "dropped"))
    end = 0

    def restore(value: Any) -> Any:
        nonlocal end
        if isinstance(value, list):
            return tuple(map(restore, value))
        if not isinstance(value, dict):
            return value
        fields = {}
        for name, field in value.items():
            if name == "input_ids":
                end += field
                fields[name] = input_ids[end - field : end]
            elif name != "kind":
                fields[name] = restore(field)
        return _ITEM_KINDS[value["kind"]](**fields)

    return [restore(item) for item in described], Counter(dropped)
