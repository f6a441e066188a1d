"""What every suite needs: the machine's description, timing, peers, a table, and results as JSON."""

import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


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
    """Wall time of one call, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Times of each variant, taken in turns after one warm-up each, so that a drifting clock hits all alike."""
    for work in variants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            times[name].append(seconds(work))
    return times


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


def peer(module: str, notes: list[str]) -> Any:
    """The module of another project, or None and a note that it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        notes.append(f"absent: {module} ({error})")
        return None


def progress(text: str) -> None:
    """A line on stderr, since a suite takes minutes."""
    print(f"   {text}", file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "transformers", "numpy", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
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
    return str(value)


def write(result: Result, command: str) -> Path:
    """Store a result as benchmarks/results/<device>/<suite>.json."""
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
            **_versions(),
        },
        "rows": result.rows,
        "notes": result.notes,
    }
    file = folder / f"{result.suite}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
