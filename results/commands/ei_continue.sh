#!/usr/bin/env bash
# Expert iteration, de-duplicated, that continues from the policy of the round before.
#
# The default, to restart from the base in every round, is ei_dedup of arithmetic.sh. Run that first.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    is_recorded continue_dedup $seed && continue
    train_and_test "$work/ei_continue_dedup_$seed" continue_dedup $seed expert_iteration.py --model "$work/sft_$seed/model" --continue --deduplicate
done
python results/table.py "$records"
