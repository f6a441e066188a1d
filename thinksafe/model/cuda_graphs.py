"""CUDA graphs: one launch for all kernels of a function that always has the same shapes and addresses."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(run: Callable[[], T], pool: tuple[int, int], warm_up: bool = False) -> tuple[T, Callable[[], None]]:
    """Capture `run` as a CUDA graph. Return what `run` returns, whose tensors hold no values yet, and a function that
    computes these values at every call.

    Args:
        pool: memory pool of the graph, from `torch.cuda.graph_pool_handle`; graphs that share one never run at a time.
        warm_up: call `run` once before, which compiles kernels and builds tables; that cannot be captured.
    """
    if warm_up:
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            run()
        torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads call CUDA meanwhile, to pin the next step's packs or to check NCCL operations.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return result, graph.replay
