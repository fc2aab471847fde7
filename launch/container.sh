# Source me before env.sh: where commands of a job run, by one variable.
#   MEGARL_CONTAINER   [none: the environment of launch/env.sh]  FILE.sif: Apptainer, bound to this directory; anything else: an image of
#                      Pyxis, as srun's --container-image takes it. MEGARL_PYTHON is then the image's interpreter [python3].
#   MEGARL_BIND        further directories to see inside, as in /data:/data,/scratch
# shellcheck shell=bash

if [[ -n ${MEGARL_CONTAINER:-} ]]; then
    export MEGARL_VENV=none MEGARL_PYTHON=${MEGARL_PYTHON:-python3}
fi
CONTAINER_PREFIX=() # before a command
CONTAINER_SRUN=()   # options of srun
case ${MEGARL_CONTAINER:-} in
"") ;;
*.sif) CONTAINER_PREFIX=(apptainer exec --nv --bind "$PWD${MEGARL_BIND:+,$MEGARL_BIND}" --pwd "$PWD" "$MEGARL_CONTAINER") ;;
*) CONTAINER_SRUN=(--container-image="$MEGARL_CONTAINER" --container-mounts="$PWD:$PWD${MEGARL_BIND:+,$MEGARL_BIND}" --container-workdir="$PWD") ;;
esac

in_container() { # COMMAND...: one process, on this node
    if [[ ${#CONTAINER_SRUN[@]} -gt 0 ]]; then
        srun --export=ALL --nodes=1 --ntasks=1 --overlap "${CONTAINER_SRUN[@]}" "$@"
    else
        ${CONTAINER_PREFIX[@]+"${CONTAINER_PREFIX[@]}"} "$@"
    fi
}
