#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as an xpk workload (pip install xpk). The only way to use tpu7x.
#
#   launch/gke_xpk.sh --name NAME --cluster CLUSTER --type v5p-128 --image IMAGE --config FILE --workdir gs://...
#       [--num-slices 2] [--zone ZONE] [--project PROJECT] [--restarts 50] [--dry-run] [-- --config.train.steps=10 ...]
#
#   --name         name of the workload
#   --type         type of one slice: v4-8, v5e-16 (or v5litepod-16), v5p-8, v6e-8, tpu7x-8, ...
#   --image        container image with `dlm`, as launch/docker/Dockerfile makes it; FILE is a path inside it, or a name
#   --num-slices   number of slices, connected over the data center network (default: 1)
#   --restarts     how often preempted slices are replaced (default: 50); a program that fails is not restarted
#   --dry-run      print the command without running it
#
# The cluster must exist (xpk cluster create). To see progress: xpk workload list --cluster CLUSTER.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

name='' cluster='' type='' image='' num_slices=1 zone='' project='' restarts=50
parse "name cluster type image num-slices zone project restarts" "" "$@"
need name cluster type image
[ -n "$(generation_of "$type")" ] || refuse "unknown TPU type '$type'; use one such as v5e-16, v5p-8, v6e-8 or tpu7x-8"
[[ $workdir == gs://* || $workdir == /* ]] ||
    refuse "'$workdir' is inside the container and would be lost with it; use gs://... or the path of a mounted volume"

# Flags of the caller are part of the command rather than --env, whose values xpk wraps in quotes of its own: this way
# nothing is quoted twice. xpk passes the command to a shell in the container.
[ -z "${LIBTPU_INIT_ARGS:-}" ] || train=(env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" "${train[@]}")
command=(xpk workload create --workload "$name" --cluster "$cluster" --tpu-type "$(accelerator_of "$type")"
    --num-slices "$num_slices" --docker-image "$image" --max-restarts "$restarts"
    --termination-grace-period-seconds 120  # the final checkpoint takes longer than the default of 30
    --command "$(quoted "${train[@]}")")
[ -z "$zone" ] || command+=(--zone "$zone")
[ -z "$project" ] || command+=(--project "$project")
become "${command[@]}"
