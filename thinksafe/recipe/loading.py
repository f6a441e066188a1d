"""Read a recipe from YAML and --set, and check it."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from thinksafe.errors import UserError, validation_message
from thinksafe.methods.registry import METHODS
from thinksafe.methods.thinksafe import ThinkSafe
from thinksafe.paths import METHODS_FOLDER, RECIPES_FOLDER, bundled_methods, bundled_recipes
from thinksafe.recipe.renamed_keys import RENAMED_KEYS
from thinksafe.recipe.schema import Recipe
from thinksafe.section import section_in

T = TypeVar("T")
_GUARD_PATHS: dict[str, Any] = {"model": None}
_GUARD_PATHS["members"] = _GUARD_PATHS  # a member may be an ensemble
_PATHS: dict[str, Any] = {
    "model": None,
    "prompts": None,
    "method": {"model": None, "source": None},
    "guard": _GUARD_PATHS,
    "evaluation": {"sets": {"source": None}},
}
"""Keys that may name a file or folder (None), inside sections and lists of sections (the keys of each entry)."""


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Return a checked recipe: the values of a file, merged into those of its `base` if it has one, with the settings
    of a method and overrides.

    A name of an existing file becomes an absolute path; it may be relative to the recipe's folder, or in an override to
    the working directory.

    Args:
        name_or_file: a YAML file, or the name of a bundled recipe. The file is used if both exist.
        overrides: `key=value` with dots for nesting (`training.epochs=1`); see `_override_value` for the values.
        method: NAME or NAME@BUDGET of a bundled method, whose settings replace those of the file, see `_with_method`;
            None to keep the file's.

    Raises:
        UserError: a recipe or method does not exist, is not YAML or is invalid; the message names file and key.
    """
    raw, file = _read_recipe(name_or_file, "--recipe", Path(), ())
    by_method = raw.pop("methods", {})
    if method is not None:
        raw = _with_method(raw, method, by_method, file)
    for override in overrides:
        _apply_override(raw, override)
    _resolve_paths(raw, Path.cwd())
    recipe = check_recipe(raw, f"{file} with --set" if overrides else str(file))
    if method is not None and method.endswith("@matched") and recipe.training.steps is None:
        remedy = "set training.steps to the number of optimizer steps of the run of ThinkSafe to match"
        raise UserError(f"--method {method}: {remedy}")
    return recipe


def _read_recipe(
    name_or_file: str, named_by: str, folder: Path, descendants: tuple[Path, ...]
) -> tuple[dict[str, Any], Path]:
    """Return a recipe's plain values, merged into its base's values, and the path of its file.

    Args:
        named_by: option or key that names the recipe, for error messages.
        folder: folder that a relative file name starts from.
        descendants: resolved files of the recipes that inherit from this one, to detect a cycle.
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
        raw = _without_shared_nodes(_load_yaml(file.read_text(), str(file)))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a recipe must be a mapping of keys to values")
    _resolve_paths(raw, file.parent)
    if isinstance(by_method := raw.get("methods"), dict):
        for changes in by_method.values():
            _resolve_paths(changes, file.parent)
    if (base := raw.pop("base", None)) is not None:
        inherited, _ = _read_recipe(str(base), f"{file}: base", file.parent, (*descendants, file.resolve()))
        raw = _merge(inherited, raw)
    return raw, file


def _load_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text, in which no key may be given twice.

    Args:
        source: file or option that the text comes from, for error messages.

    Raises:
        YAMLError: the text is not valid YAML.
        UserError: a section gives a key twice; PyYAML would silently keep the last value.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        _check_keys_are_unique(root, source)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _check_keys_are_unique(root: yaml.Node | None, source: str) -> None:
    """Raise a UserError if a section below a YAML node has a key twice; merged keys (`<<`) do not count."""
    nodes, checked = [("", root)], set()
    while nodes:
        path, node = nodes.pop()
        if id(node) in checked:  # an anchor
            continue
        checked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += [(f"{path}{index}.", entry) for index, entry in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if (key.tag, str(key.value)) in lines:
                    first_line = lines[key.tag, str(key.value)]
                    where = f"lines {first_line} and {line}" if first_line < line else f"line {line}"
                    raise UserError(f"{source}: key {path}{key.value} is given twice, in {where}; remove one")
                lines[key.tag, str(key.value)] = line
                nodes.append((f"{path}{key.value}.", value))


def _with_method(raw: dict[str, Any], method: str, by_method: Any, file: Path) -> dict[str, Any]:
    """Return a recipe's plain values with those of a method: first the method's bundled settings for the budget, then
    the recipe's own changes for this method (its key `methods`). The recipe's section `method` is replaced.

    Args:
        method: NAME or NAME@BUDGET.
        by_method: value of the key `methods`.
        file: file of the recipe, for error messages.
    """
    name, _, budget = method.partition("@")
    if name not in bundled_methods():
        raise UserError(f"--method: no method {name!r}; choose one of {', '.join(bundled_methods())}")
    settings = yaml.safe_load((METHODS_FOLDER / f"{name}.yaml").read_text())
    budgets = settings.pop("budgets")
    if budget and budget not in budgets:
        raise UserError(f"--method {method}: no budget {budget!r}; choose one of {', '.join(budgets)}")
    changes = by_method.get(name, {}) if isinstance(by_method, dict) else None
    if not isinstance(changes, dict):
        raise UserError(f"{file}: methods: must be a section of methods, each with a section of keys")
    raw = raw | {"method": {}}
    for values in (settings, budgets[budget or next(iter(budgets))], changes):
        raw = _merge(raw, values)
    return raw | {"name": f"{raw.get('name')}-{method.replace('@', '-')}"}


def _without_shared_nodes(node: Any) -> Any:
    """Return a copy of a YAML node without shared sections and lists, so that `--set` changes one key alone.

    YAML anchors make keys share a node; an anchor that contains itself is a YAMLError.
    """
    try:
        if isinstance(node, dict):
            return {key: _without_shared_nodes(value) for key, value in node.items()}
        return [_without_shared_nodes(value) for value in node] if isinstance(node, list) else node
    except RecursionError:
        raise yaml.YAMLError("an anchor contains itself") from None


def _merge(base: Any, changes: Any) -> Any:
    """Return `base` with `changes`: sections are merged key by key; any other value, also a list, is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merge(base.get(key), value) for key, value in changes.items()}


