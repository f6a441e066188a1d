"""Text for numbers on a terminal: durations, counts and bars."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def duration(seconds: float) -> str:
    """Return seconds as text: 8.25 as `8.2 s`, 754 as `12 min 34 s`, 4321 as `1 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def short_number(number: float) -> str:
    """Return a count as text, with k, M or G from a thousand on: 1234567 as `1.2M`, 950 as `950`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def bar(share: float, width: int, fill: str = " ") -> str:
    """Return a bar of `width` characters that is filled from the left to `share`, clamped to [0, 1] and exact to an
    eighth of a character; the empty part consists of `fill`."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    blocks = _EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return blocks + fill * (width - len(blocks))
