"""What every suite needs: the machine's description, timing, floors, peers, and results as JSON and Markdown."""

import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinksafe.hardware import hardware_named

RATE, BANDWIDTH = hardware_named("H200").flop_per_second, hardware_named("H200").bytes_per_second
"""The two ceilings measured on an H200: FLOP/s of a large cuBLAS product in bf16, bytes/s of a large copy."""


@dataclass
class Result:
    """One suite's outcome.

    Attributes:
        claim: what the suite shows, in a sentence.
        rows: one mapping a variant; equal keys become a column.
        notes: what a reader must know to judge the figures.
    """

    suite: str
    claim: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def device_name() -> str:
    """The GPU's name, or `cpu`; the folder of its results."""
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one call, the device's work included; without a GPU the processor's time, which other work on the
    machine does not change."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    started = clock()
    work()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def interleaved(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Times of each variant, taken in turns after one warm-up each, so that a drifting clock hits all alike; each with
    nothing of its data left in a GPU's L2."""
    for work in variants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            if torch.cuda.is_available():
                _beyond_cache().zero_()
            times[name].append(seconds(work))
    return times


@cache
def _beyond_cache() -> Tensor:
    """Memory that, written, fills the L2 twice."""
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


@dataclass
class Measured:
    """Median time of a call, and the memory that one call takes at its peak above what was held before."""

    seconds: float
    peak_bytes: int


def measure(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    notes: list[str],
    after_first: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Time and memory of each variant, in turns; one that cannot run here is left out with its reason in `notes`.

    `after_first` sees each name after that variant's first call, while its gradients are still there. A failure of our
    own is not caught, unless memory ran out.
    """
    gpu, runnable, peaks = torch.cuda.is_available(), {}, {}
    for name, work in variants.items():
        try:
            work()
            before = torch.cuda.memory_allocated() if gpu else 0
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            work()
            peaks[name] = torch.cuda.max_memory_allocated() - before if gpu else 0
        except Exception as error:
            if name.startswith("ThinkSafe") and not isinstance(error, torch.OutOfMemoryError):
                raise
            notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
            continue
        if after_first:
            after_first(name)
        runnable[name] = work
    times = interleaved(runnable, rounds)
    return {name: Measured(statistics.median(taken), peaks[name]) for name, taken in times.items()}


def figures(found: Measured, flop: float = 0, num_bytes: float = 0) -> dict[str, float]:
    """Time and memory beside the floor: the counted FLOP at RATE or bytes at BANDWIDTH, whichever takes longer."""
    floor = max(flop / RATE, num_bytes / BANDWIDTH)
    speed = {"TFLOP/s": flop / found.seconds / 1e12} if flop / RATE == floor else {}
    if not speed:
        speed = {"TB/s": num_bytes / found.seconds / 1e12}
    times = {"ms": 1e3 * found.seconds, "floor ms": 1e3 * floor, "share of the floor": floor / found.seconds}
    return times | speed | {"peak GB": found.peak_bytes / 1e9}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the 2-norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def peer(module: str, notes: list[str]) -> Any:
    """The module of another project, or None and a note why not."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # theirs to raise: what does not fit their torch or Triton is no ImportError
        notes.append(f"absent: {module} ({type(error).__name__}: {error})")
        return None


def progress(text: str) -> None:
    """A line on stderr, since a suite takes minutes."""
    print(f"   {text}", file=sys.stderr, flush=True)


def _clock() -> dict[str, str]:
    """The GPU's clocks under load, its limits and its driver, as nvidia-smi tells them; nothing without a GPU."""
    fields = "clocks.sm,clocks.max.sm,power.limit,driver_version"
    if not torch.cuda.is_available():
        return {}
    _beyond_cache().zero_()
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(fields.split(","), told[0].split(", "), strict=True)) if told else {}


def _versions() -> dict[str, str]:
    found = {}
    for package in (
        "torch",
        "triton",
        "transformers",
        "numpy",
        "trl",
        "peft",
        "liger-kernel",
        "cut-cross-entropy",
        "quack-kernels",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write(result: Result, command: str) -> Path:
    """Store a result as benchmarks/results/<device>/<suite>.json and, to be read, <suite>.md."""
    folder = Path(__file__).parent / "results" / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "suite": result.suite,
        "claim": result.claim,
        "command": command,
        "machine": {
            "device": device_name(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **_clock(),
            **_versions(),
        },
        "rows": result.rows,
        "notes": result.notes,
    }
    file = folder / f"{result.suite}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(record))
    return file


def markdown(record: dict[str, Any]) -> str:
    """A stored result as a page: claim, table, notes, and where it was measured."""
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    notes = "".join(f"- {note}\n" for note in record["notes"])
    return (
        f"# {record['suite']}\n\n{record['claim']}\n\n{table(record['rows'])}\n\n{notes}\n"
        f"`{record['command']}` on {machine}\n"
    )
