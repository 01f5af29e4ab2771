#!/usr/bin/env bash
# PPO from SFT with each estimator of the advantages. Run arithmetic.sh and hard.sh before.
#
# gae, group, loo     ten phases on the easy task. Only dev is measured, after every second phase
# hard_loo            the harder task at temperature 1, 36 phases, to compare with phases36_t1 and
#                     ei of hard.sh
# Seeds 0 to 2 of the first three and seeds 0 to 3 of hard_loo are recorded. The latter were made with
# TOKEN_BUDGET=1024.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-gae group loo hard_loo}; do
        is_recorded $name $seed && continue
        run=$work/advantage_${name}_$seed
        if [ $name = hard_loo ]; then
            dataset=arithmetic-hard
            train_and_test "$run" $name $seed ppo.py --model "$work/hard_sft_$seed/model" --dataset $dataset \
                --phases 36 --temperature 1 --advantage loo
            continue
        fi
        python ppo.py --model "$work/sft_$seed/model" --seed $seed --token-budget $budget --phases 10 --eval-every 2 \
            --advantage $name --out "$run" --resume
        record "$run" $name $seed
    done
done
