#!/usr/bin/env bash
# Ten phases of PPO with each estimator of the advantages, from SFT. Run arithmetic.sh first.
#
# Only dev is measured, after every second phase.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-gae group loo}; do
        is_recorded $name $seed && continue
        run=$work/advantage_${name}_$seed
        python ppo.py --model "$work/sft_$seed/model" --seed $seed --token-budget $budget --phases 10 --eval-every 2 \
            --advantage $name --out "$run" --resume
        record "$run" $name $seed
    done
done
