# The CPU image: everything that a machine without a GPU can prove. `nox -s image -- cpu` builds it (BuildKit).
#
# BASE has no default, its one home is docker/pins.toml. Another base wants STAND_IN=yes and is reported as one.
# The secrets pip and ca (a pip.conf, a CA bundle) are for machines that need them; no layer keeps them.
ARG BASE
# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG BASE
ARG STAND_IN=""
WORKDIR /opt/nsa
COPY docker/pins.toml docker/describe.py docker/lock-cpu.txt docker/
COPY requirements-cpu.txt ./
RUN python3 docker/describe.py base "${BASE}" "${STAND_IN}" && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# torch by its version alone: with a hash pip would pass over the small CPU build that PIP_EXTRA_INDEX_URL offers. What
# was installed is written down instead.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.crt \
    --mount=type=cache,target=/root/.cache/pip \
    grep -m1 '^torch==' requirements-cpu.txt > torch.txt \
    && pip install --no-compile --no-deps --only-binary :all: --report torch.json -r torch.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/run/ca.crt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --no-compile --no-deps --only-binary :all: --require-hashes -r docker/lock-cpu.txt && pip check
COPY docker/compile.py docker/
RUN python docker/compile.py
COPY . .
# What a run writes leads to /artifacts; any user may read the rest.
ARG REVISION=unknown
ARG DIRTY=""
RUN python3 docker/describe.py image cpu "${BASE}" "${REVISION}" "${DIRTY}" > /opt/image.json \
    && rm -rf torch.txt torch.json artifacts dist \
    && ln -s /artifacts artifacts && ln -s /artifacts dist && chmod -R a+rX /opt/nsa

# hadolint ignore=DL3006
FROM ${BASE}
ARG BASE
ARG STAND_IN=""
ARG REVISION=unknown
ARG SOURCE=""
ARG LOCK=""
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends tini && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp/nsa nsa && install -d -m 1777 /artifacts
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/image.json /opt/image.json
COPY --from=build /opt/nsa /opt/nsa
# PET_LOCAL_ADDR: a container without a network cannot resolve its own name, which torchrun would go by.
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONPATH=/opt/nsa \
    HOME=/tmp/nsa USER=nsa TRITON_CACHE_DIR=/tmp/nsa/triton TORCHINDUCTOR_CACHE_DIR=/tmp/nsa/inductor \
    HF_HOME=/tmp/nsa/huggingface PET_LOCAL_ADDR=localhost NSA_CI_IMAGE=/opt/image.json NSA_CI_PROFILE=cpu
LABEL org.opencontainers.image.title="nsa-readiness cpu" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      nsa-readiness.lane="cpu" nsa-readiness.lock="${LOCK}" nsa-readiness.stand-in="${STAND_IN}"
WORKDIR /opt/nsa
VOLUME /artifacts
USER 10001:10001
ENTRYPOINT ["tini", "--", "/opt/nsa/docker/entrypoint.sh"]
