#!/usr/bin/env bash
# Writes a checkpoint as a Hugging Face directory. Reads the checkpoint tensor by tensor: one node, no GPU, little memory.
#
#   mkdir -p runs && sbatch slurm/export_70b.sh CHECKPOINT OUT
#
# Site knobs: adapt these lines to your cluster.
#SBATCH --job-name=megarl-export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=02:00:00
##SBATCH --partition=...
##SBATCH --account=...
#SBATCH --output=runs/%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/env.sh ]] || { echo "megarl: submit from the repository's root (launch/env.sh is not in $PWD)" >&2; exit 2; }
[[ $# == 2 ]] || { echo "megarl: usage: sbatch slurm/export_70b.sh CHECKPOINT OUT" >&2; exit 2; }
. launch/env.sh || exit $?

exec "$MEGARL_PYTHON" -m megarl export "$1" "$2"
