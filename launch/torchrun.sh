#!/usr/bin/env bash
# Starts the ranks of one node: `NPROC=4 bash launch/torchrun.sh ppo configs/x.yaml a.b=c ...`
#
# Alone it runs on one node. Inside a Slurm step with several nodes (srun, one task a node) it takes nodes, node rank and rendezvous
# from Slurm, so the same line is what every node runs. The arguments are those of the command `megarl`.
# `launch/attempts.sh` starts this again after failures, and lets the ranks stop when they are asked to.
#
# Settings (environment):
#   NPROC           ranks a node                     [GPUs of this node, or 1 without a GPU]
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT         several nodes without Slurm: set all four on every node
#   MEGARL_MODULE   Python module to run             [megarl]
#   MEGARL_PREFLIGHT  look at all nodes before models are loaded: on, off or auto [auto: with several nodes]
#   MEGARL_WATCH    on a hang: kill, warn or off     [kill]; a phase hangs when it takes MEGARL_HANG_FACTOR [5] times as long as ever
#                   before and MEGARL_HANG_FLOOR [120] seconds at least; MEGARL_HANG_FIRST [1800] seconds when it never ended before
#                   (while responses are scored also as long as a reward's own time limit, which ends the run with a better message)
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/env.sh" || exit $?

if [[ $# == 0 ]]; then
    echo "megarl: nothing to run; usage: NPROC=4 bash launch/torchrun.sh ppo|sft|reward CONFIG [a.b=c ...]" >&2
    exit 2
fi

nproc_node=${NPROC:-$((MEGARL_HOST_GPUS > 0 ? MEGARL_HOST_GPUS : 1))}
[[ $nproc_node =~ ^[1-9][0-9]*$ ]] || { echo "megarl: NPROC is '$nproc_node'; expected a number of ranks" >&2; exit 2; }
nnodes=${NNODES:-${SLURM_STEP_NUM_NODES:-1}} # outside srun a Slurm job is one node too
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}

# A rank gets its share of the cores; more threads than cores only wait for one another.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    threads=$(($(nproc) / nproc_node))
    export OMP_NUM_THREADS=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
fi

common=(--nproc-per-node "$nproc_node" --max-restarts 0)
if [[ $nnodes == 1 ]]; then
    # Loopback, and a free port chosen by torchrun: two runs on one machine do not meet.
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
    rendezvous=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0 --local-addr localhost)
else
    # torchrun shares one key-value store between rounds of workers unless told not to; workers then read stale addresses.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        head=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
        port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
        id=${MEGARL_ATTEMPT:-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-${SLURM_STEP_ID:-0}}
    else
        head=${MASTER_ADDR:-} port=${MASTER_PORT:-} id=${MEGARL_RUN_ID:-megarl}
        if [[ -z $head || -z $port || -z ${NODE_RANK:-} ]]; then
            echo "megarl: NNODES=$nnodes without Slurm needs NODE_RANK, MASTER_ADDR and MASTER_PORT on every node" >&2
            exit 2
        fi
    fi
    rendezvous=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-id "$id" --rdzv-endpoint "$head:$port")
    rendezvous+=(--rdzv-conf "is_host=$([[ $node_rank == 0 ]] && echo 1 || echo 0),join_timeout=600")
fi

exec "$MEGARL_PYTHON" -m megarl.launcher "${common[@]}" "${rendezvous[@]}" --module "${MEGARL_MODULE:-megarl}" "$@"
