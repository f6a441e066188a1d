"""Which recipe may resume which run."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from thinksafe.errors import UserError
from thinksafe.recipe.loading import check_recipe
from thinksafe.recipe.schema import Recipe
from thinksafe.sampler.engine import OF_MEMORY as SAMPLING_ROOM
from thinksafe.sampler.engine import EngineConfig
from thinksafe.training.loop import OF_MEMORY as TRAINING_ROOM

T = TypeVar("T")


def may_be_corrected(recipe_file: Path) -> bool:
    """Whether the recipe was written here by us, and no stage has written anything after it."""
    files = {file.name for file in recipe_file.parent.rglob("*") if file.is_file() and file.stat().st_size > 0}
    written = (recipe_file.name, "prompts.jsonl", "estimate.json")
    inputs = {".lock", *written, *(f"{name}.partial" for name in written)}
    if "prompts.jsonl" not in files:
        inputs |= {"responses.jsonl", "marks.jsonl"}  # not sampled here, but taken in with --responses
    if "verdicts.jsonl" not in files:
        inputs.add("accepted.jsonl")  # likewise with --data
    there = recipe_in(recipe_file)
    return files <= inputs and there is not None and recipe_file.read_text(encoding="utf-8") == there.to_yaml()


def recipe_in(file: Path) -> Recipe | None:
    try:
        return check_recipe(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    except (yaml.YAMLError, UnicodeDecodeError, UserError):
        return None


def check_same_recipe(recipe_file: Path, recipe: Recipe) -> None:
    """What may be another: the room that sampling, judging and training take, how training is sharded, and who watches
    it. That changes nothing of what comes out."""
    there = recipe_in(recipe_file)
    differing = "its recipe.yaml cannot be read"
    rooms = {"sampler": _room(recipe.sampler), "guard.sampler": _room(recipe.guard.sampler), "training": TRAINING_ROOM}
    if there is not None:
        judging = _taking(there.guard.sampler, recipe.guard.sampler, rooms["guard.sampler"])
        there = replace(
            there,
            sampler=_taking(there.sampler, recipe.sampler, rooms["sampler"]),
            guard=replace(there.guard, sampler=judging),
            training=_taking(there.training, recipe.training, rooms["training"]),
            zero=recipe.zero,
            trackers=recipe.trackers,
        )
        if there == recipe:
            return
        ours, theirs = _flat(asdict(recipe)), _flat(asdict(there))
        values = ((key, ours.get(key, "nothing"), theirs.get(key, "nothing")) for key in ours | theirs)
        differing = next(f"{key}: {here}, there {other}" for key, here, other in values if here != other)
    free = ", ".join(f"{section}.{{{', '.join(names)}}}" for section, names in rooms.items())
    raise UserError(
        f"--out {recipe_file.parent}: belongs to a run with another recipe ({differing}); give another folder, into "
        "which --responses and --data take records over, or the same recipe, but for what changes no result: "
        f"{free}, zero and trackers"
    )


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """A recipe's plain values by their keys, such as `training.epochs`; an entry of a list by its number."""
    if isinstance(value, tuple):
        value = dict(enumerate(value, start=1))
    if not isinstance(value, dict):
        return {place: value}
    return {
        key: plain
        for name, entry in value.items()
        for key, plain in _flat(entry, f"{place}.{name}" if place else str(name)).items()
    }


def _room(sampler: EngineConfig) -> list[str]:
    """Sums over another number of processes have other last digits, which batch-invariant responses must not have."""
    return [name for name in SAMPLING_ROOM if not (sampler.batch_invariant and name == "tensor_parallel")]


def _taking(section: T, other: T, names: Iterable[str]) -> T:
    """A section of a recipe with some settings of another's."""
    return replace(section, **{name: getattr(other, name) for name in names})
