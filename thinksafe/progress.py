"""Progress on a terminal: done, left, and tokens a second. Where output is no terminal, one line when it is over."""

import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm


class TokenBar(AbstractContextManager):
    """A bar over responses, verdicts or steps that also counts tokens."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self._title = title
        self._bar = tqdm(total=total, initial=done, desc=f"{title:>16}", unit=f" {unit}", disable=None, file=sys.stderr)
        self._unit = unit
        self._started = time.perf_counter()
        self._tokens = 0

    def update(self, tokens: int, **figures: str) -> None:
        """One more item, of so many tokens; `figures` are shown beside the rate."""
        self._tokens += tokens
        self._bar.update(1)
        if not self._bar.disable:
            rate = self._tokens / (time.perf_counter() - self._started)
            shown = [f"{rate:,.0f} tok/s", *(f"{name} {value}" for name, value in figures.items())]
            self._bar.set_postfix_str("  ".join(shown), refresh=False)

    def share_of_limit(self, least_seconds: float) -> dict[str, str]:
        """How close the work so far came to what the hardware allows: a figure for `update`, where that is known."""
        if not least_seconds:
            return {}
        return {"share of the limit": f"{least_seconds / (time.perf_counter() - self._started):.0%}"}

    def __exit__(self, *error) -> None:
        seconds = time.perf_counter() - self._started
        self._bar.close()
        if self._bar.disable and error[0] is None:
            rate = self._tokens / max(seconds, 1e-9)
            line = f"{self._title:>30}: {self._bar.total:6} {self._unit} in {seconds:6.1f} s, {rate:9,.0f} tok/s"
            print(line, file=sys.stderr)
