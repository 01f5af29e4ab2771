#!/usr/bin/env bash
# Return-conditioned RL on the harder task. Run hard.sh first.
#
# ratio10: 16 samples per training question from the policy of expert iteration. Of these ten distinct
# correct solutions for each incorrect one, 3,200 at most, with a label per line. It is tested with
# [GOOD], with [BAD] and without a label. control: as many distinct correct solutions without labels.
#
# again, monotone, any_monotone: ratio10 once more (seeds 0 to 2, TOKEN_BUDGET=1024), and the labels of
# GLoRe on the same samples and completions.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
dataset=arithmetic-hard
for seed in ${SEEDS:-0 1 2}; do
    declare -A flags=(
        [ratio10]="--ratio 10"
        [control]="--ratio 1e9 --labels none --train-samples $work/hard_rcrl_ratio10_$seed/samples/train.jsonl"
        [again]="--ratio 10"
        [monotone]="--ratio 10 --monotone --train-samples $work/hard_rcrl_again_$seed/samples/train.jsonl"
        [any_monotone]="--ratio 10 --label-rule any --monotone --train-samples $work/hard_rcrl_again_$seed/samples/train.jsonl"
    )
    for name in ${VARIANTS:-ratio10 control}; do
        run=$work/hard_rcrl_${name}_$seed
        is_recorded $name $seed && continue
        python rcrl.py --dataset $dataset --seed $seed --token-budget $budget --model "$work/hard_ei_$seed/model" --samples 16 \
            --train-size 3200 ${flags[$name]} --out "$run" --resume
        test_labels_and_record "$run" $name $seed
    done
done
python results/table.py "$records"
