"""Workers end within seconds when one of them dies, and exactly one line says which one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.support.forked import ForkedProcess, free_port, start_forked_workers
from tests.support.waiting_workers import hang_in_library, host_store, wait_at_barrier
from thinksafe.distributed import liveness

_REDUCING = """
from types import SimpleNamespace
from thinksafe.cli import __main__ as cli
def reduce_forever(options):
    import torch
    from thinksafe.distributed import liveness
    from thinksafe.distributed.workers import Workers
    liveness.HEARTBEAT_SECONDS, liveness.SHUTDOWN_TIMEOUT = 0.25, 3.0
    with Workers.start() as workers:
        workers.connect(torch.device("cpu"))
        workers.barrier()
        print("started", flush=True)
        while True:
            torch.distributed.all_reduce(torch.ones(1))
cli.parse_arguments = lambda arguments: SimpleNamespace(command=reduce_forever)
raise SystemExit(cli.main())
"""


def start_interpreters(script: str, num_workers: int) -> list[subprocess.Popen]:
    """Start workers that no launcher watches, as on several machines, and wait until all have started."""
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(num_workers)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=os.environ | rendezvous | {"RANK": str(rank)}, **pipes)
        for rank in range(num_workers)
    ]
    assert [process.stdout.readline() for process in processes] == ["started\n"] * num_workers
    return processes


def start_workers(num_workers: int, function: Callable, *arguments, **options) -> list[ForkedProcess]:
    """Start forked workers that no launcher watches, and wait until all have started."""
    processes = start_forked_workers(num_workers, function, *arguments, **options)
    for process in processes:
        process.wait_for_output("started\n")
    return processes


@pytest.mark.slow
def test_leader_that_hosts_the_store_reports_alone():
    """The leader notices that worker 1 is silent. Worker 2 must read this from the leader's store before it is gone."""
    leader, silent, other = start_workers(3, wait_at_barrier, False)
    silent.send_signal(signal.SIGSTOP)
    outputs = [worker.communicate(timeout=30)[1] for worker in (leader, other)]
    silent.kill()
    silent.communicate(timeout=30)
    assert (leader.returncode, other.returncode) == (1, 1)
    assert re.fullmatch(
        r"thinksafe: worker 1 on \S+ has been silent for 3 seconds, so all workers end; .*\n", outputs[0]
    )
    assert outputs[1] == ""


@pytest.mark.slow
def test_workers_without_launcher_end_when_one_is_silent_or_fails():
    silent, failing = start_workers(2, wait_at_barrier, False), start_workers(2, wait_at_barrier, True)
    silent[1].send_signal(signal.SIGSTOP)
    for (waiting, other), named_worker in ((silent, "worker 1 on"), (failing, "")):
        _, errors = waiting.communicate(timeout=30)
        assert waiting.returncode == 1 and named_worker in errors and len(errors.splitlines()) == bool(named_worker)
        other.kill()
        assert ("because" in other.communicate(timeout=30)[1]) == (not named_worker)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_worker_that_dies_in_an_all_reduce_is_named(victim):
    """The error of the communication library is not shown. If rank 0 dies, the store is lost as well."""
    processes = start_interpreters(_REDUCING, num_workers=3)
    processes[victim].kill()
    lines = [line for process in processes for line in process.communicate(timeout=60)[1].splitlines()]
    ending = "so all workers end; no finished work is lost, run the same command again to continue"
    assert lines and all(line.endswith(ending) for line in lines)
    if victim:
        assert len(lines) == 1 and f"worker 1 on {socket.gethostname()} is gone" in lines[0]
    else:
        assert all("the machine of the leader (worker 0) is gone" in line for line in lines)
    assert all(process.returncode in (1, 2) for rank, process in enumerate(processes) if rank != victim)


@pytest.mark.slow
def test_workers_end_when_the_launcher_dies():
    """torchrun hosts the store. Every worker reports the loss, because none can see whether another one does."""
    port = free_port()
    launcher = ForkedProcess(host_store, port)
    launcher.wait_for_output("started\n")
    environment = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    workers = start_workers(2, hang_in_library, 0.25, 3.0, environment=environment)
    launcher.kill()
    for worker in workers:
        _, errors = worker.communicate(timeout=30)
        (line,) = (line for line in errors.splitlines() if line.startswith("thinksafe: "))
        assert worker.returncode == 1 and "the launcher or the machine of the leader (worker 0) is gone" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "heartbeat_seconds, shutdown_timeout",
    [
        (0.25, 3.0),
        pytest.param(liveness.HEARTBEAT_SECONDS, liveness.SHUTDOWN_TIMEOUT, marks=pytest.mark.exhaustive),
    ],
)
def test_workers_hanging_in_a_library_name_the_dead_worker(heartbeat_seconds, shutdown_timeout):
    """torchrun sends SIGTERM, and 30 seconds later SIGKILL; the message must come before that."""
    cases = [((1,), signal.SIGTERM), ((0,), signal.SIGTERM), ((), signal.SIGINT)]
    arguments = (hang_in_library, heartbeat_seconds, shutdown_timeout)
    groups = [start_workers(3, *arguments) for _ in cases]
    time.sleep(0.5)  # now all workers hang
    for processes, (victims, signal_number) in zip(groups, cases, strict=True):
        for rank, process in enumerate(processes):
            process.send_signal(signal.SIGKILL if rank in victims else signal_number)
    deadline = time.monotonic() + 25
    for processes, (victims, _) in zip(groups, cases, strict=True):
        survivors = [process for rank, process in enumerate(processes) if rank not in victims]
        outputs = [process.communicate(timeout=deadline - time.monotonic())[1] for process in survivors]
        lines = [line for output in outputs for line in output.splitlines() if "thinksafe: " in line]
        assert [process.returncode for process in survivors] == [1] * len(survivors)
        reasons = {(1,): f"worker 1 on {socket.gethostname()} is gone", (): "stopped by a signal"}
        assert all(reasons.get(victims, "the machine of the leader (worker 0) is gone") in line for line in lines)
        assert len(lines) == (2 if victims == (0,) else 1), lines
