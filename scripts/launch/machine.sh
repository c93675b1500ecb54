#!/usr/bin/env bash
# A rented machine with one or several GPUs (RunPod, Lambda, Vast and the like): installs jsublim beside what is there and
# runs the command, one worker per GPU. Put the store on the volume that outlives the machine.
#   jsublim launch machine CONFIG store=/workspace/store > machine.sh; copy it there, and a checkout of jsublim or its wheel
#   JSUBLIM=/workspace/jsublim nohup bash machine.sh > run.log &
set -euo pipefail
HOME_OF_RUN=${HOME_OF_RUN:-/workspace}
cd "$HOME_OF_RUN"
if [ ! -x venv/bin/jsublim ]; then
  curl -LsSf https://astral.sh/uv/install.sh | sh # the system's Python may be too old
  export PATH="$HOME/.local/bin:$PATH"
  uv venv -q --allow-existing --python 3.12 venv
  uv pip install -q --python venv "${JSUBLIM:?the folder of a checkout, or a wheel}[cuda12,ray]"
fi
export PATH="$PWD/venv/bin:$PATH" HF_HOME="$PWD/huggingface"

gpus=$(nvidia-smi --list-gpus | wc -l)
on=()
if [ "$gpus" -gt 1 ]; then
  on=(--on ray)
fi
# Killed for memory, or the driver fell over: twice more, from where it was.
for attempt in 1 2 3; do
  code=0
  @COMMAND@ "${on[@]}" || code=$?
  echo "attempt $attempt ended with code $code on $gpus GPUs"
  case $code in
    0) exit 0 ;;
    2) exit 2 ;; # the config; again would say the same
  esac
  sleep 30
done
exit "$code"
