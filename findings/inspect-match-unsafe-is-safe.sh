#!/usr/bin/env bash
# The match scorer of Inspect counts the verdict "unsafe" as correct for the target "safe", and 118 for 18.
#
# Versions: inspect-ai 0.3.285.
# Guess: incorrect. The default looks for the target at the end of the answer as a separate word or number, since
#   punctuation and letter case are normalized first.
# Behavior: it compares with str.endswith, in the middle of words as well. A classifier that always answers "unsafe"
#   gets 100 %, with either target. match(numeric=True) takes the last number and is right for the second case.
# Output seen:
#   answer 'unsafe', target 'safe': C
#   answer 'The sum is 118', target '18': C
#   answer 'The sum is 118', target '18', numeric: I
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile inspect-ai==0.3.285
"$work/venv/bin/python" - <<'PY'
import asyncio
import sys

from inspect_ai.model import ModelName, ModelOutput
from inspect_ai.scorer import Target, match
from inspect_ai.solver import TaskState


def score(answer, target, **options):
    output = ModelOutput.from_content("mockllm/model", answer)
    state = TaskState(ModelName("mockllm/model"), 1, 1, "question", [], output=output)
    value = asyncio.run(match(**options)(state, Target(target))).value
    print(f"answer {answer!r}, target {target!r}{', numeric' if options else ''}: {value}")
    return value


results = [
    score("unsafe", "safe"),
    score("The sum is 118", "18"),
    score("The sum is 118", "18", numeric=True),
]
if results != ["C", "C", "I"]:
    sys.exit("changed: the scores differ")
PY
