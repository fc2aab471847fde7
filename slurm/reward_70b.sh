#!/usr/bin/env bash
# Training of the reward model on 16 nodes x 8 GPUs: scores rollouts, and is the critic's start.
#
#   mkdir -p runs && sbatch slurm/reward_70b.sh [a.b=c ...]
#
# After a node failure Slurm requeues the job, and the run continues from the newest complete checkpoint in its output_dir
# (configs/reward_70b.yaml: checkpoint.every_steps). Reaching the time limit ends the job: submit it again to continue.
#
# Site knobs: adapt these lines to your cluster (options of sbatch on the command line win over them).
#SBATCH --job-name=megarl-reward_70b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-00:00:00
#SBATCH --exclusive
##SBATCH --partition=...
##SBATCH --account=...
# The run's log; the directory must exist before sbatch, or Slurm drops the job without a word.
#SBATCH --output=runs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# One launcher a node; it starts one rank a GPU.
#SBATCH --ntasks-per-node=1
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/torchrun.sh ]] || { echo "megarl: submit from the repository's root (launch/torchrun.sh is not in $PWD)" >&2; exit 2; }

CONFIG=${CONFIG:-configs/reward_70b.yaml}
export NPROC=${NPROC:-8}
# Several network links: name the one between nodes, e.g. export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# srun does not take --cpus-per-task over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}

# One node makes the environment on the shared file system, before all of them look for it.
srun --nodes=1 --ntasks=1 bash launch/install.sh

# A rank that fails ends the step on all nodes, instead of leaving the others to wait for it.
exec srun --kill-on-bad-exit=1 --wait=60 bash launch/torchrun.sh reward "$CONFIG" "$@"
