#!/usr/bin/env bash
# A job on a GKE cluster with TPUs, by Cluster Toolkit: every host of the slice runs the command, and a slice that was taken away
# comes back and continues from the store. Needs an image whose user may open the chips; in a checkout:
#   docker build --build-arg EXTRA=tpu,gcs --build-arg RUN_AS=root --tag IMAGE . && docker push IMAGE
#   jsublim launch gcluster CONFIG store=gs://BUCKET/store > job.sh && CLUSTER=... IMAGE=... bash job.sh
set -euo pipefail
: "${CLUSTER:?the name of the cluster}" "${IMAGE:?an image with jsublim and its TPU extra}"
PROJECT=${PROJECT:-$(gcloud config get-value project)}
LOCATION=${LOCATION:-us-west4-a} # of the cluster: a zone or a region
COMMAND=$(cat <<'END'
@COMMAND@ --distributed run.parallel=mesh
END
)

gcluster job submit \
  --project "$PROJECT" --location "$LOCATION" --cluster "$CLUSTER" \
  --name "@NAME@" \
  --compute-type "@ACCELERATOR:v5litepod-16@" --num-slices @WORKERS:1@ \
  --image "$IMAGE" \
  --restarts 50 --grace-period 2m \
  --command "$COMMAND"

echo "gcluster job list; gcluster job logs @NAME@; gcluster job cancel @NAME@"
