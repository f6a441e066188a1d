"""Responses that repeat themselves for ever: 1.5% of all, a fifth of the tokens, and most are dropped in the end."""

import numpy as np

CHECK_EVERY = 64
"""Response tokens between two looks: the search costs 20 us."""
_SHORTEST, _LONGEST, _REPEATS = 8, 256, 8


def ends_in_a_loop(tokens: np.ndarray) -> bool:
    """Whether a response ends in a block of 8 to 256 tokens that stands there eight times, back to back.

    A block of fewer tokens is found as a multiple of itself. Text worth keeping may repeat a line eight times; it is
    the user who decides whether that ends a response.

    Args:
        tokens: [T] integers.
    """
    longest = min(_LONGEST, len(tokens) // _REPEATS)
    if longest < _SHORTEST:
        return False
    before = tokens[-1 - longest : -_SHORTEST][::-1]  # the tokens 8, 9, ... longest places before the last
    for period in (np.flatnonzero(before == tokens[-1]) + _SHORTEST).tolist():
        tail = tokens[-_REPEATS * period :]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
