"""Runs benchmark suites: `python -m benchmarks.run --suite sampler`, or `--suite all`.

Each suite compares variants in one process on the same data and writes benchmarks/results/<device>/<suite>.json and,
to be read, <suite>.md. Suites of kernels need a GPU: on a CPU both sides would run plain torch.
"""

import argparse
import importlib

import torch

from benchmarks.harness import device_name, table, write

KERNELS = ("loss", "scoring", "divergence", "elementwise")
SUITES = (*KERNELS, "sampler", "precision", "guards", "train")


def main() -> None:
    """Run the chosen suites, one table each, and a summary of where the results are."""
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=[*SUITES, "all"], required=True)
    chosen = parser.parse_args().suite
    suites = SUITES if chosen == "all" else (chosen,)
    if not torch.cuda.is_available():
        left_out = [name for name in suites if name in KERNELS]
        suites = [name for name in suites if name not in KERNELS]
        parts = [f"{', '.join(left_out)} measured nothing, for the kernels need one"] if left_out else []
        parts += [f"{', '.join(suites)} with small models, where only ratios mean something"] if suites else []
        print(f"no GPU: {'; '.join(parts)}")
    written = []
    for name in suites:
        result = importlib.import_module(f"benchmarks.{name}").run()
        file = write(result, f"python -m benchmarks.run --suite {name}")
        print(f"## {name} on {device_name()}\n{result.claim}\n\n{table(result.rows)}\n")
        print("\n".join(result.notes) + "\n")
        ratio = max(row.get("ThinkSafe is faster by", 1.0) for row in result.rows)
        written.append({"suite": name, "ThinkSafe is faster by": ratio, "results": file.name})
    if written:
        print(table(written))


if __name__ == "__main__":
    main()