def check_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """Return the recipe that plain values describe; keys that they lack get their defaults.

    Args:
        raw: values by key, as YAML gives them, with dicts as sections.
        source: file or option that the values come from, for error messages.

    Raises:
        UserError: a key is unknown, renamed or missing, or a value is invalid; the message names one problem.
    """
    if isinstance(raw, dict) and "method" in raw:
        method = raw["method"]
        name = method.get("type", ThinkSafe.type) if isinstance(method, dict) else ThinkSafe.type
        if str(name) not in METHODS:
            raise UserError(f"{source}: method.type: must be one of {', '.join(METHODS)} (found {name!r})")
        raw = raw | {"method": _check_section(METHODS[name], method, source, ("method",))}
    return _check_section(Recipe, raw, source)


def _check_section(section: type[T], raw: Any, source: str, path: tuple[str, ...] = ()) -> T:
    """Return the section, of this class and at this path of keys, that plain values describe; see `check_recipe`."""
    try:
        return TypeAdapter(section).validate_python(raw)
    except ValidationError as error:
        # An unknown key is reported first: with a misspelled key, the right key is missing too.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
        raise UserError(f"{source}: {_describe(problem, section, path)}") from None


def _describe(problem: Any, root: type, root_path: tuple[str, ...]) -> str:
    """Return a message about one entry of pydantic's `ValidationError.errors()`, with the key and in YAML's terms.

    Args:
        root: class of the section that was checked.
        root_path: path of its keys in the recipe.
    """
    kind, parts = problem["type"], [str(part) for part in problem["loc"]]
    path = [*root_path, *parts]
    key = ".".join(path)
    if kind == "unexpected_keyword_argument":
        return _describe_unknown_key(path, _section_at(root, parts[:-1]))
    if kind == "missing":
        hint = "; name the student with --set model=FOLDER or --set model=HUB/NAME" if key == "model" else ""
        return f"key {key} is missing{hint}"
    message = validation_message(problem)
    if kind == "value_error":  # raised by a section, whose message begins with its key
        return ".".join([*path, message])
    if kind.startswith("dataclass"):
        message = f"must be a section of keys ({', '.join(_keys_of(_section_at(root, parts)))})"
    return f"{key}: {message} (found {problem['input']!r})"


def _describe_unknown_key(path: list[str], section: type | None) -> str:
    """Return the message about a key that its section does not have: with its new name if it was renamed, else with the
    most similar key if one is close."""
    *parents, key = path
    if new_key := RENAMED_KEYS.get(section, {}).get(key):
        return f"key {'.'.join(path)} was renamed; use {new_key if '.' in new_key else '.'.join([*parents, new_key])}"
    close_keys = difflib.get_close_matches(key, _keys_of(section), n=1)
    suggestion = f"did you mean {'.'.join([*parents, *close_keys])}?" if close_keys else ""
    return f"unknown key {'.'.join(path)}; {suggestion or '`thinksafe recipe` lists all keys'}"


def _section_at(root: type, path: list[str]) -> type | None:
    """Return the class of the section at a path of keys and list indices below `root`; None for no section."""
    section: Any = root
    for part in path:
        if section is not None and not part.isdigit():
            section = section_in(get_type_hints(section).get(part))
    return section


def _keys_of(section: type | None) -> list[str]:
    return [field.name for field in fields(section)] if section else []


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one key of `raw` in place; sections that do not exist are created."""
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
    section[last] = _override_value(key, value)


def _override_value(key: str, text: str) -> Any:
    """Return the value that a text of `--set key=TEXT` means: numbers, true, false, null, {...}, [...], "..." and '...'
    are read as YAML, and all other texts stay as they are, also a text that is not valid YAML."""
    try:
        value = _without_shared_nodes(_load_yaml(text, f"--set {key}"))
    except yaml.YAMLError:
        return text
    is_yaml = value is None or isinstance(value, (bool, int, float)) or text.lstrip().startswith(("{", "[", "'", '"'))
    return value if is_yaml else text


def _resolve_paths(node: Any, folder: Path, keys: dict[str, Any] = _PATHS) -> None:
    """Replace names of existing files and folders in `folder` with absolute paths, in place, in a section or a list of
    sections whose keys may name a file as `keys` says, see `_PATHS`. Other names stay."""
    for section in node if isinstance(node, list) else [node]:
        for key in keys.keys() & section.keys() if isinstance(section, dict) else ():
            name = section[key]
            if keys[key] is not None:
                _resolve_paths(name, folder, keys[key])
            elif isinstance(name, str) and name and (folder / name).exists():
                section[key] = str((folder / name).resolve())
