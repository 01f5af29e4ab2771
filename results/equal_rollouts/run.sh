#!/usr/bin/env bash
# PPO from SFT with as many samples as the two rounds of expert iteration draw: 36 phases of 512, 18,432 in all; three seeds.
# Expert iteration is ei_0, ei_1, ei_2 of results/arithmetic, where the policies of SFT come from, too. Restartable.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    [ -f "$here/ppo_$seed/test.json" ] && continue
    train_and_test "$work/ppo_36_$seed" ppo_$seed $seed ppo.py --model "$work/sft_$seed/model" --phases 36 \
        --pass-k 8
done
python results/table.py "$here"
