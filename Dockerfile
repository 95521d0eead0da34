# CUDA, Python and the locked packages. Code comes last, so that a change of code reinstalls nothing.
#
#   docker build -t stagecraft .
#   docker build -t stagecraft-cpu --build-arg ENV=cpu --build-arg BASE_IMAGE=ubuntu:24.04 .
#
# Run in your checkout with the image's packages, so that data/, recipes/ and outputs-*/ are yours and stay:
#
#   docker run --rm --init --gpus all --ipc=host -v "$PWD:/mine" -w /mine \
#       -v "$HOME/.cache/huggingface:/home/stagecraft/.cache/huggingface" stagecraft make all RECIPE=qwen2.5-3b

# "devel": vLLM, Triton and flash-attn compile kernels. 13.0 is the CUDA that torch 2.13 is built for.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE_IMAGE}

# python3-dev and g++: Triton compiles against Python's headers when a model runs for the first time.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The first user of a host has id 1000, as Ubuntu's own user in the base image has: mounted folders stay writable.
ARG USER_ID=1000
RUN useradd --create-home --non-unique --uid "${USER_ID}" --shell /bin/bash stagecraft \
    && install -d -o stagecraft -g stagecraft /stagecraft /home/stagecraft/.cache
USER stagecraft
WORKDIR /stagecraft

# gpu or cpu: which lock. (A GPU is not visible in a build; setup.sh's warning about it is expected here.)
ARG ENV=gpu
COPY --chown=stagecraft:stagecraft requirements/ requirements/
COPY --chown=stagecraft:stagecraft scripts/setup.sh scripts/setup.sh
RUN ENV="${ENV}" PIP_NO_CACHE_DIR=1 scripts/setup.sh

# flash-attn is source only: an nvcc build of an hour or so, about 5 GB of memory a job. Only --flash_attn needs it.
ARG FLASH_ATTN=0
ARG MAX_JOBS=4
RUN if [ "${FLASH_ATTN}" = 1 ]; then \
        MAX_JOBS="${MAX_JOBS}" .venv/bin/python -m pip install --no-cache-dir --no-build-isolation flash-attn==2.8.3.post2; \
    fi

# Make takes it instead of .venv, here and in a checkout that is mounted.
ENV PYTHON=/stagecraft/.venv/bin/python
COPY --chown=stagecraft:stagecraft . .

CMD ["make"]
