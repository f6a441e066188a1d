"""Several processes on one list of tasks: each takes the next when it has room for it, until there is none.

torchrun starts one process a GPU and gives them a store. A task is a number in a list that every process makes alike;
the store counts how far the list has been handed out. A response is a function of its task alone, so who answers it
changes nothing. If a process dies, torchrun starts all of them anew, with counters of their own.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store, rendezvous

T = TypeVar("T")
_START_WITHIN = timedelta(minutes=10)
_LOOK_EVERY = 0.1


@dataclass(frozen=True)
class Workers:
    """This process among its like.

    Attributes:
        rank: from 0; the first one leads: it alone writes what is written once.
        count: how many there are.
        store: what they share; None for a process alone.
    """

    rank: int = 0
    count: int = 1
    store: Store | None = None

    @classmethod
    def join(cls) -> "Workers":
        """The processes that torchrun started, each on a GPU of its own; otherwise this process alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        store, rank, count = next(rendezvous("env://", timeout=_START_WITHIN))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The store outlives a restart of the workers, their counters must not.
        return cls(rank, count, PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def share(self, name: str, items: Sequence[T]) -> Iterator[T]:
        """The items that fall to this process: each goes to exactly one, whoever asks first.

        Args:
            name: of the queue, never used before.
            items: the same in every process.
        """
        if self.store is None:
            yield from items
            return
        while (index := self.store.add(f"queue/{name}", 1) - 1) < len(items):
            yield items[index]

    def meet(self, name: str) -> None:
        """Wait, for as long as it takes, until all have come here.

        Args:
            name: of the meeting, never used before.
        """
        if self.store is None:
            return
        self.store.add(f"meeting/{name}", 1)
        while self.store.add(f"meeting/{name}", 0) < self.count:
            time.sleep(_LOOK_EVERY)
