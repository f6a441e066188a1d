"""Progress on a terminal: done, left, and tokens a second. Where output is no terminal, one line when it is over."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

from tqdm import tqdm

from thinksafe.distributed.workers import ALONE, Workers

_EXCHANGE_EVERY = 0.5
"""Seconds between two looks at what other workers have done."""
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's own without items a second: on a narrow terminal the tokens a second would be cut off."""


class TokenBar(AbstractContextManager):
    """A bar over responses, verdicts or steps that also counts tokens. The first worker shows what all have done."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0, workers: Workers = ALONE):
        """done: of `total`, what was there before."""
        self._title, self._unit, self._before, self._workers = title, unit, done, workers
        shown = {"desc": f"{title:>16}", "bar_format": _FORMAT, "file": sys.stderr}
        self._bar = tqdm(total=total, initial=done, disable=None if workers.leads else True, **shown)
        self._is_shown = not self._bar.disable
        self._started = self._exchanged = time.perf_counter()
        self._items, self._tokens = 0, 0
        self._to_tell, self._sums = [0, 0], (workers.total(), workers.total())

    def update(self, tokens: int, place: int | None = None, **figures: str) -> None:
        """One more item.

        Args:
            tokens: that it has.
            place: its number among all, where only now it shows how many were there before.
            figures: shown beside the rate.
        """
        self._to_tell[0] += 1
        self._to_tell[1] += tokens
        if place is not None:
            self._before = self._bar.initial = place - self._items - self._to_tell[0]
        if self._workers.count == 1 or time.perf_counter() - self._exchanged > _EXCHANGE_EVERY:
            self._exchange(figures)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        tqdm.write(f"{self._title:>16}: {text}", file=sys.stderr)

    def share_of_limit(self, least_seconds: float) -> dict[str, str]:
        """How close the work so far came to what the hardware allows: a figure for `update`, where that is known."""
        if not least_seconds:
            return {}
        return {"share of the limit": f"{least_seconds / (time.perf_counter() - self._started):.0%}"}

    def _exchange(self, figures: Mapping[str, str] = MappingProxyType({})) -> None:
        """Tell the others what was done since the last time, and show what all have."""
        self._exchanged = time.perf_counter()
        self._items, self._tokens = (add(amount) for add, amount in zip(self._sums, self._to_tell, strict=True))
        self._to_tell = [0, 0]
        if self._is_shown:
            rate = self._tokens / (self._exchanged - self._started)
            shown = [f"{rate:,.0f} tok/s", *(f"{name} {value}" for name, value in figures.items())]
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
        self._bar.update(self._before + self._items - self._bar.n)

    def __exit__(self, *error) -> None:
        """Without an error, it is over when all workers are."""
        if error[0] is None:
            self._exchange()
            self._workers.meet(meanwhile=self._exchange)
            self._exchange()
        seconds = time.perf_counter() - self._started
        self._bar.close()
        if not self._is_shown and self._workers.leads and error[0] is None:
            rate = self._tokens / max(seconds, 1e-9)
            total = self._bar.total
            done = f"{total:6}" if self._items == total else f"{self._items} of {total}"
            print(f"{self._title:>30}: {done} {self._unit} in {seconds:6.1f} s, {rate:9,.0f} tok/s", file=sys.stderr)
