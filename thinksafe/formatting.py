"""Figures for people, on a terminal: durations, sizes, bars, and an estimate as a table of them."""



_EIGHTHS = " ▏▎▍▌▋▊▉█"


def duration(seconds: float) -> str:
    """8.25 as 8.2 s, 754 as 12 min 34 s, 4321 as 1 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def in_short(number: float) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def bar(share: float, width: int, rest: str = " ") -> str:
    """A bar of so many columns, exact to an eighth of one."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    drawn = _EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return drawn + rest * (width - len(drawn))
