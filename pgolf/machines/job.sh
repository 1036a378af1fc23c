#!/bin/sh
# The machine's side of `pgolf remote`, one command per call: job.sh COMMAND DIR ARGUMENTS. POSIX sh on Linux.
# DIR holds checkout/, runs/, jobs/ and, while a job is being started, the file claim: "TOKEN OWNER".
# jobs/JOB/ holds, per attempt N, attempt-N ("PID START" of its process), attempt-N.log and attempt-N.status, and
# the file verified: the number of the attempt whose files were verified on the user's machine.

command=$1 top=$2
shift 2
if cd "$top" 2>/dev/null; then top=$PWD; fi

fail() {
    echo "$*" >&2
    exit 1
}

find_python() {
    for python in python3 python3.13 python3.12 python3.11; do
        "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return 0
    done
    return 1
}

# PID: start time of the process and the boot's id; nothing if the process has ended, or is a zombie.
started() {
    [ -r "/proc/$1/stat" ] || return 0
    # shellcheck disable=SC2046  # one word per field
    set -- $(sed 's/.*) //' "/proc/$1/stat")
    [ "$1" = Z ] || echo "${20}-$(cat /proc/sys/kernel/random/boot_id)"
}

# State of the job in the current folder: none, running N, ended N STATUS, or dead N (neither runs nor ended).
state() {
    n=$(find . -maxdepth 1 -name 'attempt-*' | sed -n 's/.*attempt-\([0-9]*\)$/\1/p' | sort -n | tail -1)
    [ -n "$n" ] || { echo none; return; }
    i=0
    while [ ! -s "attempt-$n" ] && [ $i -lt 3 ]; do sleep 1; i=$((i + 1)); done  # it is being claimed
    pid='' began=''
    read -r pid began < "attempt-$n"
    if [ ! -s "attempt-$n.status" ] && [ -n "$began" ] && [ "$(started "$pid")" = "$began" ]; then
        echo "running $n"
    elif [ -s "attempt-$n.status" ]; then
        echo "ended $n $(cat "attempt-$n.status")"
    else
        echo "dead $n"
    fi
}

# JOB: its state, whether it is verified, and all other jobs that are not.
look() {
    if cd "$top/jobs/$1" 2>/dev/null; then
        echo "state $(state)"
        [ ! -s verified ] || echo "verified $(cat verified)"
    else
        echo "state none"
    fi
    for folder in "$top"/jobs/*/; do
        cd "$folder" 2>/dev/null || continue
        job=$(basename "$folder") found=$(state)
        [ -z "$(find . -maxdepth 1 -name 'try-*')" ] || echo "other $job begun by an older pgolf"
        case $found in none | "ended $(cat verified 2>/dev/null) "*) continue ;; esac
        [ "$job" = "$1" ] || echo "other $job $found"
    done
}

# JOB TOKEN OWNER SWEEP...: claim the machine to start a job; then what is there of its runs.
# Nothing starts without a claim, so until start the folders may be written.
reserve() {
    job=$1 claim="$2 $3"
    mkdir -p "$top/jobs/$job" "$top/runs" "$top/checkout" || exit 1
    if ! (set -C; echo "$claim" > "$top/claim") 2>/dev/null; then
        read -r _ owner < "$top/claim"
        [ "$owner" = "$3" ] || fail "a job is being started from $owner: wait; if that ended, delete $top/claim there"
        echo "$claim" > "$top/claim"
    fi
    found=$(look "$job")
    echo "$found"
    case $found in "state running"* | *other*) rm -f "$top/claim" ;; esac
    shift 3
    cd "$top/runs" || exit 1
    for sweep; do
        mkdir -p "$sweep" || exit 1
        for run in "$sweep"/*/; do
            if [ -s "$run/result.json" ]; then
                echo "run complete ${run%/}"
            elif [ -s "$run/resume.pt" ] && [ -f "$run/metrics.jsonl" ]; then
                echo "run $(wc -l < "$run/metrics.jsonl") ${run%/}"
            fi
        done
    done
}

# COUNT COMMIT DIRTY, and the names of the pushed files as input: delete what an earlier push left and this one lacks.
code() {
    cd "$top/checkout" || exit 1
    cat > .pgolf-new
    [ "$(wc -l < .pgolf-new)" -eq "$1" ] || fail "the list of pushed files is truncated"
    if [ -f .pgolf-pushed ]; then
        grep -vxFf .pgolf-new .pgolf-pushed | while IFS= read -r name; do rm -f -- "$name"; done
    fi
    mv .pgolf-new .pgolf-pushed
    echo "PGOLF_GIT_COMMIT=$2 PGOLF_GIT_DIRTY=$3" > .pgolf-code.sh
}

