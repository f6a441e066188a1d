"""Workers: the processes of one run. They share lists of tasks, wait for one another, and end together.

A launcher (torchrun, deepspeed, srun) starts one process for each GPU and gives all of them the address of a store,
which holds counters and small values. All workers go through the same stages in the same order, so collective
operations are matched by a per-process counter. A response is a function of its task alone, so results do not depend on
which worker takes which task. Neighboring ranks form a tensor-parallel group if a model does not fit one GPU.

liveness.py ends all workers when one of them dies; the same command then resumes from the written files.
"""

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous

from thinksafe.distributed.liveness import Liveness, wait_until
from thinksafe.errors import UserError

T = TypeVar("T")
_START_TIMEOUT = timedelta(minutes=10)


class Workers:
    """This process and its relation to the other workers of the run.

    All workers call `on_leader`, `all_gather`, `barrier`, `claim_items` and `shared_counter` together and in the same
    order. In a single process, and inside the `work` of `on_leader`, these methods return at once.

    Attributes:
        rank: index of this process, from 0. Rank 0 is the leader: it alone writes the files that are written once.
        store: key-value store that all workers share; None for a single process.
        local_rank: index of this process among those of its machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Store | None = None, local_rank: int = 0):
        self.rank, self.world_size, self.store, self.local_rank = rank, world_size, store, local_rank
        self._liveness = None if store is None else Liveness(store, rank, world_size)
        self._num_collectives = 0
        self._groups: dict[int, dist.ProcessGroup] = {}
        self._in_leader_call = False

    @classmethod
    @contextmanager
    def start(cls) -> Iterator["Workers"]:
        """Yield this process as one of the workers that a launcher started; without a launcher, as the single process.
        The launcher sets WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield SINGLE_PROCESS
            return
        store, rank, world_size = next(rendezvous("env://", timeout=_START_TIMEOUT))
        # torchrun keeps its store when it restarts the workers, but their counters must start at zero again.
        store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        workers = cls(rank, world_size, store, int(os.environ.get("LOCAL_RANK", "0")))
        with workers._liveness.watch():
            yield workers
            workers._leave()

    @property
    def is_leader(self) -> bool:
        """Whether this process writes the files that are written once."""
        return self.rank == 0

    def on_leader(self, work: Callable[[], T]) -> T:
        """Run a function on the leader alone, and return its result on every worker, through JSON. If `work` raises,
        the leader raises the error and all workers end."""
        if self._is_single:
            return work()
        key = self._next_key()
        if self.is_leader:
            self._in_leader_call = True
            try:
                result = json.dumps(work())
            finally:
                self._in_leader_call = False
            self.store.set(key, result)
        else:
            result = self._wait_for(key)
        return json.loads(result)

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all workers by rank, on every worker. They pass the store as JSON: keep them small."""
        if self._is_single:
            return [value]
        key = self._next_key()
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait_for(f"{key}/{rank}")) for rank in range(self.world_size)]

    def barrier(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Wait without a timeout until all workers have called this method; call `meanwhile` between polls."""
        if self._is_single:
            return
        key = self._next_key()
        self.store.add(key, 1)
        wait_until(lambda: self.store.add(key, 0) >= self.world_size, meanwhile)

    def claim_items(self, items: Sequence[T], group_size: int = 1) -> Iterator[T]:
        """Return an iterator over the items that this process's group of `group_size` neighboring ranks claims. Each
        item goes to exactly one group, the first that asks. `items` are the same in every process."""
        if self._is_single:
            return iter(items)
        return self._claim_items(self._next_key(), items, group_size)

    def is_group_leader(self, group_size: int) -> bool:
        """Return whether this process has the lowest rank of its `group_size` neighboring ranks."""
        return self.rank % group_size == 0

    def connect(self, device: torch.device) -> None:
        """Create the process group in which all workers exchange tensors on `device`, unless it exists: by NCCL on
        GPUs, by Gloo on CPUs. All workers must call this, before DeepSpeed is imported."""
        # DeepSpeed reads these variables when it is imported and when it makes an engine.
        os.environ.update(LOCAL_RANK=str(self.local_rank), DS_ACCELERATOR=device.type)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore() if self.store is None else dist.PrefixStore("tensors", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)

    def tensor_parallel_group(self, group_size: int, device: torch.device) -> dist.ProcessGroup:
        """Return the process group of this process's `group_size` neighboring ranks, which share one copy of a model on
        `device`. All workers must call this. Raise a UserError if their number is not a multiple of `group_size`."""
        if self.world_size % group_size:
            started = "1 worker was" if self.world_size == 1 else f"{self.world_size} workers were"
            raise UserError(
                f"tensor_parallel_size: {group_size} workers share one model, but {started} started; "
                f"start a multiple of {group_size} with torchrun --nproc-per-node"
            )
        self.connect(device)
        if group_size not in self._groups:
            ranks = range(self.world_size)
            groups = [dist.new_group(list(ranks[start : start + group_size])) for start in ranks[::group_size]]
            self._groups[group_size] = groups[self.rank // group_size]
        return self._groups[group_size]

    def shared_counter(self) -> Callable[[int], int]:
        """Return a function that adds its argument to one sum over all workers, 0 at first, and returns the new sum. A
        worker may call that function at any time."""
        if self._is_single:
            return partial(dist.HashStore().add, "sum")
        return partial(self.store.add, self._next_key())

    @property
    def _is_single(self) -> bool:
        """Whether a collective operation involves this process alone."""
        return self.store is None or self._in_leader_call

    def _next_key(self) -> str:
        """Return the key of the next collective operation, the same in every process."""
        self._num_collectives += 1
        return f"collective/{self._num_collectives}"

    def _wait_for(self, key: str) -> bytes:
        """Return the value of a key of the store as soon as another worker has set it, without a timeout."""
        wait_until(lambda: self.store.check([key]))
        return self.store.get(key)

    def _claim_items(self, key: str, items: Sequence[T], group_size: int) -> Iterator[T]:
        """Yield the claimed items; their counter over all groups is at `key` in the store."""
        for turn in itertools.count():
            group_key = f"{key}/{self.rank // group_size}/{turn}"
            if self.is_group_leader(group_size):
                index = self.store.add(key, 1) - 1
                if group_size > 1:
                    self.store.set(group_key, str(index))
            else:
                index = int(self._wait_for(group_key))
            if index >= len(items):
                return
            yield items[index]

    def _leave(self) -> None:
        """Stop the watch, free the process group, and record that this worker is done."""
        self._liveness.stop()
        if dist.is_initialized():
            gc.collect()  # NCCL would wait forever for a CUDA graph that only garbage references
            dist.destroy_process_group()
        self._liveness.leave()


SINGLE_PROCESS = Workers()
"""The single process of a run without a launcher."""


def leader_only(work: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function whose first argument has an attribute `workers`, such as a `RunDir`, so that every worker
    calls it and the leader alone executes it, see `Workers.on_leader`."""

    @wraps(work)
    def call_on_leader(run: Any, *arguments: Any, **keywords: Any) -> T:
        return run.workers.on_leader(lambda: work(run, *arguments, **keywords))

    return call_on_leader
