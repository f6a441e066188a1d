#!/usr/bin/env bash
# All GPUs of this machine, one worker each.
#
#   launch/node.sh run --recipe qwen3-8b --out runs/qwen3-8b
#   GPUS=4 launch/node.sh generate --recipe qwen3-8b --out runs/qwen3-8b     four of them; without a GPU, four CPU workers
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m thinksafe.cli "$@"
