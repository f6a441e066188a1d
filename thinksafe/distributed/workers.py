"""Several processes on one run: they share lists of tasks, wait for one another, and end together.

A launcher (torchrun, deepspeed, srun) starts one process a GPU and says where they meet; a store there holds a few
counters. All workers go through the same stages in the same order, so what they do together is told apart by how many
such things they have done before. A task is a place in a list that all make alike, and a response is a function of its
task alone: who answers it changes nothing. Where a model does not fit one GPU, neighbours hold it together, and take
their tasks as one.

A worker that dies takes the others with it, by the launcher or, where that does not notice, by its silence; the same
command then goes on from what is written.
"""

import gc
import itertools
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous

from thinksafe.errors import UserError

T = TypeVar("T")
_START_WITHIN = timedelta(minutes=10)
_LISTEN_EVERY, _DEAD_AFTER = 1.0, 40.0
_ENDS_WITHIN = 6.0
"""After a failure, which all others hear of as they listen."""
_OF_GLOO = re.compile(r"gloo|[Cc]onnection (closed|reset) by peer")
_GOES_ON = "nothing finished is lost, the same command goes on from here"
_STORE_GONE = "the launcher, or the machine of the first worker, is gone"
_STOPPED = "stopped from outside, as a launcher does when another worker has failed"
_STOPPING = {signal.SIGINT, signal.SIGTERM}
_LEFT = 1 << 40
"""A pulse that beats no more, since its worker is done."""


