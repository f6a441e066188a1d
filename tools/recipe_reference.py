"""Write the tables of docs/recipe.md from the recipe's dataclasses: `python -m tools.recipe_reference`.

Each key gets its type, default, bounds and description; all are read from the code.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from thinksafe.methods.base import Method
from thinksafe.methods.registry import METHODS
from thinksafe.methods.thinksafe import ThinkSafe
from thinksafe.recipe.reference import key_default, key_descriptions
from thinksafe.recipe.schema import Recipe
from thinksafe.section import bounds_by_key, section_in

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
MARKER = "<!-- Everything below is written by `python -m tools.recipe_reference`. -->\n"
_TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def reference() -> str:
    """Return the Markdown tables of all sections, with a heading each, in the order of the recipe."""
    paths_by_section: dict[type, list[str]] = {}
    for path, section in _sections(Recipe, ""):
        paths_by_section.setdefault(section, []).append(path)
    titles = {section: ", ".join(f"`{path}`" for path in paths) for section, paths in paths_by_section.items()}
    titles[Recipe] = "Top level"
    titles[Method] = titles[ThinkSafe]  # the first of the methods
    return "\n".join(_section_table(section, titles) for section in paths_by_section)


def page(text: str) -> str:
    """Return the text of docs/recipe.md with new tables instead of everything below its marker line.

    Args:
        text: present text of the page.

    Raises:
        ValueError: the text has no marker line.
    """
    introduction, marker, _ = text.partition(MARKER)
    if not marker:
        raise ValueError(f"{PAGE}: the line {MARKER.strip()!r} is missing")
    return introduction + marker + "\n" + reference()


def _sections(section: type, path: str) -> Iterator[tuple[str, type]]:
    """Yield (path, dataclass) of a section and of all sections inside it. A section is not repeated inside itself.

    Args:
        section: dataclass of the section.
        path: its dotted path in the recipe, such as `guard.sampler`; empty for the recipe itself.
    """
    yield path, section
    hints = get_type_hints(section)
    for field in sorted(fields(section), key=lambda field: field.name == "guard"):  # the guard's sections repeat others
        inner = section_in(hints[field.name])
        if inner is Method:
            yield from ((f"{field.name}, type {name}", kind) for name, kind in METHODS.items())
        elif inner is not None and inner is not section:
            yield from _sections(inner, f"{path}.{field.name}" if path else field.name)


def _section_table(section: type, titles: dict[type, str]) -> str:
    descriptions, hints, bounds = key_descriptions(section), get_type_hints(section), bounds_by_key(section)
    lines = [f"### {titles[section]}", "", _summary(section), ""]
    lines += ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for field in fields(section):
        hint = hints[field.name]
        inner = section_in(hint)
        description = descriptions[field.name]
        if inner is not None and inner is not section:
            anchor = re.sub(r"[^\w -]", "", titles[inner]).replace(" ", "-")  # as GitHub names a heading
            description += f" [Keys](#{anchor})"
        cells = (f"`{field.name}`", _type_name(hint), _default(field), str(bounds.get(field.name, "")), description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _summary(section: type) -> str:
    """Return the first paragraph of a section's docstring on one line."""
    return " ".join(section.__doc__.partition("\n\n")[0].split())


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        entry = get_args(hint)[0]
        return "list of sections" if is_dataclass(entry) else f"list of {_type_name(entry)}"
    if get_origin(hint) is dict:
        return "section of values" if get_args(hint)[1] is Any else "section of text values"
    if is_dataclass(hint):
        return "section"
    if NoneType in get_args(hint):
        return f"{_type_name(next(kind for kind in get_args(hint) if kind is not NoneType))} or `null`"
    return _TYPE_NAMES[hint]


def _default(field: Field) -> str:
    default = key_default(field)
    if default is MISSING:
        return "required"
    if is_dataclass(default):
        return ""
    if isinstance(default, float):
        return f"`{default:g}`"
    if isinstance(default, str) and default:
        return f"`{default}`"
    return f"`{json.dumps(default)}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
