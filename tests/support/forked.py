"""Processes forked from a server that has already imported torch and ThinkSafe, so that they start in milliseconds.

They are real processes: each has its own memory, can be killed, and reaches the others only through sockets. They share
the server's hash seed, which separate interpreters do not; tests/support/launches.py starts those.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "thinksafe.cli.__main__",
        "thinksafe.pipeline",
        "thinksafe.training.loop",
        "torch._dynamo",  # optimizers import it at their first step
        "transformers.models.auto.tokenization_auto",
    ]
)


class ForkedProcess:
    """A process that runs `function(*arguments)` and exits like a script: SystemExit gives its exit status.

    Args:
        function: a function of a module; the process imports the module.
        environment: variables that are added to the environment.
    """

    def __init__(self, function: Callable, *arguments, environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="forked")
        self._output, self._errors = (Path(self._folder.name, name) for name in ("stdout", "stderr"))
        self._output.touch()
        self._errors.touch()
        streams = (self._output, self._errors)
        self._process = _CONTEXT.Process(target=_run, args=(streams, environment or {}, function, arguments))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """Exit status as in `subprocess`: None while the process runs, minus the signal's number after a signal."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait_for_output(self, text: str, timeout: float = 60.0) -> None:
        """Wait until the process has printed exactly `text`."""
        deadline = time.monotonic() + timeout
        while self._output.read_text() != text:
            assert self.returncode is None and time.monotonic() < deadline, self._errors.read_text()
            time.sleep(0.01)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait until the process ends, and return its stdout and stderr. Kill it if it still runs after `timeout`."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"the process still ran after {timeout} seconds:\n{self._errors.read_text()}")
        return self._output.read_text(), self._errors.read_text()


def _run(streams: tuple[Path, Path], environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    for file, descriptor in zip(streams, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.exit(function(*arguments))


def start_forked_workers(num_workers: int, function: Callable, *arguments) -> list[ForkedProcess]:
    """Start workers that no launcher watches, as on several machines; each runs `function(*arguments)`."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_workers)}
    rendezvous["CUDA_VISIBLE_DEVICES"] = ""
    return [
        ForkedProcess(function, *arguments, environment=rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_workers)
    ]


def finish_forked_workers(num_workers: int, function: Callable, *arguments) -> None:
    """Run `function(*arguments)` in each of `num_workers` processes; all must succeed."""
    processes = start_forked_workers(num_workers, function, *arguments)
    errors = "".join(process.communicate(timeout=200)[1] for process in processes)
    assert [process.returncode for process in processes] == [0] * num_workers, errors[-6000:]
