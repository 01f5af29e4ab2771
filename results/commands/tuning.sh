#!/usr/bin/env bash
# Trials of PPO on the harder task: seed 0, dev only.
#
# t1 has temperature 1, 8,192 samples and 128 questions a phase. The other short
# trials change one thing in it. Those with long in the name have 18,432 samples.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
dataset=arithmetic-hard seed=0

declare -A flags=(
    [t1]="--phases 16"
    [batch32]="--phases 16 --batch-size 32"
    [lr5e-4]="--phases 16 --lr 5e-4"
    [kl0]="--phases 16 --kl-coef 0"
    [kl1e-3]="--phases 16 --kl-coef 0.001"
    [lambda95]="--phases 16 --gae-lambda 0.95"
    [valuelr3e-3]="--phases 16 --value-lr 3e-3"
    [epochs4]="--phases 16 --epochs 4"
    [half]="--phases 32 --questions 64"
    [long_lr5e-4]="--phases 36 --lr 5e-4"
    [long_half]="--phases 72 --questions 64"
    [long_quarter]="--phases 144 --questions 32"
    [long_quarter_lr5e-4]="--phases 144 --questions 32 --lr 5e-4"
    [long_quarter_t07]="--phases 144 --questions 32 --temperature 0.7"
    [long_eighth]="--phases 288 --questions 16 --eval-every 16"
)
fine_tune "$work/hard_sft_$seed" $seed
for name in ${VARIANTS:-${!flags[*]}}; do
    is_recorded $name $seed && continue
    run=$work/tuning_$name
    python ppo.py --model "$work/hard_sft_$seed/model" --seed $seed --dataset $dataset --token-budget $budget \
        --temperature 1 ${flags[$name]} --out "$run" --resume
    python evaluate.py --model "$run/model" --dataset $dataset --split dev --samples 16 --seed $seed --resume \
        --out "$run/dev.json" >"$run/dev.txt"
    record "$run" $name $seed
done
