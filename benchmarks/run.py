"""Runs benchmark suites: `python -m benchmarks.run --suite sampler`, or `--suite all`.

Each suite compares variants in one process on the same data and writes benchmarks/results/<device>/<suite>.json.
"""

import argparse
import importlib

import torch

from benchmarks.harness import device_name, table, write

SUITES = ("loss", "divergence", "elementwise", "sampler", "train")


def main() -> None:
    """Run the chosen suites, one table each, and a summary of where the results are."""
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=[*SUITES, "all"], required=True)
    chosen = parser.parse_args().suite
    if not torch.cuda.is_available():
        print("no GPU: the suites run small models on the CPU, where only the ratios mean something\n")
    written = []
    for name in SUITES if chosen == "all" else [chosen]:
        result = importlib.import_module(f"benchmarks.{name}").run()
        if not result.rows:
            print(f"## {name}\n{result.claim}\n")
            continue
        file = write(result, f"python -m benchmarks.run --suite {name}")
        print(f"## {name} on {device_name()}\n{result.claim}\n\n{table(result.rows)}\n")
        print("\n".join(result.notes) + "\n")
        ratio = max(row.get("ThinkSafe is faster by", 1.0) for row in result.rows)
        written.append({"suite": name, "ThinkSafe is faster by": ratio, "results": file.name})
    if written:
        print(table(written))


if __name__ == "__main__":
    main()
