#!/usr/bin/env bash
# duckdb rounds fractions to whole numbers when the first 20,480 lines of a JSONL file hold whole numbers.
#
# Versions: duckdb 2.0.0.
# Guess: 0.75 is read as 0.75, or the line is an error that names the type, as a late text value in the same column is.
# Behavior: the type comes from a sample of 20,480 lines. Later fractions are cast to a 64-bit integer without a word.
#   Rewards that are 0 or 1 at first lose their partial credit.
# Output seen:
#   fraction among the first lines: [0.75, 0.25, 1.5]
#   fraction after 20,480 lines:    [1, 0, 2]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet duckdb==2.0.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import duckdb

results = []
for name, whole in [("among the first lines:", 10), ("after 20,480 lines:", 20_480)]:
    with open("rewards.jsonl", "w") as file:
        file.write('{"reward": 1}\n' * whole)
        file.write('{"reward": 0.75}\n{"reward": 0.25}\n{"reward": 1.5}\n')
    rewards = [row[0] for row in duckdb.sql("select reward from 'rewards.jsonl'").fetchall()[-3:]]
    print(f"fraction {name:22} {rewards}")
    results.append(rewards)
if results != [[0.75, 0.25, 1.5], [1, 0, 2]]:
    sys.exit("changed: late fractions are read otherwise")
PY
