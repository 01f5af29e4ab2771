#!/usr/bin/env bash
# Expert iteration that trains on from the policy of the round before, three seeds; restarting from the base in every round,
# the default, is ei_0, ei_1, ei_2 of results/arithmetic, where the policies of SFT come from, too. Restartable.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    [ -f "$here/continue_$seed/test.json" ] && continue
    train_and_test "$work/ei_continue_$seed" continue_$seed $seed expert_iteration.py --model "$work/sft_$seed/model" --continue
done
python results/table.py "$here"
