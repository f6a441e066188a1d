#!/usr/bin/env bash
# Start one worker for each GPU of this machine.
#
#   launch/node.sh run --recipe qwen3-8b --out runs/qwen3-8b
#   GPUS=4 launch/node.sh generate --recipe qwen3-8b --out runs/qwen3-8b     four workers; on the CPU if there is no GPU
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m thinksafe.cli "$@"
