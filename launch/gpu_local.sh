#!/usr/bin/env bash
# Trains on the GPUs of this machine, in one process.
#
#   launch/gpu_local.sh --config FILE --workdir DIR [--gpus 0,1] [--dry-run] [-- --config.train.steps=10 ...]
#
#   --gpus LIST   indices of the GPUs to use (default: all)
#   --dry-run     print the command without running it
#
# `dlm` must be on PATH: pip install 'dlm-jax[gpu]'. Rerun the command to resume an interrupted run. Compiled programs
# are cached in $JAX_COMPILATION_CACHE_DIR, by default next to the work directory.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

gpus=''
parse "gpus" "" "$@"
mapfile -t environment < <(gpu_environment)
[ -z "$gpus" ] || environment+=("CUDA_VISIBLE_DEVICES=$gpus")
# A single process drives all GPUs of the host: no coordinator, and only one copy of the data pipeline.
become env "${environment[@]}" "${train[@]}"
