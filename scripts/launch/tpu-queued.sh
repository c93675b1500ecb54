#!/usr/bin/env bash
# A TPU slice by queued resources. Asks for it, runs the command on every host of it, and asks anew when it is taken away: the
# command continues from the store. Run this on a machine with gcloud that stays up; it removes the slice at the end.
#   jsublim launch tpu-queued CONFIG store=gs://BUCKET/store > tpu.sh && WHEEL=https://... bash tpu.sh
set -euo pipefail
NAME=${NAME:-@NAME@}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-@ACCELERATOR:v5litepod-16@}                 # v6e-16, v5p-16
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # v2-alpha-tpuv6e, v2-alpha-tpuv5
COMMAND=$(cat <<'END'
set -e
curl -LsSf https://astral.sh/uv/install.sh | sh # the system's Python is too old
export PATH=~/jsublim/bin:~/.local/bin:$PATH
uv venv -q --allow-existing --python 3.12 ~/jsublim
uv pip install -q --python ~/jsublim "jsublim[tpu,gcs] @ $WHEEL"
@COMMAND@ --distributed run.parallel=mesh
END
)
COMMAND="export WHEEL='${WHEEL:?an https address of a wheel of jsublim, which every host can read}'
$COMMAND"

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)' 2>/dev/null || echo NONE
}
remove() {
  gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
}

failed=0
while true; do
  case $(state) in
    NONE)
      gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
      ;;
    ACTIVE)
      if gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "$COMMAND"; then
        break
      fi
      # Taken away, or an error? Errors of the command's own come again: three in a row on a slice that is there are one.
      sleep 60
      if [ "$(state)" = ACTIVE ]; then failed=$((failed + 1)); else failed=0; fi
      if [ "$failed" -ge 3 ]; then
        echo "the command failed $failed times on a slice that is up; the slice is kept: bash $0 to go on" >&2
        exit 1
      fi
      ;;
    SUSPENDED | FAILED)
      remove
      ;;
    *)
      sleep 30
      ;;
  esac
done
remove
