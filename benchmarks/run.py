"""Command that runs benchmark suites: `python -m benchmarks.run --suite sampler`, several suites, or `--suite all`.

A suite compares variants in one process on the same data. After each of its sections it writes
benchmarks/results/<device>/<suite>.json and the same as a page, <suite>.md. A failure goes into the notes; all other
measurements continue. Suites of kernels need a GPU, because on a CPU all variants would run plain torch.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time

import torch

from benchmarks.harness import (
    FAILURE_PREFIX,
    SuiteResult,
    attempt,
    device_name,
    print_progress,
    release_memory,
    table,
    write_result,
)

# Without a network, a library that looks up the hub would wait until a timeout.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KERNEL_SUITES = ("loss", "divergence", "scoring", "linear", "elementwise")
SUITES = ("sampler", "train", "guards", *KERNEL_SUITES, "sampling", "tokenization", "precision")
"""Names of all suites, which are modules of benchmarks, the most informative first."""


def main() -> int:
    """Run the suites that the command line names, and print their tables.

    Return 1 if a ThinkSafe variant failed or the process of a suite crashed, else 0. The failure of a peer does not
    count. A suite that `--seconds` cuts off does not count either, even if a variant of it failed before; the notes of
    its result list that failure.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=[*SUITES, "all"], nargs="+", required=True)
    parser.add_argument("--seconds", type=float, help="time limit of each suite; it keeps the sections it finished")
    arguments = parser.parse_args()
    suites = SUITES if "all" in arguments.suite else tuple(dict.fromkeys(arguments.suite))
    if not torch.cuda.is_available():
        skipped_suites = [name for name in suites if name in KERNEL_SUITES]
        suites = [name for name in suites if name not in KERNEL_SUITES]
        messages = [f"skipping {', '.join(skipped_suites)}, which need one"] if skipped_suites else []
        messages += [f"running {', '.join(suites)} with small models; only ratios are meaningful"] if suites else []
        print(f"no GPU: {'; '.join(messages)}")
    if len(suites) == 1 and arguments.seconds is None:
        return int(not run_suite(suites[0]))
    rows = [run_in_subprocess(name, arguments.seconds) for name in suites]
    if rows:
        print(table(rows))
    return int(any(row["outcome"] == "failures" for row in rows))


def run_suite(name: str) -> bool:
    """Run one suite, write its results after each section, so that a run that is killed keeps them, and print them.

    Return False if a ThinkSafe variant failed."""
    suite = importlib.import_module(f"benchmarks.{name}")
    result = SuiteResult(name, suite.CLAIM)
    sections = suite.sections(result.notes)
    result.remaining = list(sections)
    for section, measure_section in sections.items():
        print_progress(f"{name}: {section}")
        torch.compiler.reset()  # otherwise torch.compile stops compiling a function after eight shapes
        result.remaining.remove(section)
        attempt(f"ThinkSafe, {section}", lambda run=measure_section: result.rows.extend(run()), result.notes)
        release_memory()
        result.notes[:] = dict.fromkeys(result.notes)
        file = write_result(result, f"python -m benchmarks.run --suite {name}")
    print(f"## {name} on {device_name()}\n{result.claim}\n\n{table(result.rows)}\n")
    print("\n".join([*result.notes, str(file)]) + "\n")
    return not any(note.startswith(FAILURE_PREFIX) for note in result.notes)


def run_in_subprocess(name: str, timeout_seconds: float | None) -> dict[str, str | float]:
    """Run one suite in a separate process, so that the next one starts with free memory and a working device.

    Return a row for a table: the suite, its outcome and its wall time in seconds. The outcome is `complete` if the
    process exited with status 0, `failures` for any other status, and `cut off` if it was killed after the timeout."""
    start, command = time.monotonic(), [sys.executable, "-m", "benchmarks.run", "--suite", name]
    try:
        completed = subprocess.run(command, timeout=timeout_seconds, check=False)
        outcome = "failures" if completed.returncode else "complete"
    except subprocess.TimeoutExpired:
        outcome = "cut off"
    return {"suite": name, "outcome": outcome, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    sys.exit(main())
