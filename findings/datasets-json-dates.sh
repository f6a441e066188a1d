#!/usr/bin/env bash
# load_dataset turns JSON texts that look like dates into datetime objects, as long as all of them do.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1.
# Guess: JSON has no dates, so a quoted value stays text, as with json.loads and polars.
# Behavior: the reader makes a timestamp column when each value of the column is an ISO date. A question whose answer is
#   a date gets the gold answer datetime(2024, 1, 5, 0, 0), which prints as "2024-01-05 00:00:00". A single other text
#   in the file keeps all values as text.
# Output seen:
#   dates only: timestamp[s] ['2024-01-05 00:00:00', '1969-07-20 00:00:00']
#   one other:  string ['2024-01-05', 'in July']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import sys

from datasets import disable_progress_bars, load_dataset

disable_progress_bars()
results = []
for name, answers in [("dates only:", ["2024-01-05", "1969-07-20"]), ("one other: ", ["2024-01-05", "in July"])]:
    path = f"{len(results)}.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    rows = load_dataset("json", data_files=path, split="train")
    dtype, texts = rows.features["answer"].dtype, [str(answer) for answer in rows["answer"]]
    print(name, dtype, texts)
    results.append((dtype, texts))
expected = [("timestamp[s]", ["2024-01-05 00:00:00", "1969-07-20 00:00:00"]), ("string", ["2024-01-05", "in July"])]
if results != expected:
    sys.exit("changed: dates are read otherwise")
PY
