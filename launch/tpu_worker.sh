#!/usr/bin/env bash
# Runs on the workers of a TPU VM; tpu_vm.sh calls it in the tree it has shipped there.
#
#   tpu_worker.sh install                     installs dlm-jax and jax for TPUs into ~/dlm-venv
#   tpu_worker.sh start COMMAND...            starts COMMAND and returns at once
#   tpu_worker.sh follow                      prints its log from the beginning until it exits
#   tpu_worker.sh status                      prints `running`, its exit code, or `gone` (the machine was recreated)

set -eu
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=$HOME/dlm-run venv=$HOME/dlm-venv

# Uses the newest supported Python of the image; images still on Python 3.10 get one from uv, without root.
make_venv() {
    local version
    for version in 3.13 3.12 3.11; do
        if command -v "python$version" >/dev/null && "python$version" -m venv "$venv"; then return; fi
    done
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --clear --python 3.12 "$venv"
}

install() {
    [ -x "$venv/bin/pip" ] || make_venv
    "$venv/bin/pip" install --quiet -e "${tree}[tpu]"
}

# Checks the whole process group: a program that saves its state on SIGTERM outlives the shell that started it.
alive() { [ -e "$state/pid" ] && kill -0 -- "-$(cat "$state/pid")" 2>/dev/null; }

# In a session of its own, the run outlives the ssh connection that started it. A run still alive here has lost its
# other workers, and a TPU serves one process at a time, so it is terminated first.
start() {
    if alive; then
        kill -TERM -- "-$(cat "$state/pid")" || true
        for _ in $(seq 50); do alive || break; sleep 0.1; done
        kill -KILL -- "-$(cat "$state/pid")" 2>/dev/null || true
    fi
    rm -rf "$state" && mkdir -p "$state"
    cd "$tree"
    # shellcheck disable=SC2016 # the inner shell expands these
    nohup setsid env PATH="$venv/bin:$PATH" PYTHONUNBUFFERED=1 \
        JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/dlm-compiled}" \
        bash -c 'echo $$ > "$0/pid"; "$@"; code=$?; echo $code > "$0/code.new"; mv "$0/code.new" "$0/code"' \
        "$state" "$@" > "$state/log" 2>&1 < /dev/null &
    until [ -e "$state/pid" ]; do sleep 0.1; done
}

follow() { tail -n +1 --pid="$(cat "$state/pid")" -F "$state/log"; }

status() {
    if alive; then echo running
    elif [ -e "$state/code" ]; then cat "$state/code"
    else echo gone; fi
}

"$@"
