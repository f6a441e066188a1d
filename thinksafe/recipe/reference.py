"""Write a recipe as YAML with a comment on every key: its description, choices and default.

Descriptions and defaults come from the sections' dataclasses, so they cannot differ from the keys that are checked.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter

from thinksafe.recipe.schema import Recipe

_WIDTH = 110


def annotated_yaml(recipe: Recipe) -> str:
    """Return YAML of every key with its value, each below a comment: its description, choices and default.

    Keys inside the entries of a list are described once, above the list. `load_recipe` reads the text back as the same
    recipe.
    """
    return "\n".join(_section_lines(recipe, "")) + "\n"


def key_descriptions(section: type) -> dict[str, str]:
    """Return {key: description on one line} of a section's class: the docstrings below its fields.

    A key that is a section itself has no docstring; its description is the first paragraph of the section's class.
    """
    schema = TypeAdapter(section).json_schema()
    properties = schema.get("$defs", {}).get(section.__name__, schema)["properties"]
    sections = {key: hint for key, hint in get_type_hints(section).items() if is_dataclass(hint)}
    texts = {key: entry.get("description") or sections[key].__doc__ for key, entry in properties.items()}
    return {key: " ".join(text.partition("\n\n")[0].split()) for key, text in texts.items()}


def key_default(field: Field) -> Any:
    """Return the default of a section's key; MISSING if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _section_lines(section: Any, indent: str) -> Iterator[str]:
    """Yield the lines of a section: a comment and the value of every key, and the lines of nested sections."""
    descriptions, hints = key_descriptions(type(section)), get_type_hints(type(section))
    for field in fields(section):
        value = getattr(section, field.name)
        yield from _comment(_describe_key(field, hints[field.name], descriptions, value), indent)
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _section_lines(value, indent + "  ")
        else:
            yield from _nested_key_lines(hints[field.name], type(section), indent)
            yield from textwrap.indent(_yaml({field.name: value}), indent).splitlines()


def _nested_key_lines(hint: Any, parent: type, indent: str, comment_indent: str = "") -> Iterator[str]:
    """Yield comments on the keys of a list's entries, or of a section that may be null; nothing for other keys.

    Args:
        hint: type of the key, such as `tuple[Rung, ...]`.
        parent: class that has the key. If its entries are of the same class, they are not described again.
        indent: spaces before the `#`.
        comment_indent: spaces after the `#`.
    """
    section = next((kind for kind in get_args(hint) if is_dataclass(kind) and kind is not parent), None)
    if section is not None:
        yield from _comment("Keys:", indent, comment_indent)
        descriptions, hints = key_descriptions(section), get_type_hints(section)
        for field in fields(section):
            description = _describe_key(field, hints[field.name], descriptions, MISSING)
            yield from _comment(f"{field.name}: {description}", indent, comment_indent + "  ")
            yield from _nested_key_lines(hints[field.name], section, indent, comment_indent + "    ")


def _describe_key(field: Field, hint: Any, descriptions: dict[str, str], value: Any) -> str:
    """Return a key's description, its choices, and its default if that is not `value`; "Required." without a default.

    Args:
        field, hint: the key's field of the dataclass, and its type.
        descriptions: result of `key_descriptions`.
        value: the key's value in the recipe; MISSING to state the default always.
    """
    parts = [descriptions[field.name]]
    if get_origin(hint) is Literal:
        parts.append(f"One of {', '.join(map(str, get_args(hint)))}.")
    default = key_default(field)
    if default is MISSING:
        parts.append("Required.")
    elif default != value and not is_dataclass(default):
        parts.append(f"Default: {_yaml(default).removesuffix('...').strip()}")
    return " ".join(parts)


def _comment(text: str, indent: str, comment_indent: str = "") -> Iterator[str]:
    """Yield the lines of a comment; `indent` is before each `#`, `comment_indent` after it."""
    for line in textwrap.wrap(text, _WIDTH - len(indent) - len(comment_indent)):
        yield f"{indent}# {comment_indent}{line}"


def _yaml(value: Any) -> str:
    """Return a value as YAML. A dataclass in it becomes a section of the keys that differ from their defaults."""
    plain = json.loads(json.dumps(value, default=_non_default_values))
    return yaml.safe_dump(plain, default_flow_style=False, sort_keys=False, allow_unicode=True, width=10**6).rstrip()


def _non_default_values(section: Any) -> dict[str, Any]:
    values = {field.name: getattr(section, field.name) for field in fields(section)}
    return {field.name: values[field.name] for field in fields(section) if values[field.name] != key_default(field)}
