"""What every suite needs: the machine's description, timing, floors, peers, and results as JSON and Markdown."""

import gc
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
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


Row = dict[str, Any]
"""One variant's figures; equal keys of several rows become a column."""

Sections = dict[str, Callable[[], list[Row]]]
"""What a suite measures one after the other, from most to least worth, by name."""

FAILED = "failed: "
"""How a note begins that tells of a failure of ours; a peer's is a finding."""


@dataclass
class Result:
    """One suite's outcome so far.

    Attributes:
        claim: what the suite shows, in a sentence.
        notes: what a reader must know to judge the figures.
        left: sections that were not begun.
    """

    suite: str
    claim: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


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


@cache
def _beyond_cache() -> Tensor:
    """Memory that, written, fills the L2 twice."""
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph, where there is a GPU: a call then takes what the device takes, not the host."""
    if not torch.cuda.is_available():
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles kernels, which cannot be recorded
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


_LONG = 5.0
"""Seconds of a GPU's call that need no second one."""


@dataclass
class Measured:
    """Median time of a call, and the memory that one call takes at its peak above what was held before."""

    seconds: float
    peak_bytes: int


def attempt(name: str, work: Callable[[], Any], notes: list[str]) -> bool:
    """Whether `work` ran to its end; if not, why stands in `notes`, and what else is to be measured goes on."""
    try:
        work()
        return True
    except Exception as error:
        ours = name.startswith("ThinkSafe")
        if ours:
            traceback.print_exc()
        reason = str(error).strip().partition("\n")[0][:200]
        notes.append(f"{FAILED if ours else 'left out: '}{name}: {type(error).__name__}: {reason}")
    give_back()  # what the failure's frames held
    return False


def give_back() -> None:
    """Memory that nothing holds any more goes back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a device that a failure took along
            torch.cuda.empty_cache()


def measure(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    notes: list[str],
    after_first: Callable[[str], None] | None = None,
    first: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Measured]:
    """Time and memory of each variant, taken in turns, so that a drifting clock hits all alike, each with nothing of
    its data left in a GPU's L2. One that fails is left out, with its reason in `notes`; one that takes a GPU more than
    five seconds is timed once.

    Args:
        after_first: sees each name after that variant's first call, while its gradients are still there.
        first: what is called first, untimed, in place of a variant whose whole work would take too long, or which needs
            more to be warm.
    """
    gpu, times, peaks = torch.cuda.is_available(), {}, {}

    def begin(name: str) -> None:
        (first or {}).get(name, variants[name])()
        if after_first:
            after_first(name)

    def once(name: str) -> None:
        if gpu:
            _beyond_cache().zero_()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times[name].append(seconds(variants[name]))
        if gpu:
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)

    for name in variants:
        if attempt(name, lambda name=name: begin(name), notes):
            times[name], peaks[name] = [], 0
    for _ in range(rounds):
        for name in list(times):
            if gpu and max(times[name], default=0.0) > _LONG:
                continue
            if not attempt(name, lambda name=name: once(name), notes):
                del times[name]
    return {name: Measured(statistics.median(taken), peaks[name]) for name, taken in times.items()}


def compare(rows: list[Row], rate: str) -> None:
    """Write beside every variant how much faster the plain ThinkSafe, which comes first, is than it."""
    if rows and rows[0]["variant"] == "ThinkSafe":
        for row in rows:
            row["ThinkSafe is faster by"] = rows[0][rate] / row[rate]


def figures(found: Measured, flop: float = 0, num_bytes: float = 0, rate: float = RATE) -> dict[str, float]:
    """Time and memory beside the floor: the counted FLOP at `rate` or bytes at BANDWIDTH, whichever takes longer."""
    floor = max(flop / rate, num_bytes / BANDWIDTH)
    speed = {"TFLOP/s": flop / found.seconds / 1e12} if flop / rate == floor else {}
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
    with suppress(RuntimeError):
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


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    if not rows:
        return "(nothing)"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write(result: Result, command: str) -> Path:
    """Store a result as benchmarks/results/<device>/<suite>.json and, to be read, <suite>.md; after every section, so
    that a run which is cut off loses no other."""
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
        "notes": result.notes + [f"not measured: {section}" for section in result.left],
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
