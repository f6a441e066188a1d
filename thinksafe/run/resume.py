"""Decisions on which recipe may resume which run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from thinksafe.errors import UserError
from thinksafe.recipe.loading import check_recipe
from thinksafe.recipe.schema import Recipe
from thinksafe.sampler.config import EngineConfig
from thinksafe.training.config import TrainingConfig


def is_recipe_replaceable(recipe_file: Path) -> bool:
    """Return whether ThinkSafe wrote this recipe.yaml and no stage has written to its run directory.

    Imported records, a finished prompts.jsonl, tokenized examples and estimate.json do not count as written by a stage.
    """
    files = {file.name for file in recipe_file.parent.rglob("*") if file.is_file() and file.stat().st_size > 0}
    before_stages = (recipe_file.name, "prompts.jsonl", "estimate.json", "tokenized.npz")
    inputs = {".lock", *before_stages, *(f"{name}.partial" for name in before_stages)}
    if "prompts.jsonl" not in files:
        inputs |= {"responses.jsonl", "marks.jsonl"}  # imported with --responses, not sampled here
    if "verdicts.jsonl" not in files:
        inputs.add("accepted.jsonl")  # imported with --data
    recorded = read_recipe(recipe_file)
    return files <= inputs and recorded is not None and recipe_file.read_text(encoding="utf-8") == recorded.to_yaml()


def read_recipe(file: Path) -> Recipe | None:
    """Return the recipe in a file, or None if it is not valid for this version of ThinkSafe."""
    try:
        return check_recipe(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    except (yaml.YAMLError, UnicodeDecodeError, UserError):
        return None


def check_same_recipe(recipe_file: Path, recipe: Recipe) -> None:
    """Raise a UserError if a recipe may not resume the run of the recorded recipe.

    Memory limits, ZeRO sharding and trackers may change, since they do not affect results.
    """
    recorded, difference = read_recipe(recipe_file), "its recipe.yaml cannot be read by this version of ThinkSafe"
    free_keys = {
        "sampler": memory_only_fields(recipe.sampler),
        "guard.sampler": memory_only_fields(recipe.guard.sampler),
        "training": TrainingConfig.MEMORY_ONLY_FIELDS,
    }
    free_names = [*(f"{section}.{name}" for section, names in free_keys.items() for name in names), "zero", "trackers"]
    if recorded is not None:
        new, old = _flatten(asdict(recipe)), _flatten(asdict(recorded))
        values = {key: (new.get(key, "nothing"), old.get(key, "nothing")) for key in new | old}
        changes = [
            f"{key}: {_yaml_text(new_value)} instead of {_yaml_text(old_value)}"
            for key, (new_value, old_value) in values.items()
            if new_value != old_value and not any(f"{key}.".startswith(f"{name}.") for name in free_names)
        ]
        if not changes:
            return
        difference = changes[0]
    free_settings = ", ".join(f"{section}.{{{', '.join(names)}}}" for section, names in free_keys.items())
    raise UserError(
        f"--out {recipe_file.parent}: belongs to a run with another recipe ({difference}); use the same recipe, or a "
        "new --out folder with --responses or --data to import records. Only these settings may change: "
        f"{free_settings}, zero and trackers"
    )


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return the plain values in nested dicts and tuples by dotted key, such as `evaluation.sets.0.name`; an empty dict
    or tuple has no key."""
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flatten(entry, f"{key}.{name}" if key else str(name))
    return flat


def _yaml_text(value: Any) -> str:
    """Return a plain value as a recipe spells it: null, true and false; a text without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value)


def memory_only_fields(sampler: EngineConfig) -> list[str]:
    """Return the names of a sampler's settings that may change when a run resumes. `tensor_parallel_size` changes the
    order of summation, so it may not in batch-invariant mode."""
    fixed = {"tensor_parallel_size"} if sampler.batch_invariant else set()
    return [name for name in EngineConfig.MEMORY_ONLY_FIELDS if name not in fixed]
