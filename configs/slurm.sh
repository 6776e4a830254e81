#!/bin/bash
# sbatch configs/slurm.sh RUN [--option value ...]: trains on all GPUs of all nodes, and continues when queued again.
#SBATCH --job-name=vitreg
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# One task per node: `accelerate launch` starts a process for each GPU. Three minutes before the end of its time the job
# is told to stop, saves and exits; `scontrol requeue` it, or submit it again, and it resumes.
set -euo pipefail
run=$1
out=runs/$run
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if [[ -e $out/run.json ]]; then resume=(--resume); fi

srun --kill-on-bad-exit=1 uv run --no-sync accelerate launch --config_file configs/accelerate/slurm.yaml \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_PER_NODE))" \
  --rdzv_backend c10d --main_process_ip "$first" --main_process_port 29500 \
  apps/train.py "$run" --out "$out" --precision bf16 "${@:2}" "${resume[@]}"
