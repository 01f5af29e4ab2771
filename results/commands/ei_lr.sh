#!/usr/bin/env bash
# What rounding does to expert iteration, and a lower learning rate.
#
# round_*: one round of seed 0 at two learning rates, with micro-batches of four sizes. The size only
# changes the order in which sums are rounded. It is the seed of the record. LR= leaves these out.
# easy_3e-4 and base_3e-4: two rounds from SFT and from the base, seed 0, to compare with arithmetic.sh.
# hard_3e-4: two rounds on the harder task, to compare with hard.sh.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for lr in ${LR-1e-3 3e-4}; do
    for tokens in 512 768 1024 1536; do
        run=$work/ei_lr_${lr}_$tokens
        is_recorded round_$lr $tokens && continue
        fine_tune "$work/sft_0" 0
        python expert_iteration.py --model "$work/sft_0/model" --rounds 1 --lr $lr --token-budget $tokens --out "$run" --resume
        python evaluate.py --model "$run/model" --samples 4 --resume --out "$run/test.json" >"$run/test.txt"
        record "$run" round_$lr $tokens # the seed of the record is the size
    done
done
for start in easy base; do # two rounds, of seed 0 alone
    run=$work/ei_lr_${start}_3e-4
    is_recorded ${start}_3e-4 0 && continue
    fine_tune "$work/sft_0" 0
    how="--model $work/sft_0/model" && [ $start = easy ] || how="--model tiny --samples 8 --epochs 3"
    python expert_iteration.py $how --lr 3e-4 --token-budget 1024 --out "$run" --resume
    python evaluate.py --model "$run/model" --samples 4 --resume --out "$run/test.json" >"$run/test.txt"
    record "$run" ${start}_3e-4 0
done
dataset=arithmetic-hard
for seed in ${SEEDS:-0 1 2}; do
    is_recorded hard_3e-4 $seed && continue
    fine_tune "$work/hard_sft_$seed" $seed
    train_and_test "$work/ei_lr_hard_3e-4_$seed" hard_3e-4 $seed expert_iteration.py --model "$work/hard_sft_$seed/model" \
        --lr 3e-4 --dataset $dataset
done
python results/table.py "$records"
