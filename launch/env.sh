# Source me: `. launch/env.sh || exit $?`. Makes or reuses the environment (launch/install.sh) and sets the variables runs need.
# `MEGARL_DEV=1` adds what the tests need. Variables you have set yourself are kept.
# shellcheck shell=bash

MEGARL_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${MEGARL_DEV:-0}" = 1 ]; then
    bash "$MEGARL_ROOT/launch/install.sh" --dev || return $?
else
    bash "$MEGARL_ROOT/launch/install.sh" || return $?
fi

if [ "${MEGARL_VENV:-}" = none ]; then # a container or module system brings the packages
    MEGARL_PYTHON=${MEGARL_PYTHON:-python3}
    export PYTHONPATH=$MEGARL_ROOT${PYTHONPATH:+:$PYTHONPATH}
else
    VIRTUAL_ENV=$(cd "${MEGARL_VENV:-$MEGARL_ROOT/.venv}" && pwd) || return 2
    MEGARL_PYTHON=$VIRTUAL_ENV/bin/python
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
fi
export MEGARL_ROOT MEGARL_PYTHON

umask "${MEGARL_UMASK:-077}"                           # what a run writes is for its user alone; 027 lets the group read
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}             # a run reads local files only
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} # ranks are processes already
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}   # nothing is reported to anyone
export DO_NOT_TRACK=${DO_NOT_TRACK:-1}
export PYTHONUNBUFFERED=1                              # logs of a rank that dies are complete
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # no warnings about NUMA and the like from below Python
export MPLBACKEND=${MPLBACKEND:-Agg}                   # pictures go to files
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    export MEGARL_HOST_GPUS=${MEGARL_HOST_GPUS:-$(nvidia-smi -L | grep -c '^GPU')}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron: sequence parallelism overlaps in launch order
    # NCCL's flight recorder: the last collectives of each rank, written down on a hang (megarl/operations/watching.py says where).
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
else
    export MEGARL_HOST_GPUS=${MEGARL_HOST_GPUS:-0}
fi
