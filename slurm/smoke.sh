#!/usr/bin/env bash
# Does megarl run here? A minute of fine-tuning a tiny model on two nodes: environment, network, shared file system, checkpoint.
#
#   mkdir -p runs && sbatch slurm/smoke.sh        (SMOKE_DIR=runs/smoke is made anew)
#
# ---- Your site: adapt these lines (options on the command line win over them) ----
#SBATCH --job-name=megarl-smoke
##SBATCH --partition=...
##SBATCH --account=...
#SBATCH --time=00:15:00
#SBATCH --nodes=2
##SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --output=runs/%x-%j.log
#SBATCH --signal=B:USR1@60
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
export MEGARL_LEAD_S=${MEGARL_LEAD_S:-60}
export NPROC=${NPROC:-1}                           # ranks a node
export MEGARL_CONTAINER=${MEGARL_CONTAINER:-}      # an image instead of the environment in .venv: FILE.sif (Apptainer) or what Pyxis takes
INTERFACE=${INTERFACE:-}                           # the link between nodes where there are several, as in ib0
# ---- The rest is the same on every cluster ----
set -euo pipefail

STAGE=sft
CONFIG=${CONFIG:-configs/quickstart/sft.yaml}
DIR=${SMOKE_DIR:-runs/smoke}

cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/attempts.sh ]] || { echo "megarl: submit from the repository's root (launch/attempts.sh is not in $PWD)" >&2; exit 2; }
[[ -z $INTERFACE ]] || export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch

if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    rm -rf "$DIR/sft"
    (. launch/container.sh && . launch/env.sh && in_container "$MEGARL_PYTHON" -m megarl.quickstart.make_data "$DIR/data")
fi
exec bash launch/attempts.sh "$STAGE" "$CONFIG" output_dir="$DIR/sft" tokenizer="$DIR/data/tokenizer.model" model.path="$DIR/data/model" \
    data.path="$DIR/data/sft.jsonl" parallel.tensor=1 parallel.pipeline=1 parallel.sequence=false train.total_steps=20 "$@"
