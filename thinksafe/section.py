"""The base class of the sections of a recipe: frozen dataclasses that check themselves, in YAML as well as in code.

A key's bounds are in its type, and its description is the docstring below it. Only the standard library is imported, so
a GPU machine without pydantic can use sampler and training.
"""

import math
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, for a key's type: `epochs: Annotated[int, Bounds(ge=1)]`. A value of None has no bounds."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.ge <= value <= self.le and self.gt < value < self.lt

    def __str__(self) -> str:
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        names = {word: "2^63" if limit == 2**63 else f"{limit:g}" for word, limit in limits.items()}
        return " and ".join(f"{word} {names[word]}" for word, limit in limits.items() if math.isfinite(limit))


class Section:
    """Base class of a section: a frozen dataclass with a docstring below each field.

    Raises:
        ValueError: a number is not finite or is out of bounds, or `check` fails. The message begins with the key.
    """

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    def __post_init__(self):
        bounds = bounds_by_key(type(self))
        for key, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: must be finite (found {value})")
            if key in bounds and value is not None and value not in bounds[key]:
                or_null = " or null" if getattr(type(self), key, 0) is None else ""  # the default of the key
                raise ValueError(f"{key}: must be {bounds[key]}{or_null} (found {value!r})")
        self.check()

    def check(self) -> None:
        """Raise a ValueError, whose message begins with a key, for a mistake that bounds do not cover."""


@cache
def bounds_by_key(section: type[Section]) -> dict[str, Bounds]:
    """Return the bounds of each key that has some."""
    hints = get_type_hints(section, include_extras=True)
    return {key: bounds for key, hint in hints.items() for bounds in getattr(hint, "__metadata__", ())}


def section_in(hint: Any) -> type[Section] | None:
    """Return the section in a type hint such as `tuple[Rung, ...]` or `GuardFormat | None`; None if it names none."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
