#!/usr/bin/env bash
# numpy.sort leaves a bfloat16 array with a NaN unsorted, so numpy.median of it is a wrong finite number.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6.
# Guess: NaNs go to the end and the rest is sorted, which numpy documents for its own floating types; the median of an
#   array with a NaN is NaN.
# Behavior: the sort of ml_dtypes compares with plain "less than", for which a NaN equals everything. Elements around
#   each NaN stay in the wrong order. numpy.median looks for NaN in the last place only and does not find it.
# Output seen:
#   float16  sorted [0.0, 1.0, 2.0, 3.0, 4.0, nan] median nan
#   bfloat16 sorted [4.0, nan, 0.0, 1.0, 2.0, 3.0] median 0.5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ml-dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys
import warnings

import ml_dtypes
import numpy as np

warnings.simplefilter("ignore")
values = [4.0, np.nan, 3.0, 1.0, 0.0, 2.0]
for name, dtype in [("float16 ", np.float16), ("bfloat16", ml_dtypes.bfloat16)]:
    array = np.array(values, dtype=dtype)
    ordered = np.sort(array).astype(np.float32)
    median = float(np.median(array))
    print(name, "sorted", ordered.tolist(), "median", median)
finite = ordered[~np.isnan(ordered)]
if (np.diff(finite) >= 0).all() or np.isnan(median):
    sys.exit("changed: bfloat16 sorts as the floating types of numpy do")
PY
