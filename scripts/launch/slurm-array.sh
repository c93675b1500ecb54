#!/usr/bin/env bash
# An array of Slurm: each element does a part of the tasks on one GPU, over a store that all nodes see. Elements may start late,
# run a few at a time (--array=0-31%8), or die: run it again, or one element alone (sbatch --array=3), and it continues.
#   jsublim launch slurm-array CONFIG store=/shared/store > array.sh && sbatch array.sh
#SBATCH --job-name=@NAME@
#SBATCH --array=0-@LAST:7@
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
# The parts are counted here, not by SLURM_ARRAY_TASK_COUNT: an element that is run again alone must stay the same part.
PARTS=@WORKERS:8@

# The shell is told two minutes before the time is up, and tells the command, which then keeps its state.
@COMMAND@ --shard "$SLURM_ARRAY_TASK_ID/$PARTS" &
child=$!
stopped=
trap 'stopped=yes; kill -TERM "$child"' TERM
code=0
wait "$child" || code=$?
if [ -n "$stopped" ]; then
  wait "$child" || true
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
