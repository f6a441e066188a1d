"""Liveness: every worker sends heartbeats to the shared store, and all workers end when one fails or falls silent.

A launcher ends the workers that it started when one of them dies. Workers that ssh started on several machines have no
such launcher, so a thread in each worker watches the next rank. When workers fail, one of them prints the reason and
the others exit without a message.

A worker's pulse is a counter in the store: each heartbeat adds 1 to it, and a worker that ends adds `_FAREWELL`.
"""

import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import Store

from thinksafe.errors import UserError

HEARTBEAT_SECONDS, SILENCE_TIMEOUT = 1.0, 40.0
"""Seconds between two heartbeats, and seconds without a heartbeat after which a worker counts as failed."""
SHUTDOWN_TIMEOUT = 6.0
"""Seconds within which all workers end after a failure."""
_CONNECTION_ERROR = re.compile(r"gloo|[Cc]onnection (closed|reset) by peer")
_RESUME_HINT = "no finished work is lost, run the same command again to continue"
_STORE_LOST = "the launcher or the machine of the leader (worker 0) is gone"
_STOPPED = "stopped by a signal, which launchers send when another worker has failed"
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_FAREWELL = 1 << 40
"""A pulse of this size or more sends no more heartbeats."""


class Liveness:
    """The heartbeat of this worker, and its watch for failures of other workers, both in a thread.

    The thread reads the pulse of the next rank only. It learns of every other failure from the counter `failed` in the
    store, which the worker that notices a failure increases, and then ends this process with status 1.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._stopped, self._exit_lock = threading.Event(), threading.Lock()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Send heartbeats and watch for failures in a thread while the body runs.

        If the body raises, all workers end: the first worker to fail raises the error, and the others exit with status
        1 and without a message. The error is a UserError if another worker or the connection failed.
        """
        self._store.set(f"host/{self._rank}", socket.gethostname())
        signals, interpreter = socket.socketpair()
        thread = threading.Thread(target=self._watch, args=(signals,), daemon=True)
        thread.start()
        sigterm_handler = signal.signal(signal.SIGTERM, _raise_stopped)
        interpreter.setblocking(False)
        signal.set_wakeup_fd(interpreter.fileno(), warn_on_full_buffer=False)
        try:
            yield
            signal.signal(signal.SIGTERM, sigterm_handler)
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher may send it while this worker reports
            if not self._is_first_to_fail():
                self._say_farewell()
                exit_now(1)
            raise self._explain(error) from None
        finally:
            signal.set_wakeup_fd(-1)
            interpreter.send(b"\0")
            thread.join(SHUTDOWN_TIMEOUT)  # if the interpreter ended first, it would abort the thread's C++ call

    def stop(self) -> None:
        """Stop heartbeats and watch."""
        self._stopped.set()

    def leave(self) -> None:
        """Record in the store that this worker has finished. Rank 0, which may host the store, then waits for the
        others, at most SILENCE_TIMEOUT seconds."""
        self._store.add(f"pulse/{self._rank}", _FAREWELL)
        num_left = self._store.add("left", 1)
        if self._rank == 0 and num_left < self._world_size:
            wait_until(lambda: self._store.add("left", 0) >= self._world_size, timeout=SILENCE_TIMEOUT)

    def _watch(self, signals: socket.socket) -> None:
        """Send heartbeats until `stop`. End this process if another worker failed, the next rank is silent, the store
        is gone, or the main thread has not ended some seconds after a stop signal. The socket `signals` receives signal
        numbers even while the main thread hangs in a library."""
        next_rank = (self._rank + 1) % self._world_size
        last_pulse, changed_at, ends_at = 0, time.monotonic(), float("inf")
        while not self._stopped.is_set():
            if select.select([signals], [], [], HEARTBEAT_SECONDS)[0] and _STOP_SIGNALS & set(signals.recv(64)):
                # Rank 0 reports a failure that all workers share, so it ends first.
                grace = SHUTDOWN_TIMEOUT + (0 if self._rank == 0 else 2 * HEARTBEAT_SECONDS)
                ends_at = min(ends_at, time.monotonic() + grace)
            try:
                self._store.add(f"pulse/{self._rank}", 1)
                pulse = self._store.add(f"pulse/{next_rank}", 0)
                num_failed = self._store.add("failed", 0)
            except RuntimeError:
                self._end(_STORE_LOST, always_report=True)
                continue
            if num_failed:
                self._end("")
            if time.monotonic() > ends_at:
                self._end(_STOPPED)
            if pulse != last_pulse or pulse >= _FAREWELL:
                last_pulse, changed_at = pulse, time.monotonic()
            elif time.monotonic() - changed_at > SILENCE_TIMEOUT:
                worker = f"worker {next_rank} on {self._host(next_rank)}"
                self._end(f"{worker} has been silent for {SILENCE_TIMEOUT:.0f} seconds")

    def _end(self, reason: str, always_report: bool = False) -> None:
        """End this process with status 1 from the watching thread; return only if the main thread is ending it already.

        Args:
            reason: clause of the message that the first worker to fail prints; "" for none.
            always_report: print the message even if another worker may have reported. The store is gone.
        """
        with self._exit_lock:
            if self._stopped.is_set():
                return
            if reason and (always_report or self._store.add("failed", 1) == 1):
                dead = self._describe_dead() if reason is _STOPPED else ""
                line = f"thinksafe: {dead or reason}, so all workers end; {_RESUME_HINT}\n"
                os.write(sys.stderr.fileno(), line.encode())
            self._say_farewell()
            if not always_report:
                self._let_others_read()
            os._exit(1)

    def _say_farewell(self) -> None:
        """Record in the store, if it still exists, that this worker sends no more heartbeats."""
        with suppress(RuntimeError):
            self._store.add(f"pulse/{self._rank}", _FAREWELL)

    def _let_others_read(self) -> None:
        """Wait, on rank 0, until the others have read that a worker failed: this process may host the store."""
        if self._rank == 0:
            time.sleep(1.5 * HEARTBEAT_SECONDS)

    def _explain(self, error: BaseException) -> BaseException:
        """Return a UserError that names the dead workers if an error is only a symptom of another worker's failure: a
        stop signal or a broken connection. Otherwise return the error; a UserError then names this worker if it is not
        rank 0."""
        reason = _STOPPED if isinstance(error, _Stopped) else ""
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _CONNECTION_ERROR.search(str(error))
        ):
            reason = f"the connection between workers broke ({str(error).splitlines()[0]})"
        if reason:
            error = UserError(f"{self._describe_dead() or reason}, so all workers end; {_RESUME_HINT}")
        if isinstance(error, UserError) and self._rank != 0:
            error = UserError(f"worker {self._rank} on {socket.gethostname()}: {error}")
        return error

    def _describe_dead(self) -> str:
        """Return a clause that names the dead workers, or the store if it is gone; "" if there are none. A dead
        worker's pulse does not change and holds no farewell. This may take SHUTDOWN_TIMEOUT seconds."""

        def pulse(rank: int) -> int:
            return self._store.add(f"pulse/{rank}", 0)

        def silent_ranks() -> list[int]:
            return [rank for rank, first in first_pulses.items() if pulse(rank) == first < _FAREWELL]

        try:
            first_pulses = {rank: pulse(rank) for rank in range(self._world_size) if rank != self._rank}
            wait_until(lambda: not silent_ranks(), timeout=SHUTDOWN_TIMEOUT)
            dead = [f"worker {rank} on {self._host(rank)}" for rank in silent_ranks()]
        except RuntimeError:
            return _STORE_LOST
        return f"{' and '.join(dead)} {'are' if len(dead) > 1 else 'is'} gone" if dead else ""

    def _host(self, rank: int) -> str:
        """Return the name of a worker's machine."""
        is_known = self._store.check([f"host/{rank}"])
        return self._store.get(f"host/{rank}").decode() if is_known else "an unknown machine"

    def _is_first_to_fail(self) -> bool:
        """Stop the watch and return whether this worker reports the failure: it is the first to count itself as failed,
        or the store is gone."""
        with self._exit_lock:  # blocks forever if the watching thread is about to end this process
            self._stopped.set()
        try:
            if self._rank != 0:  # rank 0 reports a failure that all workers share
                wait_until(lambda: self._store.add("failed", 0), timeout=1.0)
            is_first = self._store.add("failed", 1) == 1
            self._let_others_read()
        except RuntimeError:
            return True  # the store is gone: two reports are better than no report
        return is_first


def exit_now(status: int) -> NoReturn:
    """Flush stdout and stderr and end this process without cleanup. In an ordinary exit the threads of communication
    libraries may hang or abort while another worker is gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


class _Stopped(KeyboardInterrupt):
    """The exception that SIGTERM raises in the main thread."""


def _raise_stopped(number: int, frame: Any) -> None:
    raise _Stopped


def wait_until(
    is_ready: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: None, timeout: float = float("inf")
) -> None:
    """Wait until `is_ready` returns a true value or `timeout` seconds have passed. Call it every millisecond at first
    and ten times a second later, and `meanwhile` before each pause."""
    pause, deadline = 0.001, time.monotonic() + timeout
    while not is_ready() and time.monotonic() < deadline:
        meanwhile()
        time.sleep(pause)
        pause = min(0.1, 2 * pause)
