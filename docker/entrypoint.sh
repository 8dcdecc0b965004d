#!/usr/bin/env bash
# IMAGE                            everything that this hardware can prove, then the verdict
# IMAGE gpu_parity [-- ARGS]       one stage; ARGS go to pytest, to look into a failure
# IMAGE preflight | report | ...   the harness's other commands (`IMAGE --help`)
# IMAGE -l                         what there is to run
# IMAGE bash | python | pytest ... that program
set -euo pipefail

for place in "$HOME:add --tmpfs /tmp" "/artifacts:make it writable for uid $(id -u), or add --user \$(id -u):\$(id -g)"; do
    folder=${place%%:*}
    if ! mkdir -p "$folder" 2>/dev/null || ! probe=$(mktemp -p "$folder" 2>/dev/null); then
        echo "nsa-readiness: $folder is not writable; ${place#*:}" >&2
        exit 78
    fi
    rm -f "$probe"
done

case "${1-}" in
"") exec python -m ci readiness ;;
-l | --list) exec python -m ci list ;;
bash | sh | python | python3 | pytest | /*) exec "$@" ;;
-* | readiness | preflight | report | bundle | runbook | list) exec python -m ci "$@" ;;
*) exec python -m ci stage "$@" ;;
esac