# JOB N TOKEN RUN...: start attempt N under the claim of that token, unless one runs.
start() {
    job=$1 n=$2
    cd "$top/jobs/$job" || exit 1
    read -r token _ 2>/dev/null < "$top/claim"
    case $(state) in
        running*) ;;
        *)
            [ "$token" = "$3" ] || fail "another start took the claim of this one; the same command tries again"
            shift 3
            for run; do rm -f "$top/runs/$run/error.json"; done
            nohup setsid sh ./job.sh attempt "$top" "$job" "$n" < /dev/null > /dev/null 2>&1 &
            i=0
            while [ ! -s "attempt-$n" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
            rm -f "$top/claim"
            ;;
    esac
    look "$job"
}

# JOB N: the attempt itself. It claims its number, so that one that is started twice runs once.
attempt() {
    cd "$top/jobs/$1" || exit 1
    n=$2
    shift 2
    case $(state) in running*) exit 0 ;; esac
    (set -C; echo "$$ $(started $$)" > "attempt-$n") 2>/dev/null || exit 0
    exec > "attempt-$n.log" 2>&1
    head -c 65536 /dev/zero > ".attempt-$n.room"  # a full disk must still hold the exit status
    (work "$@")
    status=$?
    rm -f ".attempt-$n.room"
    until echo $status > .status && [ -s .status ] && mv .status "attempt-$n.status"; do sleep 5; done
}

# Exit status 3: Python, setup or GPUs failed, and no run was begun.
# settings.sh sets python, setup, gpus, the knobs and, as positional parameters, the words of `pgolf sweep`.
work() {
    job=$PWD python='' setup='' gpus=0
    # shellcheck source=/dev/null
    . ./settings.sh
    cd "$top/checkout" || exit 3
    # shellcheck source=/dev/null
    . ./.pgolf-code.sh || exit 3
    export PGOLF_GIT_COMMIT PGOLF_GIT_DIRTY PGOLF_ROOT="$top/checkout" PGOLF_RUNS="$top/runs" PYTHONUNBUFFERED=1
    if [ -z "$python" ]; then
        { find_python && "$python" tools/install.py; } || exit 3
        python=.venv/bin/python
    fi
    [ -z "$setup" ] || sh -c "$setup" || { echo "setup failed"; exit 3; }
    if [ "$gpus" -gt 0 ]; then  # else a rented machine would train on its CPU
        "$python" -c 'import sys, torch
n = torch.cuda.device_count()
sys.exit(n < int(sys.argv[1]) and f"torch {torch.__version__} sees {n} GPUs, {sys.argv[1]} are needed: set python:")
' "$gpus" || exit 3
    fi
    "$python" -m pgolf.cli.main sweep "$@"
}

# JOB N: note that the files of attempt N are verified, if it is still the last one; then its state.
verified() {
    case $(cd "$top/jobs/$1" && state) in "ended $2 "*) echo "$2" > "$top/jobs/$1/verified" ;; esac
    look "$1"
}

# SWEEP...: sha256 of every file of these folders of runs.
checksums() {
    cd "$top/runs" || exit 1
    for sweep; do
        [ ! -d "$sweep" ] || find "$sweep" -name '.*' -prune -o -type f -exec sha256sum {} + || exit 1
    done
}

# PYTHON DISTRIBUTIONS: what this machine has, as name=value. PYTHON: '' = to be found.
probe() {
    echo "pgolf-probe"
    for tool in rsync sha256sum setsid; do
        command -v $tool > /dev/null || echo "lacks_tool=$tool"
    done
    [ -r /proc/self/stat ] || echo "lacks_tool=Linux"
    echo "gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')"
    folder=$top
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    echo "free=$(df -Pk "$folder" | awk 'NR > 1 { print $(NF - 2) }' | tail -1)"
    python=$1
    [ -n "$python" ] || find_python || python=false
    "$python" -c 'import sys
from importlib.metadata import distributions
there = {str(d.metadata["Name"]).lower().replace("_", "-") for d in distributions()}
print("version=%d.%02d" % sys.version_info[:2])
print("lacks=" + " ".join(name for name in sys.argv[1].split() if name not in there))' "$2" 2>/dev/null
    if mkdir -p "$top" 2> /dev/null && [ -w "$top" ]; then echo "writable=yes"; fi
}

case $command in
    look | reserve | start | verified | checksums | probe) "$command" "$@" && echo end ;;
    code | attempt) "$command" "$@" ;;
    *) fail "job.sh: no command $command" ;;
esac
