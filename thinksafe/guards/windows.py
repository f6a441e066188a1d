"""Plan of overlapping windows over a text that is longer than a guard's context. It knows token counts only."""


def plan_windows(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Return (start, end) of the fewest windows that cover tokens [0, length), spread evenly.

    All windows have `window` tokens, except that a text of at most `window` tokens gives the one window (0, length).

    Args:
        overlap: lowest number of tokens that two neighboring windows share, at least 0 and below `window`; a passage of
            this length lies whole in one window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"windows of {window} tokens cannot share {overlap} tokens")
    if length <= window:
        return [(0, length)]
    last_start, stride = length - window, window - overlap
    steps = -(-last_start // stride)
    return [(last_start * step // steps, last_start * step // steps + window) for step in range(steps + 1)]
