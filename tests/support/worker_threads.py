"""Workers that run as threads of one process and share a store in memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError


def run_in_threads(num_workers: int, work: Callable[[Workers], Any]) -> list[Any]:
    """Run work(workers) in one thread for each worker; return its results in order of rank.

    The result of a worker that raises a UserError is the error's text; any other error is raised.
    """
    store = torch.distributed.HashStore()

    def run(rank: int) -> Any:
        try:
            return work(Workers(rank, num_workers, store))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(run, range(num_workers)))
