# moetrain and its launchers, run by a user without privileges.
#
#   docker build --tag moetrain:cpu --build-arg INDEX=... .
#   docker build --tag moetrain \
#       --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
#   docker run --gpus all --ipc=host --volume "$PWD/runs:/workspace/runs" moetrain \
#       launch/train.sh configs/quickstart.yaml --train.global-batch 128
#
# BASE is a Debian or an Ubuntu with Python 3.11 or newer. pip takes PyTorch's default build, for
# CUDA; INDEX adds the address of another index, such as PyTorch's own for the CPU (its installation
# page names them), which makes a CPU image smaller by gigabytes. A mounted folder must be writable
# for user 10001, or the container be run with --user.
ARG BASE=debian:12.12-slim
FROM ${BASE}

# torch.compile needs a compiler and Python's headers. The base pins what apt installs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home moetrain \
    && install --directory --owner=moetrain /workspace /workspace/runs

WORKDIR /workspace
ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH
# An empty package first: what it requires takes minutes to install, and changes less than the code.
COPY pyproject.toml README.md LICENSE ./
ARG INDEX=""
# What is installed is the package itself, with the library that draws its reports.
# hadolint ignore=DL3013
RUN python3 -m venv "$VENV" \
    && mkdir moetrain && touch moetrain/__init__.py \
    && pip install --no-cache-dir --editable ".[bench]" ${INDEX:+--extra-index-url "$INDEX"}
COPY benchmarks benchmarks
COPY configs configs
COPY launch launch
COPY moetrain moetrain

USER 10001
HEALTHCHECK --interval=1h --timeout=5m --start-period=5m --retries=2 \
    CMD ["env", "CUDA_VISIBLE_DEVICES=", "NPROC=2", "MAX_RESTARTS=0", \
         "launch/train.sh", "launch/health.yaml"]
CMD ["moetrain", "--help"]
