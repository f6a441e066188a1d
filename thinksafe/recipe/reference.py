"""A recipe written out as YAML that explains itself: every key with its value, its meaning and its default.

Meanings and defaults are read from the recipe's dataclasses, so what is printed is what is checked.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from thinksafe.recipe.schema import Recipe

_WIDTH = 110


def explained(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back as the same recipe."""
    return "\n".join(_section(recipe, "")) + "\n"


def meanings(section: type) -> dict[str, str]:
    """Key to meaning, from the `Attributes:` of a dataclass's docstring."""
    _, _, attributes = inspect.getdoc(section).partition("Attributes:\n")
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _section(section: Any, indent: str) -> Iterator[str]:
    known, hints = meanings(type(section)), get_type_hints(type(section))
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            about = inspect.getdoc(type(value)).partition("\n\n")[0]
            yield from _comment(about, indent)
            yield f"{indent}{field.name}:"
            yield from _section(value, indent + "  ")
            continue
        yield from _comment(_about(field, hints[field.name], known, value), indent)
        yield from _keys_of_entries(hints[field.name], type(section), indent)
        yield from textwrap.indent(_yaml({field.name: value}), indent).splitlines()


def _keys_of_entries(hint: Any, section: type, indent: str, further: str = "") -> Iterator[str]:
    """The keys of what a list holds, or of a section that may be null; one inside itself has the same keys."""
    kind = next((kind for kind in get_args(hint) if is_dataclass(kind) and kind is not section), None)
    if kind is not None:
        yield from _comment("Keys:", indent, further)
        known, hints = meanings(kind), get_type_hints(kind)
        for field in fields(kind):
            about = _about(field, hints[field.name], known, MISSING)
            yield from _comment(f"{field.name}: {about}", indent, further + "  ")
            yield from _keys_of_entries(hints[field.name], kind, indent, further + "    ")


def _about(field: Field, hint: Any, known: dict[str, str], value: Any) -> str:
    """Meaning, choices, and the default where it is not what is shown."""
    meaning = known.get(field.name, "")
    parts = [meaning[:1].upper() + meaning[1:]]
    if get_origin(hint) is Literal:
        parts.append(f"One of {', '.join(map(str, get_args(hint)))}.")
    if field.default is MISSING:
        parts.append("Required.")
    elif field.default != value:
        parts.append(f"Default: {_yaml(field.default).removesuffix('...').strip()}")
    return " ".join(filter(None, parts))


def _comment(text: str, indent: str, further: str = "") -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(indent) - len(further)):
        yield f"{indent}# {further}{line}"


def _yaml(value: Any) -> str:
    plain = json.loads(json.dumps(value, default=_changed_keys))
    return yaml.safe_dump(plain, default_flow_style=False, sort_keys=False, allow_unicode=True, width=10**6).rstrip()


def _changed_keys(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in fields(section) if getattr(section, f.name) != f.default}
