#!/usr/bin/env bash
# safetensors.numpy saves a transposed or strided array with the wrong values, and reports no error.
#
# Versions: safetensors 0.8.0, numpy 2.4.6.
# Guess: the array comes back equal, as numpy.save does it, or there is an error that asks for a contiguous array, as
#   safetensors.torch gives it.
# Behavior: save() copies the first bytes of the buffer and ignores the strides. The shape is right, the values are
#   not: a transposed weight is stored with the values in the order of its original, a slice with a step loses its step.
# Output seen:
#   transposed: saved [[0, 3], [1, 4], [2, 5]], loaded [[0, 1], [2, 3], [4, 5]]
#   every second: saved [0, 2, 4], loaded [0, 1, 2]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
from safetensors.numpy import load, save

matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
vector = np.arange(6, dtype=np.float32)
changed = False
for name, array in [("transposed", matrix.T), ("every second", vector[::2])]:
    loaded = load(save({"weight": array}))["weight"]
    print(f"{name}: saved {array.astype(int).tolist()}, loaded {loaded.astype(int).tolist()}")
    changed |= loaded.shape != array.shape or np.array_equal(loaded, array)
if changed:
    sys.exit("changed: the values now survive")
PY
