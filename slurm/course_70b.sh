#!/usr/bin/env bash
# The whole course as a chain of jobs: SFT, reward model, PPO, export. Runs where you log in, submits four jobs and ends.
#
#   bash slurm/course_70b.sh [options of sbatch for all four]        as in --partition=... --account=...
#
# A job starts when the one before it is done, however often that one went back into the queue. When one stops for good, those behind it
# are cancelled. Every configuration is checked before the first job is submitted. The knobs of a stage are in its own script.
#
# Settings (environment): SFT_CONFIG REWARD_CONFIG PPO_CONFIG [configs/..._70b.yaml], EXPORT_FROM [runs/ppo_70b], EXPORT_TO [runs/export_70b]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/env.sh || exit $?

submitted=()
give_up() {
    [[ ${#submitted[@]} == 0 ]] || { echo "megarl: cancelling what was submitted: ${submitted[*]}" >&2 && scancel "${submitted[@]}"; }
}
trap 'give_up' ERR

submit() { "$MEGARL_PYTHON" -m megarl submit "$1" --parsable "${@:2}"; }
after() { echo "--dependency=afterok:$1 --kill-on-invalid-dep=yes"; }

stages=(sft reward ppo)
configs=("${SFT_CONFIG:-configs/sft_70b.yaml}" "${REWARD_CONFIG:-configs/reward_70b.yaml}" "${PPO_CONFIG:-configs/ppo_70b.yaml}")
for i in 0 1 2; do
    "$MEGARL_PYTHON" -m megarl "${stages[i]}" "${configs[i]}" --check >/dev/null
done
last=
for i in 0 1 2; do
    # shellcheck disable=SC2046 # two words
    last=$(submit "slurm/${stages[i]}_70b.sh" --config="${configs[i]}" "$@" ${last:+$(after "$last")})
    submitted+=("$last")
    echo "${stages[i]}: job $last"
done
# shellcheck disable=SC2046 # two words
last=$(submit slurm/export_70b.sh $(after "$last") "$@" --nodes=1 --ntasks=1 "${EXPORT_FROM:-runs/ppo_70b}" "${EXPORT_TO:-runs/export_70b}")
echo "export: job $last"
