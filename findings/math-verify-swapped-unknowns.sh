#!/usr/bin/env bash
# math-verify accepts "2, 1" for the gold answer "x = 1, y = 2".
#
# Versions: math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0.
# Guess: False. "x = 5" and "5" are equal by design, so "1, 2" may pass for the pair; "2, 1" gives each unknown the
#   value of the other.
# Behavior: an answer list is a set. The comparison drops the names on the left of each equation and then finds the same
#   set of values. With both names written, the swap is noticed.
# Output seen:
#   gold x = 1, y = 2: answer "1, 2" True, answer "2, 1" True, answer "x = 2, y = 1" False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$work/venv/bin/python" - <<'PY'
import sys

from math_verify import parse, verify

gold = parse("$x = 1, y = 2$")
results = {answer: verify(gold, parse(f"${answer}$")) for answer in ("1, 2", "2, 1", "x = 2, y = 1")}
print("gold x = 1, y = 2:", ", ".join(f'answer "{answer}" {result}' for answer, result in results.items()))
if list(results.values()) != [True, True, False]:
    sys.exit("changed: swapped values are compared otherwise")
PY
