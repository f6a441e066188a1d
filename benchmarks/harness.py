"""Shared parts of the suites: timing, floors, peers, the machine's description, and results as JSON and Markdown."""

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
from thinksafe.model.cuda_graphs import capture

MATMUL_FLOP_PER_SECOND = hardware_named("H200").flop_per_second
BYTES_PER_SECOND = hardware_named("H200").bytes_per_second
"""Two ceilings measured on an H200: FLOP/s of a large cuBLAS matmul in bf16, bytes/s of a large copy."""


Row = dict[str, Any]
"""Figures of one variant (one implementation or setting): column of the table -> value."""

Sections = dict[str, Callable[[], list[Row]]]
"""Name -> function that measures this section of a suite and returns its rows, the most informative section first."""

FAILURE_PREFIX = "failed: "
"""Start of a note about a failure of ThinkSafe. A failure of a peer (another library) is a finding, and its note starts
with `left out: `."""


@dataclass
class SuiteResult:
    """Results of one suite so far: the claim that the figures should support, one row per variant, facts that a reader
    needs to judge the figures, and the names of sections that have not started."""

    suite: str
    claim: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)


def device_name() -> str:
    """Return the GPU's name in lower case with hyphens, or `cpu` without a GPU. It names the folder of the results."""
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def time_call(call: Callable[[], None]) -> float:
    """Return the seconds of one call: wall time until a GPU has finished, or without a GPU CPU time, which does not
    depend on other work on the machine."""
    has_gpu = torch.cuda.is_available()
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if has_gpu else (time.process_time, lambda: None)
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


@cache
def _l2_flush_buffer() -> Tensor:
    """Return a buffer on the GPU twice the size of its L2; writing to it replaces the L2's data."""
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def as_cuda_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that replays `call` as a CUDA graph, so that the host does not limit its time.

    The call runs once and is then captured. Without a GPU, return the call itself, which has not run."""
    if not torch.cuda.is_available():
        return call
    return capture(call, torch.cuda.graph_pool_handle(), warm_up=True)[1]


_MAX_SECONDS_TO_REPEAT = 5.0
"""Seconds of a call on a GPU above which it is timed only once."""


@dataclass
class Measurement:
    """Time and memory of one variant.

    Attributes:
        seconds: median of the timed calls, as `time_call` returns them.
        peak_bytes: largest GPU memory allocated during a timed call beyond that allocated before it; 0 without a GPU.
    """

    seconds: float
    peak_bytes: int


def attempt(name: str, call: Callable[[], Any], notes: list[str]) -> bool:
    """Run `call`; return True if it finished, or False if it raised an exception, which becomes a note.

    The note of a name that starts with `ThinkSafe` starts with FAILURE_PREFIX, and the traceback goes to stderr; any
    other note starts with `left out: `."""
    try:
        call()
        return True
    except Exception as error:
        is_ours = name.startswith("ThinkSafe")
        if is_ours:
            traceback.print_exc()
        reason = str(error).strip().partition("\n")[0][:200]
        notes.append(f"{FAILURE_PREFIX if is_ours else 'left out: '}{name}: {type(error).__name__}: {reason}")
    release_memory()  # free the tensors that the exception's frames held
    return False


def release_memory() -> None:
    """Collect garbage, and return memory that torch caches but does not use to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # if a failure broke the device
            torch.cuda.empty_cache()


def measure(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    notes: list[str],
    after_warm_up: Callable[[str], None] | None = None,
    warm_up_calls: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Measurement]:
    """Return name -> time and memory, in the order of `variants`, of all variants of which no call failed.

    Variants take turns, so that a drifting clock affects all equally. On a GPU each call starts with none of its data
    in the L2. A variant that takes a GPU more than five seconds is timed once.

    Args:
        variants: name -> function to measure.
        rounds: timed calls of each variant.
        notes: gets the failures, as `attempt` words them.
        after_warm_up: called with a variant's name after its untimed first call, while its gradients still exist; if it
            raises an exception, the variant has failed.
        warm_up_calls: name -> untimed first call, for a variant whose full call is too long for a warm-up, or which
            needs more to warm up. A variant without an entry warms up with the call that is timed.
    """
    has_gpu, times_by_name, peaks_by_name = torch.cuda.is_available(), {}, {}

    def warm_up(name: str) -> None:
        (warm_up_calls or {}).get(name, variants[name])()
        if after_warm_up:
            after_warm_up(name)

    def time_once(name: str) -> None:
        if has_gpu:
            _l2_flush_buffer().zero_()
            held_bytes = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times_by_name[name].append(time_call(variants[name]))
        if has_gpu:
            peaks_by_name[name] = max(peaks_by_name[name], torch.cuda.max_memory_allocated() - held_bytes)

    for name in variants:
        if attempt(name, lambda name=name: warm_up(name), notes):
            times_by_name[name], peaks_by_name[name] = [], 0
    for _ in range(rounds):
        for name in list(times_by_name):
            if has_gpu and max(times_by_name[name], default=0.0) > _MAX_SECONDS_TO_REPEAT:
                continue
            if not attempt(name, lambda name=name: time_once(name), notes):
                del times_by_name[name]
    return {
        name: Measurement(statistics.median(call_times), peaks_by_name[name])
        for name, call_times in times_by_name.items()
    }