class Workers:
    """This process among its like.

    Attributes:
        rank: from 0; the first one leads: it alone writes what is written once.
        count: how many there are.
        store: what they share; None for a process alone.
        local_rank: of this process among those of its machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None, local_rank: int = 0):
        self.rank, self.count, self.store, self.local_rank = rank, count, store, local_rank
        self._done_together = 0
        self._neighbours: dict[int, dist.ProcessGroup] = {}
        self._leader_alone = False
        self._over, self._ending = threading.Event(), threading.Lock()

    @classmethod
    @contextmanager
    def join(cls) -> Iterator["Workers"]:
        """The processes that a launcher started together; this process alone where there is no launcher.

        Of what goes wrong in several of them, one speaks and the others end in silence.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield ALONE
            return
        store, rank, count = next(rendezvous("env://", timeout=_START_WITHIN))
        # torchrun's store outlives a restart of the workers, their counters must not.
        store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        workers = cls(rank, count, store, int(os.environ.get("LOCAL_RANK", "0")))
        store.set(f"host/{rank}", socket.gethostname())
        signals, interpreter = socket.socketpair()
        listening = threading.Thread(target=workers._listen, args=(signals,), daemon=True)
        listening.start()
        before = signal.signal(signal.SIGTERM, _stop)
        interpreter.setblocking(False)
        signal.set_wakeup_fd(interpreter.fileno(), warn_on_full_buffer=False)
        try:
            yield workers
            workers._leave()
            signal.signal(signal.SIGTERM, before)
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever speaks is not cut short when the others end
            if not workers._is_first_to_fail():
                workers._say_farewell()
                end(1)
            raise workers._explained(error) from None
        finally:
            signal.set_wakeup_fd(-1)
            interpreter.send(b"\0")
            listening.join(_ENDS_WITHIN)  # the interpreter's end would tear it out of a call of C++, and abort

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def once(self, work: Callable[[], T]) -> T:
        """Let the first worker do something alone, while the others wait for its result.

        Within it, `once`, `meet`, `share` and `total` concern nobody else.

        Args:
            work: returns a JSON value.
        """
        if self._is_alone:
            return work()
        key = self._next_key()
        if self.leads:
            self._leader_alone = True
            try:
                result = json.dumps(work())
            finally:
                self._leader_alone = False
            self.store.set(key, result)
        else:
            _wait_for(lambda: self.store.check([key]))
            result = self.store.get(key)
        return json.loads(result)

    def meet(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Wait, for as long as it takes, until all have come here.

        Args:
            meanwhile: called now and then.
        """
        if self._is_alone:
            return
        key = self._next_key()
        self.store.add(key, 1)
        _wait_for(lambda: self.store.add(key, 0) >= self.count, meanwhile)

    def share(self, items: Sequence[T], together: int = 1) -> Iterator[T]:
        """The items that fall to this process: each goes to exactly one, whoever asks first.

        Args:
            items: the same in every process.
            together: so many neighbours count as one, and get the same items in the same order.
        """
        if self._is_alone:
            return iter(items)
        return self._share(self._next_key(), items, together)

    def speaks(self, together: int) -> bool:
        """Whether this process writes down what it and its neighbours, so many together, have found."""
        return self.rank % together == 0

    def connect(self, device: torch.device) -> None:
        """Make the process group of all workers, in which they send one another tensors; the first time only."""
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore() if self.store is None else dist.PrefixStore("tensors", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)

    def neighbours(self, together: int, device: torch.device) -> dist.ProcessGroup:
        """The so many processes, this one among them, that hold one model on such devices.

        Raises:
            UserError: the workers cannot be put together so.
        """
        if self.count % together:
            started = "1 worker" if self.count == 1 else f"{self.count} workers"
            raise UserError(
                f"tensor_parallel: {together} GPUs are to hold one model, and {started} cannot be put together so; "
                f"start a multiple of {together} with torchrun --nproc-per-node"
            )
        self.connect(device)
        if together not in self._neighbours:
            everybody = range(self.count)
            groups = [dist.new_group(list(everybody[first : first + together])) for first in everybody[::together]]
            self._neighbours[together] = groups[self.rank // together]
        return self._neighbours[together]

    def total(self) -> Callable[[int], int]:
        """A sum over all workers: a function that adds to it and returns it."""
        if self._is_alone:
            own = [0]

            def add(amount: int) -> int:
                own[0] += amount
                return own[0]

            return add
        key = self._next_key()
        return lambda amount: self.store.add(key, amount)

    @property
    def _is_alone(self) -> bool:
        return self.store is None or self._leader_alone

    def _next_key(self) -> str:
        self._done_together += 1
        return f"together/{self._done_together}"

    def _share(self, key: str, items: Sequence[T], together: int) -> Iterator[T]:
        for turn in itertools.count():
            told = f"{key}/{self.rank // together}/{turn}"
            if self.speaks(together):
                index = self.store.add(key, 1) - 1
                if together > 1:
                    self.store.set(told, str(index))
            else:
                _wait_for(partial(self.store.check, [told]))
                index = int(self.store.get(told))
            if index >= len(items):
                return
            yield items[index]

    def _listen(self, signals: socket.socket) -> None:
        """In a thread: be heard, hear of failures, of the silence of the next worker, and of being stopped.

        Args:
            signals: where their numbers come in, also while the main thread hangs in a library and handles none.
        """
        neighbour = (self.rank + 1) % self.count
        heard, changed, ends_at = 0, time.monotonic(), float("inf")
        while not self._over.is_set():
            if select.select([signals], [], [], _LISTEN_EVERY)[0] and _STOPPING & set(signals.recv(64)):
                # What concerns all, the first worker says.
                grace = _ENDS_WITHIN + (0 if self.leads else 2 * _LISTEN_EVERY)
                ends_at = min(ends_at, time.monotonic() + grace)
            try:
                self.store.add(f"pulse/{self.rank}", 1)
                pulse = self.store.add(f"pulse/{neighbour}", 0)
                failed = self.store.add("failed", 0)
            except RuntimeError:
                self._end(_STORE_GONE, always=True)
                continue
            if failed:
                self._end("")
            if time.monotonic() > ends_at:
                self._end(_STOPPED)
            if pulse != heard or pulse >= _LEFT:
                heard, changed = pulse, time.monotonic()
            elif time.monotonic() - changed > _DEAD_AFTER:
                where = f"worker {neighbour} on {self._host(neighbour)}"
                self._end(f"{where} has been silent for {_DEAD_AFTER:.0f} seconds")

    def _end(self, why: str, always: bool = False) -> None:
        """End this process from the listening thread, unless it is ending anyway."""
        with self._ending:
            if self._over.is_set():
                return
            if why and (always or self.store.add("failed", 1) == 1):
                known = self._gone() if why is _STOPPED else ""
                line = f"thinksafe: {known or why}, so all end; {_GOES_ON}\n"
                os.write(sys.stderr.fileno(), line.encode())
            self._say_farewell()
            os._exit(1)

    def _say_farewell(self) -> None:
        with suppress(RuntimeError):  # where nobody is left to hear it
            self.store.add(f"pulse/{self.rank}", _LEFT)

    def _explained(self, error: BaseException) -> BaseException:
        """In words of ours where it only shows that others end; a user's mistake under this worker's name."""
        why = _STOPPED if isinstance(error, _Stopped) else ""
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _OF_GLOO.search(str(error))):
            why = f"the connection between workers broke ({str(error).splitlines()[0]})"
        if why:
            error = UserError(f"{self._gone() or why}, so all end; {_GOES_ON}")
        if isinstance(error, UserError) and not self.leads:
            error = UserError(f"worker {self.rank} on {socket.gethostname()}: {error}")
        return error

    def _gone(self) -> str:
        """What to say of workers that do not end as all others do, since they are dead; empty where there are none."""
        try:
            pulses = {rank: self.store.add(f"pulse/{rank}", 0) for rank in range(self.count) if rank != self.rank}

            def unheard() -> list[int]:
                return [rank for rank, heard in pulses.items() if self.store.add(f"pulse/{rank}", 0) == heard < _LEFT]

            _wait_for(lambda: not unheard(), within=_ENDS_WITHIN)
            gone = " and ".join(f"worker {rank} on {self._host(rank)}" for rank in unheard())
        except RuntimeError:
            return _STORE_GONE
        return f"{gone} {'are' if ' and ' in gone else 'is'} gone" if gone else ""

    def _host(self, rank: int) -> str:
        known = self.store.check([f"host/{rank}"])
        return self.store.get(f"host/{rank}").decode() if known else "an unknown machine"

    def _is_first_to_fail(self) -> bool:
        with self._ending:  # for ever, if the listening thread is about to end this process
            self._over.set()
        try:
            if not self.leads:  # what concerns all, the first worker says
                _wait_for(lambda: self.store.add("failed", 0), within=1.0)
            first = self.store.add("failed", 1) == 1
            if self.leads:  # it may be this process that the others' store lives in
                time.sleep(1.5 * _LISTEN_EVERY)
        except RuntimeError:
            return True  # nobody to ask: better said twice than never
        return first

    def _leave(self) -> None:
        self._over.set()
        if dist.is_initialized():
            gc.collect()  # NCCL would wait for ever for a CUDA graph that garbage still holds
            dist.destroy_process_group()
        self.store.add(f"pulse/{self.rank}", _LEFT)
        gone = self.store.add("left", 1)
        if self.leads and gone < self.count:
            _wait_for(lambda: self.store.add("left", 0) >= self.count, within=_DEAD_AFTER)


ALONE = Workers()
"""A process that nobody started together with others."""


def end(status: int) -> NoReturn:
    """End this process as it is: threads of the libraries that connect workers, if they are asked to end in the
    ordinary way while another worker is gone, may wait for it, or abort."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


class _Stopped(KeyboardInterrupt):
    """SIGTERM."""


def _stop(number: int, frame: Any) -> None:
    raise _Stopped


def _wait_for(
    ready: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: None, within: float = float("inf")
) -> None:
    """Ask often at first, then ten times a second."""
    pause, until = 0.001, time.monotonic() + within
    while not ready() and time.monotonic() < until:
        meanwhile()
        time.sleep(pause)
        pause = min(0.1, 2 * pause)
