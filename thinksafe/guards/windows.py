"""How a text that is longer than a guard's context is cut into overlapping windows. Knows numbers only."""


def plan_windows(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """The fewest windows that cover [0, length), evenly spread: no last one is left with three tokens.

    Args:
        length: of the text in tokens.
        window: tokens a window holds.
        overlap: tokens that two neighbours share at least, so that a passage this long is whole in one of them.

    Returns:
        (start, end) of each, all `window` long, or one that is shorter where the text is.

    Raises:
        ValueError: unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"windows of {window} tokens cannot share {overlap}")
    if length <= window:
        return [(0, length)]
    last, stride = length - window, window - overlap
    steps = -(-last // stride)
    return [(last * step // steps, last * step // steps + window) for step in range(steps + 1)]
