#!/usr/bin/env bash
# Several machines that ssh reaches without a password. HOSTFILE has a line for each, `NAME slots=GPUS`, as DeepSpeed and
# MPI read it; the first one leads. All need this folder, the environment of the torchrun found here, and --out, under
# the same paths.
#
#   launch/hosts.sh HOSTFILE run --recipe qwen3-32b --out /shared/runs/qwen3-32b
set -euo pipefail
hostfile=${1:-}
[ -r "$hostfile" ] || { echo "launch/hosts.sh HOSTFILE COMMAND ...: ${hostfile:-HOSTFILE} is no file that can be read" >&2; exit 2; }
shift
port=${MASTER_PORT:-29500}
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
mapfile -t slots < <(sed 's/#.*//' "$hostfile" | awk 'NF { sub("slots=", "", $2); print $2 }')
[ "${#hosts[@]}" -gt 0 ] || { echo "$hostfile: names no host; a line is NAME slots=GPUS" >&2; exit 2; }

torchrun=$(command -v torchrun) || { echo "torchrun: not found; activate the environment that ThinkSafe is in" >&2; exit 2; }

for number in "${!hosts[@]}"; do
    [[ ${slots[number]} =~ ^[1-9][0-9]*$ ]] || { echo "$hostfile: ${hosts[number]}: needs slots=GPUS behind the name" >&2; exit 2; }
done

running=()
trap 'kill "${running[@]}" 2>/dev/null || true' EXIT
for number in "${!hosts[@]}"; do
    printf -v command '%q ' "$torchrun" --nnodes "${#hosts[@]}" --node-rank "$number" \
        --master-addr "${hosts[0]}" --master-port "$port" --nproc-per-node "${slots[number]}" -m thinksafe.cli "$@"
    ssh "${hosts[number]}" "cd $(printf %q "$PWD") && exec $command" &
    running+=($!)
done
# A worker that fails ends all others, so the first machine to fail says why and the rest follow.
for _ in "${hosts[@]}"; do wait -n; done
