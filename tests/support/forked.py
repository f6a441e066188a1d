"""Processes forked from a server that has already imported torch and ThinkSafe, so that they start in milliseconds.

They are real processes: each has its own memory, can be killed, and reaches the others only through sockets. They share
the server's hash seed, which separate interpreters do not; tests/support/launches.py starts those.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from thinksafe.distributed import liveness

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "thinksafe.cli.__main__",
        "thinksafe.pipeline",
        "thinksafe.training.loop",
        # Optimizers and DeepSpeed import these at their first step.
        "torch._dynamo.testing",
        "torch._inductor.compile_fx",
        "torch.utils.cpp_extension",
        "transformers.models.auto.tokenization_auto",
    ]
)


class ForkedProcess:
    """A process that runs `function(*arguments)` and exits with its result as exit status (None is 0), like a script.

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
        # A test that fails may leave it hanging, and multiprocessing would wait for it when the interpreter exits.
        atexit.register(self._process.kill)

    @property
    def returncode(self) -> int | None:
        """Exit status as in `subprocess`: None while the process runs, minus the signal's number after a signal."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait_for_output(self, text: str, timeout: float = 60.0) -> None:
        """Wait until the process has printed exactly `text`; fail if it ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._output.read_text() != text:
            assert self.returncode is None and time.monotonic() < deadline, self._errors.read_text()
            time.sleep(0.01)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait until the process ends, and return its stdout and stderr.

        Raises:
            AssertionError: it still runs after `timeout` seconds; it is then killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"the process still ran after {timeout} seconds:\n{self._errors.read_text()}")
        return self._output.read_text(), self._errors.read_text()


def _run(streams: tuple[Path, Path], environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    for file, descriptor in zip(streams, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # the default; libraries that make locks leave fewer traces
    sys.exit(function(*arguments))


def start_forked_workers(
    num_workers: int, function: Callable, *arguments, environment: dict[str, str] | None = None
) -> list[ForkedProcess]:
    """Start workers that no launcher watches, as on several machines; each runs `function(*arguments)`.

    Returns:
        The processes, in order of rank.
    """
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(num_workers)}
    shared |= {"CUDA_VISIBLE_DEVICES": ""} | (environment or {})
    return [
        ForkedProcess(function, *arguments, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_workers)
    ]


def free_port() -> str:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        return str(unused.getsockname()[1])


def shorten_waits() -> None:
    """Set smaller constants of liveness.py in this process: fewer seconds from a kill to the end of all workers."""
    liveness.HEARTBEAT_SECONDS, liveness.SHUTDOWN_TIMEOUT = 0.25, 3.0


def finish_forked_workers(num_workers: int, function: Callable, *arguments) -> None:
    """Run `function(*arguments)` in each of `num_workers` workers, and wait until all end with status 0."""
    processes = start_forked_workers(num_workers, function, *arguments)
    errors = "".join(process.communicate(timeout=200)[1] for process in processes)
    assert [process.returncode for process in processes] == [0] * num_workers, errors[-6000:]
