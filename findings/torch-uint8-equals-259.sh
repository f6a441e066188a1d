#!/usr/bin/env bash
# A torch.uint8 tensor that holds 3 is equal to 259, and is not greater than -1.
#
# Versions: torch 2.13.0 and numpy 2.4.6.
# Guess: False and True. numpy compares with the exact value of the Python number since version 2.
# Behavior: torch converts the Python number to the dtype of the tensor first, modulo 256. Comparisons of byte tokens,
#   masks or quantized weights with a sentinel such as -100 or 300 are silently wrong.
# Output seen:
#   numpy  3 == 259: False   3 > -1: True    156 == -100: False
#   torch  3 == 259: True    3 > -1: False   156 == -100: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import torch


def compare(three, byte):
    return bool(three == 259), bool(three > -1), bool(byte == -100)


results = {
    "numpy": compare(np.array(3, dtype=np.uint8), np.array(156, dtype=np.uint8)),
    "torch": compare(torch.tensor(3, dtype=torch.uint8), torch.tensor(156, dtype=torch.uint8)),
}
for name, (equal, greater, sentinel) in results.items():
    print(f"{name}  3 == 259: {equal!s:6}  3 > -1: {greater!s:6}  156 == -100: {sentinel}")
if results != {"numpy": (False, True, False), "torch": (True, False, True)}:
    sys.exit("changed: the comparisons differ")
PY
