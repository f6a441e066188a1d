"""A CPU that poses as an H200, so that tests can run code that otherwise only a GPU runs.

Tensors requested on `cuda` are created on the CPU, where the operations run in plain torch. CUDA graphs become tapes
that replay on the same memory. This reveals wrong names, shapes and settings. It reveals nothing about kernels.
"""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from tests.emulation.taped_graphs import Tape

GIB = 2**30


class CpuGenerator(torch.Generator):
    """A random generator for a requested CUDA device, which is on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, to_cpu(device))


class RedirectToCpu(TorchFunctionMode):
    """Mode that replaces every CUDA device in the arguments of torch functions with the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: to_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(to_cpu, args), **kwargs)


def to_cpu(value):
    """Return the CPU for a CUDA device or its name; return any other value unchanged."""
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


class FakeCudaGraph:
    """A stand-in for `torch.cuda.CUDAGraph`: `capture` records operations on its tape, and `replay` runs them again."""

    def replay(self):
        self.tape.replay({})


@contextlib.contextmanager
def capture(graph, **options):
    """Stand in for `torch.cuda.graph`: capture the operations of the block on the graph's tape."""
    graph.tape = Tape({})
    with graph.tape:
        yield
    graph.tape.undo()


class FakeEvent:
    """An event that is always complete; any two events are 5 ms apart."""

    def __init__(self, enable_timing=False):
        pass

    def record(self): ...

    def query(self):
        return True

    def elapsed_time(self, end_event):
        return 5.0


class FakeStream:
    """A stream whose waits do nothing: all operations run in order on the CPU."""

    def wait_stream(self, stream): ...


# Replacements of functions and classes in torch.cuda, by name.
CUDA_REPLACEMENTS = {
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "get_device_name": lambda *device: "NVIDIA H200",
    "get_device_properties": lambda *device: SimpleNamespace(
        total_memory=139 * GIB, multi_processor_count=132, L2_cache_size=2**10
    ),
    "mem_get_info": lambda *device: (130 * GIB, 139 * GIB),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *device: 0),
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *device: None),
    "Stream": FakeStream,
    "current_stream": lambda *device: FakeStream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "Event": FakeEvent,
    "CUDAGraph": FakeCudaGraph,
    "graph": capture,
    "graph_pool_handle": lambda: None,
}


@contextlib.contextmanager
def fake_h200():
    """Make this process see an H200 inside the block: torch.cuda describes one, and its tensors are on the CPU."""
    with contextlib.ExitStack() as stack:
        for name, replacement in CUDA_REPLACEMENTS.items():
            stack.enter_context(patch.object(torch.cuda, name, replacement))
        stack.enter_context(patch.object(torch, "Generator", CpuGenerator))
        stack.enter_context(RedirectToCpu())
        yield
