#!/usr/bin/env bash
# The majority vote of lm-eval elects "[invalid]": responses without a readable answer vote for each other.
#
# Versions: lm-eval 0.4.13.
# Guess: the vote (self-consistency, maj@k) is taken among the answers that the regular expression found; responses
#   without one abstain, so 12 wins.
# Behavior: the filter before it replaces each unreadable response by "[invalid]", which then counts as one common
#   answer. A model that answers right half the time and rambles otherwise in many ways gets 0.
# Output seen:
#   extracted ['12', '[invalid]', '12', '[invalid]', '[invalid]'], elected [invalid]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile lm-eval==0.4.13
"$work/venv/bin/python" - <<'PY'
import sys

from lm_eval.filters.extraction import RegexFilter
from lm_eval.filters.selection import MajorityVoteFilter

responses = ["The answer is 12", "no idea", "The answer is 12", "let us see", "it depends"]
extracted = RegexFilter(r"The answer is (\d+)").apply([responses], [{}])
elected = list(MajorityVoteFilter().apply(extracted, [{}]))
print(f"extracted {extracted[0]}, elected {elected[0][0]}")
if elected[0][0] != "[invalid]":
    sys.exit("changed: unreadable responses do not win")
PY
