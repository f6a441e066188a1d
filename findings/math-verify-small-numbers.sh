#!/usr/bin/env bash
# math-verify takes the mass of the electron for the Planck constant: small decimal numbers are all equal.
#
# Versions: math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0.
# Guess: False. The tolerance (float_rounding=6, numeric_precision=15) means significant digits, and these differ in
#   the first digit and by a factor of 1,000.
# Behavior: both tolerances are absolute. A difference below about 1e-17 is 0 for products with a power of ten; below
#   5e-7 for numbers written out. Physical constants in SI units all pass for each other.
# Output seen:
#   gold 6.63 \times 10^{-34}, answer 9.11 \times 10^{-31}: True
#   gold 0.0000001, answer 0.0000004: True
#   gold 2 \times 10^{-16}, answer 9 \times 10^{-16}: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$work/venv/bin/python" - <<'PY'
import sys

from math_verify import parse, verify

pairs = [
    (r"6.63 \times 10^{-34}", r"9.11 \times 10^{-31}"),
    ("0.0000001", "0.0000004"),
    (r"2 \times 10^{-16}", r"9 \times 10^{-16}"),
]
results = []
for gold, answer in pairs:
    results.append(verify(parse(f"${gold}$"), parse(f"${answer}$")))
    print(f"gold {gold}, answer {answer}: {results[-1]}")
if results != [True, True, False]:
    sys.exit("changed: small numbers are compared otherwise")
PY
