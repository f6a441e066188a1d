"""Processes that share a queue: every task goes to one of them, and nobody passes a meeting before the others came."""

import threading
import time
from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinksafe.workers import Workers


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
    taken = together(count, lambda workers: list(workers.share("a", items)))
    assert sorted(chain(*taken)) == sorted(items)


def test_queues_of_different_names_do_not_mix():
    taken = together(2, lambda workers: [*workers.share("a", range(5)), *workers.share("b", range(5))])
    assert sorted(chain(*taken)) == sorted([*range(5), *range(5)])


def test_a_slow_worker_gets_fewer():
    def work(workers: Workers) -> int:
        done = 0
        for _ in workers.share("a", range(60)):
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
        workers.meet("here")
        left.append(time.monotonic())

    together(3, work)
    assert len(came) == len(left) == 3
    assert min(left) >= max(came)


def test_a_process_alone_waits_for_nobody_and_takes_everything(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Workers.join()
    assert alone == Workers() and alone.leads
    alone.meet("here")
    assert list(alone.share("a", "xyz")) == ["x", "y", "z"]
