"""Workers share a queue, a leader, barriers and counters."""

import gc
import subprocess
import sys
import time
import weakref
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import make_checkpoint
from tests.support.worker_threads import run_in_threads
from thinksafe.distributed.workers import Workers
from thinksafe.model.weights import load_decoder
from thinksafe.run.progress import TokenBar
from thinksafe.sampler.config import EngineConfig, SamplingConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.request import Request


@given(st.integers(1, 5), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_each_item_is_claimed_by_exactly_one_worker(num_workers, num_items):
    items = [f"item {index}" for index in range(num_items)]
    claimed = run_in_threads(num_workers, lambda workers: list(workers.claim_items(items)))
    assert sorted(chain(*claimed)) == sorted(items)


def test_consecutive_queues_do_not_mix():
    claimed = run_in_threads(2, lambda workers: [*workers.claim_items(range(5)), *workers.claim_items(range(5))])
    assert sorted(chain(*claimed)) == sorted([*range(5), *range(5)])


def test_slow_worker_claims_fewer_items():
    def work(workers: Workers) -> int:
        num_claimed = 0
        for _ in workers.claim_items(range(60)):
            time.sleep(0.02 if workers.rank else 0.002)
            num_claimed += 1
        return num_claimed

    fast, slow = run_in_threads(2, work)
    assert fast + slow == 60
    assert fast > 2 * slow


def test_barrier_holds_workers_until_the_last_one_arrives():
    arrived, left = [], []

    def work(workers: Workers) -> None:
        time.sleep(0.2 * workers.rank)
        arrived.append(time.monotonic())
        workers.barrier()
        left.append(time.monotonic())

    run_in_threads(3, work)
    assert len(arrived) == len(left) == 3
    assert min(left) >= max(arrived)


def test_on_leader_runs_once_and_all_workers_get_the_result():
    calls = []

    def work(workers: Workers) -> list:
        def nested_calls() -> dict:
            calls.append(workers.rank)
            workers.barrier()  # inside on_leader the leader does not wait for the other workers
            claimed, add = list(workers.claim_items(range(3))), workers.shared_counter()
            return {"results": [*claimed, workers.on_leader(lambda: 7), add(2)]}

        return [
            workers.on_leader(nested_calls),
            workers.on_leader(lambda: None),
            workers.on_leader(lambda: workers.rank),
        ]

    assert run_in_threads(3, work) == [[{"results": [0, 1, 2, 7, 2]}, None, 0]] * 3
    assert calls == [0]


def test_shared_counter_sums_over_all_workers():
    def work(workers: Workers) -> int:
        add = workers.shared_counter()
        for _ in range(10):
            add(workers.rank + 1)
        workers.barrier()
        return add(0)

    assert run_in_threads(3, work) == [60] * 3


def test_garbage_is_collected_before_the_process_group_is_destroyed(monkeypatch):
    """A CUDA graph that only garbage references would keep NCCL's communicator alive."""

    class Graph:
        pass

    graph = Graph()
    graph.itself = graph
    graph_reference, graphs_at_destroy = weakref.ref(graph), []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: graphs_at_destroy.append(graph_reference()))
    gc.disable()
    try:
        del graph
        Workers(0, 1, torch.distributed.HashStore())._leave()
    finally:
        gc.enable()
    assert graphs_at_destroy == [None]


def test_single_process_claims_everything_and_never_waits(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Workers.start() as workers:
        assert workers.is_leader and workers.world_size == 1
        workers.barrier()
        assert list(workers.claim_items("xyz")) == ["x", "y", "z"]
        assert workers.on_leader(lambda: 3) == 3
        assert [workers.shared_counter()(2), workers.shared_counter()(3)] == [2, 3]


_RESTARTED = """
import os
from thinksafe.distributed import liveness
from thinksafe.distributed.workers import Workers
liveness.HEARTBEAT_SECONDS, liveness.SHUTDOWN_TIMEOUT = 0.25, 3.0
with Workers.start() as workers:
    claimed, restarts = list(workers.claim_items(range(6))), os.environ["TORCHELASTIC_RESTART_COUNT"]
    add = workers.shared_counter()
    add(len(claimed))
    workers.barrier()
    line = f"started {restarts} {workers.on_leader(lambda: [restarts, add(0)])}\\n"
    os.write(1, line.encode())  # a single write: the lines of two workers cannot mix
    if restarts == "0" and workers.rank == 1:
        os._exit(3)
    workers.barrier()
"""


@pytest.mark.slow
def test_counters_start_at_zero_after_torchrun_restarts_the_workers(tmp_path):
    (tmp_path / "work.py").write_text(_RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command = [*torchrun, "--nproc-per-node", "2", str(tmp_path / "work.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["started 0 ['0', 6]"] * 2 + ["started 1 ['1', 6]"] * 2


def test_leader_shows_one_bar_for_all_workers(capsys):
    def work(workers: Workers) -> tuple[int, int]:
        with TokenBar("sample", 14, "responses", initial=2, workers=workers) as bar:
            for _ in range(4):
                bar.update(10 * (workers.rank + 1))
        return bar._items, bar._tokens

    assert run_in_threads(3, work)[0] == (12, 240)
    (line,) = capsys.readouterr().err.splitlines()
    assert "sample: 12 of 14 responses" in line


def test_engine_holds_no_more_than_max_requests(tmp_path):
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path / "student"), torch.float32, "cpu")
    started = []

    def requests():
        for number in range(20):
            started.append(number)
            yield Request(str(number), (3, 5, 7 + number), SamplingConfig(max_tokens=3 + number % 4), number, ())

    finished = 0
    for _ in Engine(decoder, EngineConfig(8, 64, 8, 0.01), max_requests=3).generate(requests()):
        assert len(started) - finished <= 3
        finished += 1
    assert finished == 20
