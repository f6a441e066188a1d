"""Launches of real workers on a CPU: with torchrun, as users start them, or forked, which takes milliseconds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.forked import ForkedProcess, shorten_waits, start_forked_workers
from thinksafe.cli.__main__ import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(num_workers: int, arguments: list[str], out: Path, command: str = "run") -> subprocess.Popen:
    """Start a command of thinksafe with this number of workers, and return the process, whose output goes to pipes.

    It is torchrun for several workers, and the command itself for one.

    Args:
        arguments: options of the command, without --out.
    """
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers), "-m"]
    modules = [*(torchrun if num_workers > 1 else []), "thinksafe.cli"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", *modules, command, *arguments, "--out", str(out)], env=ENVIRONMENT, **pipes
    )


def fork_workers(num_workers: int, arguments: list[str], out: Path, command: str = "run") -> list[ForkedProcess]:
    """Start a command of thinksafe with this number of workers, without a launcher; return them in order of rank."""
    return start_forked_workers(num_workers, _run_with_short_waits, [command, *arguments, "--out", str(out)])


def _run_with_short_waits(arguments: list[str]) -> int:
    """Run a command of thinksafe in a process that waits less for the other workers, and return its exit status."""
    shorten_waits()
    return main(arguments)


def finish_workers(workers: list[ForkedProcess]) -> tuple[str, str]:
    """Wait until all workers have ended with status 0; return all they printed to stdout, and all to stderr."""
    outputs = [worker.communicate(timeout=200) for worker in workers]
    printed, errors = ("".join(texts) for texts in zip(*outputs, strict=True))
    assert [worker.returncode for worker in workers] == [0] * len(workers), errors[-6000:]
    return printed, errors


def kill_worker(workers: list[ForkedProcess], victim: int) -> str:
    """Kill the worker of rank `victim` and send SIGTERM to the others, as torchrun does.

    None of them may end with status 0.

    Returns:
        What all of them printed to stderr.
    """
    workers[victim].kill()
    for rank, worker in enumerate(workers):
        if rank != victim:
            worker.send_signal(signal.SIGTERM)
    errors = "".join(worker.communicate(timeout=60)[1] for worker in workers)
    assert all(worker.returncode for worker in workers), errors
    return errors


def thinksafe_errors(stderr: str) -> list[str]:
    """Return the lines in which thinksafe itself reports an error; a launcher prints more."""
    return [line for line in stderr.splitlines() if line.startswith("thinksafe: ")]


def worker_pids(launcher: subprocess.Popen) -> list[int]:
    """Return the process ids of a launcher's workers."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if is_worker(int(pid))]


def is_worker(pid: int) -> bool:
    """Return whether a process lives and runs thinksafe."""
    try:
        return "thinksafe.cli" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
