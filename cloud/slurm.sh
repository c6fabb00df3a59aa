#!/bin/bash
# GPT-2 on two machines of eight GPUs: sbatch cloud/slurm.sh, from the root of a checkout that all machines share.
# docs/how-to/several-machines.md explains it.
#SBATCH --job-name=pipelib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=slurm-%j.txt
set -uo pipefail

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines[0]} others=${machines[*]:1}
export PIPELIB_NNODES=$SLURM_JOB_NUM_NODES
export PIPELIB_RDZV_ENDPOINT=$first:$((20000 + SLURM_JOB_ID % 10000))  # two jobs on a machine have two ports
export PIPELIB_MAX_RESTARTS=3
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over from sbatch

# The first machine downloads, tokenizes, trains and evaluates; the others wait until it trains, and go when it is done.
srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --nodelist="${others// /,}" .venv/bin/python -m stages.train --join &
joined=$!

# Three minutes before the end Slurm sends SIGUSR1 to every process of both steps. The training saves the step it is at and
# ends. DVC would die of the signal, and Slurm would kill what is left of its step before that: so DVC ignores it.
srun --nodes=1 --ntasks=1 --nodelist="$first" bash -c 'trap "" USR1; exec .venv/bin/dvc repro'
status=$?
kill "$joined" 2>/dev/null
exit "$status"
