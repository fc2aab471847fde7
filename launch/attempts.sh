#!/usr/bin/env bash
# Runs one stage of the course until it is done: starts the ranks, starts them again after a failure, stops them in time.
#
#   bash launch/attempts.sh ppo|sft|reward|... CONFIG [a.b=c ...]
#
# Inside a Slurm job (slurm/*.sh) the ranks run on all its nodes, elsewhere on this one. Every attempt continues from the newest complete
# checkpoint, with a rendezvous of its own. SIGUSR1, SIGTERM, Ctrl-C, a job's time limit, or somebody's `touch OUTPUT_DIR/drain` stop the
# ranks at the end of their step, with a checkpoint; a Slurm job then goes back into the queue. How it ended is in OUTPUT_DIR/outcome.json
# and, without the details, in the exit code: 0 done, 75 stopped and can go on, 78 the configuration or 65 the data is wrong, 93 several
# attempts in a row have published no checkpoint (jobs that wait for this one are then cancelled). A node found to be bad before
# models are loaded (OUTPUT_DIR/bad_nodes) is left out from then on, and the job goes back into the queue.
#
# Settings (environment):
#   NPROC                 ranks a node                                                     [GPUs of a node, or 1]
#   MEGARL_MAX_FRUITLESS  attempts in a row without a new checkpoint that stop it for good [3]
#   MEGARL_LEAD_S         seconds before the time limit at which the ranks are stopped: a step, a checkpoint and a minute  [900]
#   MEGARL_NODES_WAIT_S   after a failure, seconds for nodes that do not answer: Slurm gives the job up before             [900]
#   MEGARL_CONTAINER      image everything runs in: launch/container.sh
#   MEGARL_SRUN           further options of srun
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/container.sh"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh" || exit $?

JOB=${SLURM_JOB_ID:-}
LIMIT=${MEGARL_MAX_FRUITLESS:-3}
LEAD_S=${MEGARL_LEAD_S:-900}
NODES_WAIT_S=${MEGARL_NODES_WAIT_S:-900}
START=${JOB:-$(date +%s)-$$}-${SLURM_RESTART_COUNT:-0}

say() { echo "megarl: $*" >&2; }
for name in MEGARL_MAX_FRUITLESS MEGARL_LEAD_S MEGARL_NODES_WAIT_S; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || { say "$name is '${!name}'; expected a whole number over 0" && exit 2; }
done
ask() { in_container "$MEGARL_PYTHON" -m megarl.operations.attempts "$@"; }

