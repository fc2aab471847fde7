#!/usr/bin/env bash
# RRHF on the policy's own responses, in rounds: sample and score with the newest model, then learn the order of what was sampled.
#
#   ROUNDS=3 NPROC=4 bash launch/rrhf_rounds.sh SAMPLE.yaml RRHF.yaml OUT [sample:key=value | rrhf:key=value ...]
#
# The first round starts from actor.path and model.path of the two files, every later one from the model of the round before. Round n
# writes OUT/round-n/sampled and OUT/round-n/model. Its seed is SEED + n: other responses, another order. Its optimizer and its
# learning rates start anew. Started again, it goes on where it stopped, inside a round, too.
#
# Settings (environment): ROUNDS [3], SEED [0], and those of launch/torchrun.sh, which starts the ranks
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/env.sh" || exit $?

rounds=${ROUNDS:-3} seed=${SEED:-0}
[[ $rounds =~ ^[1-9][0-9]*$ ]] || { echo "megarl: ROUNDS is '$rounds'; expected a number of rounds" >&2; exit 2; }
[[ $seed =~ ^[0-9]+$ ]] || { echo "megarl: SEED is '$seed'; expected a whole number" >&2; exit 2; }
if [[ $# -lt 3 ]]; then
    echo "megarl: usage: ROUNDS=3 bash launch/rrhf_rounds.sh SAMPLE.yaml RRHF.yaml OUT [sample:key=value | rrhf:key=value ...]" >&2
    exit 2
fi
sample=("$1") rrhf=("$2") out=$3
for change in "${@:4}"; do
    case $change in
    sample:*=*) sample+=("${change#sample:}") ;;
    rrhf:*=*) rrhf+=("${change#rrhf:}") ;;
    *) echo "megarl: found '$change'; expected sample:key=value or rrhf:key=value" >&2 && exit 2 ;;
    esac
done

"$MEGARL_PYTHON" -m megarl sample "${sample[@]}" --check >/dev/null
"$MEGARL_PYTHON" -m megarl rrhf "${rrhf[@]}" --check >/dev/null
for ((round = 1; round <= rounds; round++)); do
    folder=$out/round-$round
    if [[ ! -e $folder/finished ]]; then
        echo "megarl: round $round of $rounds: $folder" >&2
        now=("seed=$((seed + round))")
        bash "$here/torchrun.sh" sample "${sample[@]}" "${now[@]}" "output_dir=$folder/sampled"
        bash "$here/torchrun.sh" rrhf "${rrhf[@]}" "${now[@]}" "data.path=$folder/sampled/samples.jsonl" "output_dir=$folder/model"
        touch "$folder/finished"
    fi
    sample+=("actor.path=$folder/model") rrhf+=("model.path=$folder/model")
done
