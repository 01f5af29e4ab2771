#!/usr/bin/env bash
# PPO from SFT for 36 phases: as many samples, 18,432, as two rounds of expert iteration with K = 4.
#
# 20 phases are ppo of arithmetic.sh. Run that first.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    is_recorded phases36 $seed && continue
    train_and_test "$work/ppo_phases36_$seed" phases36 $seed ppo.py --model "$work/sft_$seed/model" --phases 36
done
python results/table.py "$records"