if [[ $# -lt 2 ]]; then
    say "nothing to run; usage: bash launch/attempts.sh ppo|sft|reward CONFIG [a.b=c ...]"
    exit 2
fi
RUN=$(ask locate "$@") || exit $?
export MEGARL_RUN=$RUN MEGARL_DRAIN=$RUN/drain

# ---------------------------------------------------------------- where the ranks run
on_nodes() { # SRUN OPTIONS... -- COMMAND...
    local options=()
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    if [[ -z $JOB ]]; then
        exec "$@"
    fi
    # shellcheck disable=SC2086 # words on purpose
    exec srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 ${MEGARL_SRUN:-} "${options[@]}" "$@"
}

# ---------------------------------------------------------------- stopping in time
reason=
drain() { # WHY: the ranks look for the file after every step
    reason=${reason:-$1}
    echo "$1" >"$MEGARL_DRAIN.new" && mv "$MEGARL_DRAIN.new" "$MEGARL_DRAIN"
    say "$1: the ranks stop after this step"
}
interrupt() { # a second Ctrl-C does not wait for the step
    [[ -z $reason || -z $ranks ]] || kill -KILL "$ranks" 2>/dev/null || true
    drain "interrupted"
}
trap 'drain "SIGUSR1"' USR1
trap 'drain "SIGTERM"' TERM
trap 'drain "the time limit comes near"' ALRM
trap interrupt INT

seconds_left() { # until the job's time limit; nothing without one; false when Slurm does not answer
    local end
    end=$(SLURM_TIME_FORMAT=standard squeue -h -j "$JOB" -o '%A %e' 2>/dev/null) || return 1
    end=$(awk -v job="$JOB" '$1 == job { print $2 }' <<<"$end") # the last task of an array has the array's number
    end=$(date -d "${end:-none}" +%s 2>/dev/null) || return 0
    echo $((end - $(date +%s)))
}
watch_the_clock() { # the limit may be moved while the job runs, and Slurm may be too busy to answer: look again before the end
    local left
    while :; do
        if ! left=$(seconds_left); then
            left=$((LEAD_S + 60))
        elif [[ -z $left ]]; then
            return
        elif ((left <= LEAD_S)); then
            kill -ALRM $$
            return
        fi
        sleep $((left - LEAD_S > 60 ? 60 : left - LEAD_S))
    done
}
clock=
if [[ -n $JOB ]]; then
    left=$(seconds_left) || left=
    if [[ -n $left ]] && ((left < 2 * LEAD_S)); then
        LEAD_S=$((left / 2))
        say "the job ends in $left s: the ranks stop $LEAD_S s before"
    fi
    watch_the_clock </dev/null >/dev/null 2>&1 &
    clock=$!
fi
trap '[[ -z $clock ]] || kill "$clock" 2>/dev/null || true' EXIT

# ---------------------------------------------------------------- one attempt
ranks=
attempt() { # NUMBER KIND CONFIG ...: the exit code of the ranks
    local port=$((20000 + (${JOB:-0} * 31 + ${SLURM_RESTART_COUNT:-0} * 7 + $1) % 12000)) # below those that the kernel gives away
    shift
    (
        trap '' USR1 ALRM TERM INT # the ranks hear of it through the file; a second Ctrl-C ends them
        [[ -z $JOB ]] || export MASTER_PORT=$port MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
        on_nodes --kill-on-bad-exit=1 --wait=60 ${CONTAINER_SRUN[@]+"${CONTAINER_SRUN[@]}"} -- \
            ${CONTAINER_PREFIX[@]+"${CONTAINER_PREFIX[@]}"} bash "$MEGARL_ROOT/launch/torchrun.sh" "$@"
    ) &
    ranks=$!
    local code=0
    while kill -0 "$ranks" 2>/dev/null; do # a signal ends `wait`, not the ranks
        code=0
        wait "$ranks" || code=$?
    done
    ranks=
    return "$code"
}

nodes_answer() { # after a failure: a node that is gone is Slurm's to notice, and no attempt's fault
    local end=$((SECONDS + NODES_WAIT_S))
    [[ -n $JOB ]] || return 0
    while [[ -z $reason ]] && ! (on_nodes --overlap --immediate=30 -- timeout 60 true) 2>/dev/null; do
        ((SECONDS < end)) || return 1
        say "a node of this job does not answer; waiting for Slurm to give it up"
        sleep 5
    done
}

# ---------------------------------------------------------------- after the last one
cancel_successors() { # jobs that wait for this one or, in an array, come after it; and those that wait for them
    local waiting=("$JOB") next
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true
    while [[ ${#waiting[@]} -gt 0 ]]; do
        mapfile -t next < <(squeue -h -u "$EUID" -t PENDING -o '%A %E' | awk -v ids=" ${waiting[*]} " '
            { n = split($2, parts, /[^0-9]+/); for (i = 1; i <= n; i++) if (parts[i] != "" && index(ids, " " parts[i] " ")) { print $1; next } }')
        [[ ${#next[@]} == 0 ]] || { scancel "${next[@]}" && say "cancelled the jobs that waited for this one: ${next[*]}"; }
        waiting=(${next[@]+"${next[@]}"})
    done
}
LEFT_OUT=
leave_out() { # JOB AS SLURM SHOWS IT: notes the nodes in RUN/bad_nodes beside those that are left out already; false when too few remain
    local all out
    [[ -s $RUN/bad_nodes ]] || return 0
    all=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u)
    out=$(grep -o ' ExcNodeList=[^( ]*' <<<"$1" | cut -d= -f2) || true
    out=$({ [[ -z $out ]] || scontrol show hostnames "$out"; grep -xFf "$RUN/bad_nodes" <<<"$all" || true; } | sort -u)
    LEFT_OUT=${out//$'\n'/,}
    if [[ -n $out ]] && (($(grep -vxcFf <(echo "$out") <<<"$all") < SLURM_JOB_NUM_NODES)); then
        say "job $JOB needs $SLURM_JOB_NUM_NODES nodes and $SLURM_JOB_PARTITION has too few besides $LEFT_OUT: not requeued;" \
            "submit it again when nodes are repaired and their lines deleted from $RUN/bad_nodes"
        return 1
    fi
}
requeue() { # a job that Slurm is ending for another reason is left to it
    local job tries
    job=" $(scontrol show job -o "$JOB") " || true
    leave_out "$job" || return 0
    trap '' TERM USR1 ALRM # Slurm ends this script now, and it has a word to say yet
    for tries in 3 2 1; do
        if [[ $job == *" Restarts="* && $job != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
            break # somebody has done it, or Slurm has without an answer
        elif [[ $job == *" JobState=C"* && $job != *" Reason=TimeLimit "* ]]; then # completing, cancelled
            say "job $JOB was ended from outside: submit it again to continue"
            return
        elif scontrol requeue "$JOB"; then
            break
        elif [[ $tries == 1 || $job == *" Requeue=0 "* ]]; then
            say "job $JOB cannot be requeued: submit it again to continue"
            return
        fi
        sleep 20 # a busy controller answers later
        job=" $(scontrol show job -o "$JOB") " || true
    done
    say "job $JOB goes back into the queue and continues there"
    [[ -z $LEFT_OUT ]] || { scontrol update JobId="$JOB" ExcNodeList="$LEFT_OUT" && say "job $JOB leaves out $LEFT_OUT from now on"; } || true
}

number=0
while :; do
    number=$((number + 1))
    export MEGARL_ATTEMPT=$START-$number
    begun=$(ask begin "$RUN" "$MEGARL_ATTEMPT")
    if [[ $begun == fenced ]]; then # this node was cut off, and the job lives elsewhere
        say "job $JOB has been started again elsewhere: this start stops"
        exit 75
    fi
    [[ -z $reason ]] || drain "$reason" # asked while the last attempt was failing
    code=0
    attempt "$number" "$@" || code=$?
    ended=$(ask end "$RUN" "$MEGARL_ATTEMPT" "$code" "$LIMIT")
    case $ended in
    done) exit 0 ;;
    drained)
        [[ -z $JOB ]] || requeue
        exit 75
        ;;
    config-error) exit 78 ;;
    data-error) exit 65 ;;
    no-progress)
        say "$LIMIT attempts in a row without a new checkpoint: stopped for good; $RUN/outcome.json says why the last one failed"
        [[ -z $JOB ]] || cancel_successors
        exit 93
        ;;
    bad-hosts)
        say "nodes found bad: $(paste -sd ' ' "$RUN/bad_nodes"); $RUN/outcome.json says why"
        [[ -z $JOB ]] || { requeue && exit 75; }
        ;;
    fenced)
        say "a newer attempt is in charge of $RUN: this one stops"
        exit 75
        ;;
    esac
    say "attempt $MEGARL_ATTEMPT failed (exit code $code); $RUN/outcome.json says why"
    if [[ -n $reason ]]; then
        [[ -z $JOB ]] || requeue
        exit 75
    fi
    nodes_answer || { say "nodes of this job have not answered for $NODES_WAIT_S s" && exit 75; }
done
