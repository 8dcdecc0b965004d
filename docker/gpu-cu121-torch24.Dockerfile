# The image of the runbook's GPU lane: CUDA 12.1 (from torch's own wheels; the container toolkit brings the driver),
# torch 2.4, Triton 3.0, flash-attn 2.6.3. `nox -s image -- gpu` builds it (BuildKit).
#
# BASE, FLASH_ATTN_URL and FLASH_ATTN_SHA256 have no default, their one home is docker/pins.toml. Another base (an
# nvidia/cuda one must bring Python 3.11) wants STAND_IN=yes; FLASH_ATTN=none leaves flash-attn out. Both are reported.
ARG BASE
# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG BASE
ARG STAND_IN=""
WORKDIR /opt/nsa
COPY docker/pins.toml docker/describe.py docker/lock-gpu.txt docker/
RUN python3 docker/describe.py base "${BASE}" "${STAND_IN}" && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.crt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --no-deps --only-binary :all: --require-hashes -r docker/lock-gpu.txt && pip check
# The sdist would fetch this wheel without a checksum; so it is named, with the checksum.
ARG FLASH_ATTN=wheel
ARG FLASH_ATTN_URL=""
ARG FLASH_ATTN_SHA256=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.crt \
    if [ "$FLASH_ATTN" != none ]; then \
        if ! expr "$FLASH_ATTN_SHA256" : '[0-9a-f]\{64\}$' > /dev/null; then \
            echo "FLASH_ATTN_SHA256 is unresolved: run nox -s lock where the wheel can be fetched" >&2; exit 1; \
        fi; \
        echo "flash-attn @ ${FLASH_ATTN_URL} --hash=sha256:${FLASH_ATTN_SHA256}" > flash-attn.txt; \
        pip install --no-cache-dir --no-compile --no-deps --require-hashes -r flash-attn.txt; \
    fi
COPY docker/compile.py docker/
RUN python docker/compile.py
COPY . .
# What a run writes leads to /artifacts; any user may read the rest.
ARG REVISION=unknown
ARG DIRTY=""
RUN python3 docker/describe.py image gpu "${BASE}" "${REVISION}" "${DIRTY}" > /opt/image.json \
    && rm -rf flash-attn.txt artifacts dist \
    && ln -s /artifacts artifacts && ln -s /artifacts dist && chmod -R a+rX /opt/nsa

# hadolint ignore=DL3006
FROM ${BASE}
ARG BASE
ARG STAND_IN=""
ARG REVISION=unknown
ARG SOURCE=""
ARG LOCK=""
# gcc: Triton builds a launcher for each kernel.
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends tini gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp/nsa nsa && install -d -m 1777 /artifacts
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/image.json /opt/image.json
COPY --from=build /opt/nsa /opt/nsa
# PET_LOCAL_ADDR: a container without a network cannot resolve its own name, which torchrun would go by.
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONPATH=/opt/nsa \
    HOME=/tmp/nsa USER=nsa TRITON_CACHE_DIR=/tmp/nsa/triton TORCHINDUCTOR_CACHE_DIR=/tmp/nsa/inductor \
    HF_HOME=/tmp/nsa/huggingface PET_LOCAL_ADDR=localhost NSA_CI_IMAGE=/opt/image.json NSA_CI_PROFILE=gpu \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="nsa-readiness gpu" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      nsa-readiness.lane="gpu" nsa-readiness.lock="${LOCK}" nsa-readiness.stand-in="${STAND_IN}"
WORKDIR /opt/nsa
VOLUME /artifacts
USER 10001:10001
ENTRYPOINT ["tini", "--", "/opt/nsa/docker/entrypoint.sh"]
