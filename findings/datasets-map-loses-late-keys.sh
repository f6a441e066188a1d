#!/usr/bin/env bash
# Dataset.map drops a key that the function adds to later rows only; the streaming map keeps it.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1.
# Guess: rows without the key get None, as rows of a JSONL file do. The other order, first with the key and then
#   without, is either fine as well or an error.
# Behavior: the columns come from the first row that the function returns. A key that appears later is lost without a
#   warning; the other order is a KeyError; IterableDataset.map keeps the key in the rows that have it.
# Output seen:
#   Dataset          [{'id': 0}, {'id': 1}, {'id': 2}]
#   IterableDataset  [{'id': 0}, {'id': 1, 'refusal': 'I cannot help'}, {'id': 2}]
#   key first        KeyError: 'refusal'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
"$work/venv/bin/python" - <<'PY'
import sys

from datasets import Dataset, disable_progress_bars

disable_progress_bars()
rows = Dataset.from_dict({"id": [0, 1, 2]})


def add_refusal(chosen):
    return lambda row: {"refusal": "I cannot help"} if row["id"] == chosen else {}


table = rows.map(add_refusal(1)).to_list()
stream = list(rows.to_iterable_dataset().map(add_refusal(1)))
print("Dataset         ", table)
print("IterableDataset ", stream)
try:
    first = rows.map(add_refusal(0)).to_list()
except KeyError as error:
    first = f"KeyError: {error}"
print("key first       ", first)
if any("refusal" in row for row in table) or "refusal" not in stream[1] or first != "KeyError: 'refusal'":
    sys.exit("changed: map treats late keys otherwise")
PY
