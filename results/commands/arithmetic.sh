#!/usr/bin/env bash
# The main runs on the embedded task: base, SFT, expert iteration and PPO, from SFT and from the base.
#
# sft_more is a control: 840 updates on the 24 written solutions alone. *_dedup: of the correct
# solutions of a question with the same sequence of operations only one is kept. Other experiments
# start from the policies of this one.
set -euo pipefail
source "$(dirname "$0")/steps.sh"

declare -A flags=(
    [sft]="sft.py"
    [ei]="expert_iteration.py --model SFT"
    [ei_dedup]="expert_iteration.py --model SFT --deduplicate"
    [ei_base]="expert_iteration.py --model tiny --samples 8 --epochs 3"
    [ei_base_dedup]="expert_iteration.py --model tiny --samples 8 --epochs 3 --deduplicate"
    [ppo]="ppo.py --model SFT"
    [ppo_base]="ppo.py --model tiny"
    [sft_more]="sft.py --batch-size 1 --epochs 35" # control: 840 updates on the 24 written solutions alone
)
is_recorded base 0 || { mkdir -p "$work/base" && test_and_record "$work/base" base 0 tiny; }
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-sft ei ei_dedup ei_base ei_base_dedup ppo ppo_base sft_more}; do
        is_recorded $name $seed && continue
        train_and_test "$work/${name}_$seed" $name $seed ${flags[$name]//SFT/$work/sft_$seed/model}
    done
done
python results/table.py "$records"
