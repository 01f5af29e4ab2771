#!/usr/bin/env bash
# Expert iteration with adapters of rank 16, from SFT. Run arithmetic.sh first.
#
# lr_*: one round of seed 0 with three learning rates, measured on dev. rank16: the default two rounds
# with the best of them.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for lr in ${RATES:-1e-3 3e-3 1e-2}; do
    is_recorded lr_$lr 0 && continue
    run=$work/adapters_$lr
    python expert_iteration.py --model "$work/sft_0/model" --rounds 1 --lora-rank 16 --lr $lr --token-budget $budget \
        --out "$run" --resume
    record "$run" lr_$lr 0
done
for seed in ${SEEDS:-0 1 2}; do
    is_recorded rank16 $seed && continue
    train_and_test "$work/adapters_rank16_$seed" rank16 $seed expert_iteration.py --model "$work/sft_$seed/model" \
        --lora-rank 16 --lr ${LR:-3e-3}
done
