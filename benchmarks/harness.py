"""What every suite needs: the machine's description, timing, a table, and results as JSON."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
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
    packages = ("torch", "transformers", "numpy")
    record = {
        "suite": result.suite,
        "claim": result.claim,
        "command": command,
        "machine": {
            "device": device_name(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "rows": result.rows,
        "notes": result.notes,
    }
    file = folder / f"{result.suite}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
