#!/usr/bin/env bash
# A workload on a GKE cluster that xpk made: every host of the slice runs the command, and a slice that was taken away comes
# back and continues from the store. Needs an image: `docker build --build-arg EXTRA=tpu,gcs .` in a checkout makes one.
#   jsublim launch xpk CONFIG store=gs://BUCKET/store > xpk.sh && CLUSTER=... IMAGE=... bash xpk.sh
set -euo pipefail
: "${CLUSTER:?the name of the cluster}" "${IMAGE:?an image with jsublim and its TPU extra}"
PROJECT=${PROJECT:-$(gcloud config get-value project)}
ZONE=${ZONE:-us-west4-a}
COMMAND=$(cat <<'END'
@COMMAND@ --distributed run.parallel=mesh
END
)

xpk workload create \
  --project "$PROJECT" --zone "$ZONE" --cluster "$CLUSTER" \
  --workload "@NAME@" \
  --tpu-type "@ACCELERATOR:v5litepod-16@" --num-slices 1 \
  --docker-image "$IMAGE" \
  --max-restarts 50 \
  --command "$COMMAND"

echo "xpk workload list --cluster $CLUSTER; kubectl logs -f -l xpk.google.com/workload=@NAME@"
