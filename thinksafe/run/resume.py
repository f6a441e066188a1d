"""Decisions on which recipe may resume which run."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from thinksafe.errors import UserError
from thinksafe.recipe.loading import check_recipe
from thinksafe.recipe.schema import Recipe
from thinksafe.sampler.engine import EngineConfig
from thinksafe.training.loop import TrainingConfig

T = TypeVar("T")


def is_recipe_replaceable(recipe_file: Path) -> bool:
    """Return whether ThinkSafe wrote this recipe.yaml and no stage has written to its run directory.

    Imported records, a finished prompts.jsonl and estimate.json do not count as written by a stage.
    """
    files = {file.name for file in recipe_file.parent.rglob("*") if file.is_file() and file.stat().st_size > 0}
    before_stages = (recipe_file.name, "prompts.jsonl", "estimate.json")
    inputs = {".lock", *before_stages, *(f"{name}.partial" for name in before_stages)}
    if "prompts.jsonl" not in files:
        inputs |= {"responses.jsonl", "marks.jsonl"}  # imported with --responses, not sampled here
    if "verdicts.jsonl" not in files:
        inputs.add("accepted.jsonl")  # imported with --data
    recorded = read_recipe(recipe_file)
    return files <= inputs and recorded is not None and recipe_file.read_text(encoding="utf-8") == recorded.to_yaml()


def read_recipe(file: Path) -> Recipe | None:
    """Return the recipe in a file, or None if it is not valid for this version of ThinkSafe.

    Raises:
        OSError: the file does not exist or cannot be opened.
    """
    try:
        return check_recipe(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    except (yaml.YAMLError, UnicodeDecodeError, UserError):
        return None


def check_same_recipe(recipe_file: Path, recipe: Recipe) -> None:
    """Check that a recipe may resume the run of the recorded recipe; return nothing.

    Memory limits, ZeRO sharding and trackers may change, since they do not affect results.

    Args:
        recipe_file: recipe.yaml in the run directory.
        recipe: the recipe of this launch.

    Raises:
        UserError: another setting differs, or the recorded recipe cannot be read.
    """
    recorded = read_recipe(recipe_file)
    difference = "its recipe.yaml cannot be read by this version of ThinkSafe"
    memory_only = {
        "sampler": memory_only_fields(recipe.sampler),
        "guard.sampler": memory_only_fields(recipe.guard.sampler),
        "training": TrainingConfig.MEMORY_ONLY_FIELDS,
    }
    if recorded is not None:
        guard_sampler = with_fields_of(recorded.guard.sampler, recipe.guard.sampler, memory_only["guard.sampler"])
        recorded = replace(
            recorded,
            sampler=with_fields_of(recorded.sampler, recipe.sampler, memory_only["sampler"]),
            guard=replace(recorded.guard, sampler=guard_sampler),
            training=with_fields_of(recorded.training, recipe.training, memory_only["training"]),
            zero=recipe.zero,
            trackers=recipe.trackers,
        )
        if recorded == recipe:
            return
        new_values, old_values = _flatten(asdict(recipe)), _flatten(asdict(recorded))
        keys = new_values | old_values
        values = ((key, new_values.get(key, "nothing"), old_values.get(key, "nothing")) for key in keys)
        difference = next(
            f"{key}: {_yaml_text(new)} instead of {_yaml_text(old)}" for key, new, old in values if new != old
        )
    free_settings = ", ".join(f"{section}.{{{', '.join(names)}}}" for section, names in memory_only.items())
    raise UserError(
        f"--out {recipe_file.parent}: belongs to a run with another recipe ({difference}); use the same recipe, or a "
        "new --out folder with --responses or --data to import records. Only these settings may change: "
        f"{free_settings}, zero and trackers"
    )


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return a recipe's plain values by dotted key, such as `training.epochs`.

    Elements of a tuple are numbered from 0, as in the errors of a recipe; an empty tuple or dict has no key.

    Args:
        value: nested dicts and tuples of plain values.
        key: dotted key of `value` itself.
    """
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    return {
        plain_key: plain_value
        for name, entry in value.items()
        for plain_key, plain_value in _flatten(entry, f"{key}.{name}" if key else str(name)).items()
    }


def _yaml_text(value: Any) -> str:
    """Return a plain value as a recipe spells it: null, true and false; a text without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value)


def memory_only_fields(sampler: EngineConfig) -> list[str]:
    """Return the names of a sampler's settings that may change when a run resumes, since they only affect memory.

    These are `EngineConfig.MEMORY_ONLY_FIELDS`, without `tensor_parallel_size` in batch-invariant mode, because it
    changes the order of summation.
    """
    fixed = {"tensor_parallel_size"} if sampler.batch_invariant else set()
    return [name for name in EngineConfig.MEMORY_ONLY_FIELDS if name not in fixed]


def with_fields_of(section: T, other: T, names: Iterable[str]) -> T:
    """Return a copy of `section` in which the settings `names` have the values that they have in `other`."""
    return replace(section, **{name: getattr(other, name) for name in names})
