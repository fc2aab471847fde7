#!/usr/bin/env bash
# Training of the reward model on 16 nodes x 8 GPUs: scores rollouts, and is the critic's start.
#
#   megarl submit slurm/reward_70b.sh [options of sbatch] [a.b=c ...]        or: mkdir -p runs && sbatch slurm/reward_70b.sh [a.b=c ...]
#
# Before the time limit, and when Slurm wants the nodes back, the ranks finish their step, publish a checkpoint, and the job goes back into
# the queue; after a failure they start again inside the job, after a lost node Slurm starts the job again: docs/slurm.md.
#
# ---- Your site: adapt these lines (options on the command line win over them) ----
#SBATCH --job-name=megarl-reward_70b
##SBATCH --partition=...
##SBATCH --account=...
#SBATCH --time=1-00:00:00
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
# All memory of a node, where the site gives a job less:
##SBATCH --mem=0
#SBATCH --output=runs/%x-%j.log
# Seconds before the end at which the ranks are told: a step and a checkpoint, and a minute. Twice the same number.
#SBATCH --signal=B:USR1@600
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
export MEGARL_LEAD_S=${MEGARL_LEAD_S:-600}
export NPROC=${NPROC:-8}                           # ranks a node, one a GPU
export MEGARL_CONTAINER=${MEGARL_CONTAINER:-}      # an image instead of the environment in .venv: FILE.sif (Apptainer) or what Pyxis takes
INTERFACE=${INTERFACE:-}                           # the link between nodes where there are several, as in ib0
# ---- The rest is the same on every cluster ----
set -euo pipefail

STAGE=reward
CONFIG=${CONFIG:-configs/reward_70b.yaml}

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/attempts.sh ]] || { echo "megarl: submit from the repository's root (launch/attempts.sh is not in $PWD)" >&2; exit 2; }
[[ -z $INTERFACE ]] || export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch

exec bash launch/attempts.sh "$STAGE" "$CONFIG" "$@"
