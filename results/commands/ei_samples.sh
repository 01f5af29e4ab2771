#!/usr/bin/env bash
# Expert iteration, de-duplicated, with more samples per question and round.
#
# K = 4 is ei_dedup of arithmetic.sh. Run that first.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for k in ${SAMPLES:-16}; do
    for seed in ${SEEDS:-0 1 2}; do
        name=k${k}_dedup
        is_recorded $name $seed && continue
        train_and_test "$work/ei_${name}_$seed" $name $seed expert_iteration.py --model "$work/sft_$seed/model" --samples $k --deduplicate
    done
done
python results/table.py "$records"
