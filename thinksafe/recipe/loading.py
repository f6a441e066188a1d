"""Read a recipe from YAML and --set, and check it."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from thinksafe.errors import UserError, validation_message
from thinksafe.paths import RECIPES_FOLDER, bundled_recipes
from thinksafe.recipe.renamed_keys import RENAMED_KEYS
from thinksafe.recipe.schema import Recipe


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a checked recipe: the values of a file, merged into those of its `base` if it has one, with overrides.

    A name of an existing file becomes an absolute path; it may be relative to the recipe's folder, or in an override to
    the working directory.

    Args:
        name_or_file: a YAML file, or the name of a bundled recipe. The file is used if both exist.
        overrides: `key=value` with dots for nesting (`training.epochs=1`); see `_override_value` for the values.

    Raises:
        UserError: a recipe does not exist, is not YAML or is invalid; the message names file and key.
    """
    raw, file = _read_recipe(name_or_file, "--recipe", Path(), ())
    for override in overrides:
        _apply_override(raw, override)
    _resolve_paths(raw, Path.cwd())
    return check_recipe(raw, f"{file} with --set" if overrides else str(file))


def _read_recipe(
    name_or_file: str, named_by: str, folder: Path, descendants: tuple[Path, ...]
) -> tuple[dict[str, Any], Path]:
    """Return a recipe's plain values, merged into its base's values, and the path of its file.

    Args:
        name_or_file: a YAML file, or the name of a bundled recipe.
        named_by: option or key that names the recipe, for error messages.
        folder: folder that a relative file name starts from.
        descendants: resolved files of the recipes that inherit from this one, to detect a cycle.

    Raises:
        UserError: the recipe or its base does not exist or is not a YAML mapping, or the recipes inherit in a cycle.
    """
    file = folder / name_or_file
    if not file.is_file():
        if name_or_file not in bundled_recipes():
            names = ", ".join(bundled_recipes())
            raise UserError(f"{named_by}: no file {name_or_file!r}, and the bundled recipes are: {names}")
        file = RECIPES_FOLDER / f"{name_or_file}.yaml"
    if file.resolve() in descendants:
        raise UserError(f"{descendants[-1]}: base: {name_or_file!r} inherits from this recipe; remove one of the two")
    try:
        raw = _without_shared_nodes(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe must be a mapping of keys to values")
    _resolve_paths(raw, file.parent)
    if (base := raw.pop("base", None)) is not None:
        inherited, _ = _read_recipe(str(base), f"{file}: base", file.parent, (*descendants, file.resolve()))
        raw = _merge(inherited, raw)
    return raw, file


def _without_shared_nodes(node: Any) -> Any:
    """Return a copy of a YAML node in which no two keys share a section or list.

    YAML anchors make keys share a node, and `--set` on one of them would change the other too.

    Raises:
        yaml.YAMLError: a section contains itself.
    """
    try:
        if isinstance(node, dict):
            return {key: _without_shared_nodes(value) for key, value in node.items()}
        return [_without_shared_nodes(value) for value in node] if isinstance(node, list) else node
    except RecursionError:
        raise yaml.YAMLError("an anchor contains itself") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`: sections are merged key by key; any other value, also a list, is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both_sections = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_sections else value
    return merged


def check_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """Return the recipe that plain values describe; keys that they lack get their defaults.

    Args:
        raw: values by key, as YAML gives them, with dicts as sections.
        source: file or option that the values come from, for error messages.

    Raises:
        UserError: a key is unknown, renamed or missing, a value is invalid, or a number is not finite; the message
            names one problem.
    """
    try:
        recipe = TypeAdapter(Recipe).validate_python(raw)
        json.dumps(asdict(recipe), allow_nan=False)
        return recipe
    except ValidationError as error:
        # An unknown key is reported first: with a misspelled key, the right key is missing too.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
        raise UserError(f"{source}: {_describe(problem)}") from None
    except ValueError:
        raise UserError(f"{source}: every number must be finite") from None


def _describe(problem: Any) -> str:
    """Return a message about one entry of Pydantic's `ValidationError.errors()`, with the key and in YAML's terms."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "unexpected_keyword_argument":
        return _describe_unknown_key(path)
    if problem["type"] == "missing":
        hint = "; name the student with --set model=FOLDER or --set model=HUB/NAME" if key == "model" else ""
        return f"key {key} is missing{hint}"
    if problem["type"].startswith("dataclass"):
        message = f"must be a section of keys ({', '.join(_keys_of(_section_at(path)))})"
    else:
        message = validation_message(problem)
    value = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    return f"{key + ': ' if key else ''}{message}{value}"


def _describe_unknown_key(path: list[str]) -> str:
    """Return the message about a key that its section does not have.

    It names the present key if the key was renamed, else the most similar key of the section if one is close, else the
    command that lists all keys.

    Args:
        path: keys and list indices that lead to the key; the key is last.
    """
    *parents, key = path
    section = _section_at(parents)
    if new_key := RENAMED_KEYS.get(section, {}).get(key):
        return f"key {'.'.join(path)} was renamed; use {'.'.join([*parents, new_key])}"
    close_keys = difflib.get_close_matches(key, _keys_of(section), n=1)
    suggestion = f"did you mean {'.'.join([*parents, *close_keys])}?" if close_keys else ""
    return f"unknown key {'.'.join(path)}; {suggestion or '`thinksafe recipe` lists all keys'}"


def _section_at(path: list[str]) -> type | None:
    """Return the dataclass of the section at a path of keys and list indices: Recipe for [], None for no section."""
    section: Any = Recipe
    for part in path:
        if not part.isdigit():
            hint = get_type_hints(section).get(part)
            section = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if section is None:
            return None
    return section


def _keys_of(section: type | None) -> list[str]:
    """Return the keys of a section's dataclass, or [] for None."""
    return [field.name for field in fields(section)] if section else []


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one key of `raw` in place; sections that do not exist are created.

    Args:
        override: `key=value`, see `load_recipe`.

    Raises:
        UserError: there is no key or no "=", or the key lies in a list or in a value that is not a section.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected key=value, such as training.epochs=1")
    *parents, last = key.split(".")
    section: Any = raw
    for part in parents:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section
        if isinstance(section, list) and part.isdigit():
            raise UserError(f"--set {key}: a list can only be set as a whole, not by index")
    if not isinstance(section, dict):
        raise UserError(f"--set {key}: {'.'.join(parents)} is not a section")
    section[last] = _override_value(value)


def _override_value(text: str) -> Any:
    """Return the value that a text of `--set key=TEXT` means.

    Numbers, true, false, null, {...}, [...], "..." and '...' are read as YAML. All other texts stay as they are, also a
    text that is not valid YAML.
    """
    try:
        value = _without_shared_nodes(yaml.safe_load(text))
    except yaml.YAMLError:
        return text
    bracketed = text.lstrip().startswith(("{", "["))
    quoted = text.lstrip().startswith(("'", '"'))
    scalar = value is None or isinstance(value, (bool, int, float))
    return value if scalar or bracketed or quoted else text


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Replace names of existing files and folders in `folder` with absolute paths, in place. Other names stay.

    The keys are model, prompts, the `model` of the guard and its members, and the `source` of evaluation sets.

    Args:
        raw: values of a recipe, not yet checked.
    """

    def resolve(name: Any) -> Any:
        file = folder / name if isinstance(name, str) and name else None
        return str(file.resolve()) if file is not None and file.exists() else name

    for key in ("model", "prompts"):
        if key in raw:
            raw[key] = resolve(raw[key])
    guards = [raw.get("guard")]
    for guard in guards:
        if isinstance(guard, dict):
            guards += guard["members"] if isinstance(guard.get("members"), list) else []
            if "model" in guard:
                guard["model"] = resolve(guard["model"])
    evaluation = raw.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("sets"), list):
        for entry in evaluation["sets"]:
            if isinstance(entry, dict) and "source" in entry:
                entry["source"] = resolve(entry["source"])
