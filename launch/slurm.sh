#!/usr/bin/env bash
# A SLURM job: one torchrun on each machine, one worker on each GPU. Machines, GPUs, cores and time are options of
# sbatch. If a site's default is one core for each task, all workers of a machine would share this core: set
# --cpus-per-gpu or --exclusive.
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-gpu 8 launch/slurm.sh run --recipe qwen3-32b --out /shared/runs/qwen
#
# A job that was stopped or preempted resumes when it is queued again, even with another number of machines.
#SBATCH --job-name=thinksafe
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
read -r first_host < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_host:${MASTER_PORT:-29400}" \
    -m thinksafe.cli "$@"
