#!/usr/bin/env bash
# Return-conditioned RL: mixtures that differ in the ratio of correct to incorrect and in the labels.
#
# 16 samples per training question from the policy of de-duplicated expert iteration. A mixture has
# 3,200 solutions, or as many as there are distinct correct ones for. Each is tested with [GOOD], with
# [BAD] and without a label. The controls have no labels:
#     control         all distinct correct solutions, 3,200 at most, as de-duplicated expert iteration
#     control_1600    the 1,600 correct ones of ratio1
#     control_mixed   all of ratio1
# Seeds 3 to 5 have the ratios only. The last two draw other samples from the policy of seed 0. Run
# arithmetic.sh first, for seed 3 too. An earlier version completed 200 prefixes of ratio1 64 more
# times, to see how often 8 completions give the same label (label_agreement, q_difference).
set -euo pipefail
source "$(dirname "$0")/steps.sh"
declare -A flags=(
    [ratio1]="--ratio 1"
    [ratio10]="--ratio 10"
    [ratio100]="--ratio 100"
    [outcome1]="--ratio 1 --labels outcome"
    [control]="--ratio 1e9 --labels none"
    [control_1600]="--ratio 1e9 --labels none --train-size 1600"
    [control_mixed]="--ratio 1 --labels none"
)
for seed in ${SEEDS:-0 1 2 3 4 5}; do
    names="ratio1 ratio10 ratio100" policy=ei_dedup_0
    [ $seed -gt 3 ] || policy=ei_dedup_$seed
    [ $seed -gt 2 ] || names="$names outcome1 control control_1600 control_mixed"
    for name in ${VARIANTS:-$names}; do
        run=$work/rcrl_${name}_$seed samples=$work/rcrl_ratio1_$seed/samples/train.jsonl
        is_recorded $name $seed && continue
        [ $name = ratio1 ] || extra="--train-samples $samples"
        python rcrl.py --seed $seed --token-budget $budget --model "$work/$policy/model" --samples 16 \
            --train-size 3200 ${flags[$name]} ${extra:-} --out "$run" --resume
        extra=
        test_labels_and_record "$run" $name $seed
    done
done
python results/table.py "$records"
