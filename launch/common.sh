# shellcheck shell=bash
# Helpers shared by the launch scripts: flag parsing, error messages, quoting, and --dry-run. Sourced, not run.

script=${script:-$(basename "$0")}
config='' workdir='' dry_run=''
train=()  # the training command; set by `parse`
exec 3>&1  # --dry-run prints here, even from inside $(...)

refuse() { echo "$script: $*" >&2; exit 2; }
fail() { echo "$script: $*" >&2; exit 1; }
note() { echo "$script: $*" >&2; }

# Prints the comment block at the top of the script.
show_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# Quotes the arguments into one line that any POSIX shell parses back into exactly these arguments.
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

# Runs a command; with --dry-run, prints it instead.
run() {
    if [ -n "$dry_run" ]; then { quoted "$@"; echo; } >&3; else "$@"; fi
}

# Like `run`, for the last command of a script: replaces the shell, so signals reach the command directly.
become() {
    if [ -n "$dry_run" ]; then run "$@"; else exec "$@"; fi
}

# parse "VALUES" "SWITCHES" ARGUMENT...: --one-flag VALUE sets the variable one_flag; a switch sets its variable to 1.
# The variables belong to the calling script, so no flag may share the name of a local variable below.
parse() {
    local values=" config workdir $1 " switches=" dry-run $2 " flag split overrides=()
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift; overrides=("$@"); break ;;
            --*=*) split=${1%%=*}; [[ $values != *" ${split#--} "* ]] || set -- "$split" "${1#*=}" "${@:2}" ;;
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
        --config.*) refuse "$1 is an override for dlm train; put it after --, as in: -- $1" ;;
        *) refuse "unknown argument '$1'; --help lists the arguments" ;;
    esac
}

# need FLAG...: exits with an error if one of these flags is missing.
need() {
    local flag variable
    for flag in "$@"; do
        variable=${flag//-/_}
        [ -n "${!variable}" ] || refuse "--$flag is missing; add --$flag VALUE, or see --help"
    done
}

# The generation of a TPU type such as v5litepod-16; empty for an unknown type.
generation_of() {
    case $1 in
        v4-*) echo v4 ;;
        v5e-* | v5litepod-*) echo v5e ;;
        v5p-*) echo v5p ;;
        v6e-*) echo v6e ;;
        tpu7x-*) echo tpu7x ;;
    esac
}

# Google's APIs call v5e `v5litepod`.
accelerator_of() { echo "${1/#v5e-/v5litepod-}"; }

# What every run on GPUs gets: XLA preallocates this fraction of their memory instead of three quarters (as in NVIDIA's JAX
# images), and compiled programs are cached next to the work directory.
gpu_environment() {
    echo "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
    echo "JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${workdir%/}.compiled}"
}
