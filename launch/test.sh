#!/usr/bin/env bash
# Runs the tests: `bash launch/test.sh [--slow | --faults | --cluster] [pytest arguments]`. Under 20 minutes on two cores.
#   --slow     the slow slice (whole courses, larger worlds) instead of the default selection
#   --faults   every fault test (kills, disks, damage, exact resume) in full; the default selection has a quick slice of them
#   --cluster  jobs on a Slurm that the tests start themselves (root, Debian packages: docs/slurm.md)
# Soaks (random faults, in --faults and --cluster) hit their runs for MEGARL_SOAK_S seconds [60; 120 in a job].
# Exit code: pytest's; 124 when the whole run takes longer than MEGARL_TEST_TIMEOUT seconds [2400; 7200 for --slow and --faults].
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
MEGARL_DEV=1 . launch/env.sh || exit $?

selection="not slow and not gpu and not cluster" limit=2400
[[ ${MEGARL_HOST_GPUS:-0} == 0 ]] || selection="not slow and not cluster"
if [[ ${1:-} == --slow ]]; then
    selection="slow and not gpu and not cluster" limit=7200
    shift
elif [[ ${1:-} == --faults ]]; then
    selection="not gpu" limit=7200
    shift
    set -- -rA tests/faults tests/multi_rank/test_resume*.py tests/multi_rank/test_kill_while_saving.py "$@"
elif [[ ${1:-} == --cluster ]]; then
    selection="cluster" limit=7200
    shift
    set -- tests/cluster "$@"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}          # ranks of the multi-rank tests share the cores
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
"$MEGARL_PYTHON" -m ruff check . || exit 1
exec timeout --signal=INT --kill-after=30 "${MEGARL_TEST_TIMEOUT:-$limit}" \
    "$MEGARL_PYTHON" -m pytest -m "$selection" --durations=15 "$@"
