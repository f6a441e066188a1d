#!/usr/bin/env bash
# GGUF's Q8_0 turns a block of weights below 7.5e-6 into zeros, and a block with a weight above 8.4e6 into inf and NaN.
#
# Versions: gguf 0.19.0, numpy 2.4.6.
# Guess: each block has its scale, so the relative error is about 1/254 for blocks of every size that float32 has.
# Behavior: the scale (largest weight / 127) is stored as float16. Below 2**-25 it rounds to 0, above 65504 to infinity;
#   numpy warns about the latter, nobody about the former. A LoRA matrix B early in training or a small bias vanishes.
# Output seen:
#   largest weight 1e-03: 1.00e-03
#   largest weight 1e-05: 7.57e-06
#   largest weight 3e-06: 0.00e+00
#   largest weight 1e+07: inf
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
from gguf import GGMLQuantizationType, quants

np.seterr(all="ignore")
results = {}
for size in (1e-3, 1e-5, 3e-6, 1e7):
    weights = np.linspace(size / 32, size, 32, dtype=np.float32)
    quantized = quants.quantize(weights, GGMLQuantizationType.Q8_0)
    results[size] = quants.dequantize(quantized, GGMLQuantizationType.Q8_0).max()
    print(f"largest weight {size:.0e}: {results[size]:.2e}")
if results[3e-6] != 0 or np.isfinite(results[1e7]) or abs(results[1e-3] / 1e-3 - 1) > 0.01:
    sys.exit("changed: the range of the scale differs")
PY
