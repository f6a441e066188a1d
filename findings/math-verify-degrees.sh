#!/usr/bin/env bash
# math-verify computes \sin 30^\circ in radians, and reads \cos 60° (degree sign) as 60.
#
# Versions: math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0.
# Guess: 1/2 for both. A parser that knows \circ and trigonometric functions converts to radians, or at worst fails.
# Behavior: ^\circ is removed as a unit before parsing, so 30^\circ and 30 are equal, which is right for a bare angle
#   and wrong inside a function. With the character for degrees the LaTeX parser gives up, and the last number is the
#   answer.
# Output seen:
#   \sin 30^\circ -> sin(30), equal to 1/2: False
#   \cos 60°      -> 60, equal to 1/2: False, equal to 60: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$work/venv/bin/python" - <<'PY'
import sys

from math_verify import parse, verify

half = parse(r"$\frac{1}{2}$")
sine, cosine = parse(r"$\sin 30^\circ$"), parse("$\\cos 60\N{DEGREE SIGN}$")
sine_is_half, cosine_is_half, cosine_is_60 = verify(half, sine), verify(half, cosine), verify(parse("$60$"), cosine)
print(rf"\sin 30^\circ -> {sine[0]}, equal to 1/2: {sine_is_half}")
print(f"\\cos 60\N{DEGREE SIGN}      -> {cosine[0]}, equal to 1/2: {cosine_is_half}, equal to 60: {cosine_is_60}")
if (sine_is_half, cosine_is_half, cosine_is_60) != (False, False, True):
    sys.exit("changed: degrees are read otherwise")
PY
