#!/usr/bin/env bash
# Return-conditioned RL that counts a solution as often as it was sampled, as expert iteration does.
#
# rcrl.sh and hard_rcrl.sh take one solution for each sequence of operations. Here are 16 samples per
# training question: 10,000 correct ones with 1,000 incorrect ones and labels (ratio10), or alone
# without labels (control). On the easy task from ei_base of arithmetic.sh (recorded: seed 0). On the
# harder task from expert iteration that is run here (hard_policy). VARIANTS= or HARD_SEEDS= leaves a
# task out.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
declare -A flags=([ratio10]="--ratio 10 --train-size 11000" [control]="--ratio 1e9 --train-size 10000 --labels none")

mixture() { # its kind, name of the record, seed, folder of the policy, more flags ...
    local run=$work/rcrl_all_$2_$3
    python rcrl.py --dataset $dataset --seed $3 --token-budget $budget --model "$4/model" --samples 16 --no-deduplicate \
        ${flags[$1]} "${@:5}" --out "$run" --resume
    test_labels_and_record "$run" $2 $3
}

for name in ${VARIANTS-ratio10 control}; do
    for seed in ${SEEDS:-0}; do
        is_recorded $name $seed || mixture $name $name $seed "$work/ei_base_$seed"
    done
done
dataset=arithmetic-hard
for seed in ${HARD_SEEDS-0 1 2}; do
    sft=$work/hard_sft_$seed policy=$work/rcrl_all_hard_policy_$seed samples=$work/rcrl_all_hard_ratio10_$seed/samples/train.jsonl
    if ! is_recorded hard_policy $seed; then
        fine_tune "$sft" $seed
        train_and_test "$policy" hard_policy $seed expert_iteration.py --model "$sft/model" --dataset $dataset
    fi
    is_recorded hard_ratio10 $seed || mixture ratio10 hard_ratio10 $seed "$policy"
    is_recorded hard_control $seed || mixture control hard_control $seed "$policy" --train-samples "$samples"
done
python results/table.py "$records"
