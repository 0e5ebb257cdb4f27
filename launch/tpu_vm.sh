#!/usr/bin/env bash
# Trains on a TPU VM of Google Cloud, or on all workers of a slice: creates it or takes the one of that name, ships the
# commit that is checked out, installs it, starts `dlm train` on every worker and shows the log of the first.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE --type v5e-16 --config FILE --workdir gs://...
#       [--version IMAGE] [--queued] [--spot] [--restart] [--dry-run] [-- --config.train.steps=10 ...]
#
#   --type      v4-8, v5e-16 (or v5litepod-16), v5p-8, v6e-8, ...
#   --version   software of the machines; by default what Google names for the type
#   --queued    asks for a queued resource and waits in the queue, instead of failing when there is no capacity
#   --spot      cheaper, and taken away at any time
#   --restart   when the machines are taken away: delete, create anew and go on, until the run ends by itself
#   --dry-run   prints every command for a VM that does not exist yet, and runs nothing
#
# Ends with the exit code of the run. The run does not depend on this terminal: interrupted and given again, the command
# follows it, or begins it anew where it stopped. FILE must be committed, or be an absolute path on the workers. The VM
# is kept at the end, and paid for, until it is deleted.

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
    tpu7x) refuse "tpu7x is offered through GKE only; use launch/gke_xpk.sh" ;;
    *) refuse "no TPU type '$type' is known; write one such as v4-8, v5e-16, v5p-8 or v6e-8" ;;
esac
version=${version:-$default}
[[ $workdir == gs://* || $workdir == /* ]] ||
    refuse "'$workdir' would lie apart on each worker; give gs://... or an absolute path that all share"
[[ $config == /* ]] || git -C "$here/.." cat-file -e "HEAD:${config#./}" 2>/dev/null ||
    refuse "$config is not in the commit that is shipped; commit it, or give an absolute path on the workers"

# shellcheck source=launch/tpu_machines.sh
. "$here/tpu_machines.sh"
worker=dlm-jax/launch/tpu_worker.sh

on() { run "${vm[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"; }

# The tree of the commit, unpacked in place of an older one, and installed.
ship() {
    local directory=${TMPDIR:-/tmp} code=0
    [ -n "$dry_run" ] || directory=$(mktemp -d)
    run git -C "$here/.." archive --format=tar.gz --prefix=dlm-jax/ -o "$directory/dlm-jax.tar.gz" HEAD &&
        run "${vm[@]}" scp "$directory/dlm-jax.tar.gz" "$name:dlm-jax.tar.gz" "${where[@]}" --worker=all &&
        on all "rm -rf dlm-jax && tar -xzf dlm-jax.tar.gz && bash $worker install" || code=$?
    [ -n "$dry_run" ] || rm -r "$directory"
    return "$code"
}

# Sets `answer` to what worker 0 says of the run: running, gone, an exit code, or nothing when it is not reached.
inquire() {
    if [ -n "$dry_run" ]; then on 0 "bash $worker status"; answer=0; return; fi
    answer=$(on 0 "bash $worker status" 2>/dev/null | tail -n 1) || answer=''
}

# Begins the run, unless it goes on already.
begin() {
    answer=''
    [ -n "$fresh" ] || inquire
    if [ "$answer" = running ]; then note "the run goes on; this is its log"; return; fi
    ship && on all "bash $worker start $generation $(quoted "${train[@]}")"
}

# Shows the run until `answer` is its exit code, or it cannot be reached. A connection that is lost is made again.
watch() {
    local misses=0
    while [ "$misses" -lt 20 ]; do
        on 0 "bash $worker follow" || true
        inquire
        case $answer in
            running) misses=0 ;;
            '') misses=$((misses + 1))
                if taken_away; then return; fi ;;
            *) return ;;
        esac
    done
}

trap 'note "the run goes on without this terminal; the same command follows it"; exit 130' INT
if [ -z "$dry_run" ] && [ -n "$(git -C "$here/.." status --porcelain --untracked-files=no)" ]; then
    note "changes that are not committed are not shipped"
fi
again=''
while true; do
    ensure
    if begin; then watch; else answer=unfit; fi
    [ "$answer" != 0 ] || break
    [ -n "$restart" ] || break
    # A machine that was started anew in its place has lost the run as well.
    if ! taken_away && [ "$answer" != gone ]; then break; fi
    note "the machines of $name were taken away; the run goes on with others"
    # A queued resource may still call itself active when its machines are gone, so it is not asked.
    case $state in PREEMPTED | TERMINATED) delete || true ;; esac
    again=1
done
[ -n "$dry_run" ] || note "$name is kept and costs; to delete it: $(dry_run=1 delete 3>&1)"
case $answer in
    [0-9]*) exit "$answer" ;;
    unfit) fail "dlm-jax could not be installed or started on $name; the reason stands above" ;;
    *) fail "the run on $name is lost; --restart begins anew where it stopped" ;;
esac
