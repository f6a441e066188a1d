"""The one error a user may cause. Its message is a single line: what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad input, a bad setting or a missing file. The command line prints the message and exits with 2."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or device had no more room; libraries say so in words."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error))
