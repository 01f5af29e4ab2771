#!/usr/bin/env bash
# Trials of PPO on the harder task: seed 0, dev only.
#
# t1 has the defaults, but temperature 1 and 8,192 samples. Each other trial changes one thing in it.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
dataset=arithmetic-hard seed=0

declare -A flags=(
    [t1]="--phases 16"
    [batch32]="--phases 16 --batch-size 32"
    [lr5e-4]="--phases 16 --lr 5e-4"
    [kl0]="--phases 16 --kl-coef 0"
    [half]="--phases 32 --questions 64"
    [epochs4]="--phases 16 --epochs 4"
    [long_lr5e-4]="--phases 36 --lr 5e-4"
)
fine_tune "$work/hard_sft_$seed" $seed
for name in ${VARIANTS:-t1 batch32 lr5e-4 kl0 half epochs4 long_lr5e-4}; do
    is_recorded $name $seed && continue
    run=$work/tuning_$name
    python ppo.py --model "$work/hard_sft_$seed/model" --seed $seed --dataset $dataset --token-budget $budget \
        --temperature 1 ${flags[$name]} --out "$run" --resume
    python evaluate.py --model "$run/model" --dataset $dataset --split dev --samples 16 --seed $seed --resume \
        --out "$run/dev.json" >"$run/dev.txt"
    record "$run" $name $seed
done
