# An image that runs jsublim on the CPU, or with EXTRA=cuda13 (or cuda12, tpu) on an accelerator:
#   docker build --build-arg EXTRA=cuda13 --tag jsublim .
#   docker run --rm --gpus all --volume "$PWD:/work" jsublim run configs/quickstart.yaml
# CUDA comes with the wheels of JAX; the host needs the driver (580 for cuda13, 525 for cuda12) and the NVIDIA container toolkit.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim AS build
ARG EXTRA=""
# hatch-vcs takes the version from .git where that is in the context, and from here where it is not.
ARG VERSION=""
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python -m venv /opt/jsublim \
  && SETUPTOOLS_SCM_PRETEND_VERSION_FOR_JSUBLIM=${VERSION} /opt/jsublim/bin/pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"

FROM python:${PYTHON}-slim
COPY --from=build /opt/jsublim /opt/jsublim
# KubeRay asks by wget whether a pod lives.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home --uid 1000 jsublim && mkdir /work && chown jsublim /work
# root opens a TPU's /dev/vfio: --build-arg RUN_AS=root.
ARG RUN_AS=jsublim
USER ${RUN_AS}
ENV PATH=/opt/jsublim/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["jsublim"]
CMD ["--help"]
