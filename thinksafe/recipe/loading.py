"""Read a recipe from YAML and --set, and check it."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from thinksafe.errors import UserError, in_words
from thinksafe.paths import RECIPES, bundled_recipes
from thinksafe.recipe.schema import Recipe


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_file: a YAML file, or the name of a bundled recipe.
        overrides: `key=value` with dots for nesting (`training.epochs=1`); values are YAML.

    Raises:
        UserError: naming the file and the key.
    """
    raw, file = _read(name_or_file, "--recipe", Path(), ())
    for override in overrides:
        _apply(raw, override)
    _resolve_paths(raw, Path.cwd())
    return check_recipe(raw, f"{file} with --set" if overrides else str(file))


def _read(name_or_file: str, key: str, folder: Path, inheriting: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    """A recipe's plain values on top of those of its base, and its file.

    Args:
        key: that named it.
        folder: that a relative name starts from.
        inheriting: the recipes whose base it is.
    """
    file = folder / name_or_file
    if not file.is_file():
        if name_or_file not in bundled_recipes():
            known = ", ".join(bundled_recipes())
            raise UserError(f"{key}: no file {name_or_file!r}, and the bundled recipes are: {known}")
        file = Path(str(RECIPES / f"{name_or_file}.yaml"))
    if file.resolve() in inheriting:
        raise UserError(f"{inheriting[-1]}: base: {name_or_file!r} is built on this recipe itself")
    try:
        raw = _plain(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe is a mapping of keys to values")
    _resolve_paths(raw, file.parent)
    if (base := raw.pop("base", None)) is not None:
        inherited, _ = _read(str(base), f"{file}: base", file.parent, (*inheriting, file.resolve()))
        raw = _merged(inherited, raw)
    return raw, file


def _plain(value: Any) -> Any:
    """Each place with a section and a list of its own: YAML's anchors share them, and changing one changed the other.

    Raises:
        yaml.YAMLError: a section that is inside itself.
    """
    try:
        if isinstance(value, dict):
            return {key: _plain(entry) for key, entry in value.items()}
        return [_plain(entry) for entry in value] if isinstance(value, list) else value
    except RecursionError:
        raise yaml.YAMLError("an anchor holds itself") from None


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; a list, or any other value, as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def check_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """A recipe from plain values.

    Raises:
        UserError: the first thing that is wrong.
    """
    try:
        recipe = TypeAdapter(Recipe).validate_python(raw)
        json.dumps(asdict(recipe), allow_nan=False)
        return recipe
    except ValidationError as error:
        # An unknown key first: it explains the one that is missing.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        if problem["type"] == "unexpected_keyword_argument":
            close = difflib.get_close_matches(place[-1], _known_keys(place[:-1]), n=1)
            hint = f"; did you mean {'.'.join([*place[:-1], close[0]])}?" if close else ""
            raise UserError(f"{source}: unknown key {key}{hint}") from None
        if problem["type"] == "missing":
            raise UserError(f"{source}: key {key} is missing") from None
        found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
        raise UserError(f"{source}: {key + ': ' if key else ''}{_in_words(problem, place)}{found}") from None
    except ValueError:
        raise UserError(f"{source}: every number must be finite, and one is not") from None


def _in_words(problem: Any, place: list[str]) -> str:
    """What is wrong with a value, in the words of YAML and not of Python."""
    if problem["type"].startswith("dataclass"):
        return f"must be a section of keys ({', '.join(_known_keys(place))})"
    return in_words(problem)


def _known_keys(place: list[str]) -> list[str]:
    kind: Any = Recipe
    for part in place:
        if not part.isdigit():
            hint = get_type_hints(kind).get(part)
            kind = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if kind is None:
            return []
    return [field.name for field in fields(kind)]


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected key=value, such as training.epochs=1")
    *path, last = key.split(".")
    section: Any = raw
    for part in path:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section
        if isinstance(section, list) and part.isdigit():
            raise UserError(f"--set {key}: lists are set whole, not by index")
    if not isinstance(section, dict):
        raise UserError(f"--set {key}: {'.'.join(path)} is not a section")
    section[last] = _override_value(value)


def _override_value(text: str) -> Any:
    """Numbers, truth values, null, {...} and [...] as YAML reads them; all else is text, colons and all."""
    try:
        value = _plain(yaml.safe_load(text))
    except yaml.YAMLError:
        return text
    bracketed = text.lstrip().startswith(("{", "["))
    quoted = text.lstrip().startswith(("'", '"'))
    scalar = value is None or isinstance(value, (bool, int, float))
    return value if scalar or bracketed or quoted else text


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """A relative name that exists beside the recipe is that file; others, `package:...` and hub names too, stay."""

    def resolved(name: Any) -> Any:
        beside = folder / name if isinstance(name, str) and name else None
        return str(beside.resolve()) if beside is not None and beside.exists() else name

    for key in ("model", "prompts"):
        if key in raw:
            raw[key] = resolved(raw[key])
    guards = [raw.get("guard")]
    for guard in guards:
        if isinstance(guard, dict):
            guards += guard["members"] if isinstance(guard.get("members"), list) else []
            if "model" in guard:
                guard["model"] = resolved(guard["model"])
    evaluation = raw.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("sets"), list):
        for entry in evaluation["sets"]:
            if isinstance(entry, dict) and "file" in entry:
                entry["file"] = resolved(entry["file"])
