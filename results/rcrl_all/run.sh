#!/usr/bin/env bash
# Return-conditioned RL that counts a solution as often as it was sampled, as expert iteration does by default, where
# results/rcrl takes one for each sequence of operations: 16 samples per training question from the policy of expert iteration
# from the base (results/arithmetic/run.sh, ei_base), of which 10,000 right ones, with 1,000 wrong ones and labels (ratio10) or
# alone and without (control); seed 0 was run. Restartable.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
declare -A flags=([ratio10]="--ratio 10 --train-size 11000" [control]="--ratio 1e9 --train-size 10000 --labels none")
for seed in ${SEEDS:-0}; do
    for name in ${VARIANTS:-ratio10 control}; do
        run=$work/rcrl_all_${name}_$seed
        [ -f "$here/${name}_$seed/test.json" ] && continue
        python rcrl.py --seed $seed --token-budget $budget --model "$work/ei_base_$seed/model" --samples 16 --no-deduplicate \
            ${flags[$name]} --out "$run" --resume
        test_and_record_labels "$run" ${name}_$seed $seed
    done
done
python results/table.py "$here"
