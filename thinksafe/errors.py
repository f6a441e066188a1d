"""The error for mistakes of the user. Its message is a single line: what is wrong, where, and what to do."""

from collections.abc import Mapping
from typing import Any

_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a section of keys",
}


class UserError(Exception):
    """Invalid input, an invalid setting or a missing file. The command line prints the message and returns 2."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether host or device is out of memory: a MemoryError, or a RuntimeError whose message says so."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def validation_message(problem: Mapping[str, Any]) -> str:
    """Return the problem that one of Pydantic's errors reports, in the terms of YAML and JSON."""
    kind = problem["type"].partition("_")[0]
    if kind == "missing":
        return "is missing"
    if kind == "literal":
        return f"must be {problem['ctx']['expected']}"
    return f"must be {_TYPE_NAMES[kind]}" if kind in _TYPE_NAMES else problem["msg"].removeprefix("Value error, ")
