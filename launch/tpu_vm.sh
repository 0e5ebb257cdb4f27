#!/usr/bin/env bash
# Trains on a Google Cloud TPU VM, or on all workers of a slice: creates the VM or reuses the one of that name, ships
# the checked-out commit, installs it, starts `dlm train` on every worker and shows the log of the first.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE --type v5e-16 --config FILE --workdir gs://...
#       [--version IMAGE] [--queued] [--spot] [--restart] [--dry-run] [-- --config.train.steps=10 ...]
#
#   --type      TPU type: v4-8, v5e-16 (or v5litepod-16), v5p-8, v6e-8, ...
#   --version   VM software version (default: the one Google recommends for the type)
#   --queued    request a queued resource and wait in the queue instead of failing when there is no capacity
#   --spot      cheaper, but can be preempted at any time
#   --restart   after a preemption, delete and recreate the machines and resume, until the run ends on its own
#   --dry-run   print every command, as for a VM that does not exist yet, without running any
#
# Exits with the exit code of the run. The run does not depend on this terminal: rerun an interrupted command to follow
# the run again, or to resume it if it has stopped. FILE is the name of a config, a committed file, or an absolute path
# on the workers. When the run ends the VM is kept, and billed, until you delete it.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

name='' zone='' type='' version='' queued='' spot='' restart=''
parse "name zone type version" "queued spot restart" "$@"
need name zone type
generation=$(generation_of "$type")
case $generation in
    v4) default=tpu-ubuntu2204-base ;;
    v5e) default=v2-alpha-tpuv5-lite ;;
    v5p) default=v2-alpha-tpuv5 ;;
    v6e) default=v2-alpha-tpuv6e ;;
    tpu7x) refuse "tpu7x is only available through GKE; use launch/gke_xpk.sh" ;;
    *) refuse "unknown TPU type '$type'; use one such as v4-8, v5e-16, v5p-8 or v6e-8" ;;
esac
version=${version:-$default}
[[ $workdir == gs://* || $workdir == /* ]] ||
    refuse "'$workdir' would be a different directory on each worker; use gs://... or an absolute path that all share"
[[ $config == /* || $config != *[/.]* ]] || git -C "$here/.." cat-file -e "HEAD:${config#./}" 2>/dev/null ||
    refuse "$config is not in the commit to be shipped; commit it, or use an absolute path on the workers"

# shellcheck source=launch/tpu_machines.sh
. "$here/tpu_machines.sh"
worker=dlm-jax/launch/tpu_worker.sh

on() { run "${vm[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

# Ships the tree of the commit, replaces an older one with it, and installs it.
ship() {
    local directory=${TMPDIR:-/tmp} code=0
    [ -n "$dry_run" ] || directory=$(mktemp -d)
    run git -C "$here/.." archive --format=tar.gz --prefix=dlm-jax/ -o "$directory/dlm-jax.tar.gz" HEAD &&
        run "${vm[@]}" scp "$directory/dlm-jax.tar.gz" "$name:dlm-jax.tar.gz" "${where[@]}" --worker=all &&
        on all "rm -rf dlm-jax && tar -xzf dlm-jax.tar.gz && bash $worker install" || code=$?
    [ -n "$dry_run" ] || rm -r "$directory"
    return "$code"
}

# Sets `answer` to the status of the run on worker 0: running, gone, an exit code, or empty if it is unreachable.
inquire() {
    if [ -n "$dry_run" ]; then on 0 "bash $worker status"; answer=0; return; fi
    answer=$(on 0 "bash $worker status" 2>/dev/null | tail -n 1) || answer=''
}

# Starts the run, unless it is already running.
begin() {
    answer=''
    [ -n "$fresh" ] || inquire
    if [ "$answer" = running ]; then note "already running; following its log"; return; fi
    ship && on all "bash $worker start $(quoted "${train[@]}")"
}

# Follows the run until `answer` is its exit code or worker 0 stays unreachable. Reconnects when the connection drops.
watch() {
    local misses=0
    while [ "$misses" -lt 20 ]; do
        on 0 "bash $worker follow" || true
        inquire
        case $answer in
            running) misses=0 ;;
            '') misses=$((misses + 1))
                if preempted; then return; fi ;;
            *) return ;;
        esac
    done
}

trap 'note "the run continues without this terminal; rerun the command to follow it"; exit 130' INT
if [ -z "$dry_run" ] && [ -n "$(git -C "$here/.." status --porcelain --untracked-files=no)" ]; then
    note "uncommitted changes are not shipped"
fi
again=''
while true; do
    ensure
    if begin; then watch; else answer=failed; fi
    [ "$answer" != 0 ] || break
    [ -n "$restart" ] || break
    # A machine that was recreated under the same name has lost the run as well.
    if ! preempted && [ "$answer" != gone ]; then break; fi
    note "the machines of $name were preempted; resuming on new ones"
    # A queued resource may still report itself active after its machines are gone, so its state is not queried.
    case $state in PREEMPTED | TERMINATED) delete || true ;; esac
    again=1
done
[ -n "$dry_run" ] || note "$name is kept and billed; to delete it: $(dry_run=1 delete 3>&1)"
case $answer in
    [0-9]*) exit "$answer" ;;
    failed) fail "dlm-jax could not be installed or started on $name; see the messages above" ;;
    *) fail "the run on $name is lost; use --restart to recreate the machines and resume" ;;
esac
