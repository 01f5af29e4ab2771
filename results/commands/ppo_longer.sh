#!/usr/bin/env bash
# PPO from SFT for 36 phases instead of 20, three seeds: as many samples, 18,432, as expert iteration with K = 4 draws in its
# two rounds. Twenty phases are ppo_0, ppo_1, ppo_2 of results/arithmetic, where the policies of SFT come from, too. Restartable.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    is_recorded phases36 $seed && continue
    train_and_test "$work/ppo_phases36_$seed" phases36 $seed ppo.py --model "$work/sft_$seed/model" --phases 36
done
python results/table.py "$records"
