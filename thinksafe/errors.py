"""The one error a user may cause. Its message is a single line: what was wrong, where, and what to do."""


class UserError(Exception):
    """Bad input, a bad setting or a missing file. The command line prints the message and exits with 2."""
