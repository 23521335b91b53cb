#!/usr/bin/env bash
# One call of a visit to a GPU machine without a network: peers from runs/visit/, halny itself, then bench/gpu_pass.py.
# bench/VISIT.md says what to put into runs/visit/ and which arguments to give.
set -euo pipefail
cd "$(dirname "$0")/.."
visit=runs/visit
site=${PEERS:-/tmp/peers}
if [ -e "$visit/peers.tar.xz" ] && [ -z "${PEERS:-}" ] && [ ! -e "$site" ]; then
    mkdir -p "$site"
    tar xf "$visit/peers.tar.xz" -C "$site"
fi
# cutlass-dsl is found through a .pth file, which only a site folder's would be read
export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c "import halny.kernels.rope" 2>/dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e .
data=()
[ -d "$visit/data" ] && data=(--data "$visit/data")
exec python3 bench/gpu_pass.py "${data[@]}" "$@"
