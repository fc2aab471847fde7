#!/usr/bin/env bash
# The whole course on one machine: data, SFT, reward model, PPO with a critic, export, verification. About ten minutes on two cores.
#
#   bash launch/quickstart.sh [--layout tp2pp1dp2] [--seed 1] [--out DIR] [stage:key=value ...]
#
# The same as variables: LAYOUT [tp2pp2dp1], SEED [0], OUT [runs/quickstart]. An earlier quickstart in the same folder is replaced.
# A change of one stage's configuration (configs/quickstart): ppo:ppo.total_steps=50
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/env.sh" || exit $?

exec "$MEGARL_PYTHON" -m megarl.quickstart.course "$@"
