#!/bin/bash
# GPT-2 on two machines of eight GPUs: sbatch docs/how-to/sbatch.sh, from the root of a checkout that all machines share.
# docs/how-to/several-machines.md explains it.
#SBATCH --job-name=pipelib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --output=slurm-%j.txt
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PIPELIB_NNODES=$SLURM_JOB_NUM_NODES
export PIPELIB_RDZV_ENDPOINT=$first:29500
export PIPELIB_MAX_RESTARTS=3

# Task 0 runs on the first machine. It alone downloads, tokenizes and evaluates; the others wait until it trains.
srun --kill-on-bad-exit=1 --wait=120 bash -c '
    if [ "$SLURM_PROCID" = 0 ]; then
        exec .venv/bin/dvc repro
    else
        exec .venv/bin/python -m stages.train --join
    fi'