def add_speedups(rows: list[Row], rate: str) -> None:
    """Add the column `ThinkSafe is faster by` to each row, unless ThinkSafe, the first row, has failed.

    It is the first row's rate over the row's rate, the column in which more is faster, such as `tokens/s`."""
    if rows and rows[0]["variant"] == "ThinkSafe":
        for row in rows:
            row["ThinkSafe is faster by"] = rows[0][rate] / row[rate]


def timing_columns(
    measurement: Measurement, flop: float = 0, num_bytes: float = 0, flop_per_second: float = MATMUL_FLOP_PER_SECOND
) -> dict[str, float]:
    """Return the columns `ms`, `floor ms`, `share of the floor`, a rate, and `peak GB` of one call.

    The floor is the larger of two times: counted FLOP at `flop_per_second`, and `num_bytes`, which the call must read
    and write, at BYTES_PER_SECOND. The rate is `TFLOP/s` if FLOP give the floor, else `TB/s`."""
    seconds, flop_seconds = measurement.seconds, flop / flop_per_second
    floor = max(flop_seconds, num_bytes / BYTES_PER_SECOND)
    unit, amount = ("TFLOP/s", flop) if flop_seconds == floor else ("TB/s", num_bytes)
    times = {"ms": 1e3 * seconds, "floor ms": 1e3 * floor, "share of the floor": floor / seconds}
    return times | {unit: amount / seconds / 1e12, "peak GB": measurement.peak_bytes / 1e9}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return ‖actual - exact‖ / ‖exact‖ in the 2-norm over all elements; `exact` is in fp64."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def import_peer(module: str, notes: list[str]) -> Any:
    """Return the imported module of a peer, or None with a note in `notes` if its import fails for any reason."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer that does not support this torch or Triton may raise anything
        notes.append(f"absent: {module} ({type(error).__name__}: {error})")
        return None


def print_progress(text: str) -> None:
    """Print a line on stderr, because a suite takes minutes."""
    print(f"   {text}", file=sys.stderr, flush=True)


def _gpu_clocks() -> dict[str, str]:
    """Return clocks under load, power limit and driver from nvidia-smi, if it answers."""
    fields = "clocks.sm,clocks.max.sm,power.limit,driver_version"
    if not torch.cuda.is_available():
        return {}
    with suppress(RuntimeError):
        _l2_flush_buffer().zero_()
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    output_lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(fields.split(","), output_lines[0].split(", "), strict=True)) if output_lines else {}


def _versions() -> dict[str, str]:
    versions = {}
    peers = ("transformers", "trl", "peft", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    for package in ("torch", "triton", "numpy", *peers):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table, with a column for each key of any row; `(nothing)` if there are no rows."""
    if not rows:
        return "(nothing)"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_format_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write_result(result: SuiteResult, command: str) -> Path:
    """Write a result to benchmarks/results/<device>/<suite>.json and, as a page, to <suite>.md; return the JSON's path.

    `command` is the shell command that repeats the measurement."""
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
            **_gpu_clocks(),
            **_versions(),
        },
        "rows": result.rows,
        "notes": result.notes + [f"not measured: {section}" for section in result.remaining],
    }
    file = folder / f"{result.suite}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown_page(record))
    return file


def markdown_page(record: dict[str, Any]) -> str:
    """Return the content of a JSON file of `write_result` as a Markdown page."""
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    notes = "".join(f"- {note}\n" for note in record["notes"])
    return (
        f"# {record['suite']}\n\n{record['claim']}\n\n{table(record['rows'])}\n\n{notes}\n"
        f"`{record['command']}` on {machine}\n"
    )
