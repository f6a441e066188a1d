"""The one error a user may cause. Its message is a single line: what was wrong, where, and what to do."""

from collections.abc import Mapping
from typing import Any

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a section of keys",
}


class UserError(Exception):
    """Bad input, a bad setting or a missing file. The command line prints the message and exits with 2."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or device had no more room; libraries say so in words."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def in_words(problem: Mapping[str, Any]) -> str:
    """One of Pydantic's findings in the words of YAML and JSON, and not of Python."""
    kind = problem["type"].partition("_")[0]
    if kind == "missing":
        return "is missing"
    if kind == "literal":
        return f"must be {problem['ctx']['expected']}"
    return f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else problem["msg"].removeprefix("Value error, ")
