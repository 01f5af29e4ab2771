#!/usr/bin/env bash
# Expert iteration from SFT with another number of samples K per question and round, three seeds; K = 4 is ei_0, ei_1, ei_2 of
# results/arithmetic, where the policies of SFT come from, too. Restartable.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
for k in ${SAMPLES:-16}; do
    for seed in ${SEEDS:-0 1 2}; do
        [ -f "$here/k${k}_$seed/test.json" ] && continue
        train_and_test "$work/ei_k${k}_$seed" k${k}_$seed $seed expert_iteration.py --model "$work/sft_$seed/model" --samples $k
    done
done
python results/table.py "$here"
