"""Runs benchmark suites: `python -m benchmarks.run --suite sampler`, several of them, or `--suite all`.

Each suite compares variants in one process on the same data and writes benchmarks/results/<device>/<suite>.json and,
to be read, <suite>.md, after each of its sections. What fails stands in the notes and stops nothing else. Suites of
kernels need a GPU: on a CPU both sides would run plain torch.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time

import torch

from benchmarks.harness import FAILED, Result, attempt, device_name, give_back, progress, table, write

# A library that looks for something on the hub would wait for a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KERNELS = ("loss", "divergence", "scoring", "linear", "elementwise")
SUITES = ("sampler", "train", "guards", *KERNELS, "precision")
"""In the order in which they say most."""


def main() -> int:
    """Run the chosen suites, a table each; returns 1 where something of ours failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=[*SUITES, "all"], nargs="+", required=True)
    parser.add_argument("--seconds", type=float, help="cut each suite off after so many; what it has stays written")
    arguments = parser.parse_args()
    suites = SUITES if "all" in arguments.suite else tuple(dict.fromkeys(arguments.suite))
    if not torch.cuda.is_available():
        left_out = [name for name in suites if name in KERNELS]
        suites = [name for name in suites if name not in KERNELS]
        parts = [f"{', '.join(left_out)} measured nothing, for the kernels need one"] if left_out else []
        parts += [f"{', '.join(suites)} with small models, where only ratios mean something"] if suites else []
        print(f"no GPU: {'; '.join(parts)}")
    if len(suites) == 1 and arguments.seconds is None:
        return int(not run(suites[0]))
    rows = [in_a_process(name, arguments.seconds) for name in suites]
    if rows:
        print(table(rows))
    return int(any(row["outcome"] == "failures" for row in rows))


def run(name: str) -> bool:
    """One suite, section by section; whether all went well."""
    suite = importlib.import_module(f"benchmarks.{name}")
    result = Result(name, suite.CLAIM)
    sections = suite.sections(result.notes)
    result.left = list(sections)
    for section, work in sections.items():
        progress(f"{name}: {section}")
        torch.compiler.reset()  # or it gives up on a function after eight shapes, and leaves it uncompiled
        result.left.remove(section)
        attempt(f"ThinkSafe, {section}", lambda work=work: result.rows.extend(work()), result.notes)
        give_back()
        result.notes[:] = dict.fromkeys(result.notes)
        file = write(result, f"python -m benchmarks.run --suite {name}")
    print(f"## {name} on {device_name()}\n{result.claim}\n\n{table(result.rows)}\n")
    print("\n".join([*result.notes, str(file)]) + "\n")
    return not any(note.startswith(FAILED) for note in result.notes)


def in_a_process(name: str, limit: float | None) -> dict[str, str | float]:
    """One suite in a process of its own, which leaves the next one its memory and, after a fault, a sound device."""
    started = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-m", "benchmarks.run", "--suite", name], timeout=limit, check=False)
        outcome = "failures" if done.returncode else "whole"
    except subprocess.TimeoutExpired:
        outcome = "cut off"
    return {"suite": name, "outcome": outcome, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    sys.exit(main())
