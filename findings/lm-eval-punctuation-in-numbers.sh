#!/usr/bin/env bash
# exact_match of lm-eval with ignore_punctuation takes 1.5 for 15, and -5 for 5.
#
# Versions: lm-eval 0.4.13.
# Guess: False. The option, which many tasks set, forgives a final period or a comma; minus signs and decimal points
#   are part of the number.
# Behavior: every character of string.punctuation is deleted, also inside the answer.
# Output seen:
#   prediction 1.5, gold 15: 1.0
#   prediction -5, gold 5: 1.0
#   prediction 3/4, gold 34: 1.0
#   prediction 15, gold 16: 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile lm-eval==0.4.13
"$work/venv/bin/python" - <<'PY'
import sys

from lm_eval.api.metrics import exact_match_hf_evaluate

results = []
for prediction, gold in [("1.5", "15"), ("-5", "5"), ("3/4", "34"), ("15", "16")]:
    score = exact_match_hf_evaluate([prediction], [gold], ignore_punctuation=True)["exact_match"]
    print(f"prediction {prediction}, gold {gold}: {float(score)}")
    results.append(float(score))
if results != [1.0, 1.0, 1.0, 0.0]:
    sys.exit("changed: punctuation inside numbers counts otherwise")
PY
