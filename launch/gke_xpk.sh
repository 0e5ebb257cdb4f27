#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a workload of xpk (pip install xpk). The way to tpu7x.
#
#   launch/gke_xpk.sh --name NAME --cluster CLUSTER --type v5p-128 --image IMAGE --config FILE --workdir gs://...
#       [--num-slices 2] [--zone ZONE] [--project PROJECT] [--restarts 50] [--dry-run] [-- --config.train.steps=10 ...]
#
#   --name         of the workload
#   --type         v4-8, v5e-16 (or v5litepod-16), v5p-8, v6e-8, tpu7x-8, ...: one slice
#   --image        has `dlm` (pip install 'dlm-jax[tpu]'); FILE is a path in it
#   --num-slices   slices, joined over the data center's network; 1
#   --restarts     how often slices that were taken away are replaced; 50. A program that fails is not started again
#   --dry-run      prints the command and runs nothing
#
# The cluster must stand (xpk cluster create). Progress: xpk workload list --cluster CLUSTER.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"
# shellcheck source=launch/flags.sh
. "$here/flags.sh"

name='' cluster='' type='' image='' num_slices=1 zone='' project='' restarts=50
parse "name cluster type image num-slices zone project restarts" "" "$@"
need name cluster type image
generation=$(generation_of "$type")
[ -n "$generation" ] || refuse "no TPU type '$type' is known; write one such as v5e-16, v5p-8, v6e-8 or tpu7x-8"
[[ $workdir == gs://* || $workdir == /* ]] ||
    refuse "'$workdir' lies in a container that will be gone; give gs://... or the path of a mounted volume"

flag_environment "$generation"
# The flags travel inside the command and not as --env, which xpk writes between quotes of its own: here nothing is read
# twice. xpk hands the command to a shell in the container.
command=(xpk workload create --workload "$name" --cluster "$cluster" --tpu-type "$(accelerator_of "$type")"
    --num-slices "$num_slices" --docker-image "$image" --max-restarts "$restarts"
    --termination-grace-period-seconds 120  # a last checkpoint takes longer than the usual 30
    --command "$(quoted env "${environment[@]}" "${train[@]}")")
[ -z "$zone" ] || command+=(--zone "$zone")
[ -z "$project" ] || command+=(--project "$project")
become "${command[@]}"
