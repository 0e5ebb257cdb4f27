# shellcheck shell=bash disable=SC2154 # tpu_vm.sh has set name, zone, type and version
# The TPU VMs of tpu_vm.sh: queries, creates and deletes them. Sourced by tpu_vm.sh after it has parsed its flags;
# results are left in `state` and `fresh`.

vm=(gcloud compute tpus tpu-vm) queue=(gcloud compute tpus queued-resources)
where=(--zone "$zone")
pause=${LAUNCH_PAUSE:-30}  # seconds between two queries

# describe FIELD COMMAND...: sets `state`; NONE if the resource does not exist, UNKNOWN if gcloud cannot tell.
dry_state=NONE
describe() {
    local field=$1 errors
    shift
    if [ -n "$dry_run" ]; then
        run "$@" describe "$name" "${where[@]}" "--format=value($field)"
        state=$dry_state
        return
    fi
    errors=$(mktemp)
    if state=$("$@" describe "$name" "${where[@]}" "--format=value($field)" 2>"$errors"); then :
    elif grep -qi 'not[_ ]found' "$errors"; then state=NONE
    else state=UNKNOWN; cat "$errors" >&2; fi
    rm -f "$errors"
}

create() {
    local request=(--accelerator-type "$(accelerator_of "$type")")
    [ -z "$spot" ] || request+=(--spot)
    if [ -n "$queued" ]; then
        run "${queue[@]}" create "$name" "${where[@]}" --node-id "$name" --runtime-version "$version" "${request[@]}"
        dry_state=ACTIVE
    else
        run "${vm[@]}" create "$name" "${where[@]}" --version "$version" "${request[@]}"
        dry_state=READY
    fi
}

delete() {
    if [ -n "$queued" ]; then run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
    else run "${vm[@]}" delete "$name" "${where[@]}" --quiet; fi
}

ask() { if [ -n "$queued" ]; then describe state.state "${queue[@]}"; else describe state "${vm[@]}"; fi; }

# Waits until the machines are up; sets `fresh` if they were just created. Deletes what a preemption has left behind.
# With `again`, the machines existed before, so a failed request only means a lack of capacity and is retried.
ensure() {
    fresh=''
    while true; do
        ask
        case $state in
            READY | ACTIVE) return ;;
            PREEMPTED | TERMINATED | SUSPENDED) delete ;;
            FAILED)
                [ -z "$fresh" ] || [ -n "$again" ] || fail "the queue rejected $name; run 'describe' on it to see why"
                delete ;;
            NONE)
                fresh=1
                if create; then :
                elif [ -n "$again" ]; then sleep "$pause"
                else fail "$name could not be created; fix what gcloud reports above, or queue with --queued"; fi ;;
            CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING | SUSPENDING | \
                ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING)
                note "$name: $state"
                sleep "$pause" ;;
            UNKNOWN)
                [ -n "$again" ] || fail "gcloud cannot tell whether $name exists; fix what it reports above"
                sleep "$pause" ;;
            *) fail "$name is in state $state; start or delete it" ;;
        esac
    done
}

# Whether the machines were preempted. Google reports it a little after the programs on them notice.
preempted() {
    sleep "$pause"
    describe state "${vm[@]}"
    [ "$state" != READY ] && [ "$state" != UNKNOWN ]
}
