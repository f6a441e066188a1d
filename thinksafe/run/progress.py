"""Progress on a terminal: items done and left, and tokens per second. Without a terminal, one line at the end."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

from tqdm import tqdm

from thinksafe.distributed.workers import SINGLE_PROCESS, Workers

_EXCHANGE_SECONDS = 0.5
"""Seconds between two exchanges of counts with the other workers."""
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's format without items per second: on a narrow terminal the tokens per second would be cut off."""


def print_note(title: str, text: str) -> None:
    """Print a line of a stage to stderr, aligned with the lines of the bars."""
    print(f"{title:>30}: {text}", file=sys.stderr)


class TokenBar(AbstractContextManager):
    """A progress bar over responses, verdicts or steps that also counts tokens, used as a context manager.

    All workers create it and leave its context together. The leader shows the sums over all workers; without a terminal
    it prints one line at the end instead, unless the body raised.
    """

    def __init__(self, title: str, total: int, unit: str, initial: int = 0, workers: Workers = SINGLE_PROCESS):
        """Show the bar.

        Args:
            total: number of items in all.
            unit: name of the items in the line at the end, such as `responses`.
            initial: number of items that an earlier process did.
        """
        self._title, self._unit, self._initial, self._workers = title, unit, initial, workers
        style = {"desc": f"{title:>16}", "bar_format": _FORMAT, "file": sys.stderr}
        self._bar = tqdm(total=total, initial=initial, disable=None if workers.is_leader else True, **style)
        self._is_shown = not self._bar.disable
        self._started = self._exchanged = time.perf_counter()
        self._items, self._tokens = 0, 0
        self._unshared, self._counters = [0, 0], (workers.shared_counter(), workers.shared_counter())

    def update(
        self, tokens: int, item_number: int | None = None, roofline_seconds: float = 0.0, **figures: str
    ) -> None:
        """Count one more item of this worker and its tokens.

        Args:
            item_number: number of the item among all items, from 1; it corrects `initial` if that was not known when
                the bar was made. None keeps `initial`.
            roofline_seconds: least time in which the hardware could have done this worker's work since the bar began,
                shown as a share of the time since then; 0 if it is unknown.
            figures: name -> text of further figures to show beside the tokens per second.
        """
        if roofline_seconds:
            share = roofline_seconds / (time.perf_counter() - self._started)
            figures["share of the limit"] = f"{share:.0%}"
        self._unshared[0] += 1
        self._unshared[1] += tokens
        if item_number is not None:
            self._initial = self._bar.initial = item_number - self._items - self._unshared[0]
        if self._workers.world_size == 1 or time.perf_counter() - self._exchanged > _EXCHANGE_SECONDS:
            self._exchange(figures)

    def print_line(self, text: str) -> None:
        """Print a line above the bar, on this worker, whether or not the bar is shown."""
        tqdm.write(f"{self._title:>16}: {text}", file=sys.stderr)

    def _exchange(self, figures: Mapping[str, str] = MappingProxyType({})) -> None:
        """Add this worker's new counts to the shared sums, and show the sums."""
        self._exchanged = time.perf_counter()
        self._items, self._tokens = (add(amount) for add, amount in zip(self._counters, self._unshared, strict=True))
        self._unshared = [0, 0]
        if self._is_shown:
            rate = self._tokens / (self._exchanged - self._started)
            texts = [f"{rate:,.0f} tok/s", *(f"{name} {value}" for name, value in figures.items())]
            self._bar.set_postfix_str("  ".join(texts), refresh=False)
        self._bar.update(self._initial + self._items - self._bar.n)

    def __exit__(self, error_type: type[BaseException] | None, *details) -> None:
        """Close the bar; if the body did not raise, first wait for all workers, and then print the line at the end."""
        if error_type is None:
            self._exchange()
            self._workers.barrier(meanwhile=self._exchange)
            self._exchange()
        seconds = time.perf_counter() - self._started
        self._bar.close()
        if not self._is_shown and self._workers.is_leader and error_type is None:
            rate = self._tokens / max(seconds, 1e-9)
            total = self._bar.total
            done = f"{total:6}" if self._items == total else f"{self._items} of {total}"
            print_note(self._title, f"{done} {self._unit} in {seconds:6.1f} s, {rate:9,.0f} tok/s")
