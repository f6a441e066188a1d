"""Processes that share a queue: every task goes to one of them, and nobody passes a meeting before the others came."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import make_checkpoint
from thinksafe.distributed import workers as workers_module
from thinksafe.distributed.workers import Workers
from thinksafe.model.weights import load_decoder
from thinksafe.run.progress import TokenBar
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.request import Request, SamplingConfig


def together(count: int, work) -> list:
    """Runs work(workers) in `count` threads over one store; their results by rank."""
    store, results = torch.distributed.HashStore(), [None] * count

    def run(rank: int) -> None:
        results[rank] = work(Workers(rank, count, store))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


@given(st.integers(1, 5), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_every_item_goes_to_exactly_one(count, size):
    items = [f"item {index}" for index in range(size)]
    taken = together(count, lambda workers: list(workers.share(items)))
    assert sorted(chain(*taken)) == sorted(items)


def test_one_queue_after_another_does_not_mix_with_it():
    taken = together(2, lambda workers: [*workers.share(range(5)), *workers.share(range(5))])
    assert sorted(chain(*taken)) == sorted([*range(5), *range(5)])


def test_a_slow_worker_gets_fewer():
    def work(workers: Workers) -> int:
        done = 0
        for _ in workers.share(range(60)):
            time.sleep(0.02 if workers.rank else 0.002)
            done += 1
        return done

    fast, slow = together(2, work)
    assert fast + slow == 60
    assert fast > 2 * slow


def test_nobody_leaves_a_meeting_before_the_last_has_come():
    came, left = [], []

    def work(workers: Workers) -> None:
        time.sleep(0.2 * workers.rank)
        came.append(time.monotonic())
        workers.meet()
        left.append(time.monotonic())

    together(3, work)
    assert len(came) == len(left) == 3
    assert min(left) >= max(came)


def test_the_first_one_does_it_once_and_all_have_the_result():
    calls = []

    def work(workers: Workers) -> list:
        def look() -> dict:
            calls.append(workers.rank)
            workers.meet()  # within `once` the leader waits for nobody
            return {"found": [*workers.share(range(3)), workers.once(lambda: 7), workers.total()(2)]}

        return [workers.once(look), workers.once(lambda: None), workers.once(lambda: workers.rank)]

    assert together(3, work) == [[{"found": [0, 1, 2, 7, 2]}, None, 0]] * 3
    assert calls == [0]


def test_a_total_is_of_all():
    def work(workers: Workers) -> int:
        total = workers.total()
        for _ in range(10):
            total(workers.rank + 1)
        workers.meet()
        return total(0)

    assert together(3, work) == [60] * 3


def test_garbage_is_gone_before_the_process_group_is_ended(monkeypatch):
    """A CUDA graph in it would hold NCCL's communicator."""

    class Graph:
        pass

    graph = Graph()
    graph.itself = graph
    watched, seen = weakref.ref(graph), []
    monkeypatch.setattr(workers_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(workers_module.dist, "destroy_process_group", lambda: seen.append(watched()))
    gc.disable()
    try:
        del graph
        Workers(0, 1, torch.distributed.HashStore())._leave()
    finally:
        gc.enable()
    assert seen == [None]


def test_a_process_alone_waits_for_nobody_and_takes_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Workers.join() as alone:
        assert alone.leads and alone.count == 1
        alone.meet()
        assert list(alone.share("xyz")) == ["x", "y", "z"]
        assert alone.once(lambda: 3) == 3
        assert [alone.total()(2), alone.total()(3)] == [2, 3]


_JOINED = """
import sys, time
from thinksafe.distributed import workers
workers._DEAD_AFTER = 3.0
with workers.Workers.join() as one:
    one.meet()
    print("joined", flush=True)
    if sys.argv[1:] == ["fails"] and one.rank == 1:
        raise SystemExit("because")
    one.meet() if one.rank == 0 else time.sleep(60)
"""


_TALKING = """
from types import SimpleNamespace
from thinksafe.cli import parser as cli
def talk(options):
    import torch
    from thinksafe.distributed.workers import Workers
    with Workers.join() as one:
        one.connect(torch.device("cpu"))
        one.meet()
        print("joined", flush=True)
        while True:
            torch.distributed.all_reduce(torch.ones(1))
cli._parsed = lambda arguments: SimpleNamespace(command=talk)
raise SystemExit(cli.main())
"""


_HANGING = """
import ctypes, signal
from thinksafe.distributed import workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a process in the background has is to ignore it
with workers.Workers.join() as one:
    one.meet()
    print("joined", flush=True)
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # for ever, and the interpreter handles no signal
"""


def without_launcher(*arguments: str, script: str = _JOINED, count: int = 2) -> list[subprocess.Popen]:
    """Workers that nobody looks after, as on several machines; all have joined."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    where |= {"WORLD_SIZE": str(count)}
    command = [sys.executable, "-c", script, *arguments]
    started = [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank)}, **pipes) for rank in range(count)
    ]
    assert [one.stdout.readline() for one in started] == ["joined\n"] * count
    return started


@pytest.mark.slow
def test_workers_that_no_launcher_looks_after_end_when_one_is_silent_or_fails():
    silent, failing = without_launcher(), without_launcher("fails")
    silent[1].send_signal(signal.SIGSTOP)
    for (waiting, other), words in ((silent, "worker 1 on"), (failing, "")):
        _, errors = waiting.communicate(timeout=30)
        assert waiting.returncode == 1 and words in errors and len(errors.splitlines()) == bool(words)
        other.kill()
        assert ("because" in other.communicate()[1]) == (not words)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_who_died_while_workers_exchange_tensors_is_named_in_one_line(victim):
    """And not in the words of the library that exchanges them; with the first worker the store is gone as well."""
    started = without_launcher(script=_TALKING, count=3)
    started[victim].kill()
    said = [line for one in started for line in one.communicate(timeout=60)[1].splitlines()]
    assert said and all(
        line.endswith("so all end; nothing finished is lost, the same command goes on from here") for line in said
    )
    if victim:
        assert len(said) == 1 and f"worker 1 on {socket.gethostname()} is gone" in said[0]
    else:
        assert all("the machine of the first worker, is gone" in line for line in said)
    assert all(one.returncode in (1, 2) for one in started if one is not started[victim])


@pytest.mark.slow
@pytest.mark.parametrize("victims, number", [((1,), signal.SIGTERM), ((0,), signal.SIGTERM), ((), signal.SIGINT)])
def test_workers_that_a_library_holds_say_who_died_before_their_launcher_kills_them(victims, number):
    """torchrun asks them to end, and 30 seconds later does not ask."""
    started = without_launcher(script=_HANGING, count=3)
    time.sleep(0.5)  # all hang by now
    for victim in victims:
        started[victim].kill()
    survivors = [one for rank, one in enumerate(started) if rank not in victims]
    for one in survivors:
        one.send_signal(number)
    said = [line for one in survivors for line in one.communicate(timeout=25)[1].splitlines() if "thinksafe: " in line]
    assert [one.returncode for one in survivors] == [1] * len(survivors)
    why = {(1,): f"worker 1 on {socket.gethostname()} is gone", (): "stopped from outside"}
    assert all(why.get(victims, "the machine of the first worker, is gone") in line for line in said)
    assert len(said) == (2 if victims == (0,) else 1)


_RESTARTED = """
import os, sys
from thinksafe.distributed.workers import Workers
with Workers.join() as one:
    mine, again = list(one.share(range(6))), os.environ["TORCHELASTIC_RESTART_COUNT"]
    total = one.total()
    total(len(mine))
    one.meet()
    print("started", again, one.once(lambda: [again, total(0)]), flush=True)
    if again == "0" and one.rank == 1:
        os._exit(3)
    one.meet()
"""


@pytest.mark.slow
def test_workers_that_torchrun_starts_anew_know_nothing_of_the_counters_before(tmp_path):
    (tmp_path / "work.py").write_text(_RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command = [*torchrun, "--nproc-per-node", "2", str(tmp_path / "work.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["started 0 ['0', 6]"] * 2 + ["started 1 ['1', 6]"] * 2


def test_a_bar_counts_the_work_of_all_and_the_first_worker_shows_it(capsys):
    def work(workers: Workers) -> tuple[int, int]:
        with TokenBar("sample", 14, "responses", done=2, workers=workers) as bar:
            for _ in range(4):
                bar.update(10 * (workers.rank + 1))
        return bar._items, bar._tokens

    assert together(3, work)[0] == (12, 240)
    (line,) = capsys.readouterr().err.splitlines()
    assert "sample: 12 of 14 responses" in line


def test_an_engine_holds_no_more_requests_than_its_share(tmp_path):
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path / "student"), torch.float32, "cpu")
    taken = []

    def requests():
        for number in range(20):
            taken.append(number)
            yield Request(str(number), (3, 5, 7 + number), SamplingConfig(max_tokens=3 + number % 4), number, ())

    finished = 0
    for _ in Engine(decoder, EngineConfig(8, 64, 8, 0.01), most_at_once=3).generate(requests()):
        assert len(taken) - finished <= 3
        finished += 1
    assert finished == 20
