"""The error for mistakes of the user. Its message is a single line: what is wrong, where, and what to do."""

import errno
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
    """A mistake of the user: invalid input, an invalid setting or a missing file. The command line prints the message,
    one line, without a traceback and exits with status 2."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of host or GPU is exhausted; torch says so in a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def validation_message(problem: Mapping[str, Any]) -> str:
    """Return the end of an error message on a field, in the terms of YAML and JSON, such as "must be a number".

    Args:
        problem: an entry of pydantic's `ValidationError.errors()`. The field's name is left to the caller.
    """
    kind = problem["type"].partition("_")[0]
    if kind == "missing":
        return "is missing"
    if kind == "literal":
        return f"must be {problem['ctx']['expected']}"
    return f"must be {_TYPE_NAMES[kind]}" if kind in _TYPE_NAMES else problem["msg"].removeprefix("Value error, ")
