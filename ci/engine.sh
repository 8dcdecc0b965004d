#!/usr/bin/env bash
# A Docker engine for the image's tests, where a machine may have none.
#
#   ci/engine.sh with COMMAND...   runs COMMAND with an engine: the one that answers, else one of its own, which is ended
#                                  afterwards (root on Debian or Ubuntu, packages from apt). NSA_CI_BASE is set for
#                                  COMMAND to a stand-in base where docker/pins.toml has no digest. 75: none can be had
#   ci/engine.sh down              ends an engine of this tree that a killed run left, and removes what it stored
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

answers() { timeout 20 docker version >/dev/null 2>&1; }

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

start() {
    [ "$(id -u)" = 0 ] || none "none answers, and only root can start one; start it and set DOCKER_HOST"
    mkdir -p "$state"
    packages
    if answers; then return; fi # where a service manager runs, the package has started one
    [ ! -e "$state/dockerd.pid" ] || stop
    local run # a socket's path has at most 107 characters
    run=$(mktemp -d /tmp/nsa-engine-XXXXXX)
    # No bridge and no firewall rules: the machine's network stays as it is. Builds use the host's network, runs none.
    setsid dockerd --host "unix://$run/docker.sock" --data-root "$state/data" --exec-root "$run/exec" \
        --pidfile "$state/dockerd.pid" --bridge none --iptables=false --ip6tables=false --ip-forward=false \
        --ip-masq=false >"$state/dockerd.log" 2>&1 </dev/null &
    export DOCKER_HOST=unix://$run/docker.sock
    for _ in $(seq 120); do
        answers && return
        kill -0 $! 2>/dev/null || break
        sleep 0.5
    done
    none "dockerd does not start: $(grep -v level=info "$state/dockerd.log" | tail -n 1)"
}

stop() {
    local pid
    pid=$(cat "$state/dockerd.pid" 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 150); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.2
    done
    echo "dockerd $pid does not end" >&2
    return 1
}

base() {
    docker image inspect "$standin" >/dev/null 2>&1 && return
    has mmdebstrap || none "docker/pins.toml has no base digest, and mmdebstrap is not here to make a stand-in"
    local tar=$state/base.tar
    mkdir -p "$state"
    # Documentation and translations are left out, and apt need not sync: the result is thrown away.
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv,libpython3-dev \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$tar" >"$state/base.log" 2>&1 \
        || none "mmdebstrap cannot make the stand-in base: $(tail -n 1 "$state/base.log")"
    docker import --change 'ENV LANG=C.UTF-8' "$tar" "$standin" >/dev/null
    rm "$tar"
}

down() {
    stop
    rm -rf "$state"
}

with() {
    if ! has docker || ! answers; then
        trap stop EXIT
        start
    fi
    if grep -qE '^digest *= *"unresolved"' "$root/docker/pins.toml"; then
        base
        export NSA_CI_BASE=$standin
    fi
    "$@"
}

case "${1-}" in
with | down) ;;
*) echo "usage: ci/engine.sh with COMMAND... | down" >&2 && exit 2 ;;
esac
action=$1
shift
"$action" "$@"
