#!/usr/bin/env bash
# Start workers on several machines that ssh reaches without a password. HOSTFILE has one line for each machine,
# `NAME slots=GPUS`, in the format of DeepSpeed and MPI. The first machine runs the leader (rank 0). All machines need
# this folder, the Python environment that holds torchrun, and the --out folder under the same paths.
#
#   launch/hosts.sh HOSTFILE run --recipe qwen3-32b --out /shared/runs/qwen3-32b
set -euo pipefail
hostfile=${1:-}
[ -r "$hostfile" ] || { echo "launch/hosts.sh HOSTFILE COMMAND ...: ${hostfile:-HOSTFILE} is not a readable file" >&2; exit 2; }
shift
port=${MASTER_PORT:-29500}
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
mapfile -t slots < <(sed 's/#.*//' "$hostfile" | awk 'NF { sub("slots=", "", $2); print $2 }')
[ "${#hosts[@]}" -gt 0 ] || { echo "$hostfile: names no host; write a line NAME slots=GPUS for each machine" >&2; exit 2; }

torchrun=$(command -v torchrun) || { echo "torchrun: not found; activate the environment in which ThinkSafe is installed" >&2; exit 2; }

for rank in "${!hosts[@]}"; do
    [[ ${slots[rank]} =~ ^[1-9][0-9]*$ ]] || { echo "$hostfile: ${hosts[rank]}: needs slots=GPUS after the name" >&2; exit 2; }
done

ssh_pids=()
trap 'kill "${ssh_pids[@]}" 2>/dev/null || true' EXIT
for rank in "${!hosts[@]}"; do
    printf -v command '%q ' "$torchrun" --nnodes "${#hosts[@]}" --node-rank "$rank" \
        --master-addr "${hosts[0]}" --master-port "$port" --nproc-per-node "${slots[rank]}" -m thinksafe.cli "$@"
    ssh "${hosts[rank]}" "cd $(printf %q "$PWD") && exec $command" &
    ssh_pids+=($!)
done
# A worker that fails ends all other workers, so the first machine that fails prints the reason and the others end too.
for _ in "${hosts[@]}"; do wait -n; done
