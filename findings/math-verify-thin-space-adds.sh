#!/usr/bin/env bash
# math-verify adds the digit groups of a number: 1 234 567 is read as 802, 10\,080 as 90.
#
# Versions: math-verify 0.9.0, latex2sympy2_extended 1.11.0, sympy 1.14.0.
# Guess: 1234567 and 10080, the notation of SI and of most of Europe, as 1,234,567 and 10{,}080 are read; or no answer.
# Behavior: neighboring integers count as a mixed number like "3 1/2", so they are added. A wrong answer 90 is accepted
#   for the gold 10\,080, the right answer 10080 is not.
# Output seen:
#   10\,080 -> 90
#   1 234 567 -> 802
#   1,234,567 -> 1234567
#   gold 10\,080: answer 90 True, answer 10080 False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$work/venv/bin/python" - <<'PY'
import sys

from math_verify import parse, verify

seen = []
for text in (r"10\,080", "1 234 567", "1,234,567"):
    seen.append(str(parse(f"${text}$")[0]))
    print(text, "->", seen[-1])
gold = parse(r"$10\,080$")
verdicts = [verify(gold, parse(f"${answer}$")) for answer in ("90", "10080")]
print(rf"gold 10\,080: answer 90 {verdicts[0]}, answer 10080 {verdicts[1]}")
if seen != ["90", "802", "1234567"] or verdicts != [True, False]:
    sys.exit("changed: digit groups are read otherwise")
PY
