"""Workers of test_liveness.py: they print `started`, then wait, fail or hang.

Shorter constants of liveness.py only shorten the waits: a worker is silent after 3 seconds, not after 40.
"""

import ctypes
import signal
import time

from torch.distributed import TCPStore

from thinksafe.distributed import liveness
from thinksafe.distributed.workers import Workers


def wait_at_barrier(rank_1_fails: bool) -> None:
    """Wait in rank 0 for rank 1, which ends with an error if `rank_1_fails`, and otherwise sleeps for a minute."""
    liveness.SILENCE_TIMEOUT = 3.0
    with Workers.start() as workers:
        workers.barrier()
        print("started", flush=True)
        if rank_1_fails and workers.rank == 1:
            raise SystemExit("because")
        if workers.rank == 0:
            workers.barrier()
        else:
            time.sleep(60)


def hang_in_library(heartbeat_seconds: float, shutdown_timeout: float) -> None:
    """Hang forever in a C function, where the interpreter handles no signal.

    Args:
        heartbeat_seconds, shutdown_timeout: values of HEARTBEAT_SECONDS and SHUTDOWN_TIMEOUT in liveness.py.
    """
    liveness.HEARTBEAT_SECONDS, liveness.SHUTDOWN_TIMEOUT = heartbeat_seconds, shutdown_timeout
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore SIGINT by default
    with Workers.start() as workers:
        workers.barrier()
        print("started", flush=True)
        mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)  # blocks forever


def host_store(port: str) -> None:
    """Host the shared store, as a launcher does, for at most a minute."""
    store = TCPStore("localhost", int(port), is_master=True, wait_for_workers=False)
    print("started", flush=True)
    time.sleep(60)
    del store
