#!/usr/bin/env bash
# Return-conditioned RL that counts a solution as often as it was sampled, as expert iteration does by default, where
# results/rcrl and results/hard_rcrl take one for each sequence of operations: 16 samples per training question, of which 10,000
# right ones, with 1,000 wrong ones and labels (ratio10) or alone and without (control). On the easy task from the policy of
# expert iteration from the base (results/arithmetic/run.sh, ei_base; seed 0 was run), on the harder one from that of expert
# iteration from SFT (results/hard/run.sh, ei). Restartable.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
declare -A flags=([ratio10]="--ratio 10 --train-size 11000" [control]="--ratio 1e9 --train-size 10000 --labels none")
for name in ${VARIANTS:-ratio10 control hard_ratio10 hard_control}; do
    mixture=${name#hard_} seeds=${SEEDS:-0} policy=ei_base dataset=arithmetic
    if [ $mixture != $name ]; then seeds=${SEEDS:-0 1 2} policy=hard_ei dataset=arithmetic-hard; fi
    for seed in $seeds; do
        run=$work/rcrl_all_${name}_$seed
        [ -f "$here/${name}_$seed/test.json" ] && continue
        again= # the control of the harder task reads the other's samples back
        if [ $name = hard_control ]; then again="--train-samples $work/rcrl_all_hard_ratio10_$seed/samples/train.jsonl"; fi
        python rcrl.py --dataset $dataset --seed $seed --token-budget $budget --model "$work/${policy}_$seed/model" --samples 16 \
            --no-deduplicate ${flags[$mixture]} $again --out "$run" --resume
        test_and_record_labels "$run" ${name}_$seed $seed
    done
done
python results/table.py "$here"
