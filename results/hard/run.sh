#!/usr/bin/env bash
# The harder variant of the task, problems of 4 to 6 steps, where expert iteration is not at its ceiling: SFT, expert iteration
# with K = 4 (ei) and K = 16 samples per question and round, the same training on from the last policy (continue), PPO; three
# seeds. Restartable: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
dataset=arithmetic-hard

declare -A flags=(
    [sft]="sft.py"
    [ei]="expert_iteration.py --model SFT"
    [continue]="expert_iteration.py --model SFT --continue"
    [k16]="expert_iteration.py --model SFT --samples 16"
    [ppo]="ppo.py --model SFT"
    # every right sample counts, not one of each sequence of operations; its control, with as many updates; and both with
    # K = 16, the first round alone
    [all]="expert_iteration.py --model SFT --no-deduplicate"
    [ei_long]="expert_iteration.py --model SFT --epochs 12"
    [k16_all]="expert_iteration.py --model SFT --no-deduplicate --samples 16 --rounds 1"
    [k16_long]="expert_iteration.py --model SFT --samples 16 --rounds 1 --epochs 12"
)
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-sft ei continue k16 ppo all ei_long k16_all k16_long}; do
        [ -f "$here/${name}_$seed/test.json" ] && continue
        train_and_test "$work/hard_${name}_$seed" ${name}_$seed $seed ${flags[$name]//SFT/$work/hard_sft_$seed/model} --dataset $dataset
    done
done
python results/table.py "$here"
