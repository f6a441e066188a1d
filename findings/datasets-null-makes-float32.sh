#!/usr/bin/env bash
# One None in a column of integers makes datasets return float32: id 16777217 becomes 16777216.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, numpy 2.4.6.
# Guess: an object array, or float64 as pandas makes it (exact up to 2**53).
# Behavior: the numpy (and torch) format goes to float and then to float32, its default for every float. Ids and
#   seeds above 2**24 change, and only in batches that hold a None.
# Output seen:
#   without None: int64 [16777217, 5]
#   with None:    float32 [16777216.0, nan]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

from datasets import Dataset

results = []
for name, ids in [("without None:", [2**24 + 1, 5]), ("with None:   ", [2**24 + 1, None])]:
    array = Dataset.from_dict({"id": ids}).with_format("numpy")[:]["id"]
    print(name, array.dtype, array.tolist())
    results.append((str(array.dtype), int(array[0])))
if results != [("int64", 16777217), ("float32", 16777216)]:
    sys.exit("changed: the dtype or the value differs")
PY
