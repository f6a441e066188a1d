#!/usr/bin/env bash
# In Triton, n // 2 and n % 2 have other values when n is a tl.constexpr: -7 // 2 is -4 there and -3 for a run-time int.
#
# Versions: triton 3.9.0, numpy 2.4.6, with the interpreter of Triton on the CPU (no torch needed).
# Guess: the same expression gives the same number. A constexpr marker changes what is compiled, not the arithmetic;
#   and where Triton follows C for integers, it does so for both.
# Behavior: run-time integers divide towards zero as in C, constexpr integers with Python's floor. An index or offset
#   that can be negative changes when a parameter becomes constexpr for speed.
# Output seen (n, n // 2, n % 2):
#   run-time [-7] [-3] [-1]
#   constexpr -7 -4 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile triton==3.9.0 numpy==2.4.6
cat >"$work/kernels.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def run_time(n):
    print("run-time", n + tl.zeros([1], tl.int32), n // 2, n % 2)


@triton.jit
def compile_time(n: tl.constexpr):
    print("constexpr", n, n // 2, n % 2)


run_time[(1,)](-7)
compile_time[(1,)](-7)
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/kernels.py" | tee "$work/output"
if ! diff - "$work/output" <<'EXPECTED'; then
run-time [-7] [-3] [-1]
constexpr -7 -4 1
EXPECTED
    echo "changed: the divisions agree or differ otherwise"
    exit 1
fi
