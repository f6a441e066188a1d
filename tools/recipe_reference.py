"""Write the tables of docs/recipe.md from the recipe's dataclasses: `python -m tools.recipe_reference`.

Each key gets its type, default, bounds and description. Types, defaults and descriptions are read from the code. Bounds
are found by trial: the tool passes values around 0 and 1 to the section's own checks and notes which ones are accepted.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from thinksafe.evaluation.config import EvaluationSet
from thinksafe.guards.formats import GuardFormat, Question
from thinksafe.recipe.reference import key_descriptions
from thinksafe.recipe.schema import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
MARKER = "<!-- Everything below is written by `python -m tools.recipe_reference`. -->\n"
_QUESTION = Question("harm", {"safe": "safe", "unsafe": "unsafe"})
_VALID_SECTIONS = {
    Recipe: Recipe("a", "b"),
    EvaluationSet: EvaluationSet("a", "b", "harmful"),
    Question: _QUESTION,
    GuardFormat: GuardFormat((_QUESTION,)),
}
"""Section class with required keys -> a valid instance. The other classes are valid without arguments."""
_STEP = 1e-9
_INTEGERS = (-1, 0, 1, 2, 2**63 - 1, 2**63)
_NUMBERS = (-1.0, -_STEP, 0.0, _STEP, 0.5 - _STEP, 0.5, 0.5 + _STEP, 1 - _STEP, 1.0, 1 + _STEP, 2.0)
_TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def reference() -> str:
    """Return the Markdown tables of all sections, with a heading each, in the order of the recipe."""
    paths_by_section: dict[type, list[str]] = {}
    for path, section in _sections(Recipe, ""):
        paths_by_section.setdefault(section, []).append(path)
    titles = {section: ", ".join(f"`{path}`" for path in paths) for section, paths in paths_by_section.items()}
    titles[Recipe] = "Top level"
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


def bounds(section: type, field: Field, hint: type) -> str:
    """Return the bounds of a recipe key, such as `> 0, ≤ 1`; empty if it has none or is not numeric.

    Args:
        section: dataclass of the key's section, whose checks decide which values are valid.
        field: the key.
        hint: type of the key.
    """
    kind = next((kind for kind in (hint, *get_args(hint)) if kind in (int, float)), None)
    if kind is None or get_origin(hint) is Literal:
        return ""
    candidates = _INTEGERS if kind is int else _NUMBERS
    accepted = [value for value in candidates if _is_accepted(section, field.name, value)]
    lowest, highest = accepted[0], accepted[-1]
    lower = "" if lowest == candidates[0] else "> 0" if lowest == _STEP else f"≥ {lowest:g}"
    upper = {1.0: "≤ 1", 1 - _STEP: "< 1", 0.5 - _STEP: "< 0.5", 2**63 - 1: "< 2^63"}.get(highest, "")
    return ", ".join(filter(None, (lower, upper)))


def _is_accepted(section: type, name: str, value: float) -> bool:
    try:
        replace(_VALID_SECTIONS.get(section) or section(), **{name: value})
    except ValueError:
        return False
    return True


def _sections(section: type, path: str) -> Iterator[tuple[str, type]]:
    """Yield (path, dataclass) of a section and of all sections inside it. A section is not repeated inside itself.

    Args:
        section: dataclass of the section.
        path: its dotted path in the recipe, such as `guard.sampler`; empty for the recipe itself.
    """
    yield path, section
    hints = get_type_hints(section)
    for field in sorted(fields(section), key=lambda field: field.name == "guard"):  # the guard's sections repeat others
        inner = _section_in(hints[field.name])
        if inner is not None and inner is not section:
            yield from _sections(inner, f"{path}.{field.name}" if path else field.name)


def _section_in(hint: Any) -> type | None:
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _section_table(section: type, titles: dict[type, str]) -> str:
    descriptions, hints = key_descriptions(section), get_type_hints(section)
    lines = [f"### {titles[section]}", "", _summary(section), ""]
    lines += ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for field in fields(section):
        hint = hints[field.name]
        inner = _section_in(hint)
        description = descriptions.get(field.name) or _summary(inner)
        description = description[:1].upper() + description[1:]
        if inner is not None and inner is not section:
            anchor = re.sub(r"[^\w -]", "", titles[inner]).replace(" ", "-")  # as GitHub names a heading
            description += f" [Keys](#{anchor})"
        cells = (f"`{field.name}`", _type_name(hint), _default(field), bounds(section, field, hint), description)
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
        return "section of text values"
    if is_dataclass(hint):
        return "section"
    if NoneType in get_args(hint):
        return f"{_type_name(next(kind for kind in get_args(hint) if kind is not NoneType))} or `null`"
    return _TYPE_NAMES[hint]


def _default(field: Field) -> str:
    if field.default is MISSING:
        return "required"
    if is_dataclass(field.default):
        return ""
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    if isinstance(field.default, str) and field.default:
        return f"`{field.default}`"
    return f"`{json.dumps(field.default)}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
