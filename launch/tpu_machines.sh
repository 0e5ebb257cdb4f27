# shellcheck shell=bash disable=SC2154 # tpu_vm.sh has set name, zone, type and version
# The machines of tpu_vm.sh: whether they stand, creating and deleting them. Sourced by it, after it has read its flags;
# answers are in `state` and `fresh`.

vm=(gcloud compute tpus tpu-vm) queue=(gcloud compute tpus queued-resources)
where=(--zone "$zone")
pause=${LAUNCH_PAUSE:-30}  # seconds between two questions

# describe FIELD COMMAND...: sets `state`; NONE if there is no such thing, UNKNOWN if Google does not answer.
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

# Waits until the machines stand; `fresh` if they were made just now. What is left of machines that were taken away is
# deleted. With `again` they were there before, so that a request only fails for want of capacity, and is repeated.
ensure() {
    fresh=''
    while true; do
        ask
        case $state in
            READY | ACTIVE) return ;;
            PREEMPTED | TERMINATED | SUSPENDED) delete ;;
            FAILED)
                [ -z "$fresh" ] || [ -n "$again" ] || fail "the queue refused $name; its 'describe' says why"
                delete ;;
            NONE)
                fresh=1
                if create; then :
                elif [ -n "$again" ]; then sleep "$pause"
                else fail "$name could not be created, as gcloud says above; mend that, or queue with --queued"; fi ;;
            CREATING | STARTING | RESTARTING | REPAIRING | STOPPING | DELETING | SUSPENDING | \
                ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING)
                note "$name: $state"
                sleep "$pause" ;;
            UNKNOWN)
                [ -n "$again" ] || fail "gcloud does not say whether $name exists; mend what it says above"
                sleep "$pause" ;;
            *) fail "$name is $state; start or delete it" ;;
        esac
    done
}

# Whether the machines were taken away. Google says so a little later than the programs on them feel it.
taken_away() {
    sleep "$pause"
    describe state "${vm[@]}"
    [ "$state" != READY ] && [ "$state" != UNKNOWN ]
}
