#!/usr/bin/env bash
# Trains on the GPUs of this machine, in one process.
#
#   launch/gpu_local.sh --config FILE --workdir DIR [--gpus 0,1] [--dry-run] [-- --config.train.steps=10 ...]
#
#   --gpus LIST   numbers of the GPUs to use; without it, all
#   --dry-run     prints the command and runs nothing
#
# `dlm` must be on PATH: pip install 'dlm-jax[gpu]'. Given again, the command goes on where the run stopped. Compiled
# programs are kept in $JAX_COMPILATION_CACHE_DIR, by default beside the work directory.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"
# shellcheck source=launch/flags.sh
. "$here/flags.sh"

gpus=''
parse "gpus" "" "$@"
flag_environment gpu
[ -z "$gpus" ] || environment+=("CUDA_VISIBLE_DEVICES=$gpus")
# One process drives all GPUs of a host: no coordinator, and one copy of the data pipeline.
become env "${environment[@]}" "JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${workdir%/}.compiled}" \
    "${train[@]}"
