"""A CPU in the place of a GPU, so that what only a GPU runs is run once before there is one.

Whatever is asked for on `cuda` is made on the CPU, where operations take plain torch, and CUDA graphs are tapes that
run again on the same memory. That shows wrong names, shapes and settings, and nothing of kernels.
"""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from tests.emulation.taped_graphs import Tape

GIB = 2**30


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, on_cpu(device))


class OnCpu(TorchFunctionMode):
    """Turns every mention of a CUDA device into one of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


def on_cpu(value):
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


class Graph:
    """A CUDA graph; what is recorded is computed when it is replayed."""

    def replay(self):
        self.tape.replay({})


@contextlib.contextmanager
def record(graph, **options):
    graph.tape = Tape({})
    with graph.tape:
        yield
    graph.tape.forget()


class Event:
    """Of a device that is never behind, and waits 5 ms for what comes next."""

    def __init__(self, enable_timing=False):
        pass

    def record(self): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 5.0


class Stream:
    def wait_stream(self, other): ...


OF_CUDA = {
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "get_device_name": lambda *device: "NVIDIA H200",
    "get_device_properties": lambda *device: SimpleNamespace(
        total_memory=139 * GIB, multi_processor_count=132, L2_cache_size=2**10
    ),
    "mem_get_info": lambda *device: (130 * GIB, 139 * GIB),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *device: 0),
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *device: None),
    "Stream": Stream,
    "current_stream": lambda *device: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": record,
    "graph_pool_handle": lambda: None,
}


@contextlib.contextmanager
def stand_in():
    """Inside of it this process has an H200."""
    with contextlib.ExitStack() as held:
        for name, replacement in OF_CUDA.items():
            held.enter_context(patch.object(torch.cuda, name, replacement))
        held.enter_context(patch.object(torch, "Generator", Generator))
        held.enter_context(OnCpu())
        yield
