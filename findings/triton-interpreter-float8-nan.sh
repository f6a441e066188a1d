#!/usr/bin/env bash
# The interpreter of Triton turns a NaN into 384 and infinity into 256 when it casts to tl.float8e4nv and back.
#
# Versions: triton 3.9.0, numpy 2.4.6, with the interpreter of Triton on the CPU (no torch needed).
# Guess: NaN stays NaN, for which the format has a code; infinity and 1000 become 448, the largest number (saturation),
#   or NaN. float8e5 has an infinity and keeps it.
# Behavior: exponents beyond the range are cut without a look at infinity and NaN, so a test that feeds NaN through a
#   quantizing kernel sees finite numbers; 1000 becomes 256. float8e5 returns 65536, above its largest number 57344.
# Output seen (input, float8e4nv, float8e5):
#   [448.] [448.] [448.]
#   [1000.] [256.] [1024.]
#   [inf] [256.] [65536.]
#   [nan] [384.] [98304.]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile triton==3.9.0 numpy==2.4.6
cat >"$work/kernel.py" <<'PY'
import triton
import triton.language as tl


@triton.jit
def round_trip(number):
    x = number + tl.zeros([1], tl.float32)
    print(x, x.to(tl.float8e4nv).to(tl.float32), x.to(tl.float8e5).to(tl.float32))


for number in (448.0, 1000.0, float("inf"), float("nan")):
    round_trip[(1,)](number)
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/kernel.py" | tee "$work/output"
if ! diff - "$work/output" <<'EXPECTED'; then
[448.] [448.] [448.]
[1000.] [256.] [1024.]
[inf] [256.] [65536.]
[nan] [384.] [98304.]
EXPECTED
    echo "changed: the casts differ"
    exit 1
fi
