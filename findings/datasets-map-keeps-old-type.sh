#!/usr/bin/env bash
# Dataset.map that replaces a number by a text may store a number again: "007" becomes 7.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1.
# Guess: the new column holds what the function returned. Text in a column of numbers makes the column text, because
#   map infers the type of what it writes; it does so for "no answer".
# Behavior: map tries the old type of the column first and keeps it if every value converts. Formatted answers turn back
#   into numbers, verdicts "true" into booleans. The same function that writes into a new column keeps the text.
# Output seen:
#   {'answer': [7, 42], 'safe': [True, False], 'new': ['007', '042']}
#   with one text that is no number: ['007', 'no answer']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
"$work/venv/bin/python" - <<'PY'
import sys

from datasets import Dataset, disable_progress_bars

disable_progress_bars()
rows = Dataset.from_dict({"answer": [7, 42], "safe": [True, False]})


def as_text(row):
    padded = f"{row['answer']:03d}"
    return {"answer": padded, "safe": str(row["safe"]).lower(), "new": padded}


mapped = rows.map(as_text)[:]
print(mapped)
mixed = rows.map(lambda row: {"answer": "007" if row["answer"] == 7 else "no answer"})["answer"][:]
print("with one text that is no number:", mixed)
if mapped != {"answer": [7, 42], "safe": [True, False], "new": ["007", "042"]} or mixed != ["007", "no answer"]:
    sys.exit("changed: map stores other types")
PY
