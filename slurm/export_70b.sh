#!/usr/bin/env bash
# Writes a checkpoint as a Hugging Face directory. Reads the checkpoint tensor by tensor: one node, no GPU, little memory.
#
#   megarl submit slurm/export_70b.sh CHECKPOINT OUT        or: mkdir -p runs && sbatch slurm/export_70b.sh CHECKPOINT OUT
#
# ---- Your site: adapt these lines (options on the command line win over them) ----
#SBATCH --job-name=megarl-export
##SBATCH --partition=...
##SBATCH --account=...
#SBATCH --time=02:00:00
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --output=runs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
export MEGARL_CONTAINER=${MEGARL_CONTAINER:-}      # an image instead of the environment in .venv: FILE.sif (Apptainer) or what Pyxis takes
# ---- The rest is the same on every cluster ----
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/env.sh ]] || { echo "megarl: submit from the repository's root (launch/env.sh is not in $PWD)" >&2; exit 2; }
[[ $# == 2 ]] || { echo "megarl: usage: sbatch slurm/export_70b.sh CHECKPOINT OUT" >&2; exit 2; }
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch
. launch/container.sh
. launch/env.sh || exit $?

in_container "$MEGARL_PYTHON" -m megarl export "$1" "$2"
