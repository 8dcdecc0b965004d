#!/usr/bin/env bash
# A Docker engine for the images, where a machine may have none.
#
#   eval "$(ci/engine.sh up)"      the engine that answers, else one of this tree's own (root on Debian or Ubuntu, packages
#                                  from apt); prints DOCKER_HOST, and NSA_CI_BASE with a stand-in for the base that
#                                  docker/pins.toml has no digest of. 75 with the reason if no engine can be had
#   ci/engine.sh with COMMAND...   runs COMMAND with such an engine, and ends it afterwards if it is its own
#   ci/engine.sh down              ends this tree's own engine and removes what it stored
#
# The stand-in is Debian bookworm with its own Python 3.11, not the official image; whatever is built on it says so.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
state=$root/.nox/engine
standin=nsa-readiness-base:bookworm-py3.11

none() {
    echo "no Docker engine: $*" >&2
    exit 75
}

has() { command -v "$1" >/dev/null; }

answers() { has docker && timeout 20 docker version >/dev/null 2>&1; }

packages() {
    local wanted=()
    has dockerd || wanted+=(docker.io)
    has mmdebstrap || wanted+=(mmdebstrap)
    ((${#wanted[@]})) || return 0
    has apt-get || none "this machine has no apt-get; start an engine by hand and set DOCKER_HOST"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >"$state/apt.log" 2>&1 \
        || none "apt-get install ${wanted[*]} failed: $(tail -n 1 "$state/apt.log")"
}

engine() {
    if answers; then return; fi
    if [ -s "$state/host" ]; then # this tree's own, started before
        DOCKER_HOST=$(cat "$state/host")
        export DOCKER_HOST
        if answers; then return; fi
        stop
        unset DOCKER_HOST
    fi
    [ "$(id -u)" = 0 ] || none "none answers, and only root can start one; start it and set DOCKER_HOST"
    mkdir -p "$state"
    packages
    if answers; then return; fi # where a service manager runs, the package has started one
    local run # a socket's path has at most 107 characters
    run=$(mktemp -d /tmp/nsa-engine-XXXXXX)
    export DOCKER_HOST=unix://$run/docker.sock
    echo "$DOCKER_HOST" >"$state/host"
    # No bridge and no firewall rules: the machine's network stays as it is. Builds use the host's network, runs none.
    setsid dockerd --host "$DOCKER_HOST" --data-root "$state/data" --exec-root "$run/exec" \
        --pidfile "$state/dockerd.pid" --bridge none --iptables=false --ip6tables=false --ip-forward=false \
        --ip-masq=false >"$state/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 120); do
        if answers; then return; fi
        kill -0 $! 2>/dev/null || break
        sleep 0.5
    done
    stop
    none "dockerd does not start: $(grep -v level=info "$state/dockerd.log" | tail -n 1)"
}

base() {
    grep -qE '^digest *= *"unresolved"' "$root/docker/pins.toml" || return 0
    export NSA_CI_BASE=$standin
    if docker image inspect "$standin" >/dev/null 2>&1; then return; fi
    has mmdebstrap || none "docker/pins.toml has no base digest, and there is no mmdebstrap to make a stand-in"
    mkdir -p "$state"
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv,libpython3-dev \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$state/base.tar" >"$state/base.log" 2>&1 \
        || none "mmdebstrap cannot make the stand-in base: $(tail -n 1 "$state/base.log")"
    docker import --change 'ENV LANG=C.UTF-8' "$state/base.tar" "$standin" >/dev/null
    rm "$state/base.tar"
}

stop() {
    local pid run
    # The number may have become another process's since, after a restart of the machine say.
    if pid=$(cat "$state/dockerd.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] &&
        kill "$pid" 2>/dev/null; then
        for _ in $(seq 150); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
    fi
    if [ -s "$state/host" ]; then
        run=$(dirname "$(sed 's,^unix://,,' "$state/host")")
        rm -rf "$run" "$state/host"
    fi
}

up() {
    engine
    base
    [ -z "${DOCKER_HOST-}" ] || printf 'export DOCKER_HOST=%q\n' "$DOCKER_HOST"
    [ -z "${NSA_CI_BASE-}" ] || printf 'export NSA_CI_BASE=%q\n' "$NSA_CI_BASE"
}

with() {
    local before=no
    if [ -s "$state/host" ]; then before=yes; fi
    if [ $before = no ]; then trap stop EXIT; fi
    engine
    base
    "$@"
}

down() {
    stop
    rm -rf "$state"
}

case "${1-}" in
up | with | down) "$@" ;;
*)
    echo "usage: ci/engine.sh up | with COMMAND... | down" >&2
    exit 2
    ;;
esac
