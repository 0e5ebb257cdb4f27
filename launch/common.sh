# shellcheck shell=bash
# What the launch scripts share: reading flags, refusing them, quoting, and --dry-run. Sourced, not run.

script=${script:-$(basename "$0")}
config='' workdir='' dry_run=''
train=()  # the command that trains, once `parse` has run
exec 3>&1  # --dry-run prints here, also from inside $(...)

refuse() { echo "$script: $*" >&2; exit 2; }
fail() { echo "$script: $*" >&2; exit 1; }
note() { echo "$script: $*" >&2; }

# The comment at the head of the script, up to the first line that is none.
show_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# One line that any POSIX shell reads as exactly these arguments.
quoted() {
    local word line='' inside="'\\''"
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) line+=" '${word//\'/$inside}'" ;;
            *) line+=" $word" ;;
        esac
    done
    printf '%s' "${line# }"
}

# Runs a command, or with --dry-run prints it.
run() {
    if [ -n "$dry_run" ]; then { quoted "$@"; echo; } >&3; else "$@"; fi
}

# The same for the last command of a script, which it becomes: signals then reach it with nobody in between.
become() {
    if [ -n "$dry_run" ]; then run "$@"; else exec "$@"; fi
}

# parse "VALUES" "SWITCHES" ARGUMENT...: --one-flag VALUE sets the variable one_flag, and a switch sets its own to 1.
# Both are set in the script that calls, so no flag may be called like a local variable here.
parse() {
    local values=" config workdir $1 " switches=" dry-run $2 " flag given overrides=()
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift; overrides=("$@"); break ;;
            --*=*) given=${1%%=*}; [[ $values != *" ${given#--} "* ]] || set -- "$given" "${1#*=}" "${@:2}" ;;
        esac
        flag=${1#--}
        if [ "$1" = --help ]; then show_help; exit 0
        elif [[ $1 == --* && $switches == *" $flag "* ]]; then printf -v "${flag//-/_}" 1; shift
        elif [[ $1 != --* || $values != *" $flag "* ]]; then unknown "$1"
        elif [ $# -eq 1 ] || [[ $2 == --* ]]; then refuse "$1 has no value; write $1 VALUE"
        else printf -v "${flag//-/_}" %s "$2"; shift 2; fi
    done
    need config workdir
    train=(dlm train --config "$config" --workdir "$workdir")
    [ ${#overrides[@]} -eq 0 ] || train+=("${overrides[@]}")
}

unknown() {
    case $1 in
        --config.*) refuse "$1 is for dlm train; write it behind --, as in: -- $1" ;;
        *) refuse "unknown argument '$1'; --help shows what there is" ;;
    esac
}

# need FLAG...: these must have been given.
need() {
    local flag variable
    for flag in "$@"; do
        variable=${flag//-/_}
        [ -n "${!variable}" ] || refuse "--$flag is missing; add --$flag VALUE, or see --help"
    done
}

# The generation of a TPU type such as v5litepod-16, as flags.sh names it; empty if it is none.
generation_of() {
    case $1 in
        v4-*) echo v4 ;;
        v5e-* | v5litepod-*) echo v5e ;;
        v5p-*) echo v5p ;;
        v6e-*) echo v6e ;;
        tpu7x-*) echo tpu7x ;;
    esac
}

# Google's interfaces call v5e `v5litepod`.
accelerator_of() { echo "${1/#v5e-/v5litepod-}"; }
