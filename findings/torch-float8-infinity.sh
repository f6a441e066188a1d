#!/usr/bin/env bash
# A cast to torch.float8_e4m3fn turns infinity into 448; ml_dtypes turns 1000 into NaN in the same format.
#
# Versions: torch 2.13.0 (CPU), ml_dtypes 0.6.0, numpy 2.4.6.
# Guess: float8_e4m3fn has no infinity, so an infinity becomes NaN, as in ml_dtypes (JAX). A check for non-finite values
#   after quantization then finds an overflow. All float8 dtypes of torch follow one rule.
# Behavior: torch saturates e4m3fn, also for infinity, so an overflow of the forward pass becomes a plausible weight or
#   activation. It does not saturate e5m2 (infinity) and e4m3fnuz (NaN).
# Output seen:
#   torch e4m3fn     1000 -> 448.0   inf -> 448.0
#   torch e5m2       1e+06 -> inf    inf -> inf
#   torch e4m3fnuz   1000 -> nan     inf -> nan
#   ml_dtypes e4m3fn 1000 -> nan     inf -> nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 ml-dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import torch

np.seterr(all="ignore")


def torch_cast(dtype):
    return lambda value: torch.tensor(value).to(dtype).float().item()


def ml_cast(value):
    return float(np.float32(value).astype(ml_dtypes.float8_e4m3fn))


rows = [
    ("torch e4m3fn", torch_cast(torch.float8_e4m3fn), 1e3),
    ("torch e5m2", torch_cast(torch.float8_e5m2), 1e6),
    ("torch e4m3fnuz", torch_cast(torch.float8_e4m3fnuz), 1e3),
    ("ml_dtypes e4m3fn", ml_cast, 1e3),
]
seen = []
for name, cast, large in rows:
    results = cast(large), cast(float("inf"))
    print(f"{name:16} {large:g} -> {results[0]!s:7} inf -> {results[1]}")
    seen += map(str, results)
if seen != ["448.0", "448.0", "inf", "inf", "nan", "nan", "nan", "nan"]:
    sys.exit("changed: the overflow of a cast differs")
PY
