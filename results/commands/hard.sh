#!/usr/bin/env bash
# The harder task, problems of 4 to 6 steps, where no method is near its ceiling.
#
# phases36       PPO with as many samples as expert iteration
# phases36_t1    the same at temperature 1, as expert iteration samples
# phases72       PPO with as many samples as rounds4
# backtracking, plr   PPO with a curriculum
# rounds3, rounds4    expert iteration with more rounds. The first two are those of ei
# continue       expert iteration that continues from the last policy
# k16_once       four times the samples of ei, and as many updates
# k16_max10      the same with at most 10 solutions of a question (ReST-EM, VinePPO)
# *_dedup        of the solutions with the same sequence of operations only one is kept
# long_dedup     control of ei_dedup with more updates than ei
# k16_round      the first round of K = 16 alone
#
# Recorded are four seeds of most, seven of sft, ei and k16_once, seeds 4 to 6 of rounds4 and
# phases72, seeds 0 to 2 of k16_max10 and 0 and 1 of phases36_t1 (TOKEN_BUDGET=1024), and seed 0 of
# k16_round.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
dataset=arithmetic-hard

declare -A flags=(
    [sft]="sft.py"
    [ei]="expert_iteration.py --model SFT"
    [ppo]="ppo.py --model SFT"
    [phases36]="ppo.py --model SFT --phases 36"
    [phases36_t1]="ppo.py --model SFT --phases 36 --temperature 1"
    [backtracking]="ppo.py --model SFT --curriculum backtracking"
    [plr]="ppo.py --model SFT --curriculum plr"
    [phases72]="ppo.py --model SFT --phases 72"
    [rounds3]="expert_iteration.py --model SFT --rounds 3"
    [rounds4]="expert_iteration.py --model SFT --rounds 4"
    [continue]="expert_iteration.py --model SFT --continue"
    [k16_once]="expert_iteration.py --model SFT --samples 16 --epochs 1"
    [k16_max10]="expert_iteration.py --model SFT --samples 16 --epochs 1 --max-per-question 10"
    [ei_dedup]="expert_iteration.py --model SFT --deduplicate"
    [long_dedup]="expert_iteration.py --model SFT --deduplicate --epochs 12"
    [k16_dedup]="expert_iteration.py --model SFT --deduplicate --samples 16"
    [k16_round]="expert_iteration.py --model SFT --samples 16 --rounds 1"
)
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-sft ei ppo phases36 phases36_t1 phases72 backtracking plr rounds3 rounds4 continue k16_once k16_max10 ei_dedup long_dedup k16_dedup k16_round}; do
        is_recorded $name $seed && continue
        run=$work/hard_${name}_$seed ei=$work/hard_ei_$seed
        if [[ $name = rounds? ]] && [ -d "$ei/model" ] && [ ! -e "$run" ]; then # its first two rounds are those of ei
            rm -rf "$run.part" && cp -r "$ei" "$run.part" && rm -f "$run.part"/test.* && mv "$run.part" "$run"
        fi
        train_and_test "$run" $name $seed ${flags[$name]//SFT/$work/hard_sft_$seed/model} --dataset $dataset
    done
done
python results/table.py "$records"
