#!/usr/bin/env bash
# SFT on the 24 written solutions for 2, 4 and 16 epochs, each with its own learning rate schedule.
#
# Ten seeds, and pass@8 on dev after every epoch. What counts is the last epoch, not the best one.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for epochs in ${EPOCHS:-2 4 16}; do
    for seed in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do
        run=$work/sft_epochs${epochs}_$seed
        is_recorded epochs$epochs $seed && continue
        python sft.py --seed $seed --token-budget $budget --epochs $epochs --samples 8 --out "$run" --resume
        record "$run" epochs$epochs $seed
    done
done
