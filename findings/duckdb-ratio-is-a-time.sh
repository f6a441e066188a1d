#!/usr/bin/env bash
# duckdb reads the JSON text "12:30" as a time of day, so the answer 12:30 comes back as 12:30:00.
#
# Versions: duckdb 2.0.0.
# Guess: JSON has one type of text, so a quoted value is text. A reader may guess a timestamp from a full ISO date and
#   time, yet not from two numbers with a colon, which is how ratios and scores look.
# Behavior: when every value of the column fits hours and minutes, the column is TIME. One ratio like 25:3 in the sample
#   makes all of them text again, so the answer column of one split may match and that of another may not.
# Output seen:
#   12:30, 2:03        -> TIME     ['12:30:00', '02:03:00']
#   12:30, 2:03, 25:3  -> VARCHAR  ['12:30', '2:03', '25:3']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet duckdb==2.0.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import sys

import duckdb

results = []
for answers in (["12:30", "2:03"], ["12:30", "2:03", "25:3"]):
    with open("answers.jsonl", "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    relation = duckdb.sql("select answer::varchar from 'answers.jsonl'")
    texts = [row[0] for row in relation.fetchall()]
    dtype = str(duckdb.sql("select answer from 'answers.jsonl'").types[0])
    print(f"{', '.join(answers):18} -> {dtype:8} {texts}")
    results.append((dtype, texts))
if results != [("TIME", ["12:30:00", "02:03:00"]), ("VARCHAR", ["12:30", "2:03", "25:3"])]:
    sys.exit("changed: ratios are read otherwise")
PY
