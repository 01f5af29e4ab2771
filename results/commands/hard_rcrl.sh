#!/usr/bin/env bash
# Return-conditioned RL on the harder task. Run hard.sh first.
#
# ratio10: 16 samples per training question from the policy of expert iteration. Of these ten distinct
# correct solutions for each incorrect one, 3,200 at most, with a label per line. It is tested with
# [GOOD], with [BAD] and without a label. control: as many distinct correct solutions without labels.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
dataset=arithmetic-hard
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-ratio10 control}; do
        run=$work/hard_rcrl_${name}_$seed
        is_recorded $name $seed && continue
        flags="--ratio 10" && [ $name = ratio10 ] ||
            flags="--ratio 1e9 --labels none --train-samples $work/hard_rcrl_ratio10_$seed/samples/train.jsonl"
        python rcrl.py --dataset $dataset --seed $seed --token-budget $budget --model "$work/hard_ei_$seed/model" --samples 16 \
            --train-size 3200 $flags --out "$run" --resume
        test_labels_and_record "$run" $name $seed
    done
done
python results/table.py "$records"
