#!/usr/bin/env bash
# Several nodes of Slurm as one machine: one process per node, all of them in every task. For checkpoints that no single node
# holds; for many small tasks, slurm-array does more per hour.
#   jsublim launch slurm-multinode CONFIG store=/shared/store run.model_axis=8 > nodes.sh && sbatch nodes.sh
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@WORKERS:2@
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail
# JAX finds the other processes by Slurm's variables. Code 75: told to stop, state kept; the job goes back into the queue.
code=0
srun --kill-on-bad-exit=0 @COMMAND@ --distributed run.parallel=mesh || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
