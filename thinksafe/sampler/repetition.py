"""Detection of responses that repeat themselves endlessly.

They are 1.5% of all responses but a fifth of all tokens, and most of them are dropped in the end.
"""

import numpy as np

CHECK_INTERVAL = 64
"""Number of response tokens between two checks; one check costs 20 us."""
_MIN_PERIOD, _MAX_PERIOD, _NUM_REPEATS = 8, 256, 8


def ends_in_repetition(tokens: np.ndarray) -> bool:
    """Return whether a response ends in a block of 8 to 256 tokens that occurs eight times in a row.

    A block of fewer than 8 tokens is detected as a multiple of itself. The result is False for fewer than 64 tokens. A
    useful text may also repeat a line eight times, so the user decides whether a repetition ends a response
    (`SamplingConfig.stop_on_repetition`).

    Args:
        tokens: [T] integers, ids of the response tokens without the prompt.
    """
    max_period = min(_MAX_PERIOD, len(tokens) // _NUM_REPEATS)
    if max_period < _MIN_PERIOD:
        return False
    # The tokens at distances 8, 9, ... max_period before the last one.
    earlier_tokens = tokens[-1 - max_period : -_MIN_PERIOD][::-1]
    for period in (np.flatnonzero(earlier_tokens == tokens[-1]) + _MIN_PERIOD).tolist():
        tail = tokens[-_NUM_REPEATS * period :]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
