#!/usr/bin/env bash
# The harder variant of the task, problems of 4 to 6 steps, where no method is at its ceiling: SFT, expert iteration, PPO;
# PPO with as many samples as expert iteration (phases36) or with a curriculum (backtracking, plr); and expert iteration that
# trains on from the last policy (continue), or with four times the samples and as many updates (k16_once), or with more
# rounds (rounds3, rounds4), the last beside PPO with as many samples (phases72); three seeds (recorded are four of most, seven
# of sft, ei and k16_once; rounds4 and phases72 are seeds 4 to 6). *_dedup: of the right solutions of a question with the same
# sequence of operations one is kept; long_dedup is the control with more updates than ei makes, k16_round the first round of
# K = 16 alone (seed 0 was run). Restartable: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
dataset=arithmetic-hard

declare -A flags=(
    [sft]="sft.py"
    [ei]="expert_iteration.py --model SFT"
    [ppo]="ppo.py --model SFT"
    [phases36]="ppo.py --model SFT --phases 36"
    [backtracking]="ppo.py --model SFT --curriculum backtracking"
    [plr]="ppo.py --model SFT --curriculum plr"
    [phases72]="ppo.py --model SFT --phases 72"
    [rounds3]="expert_iteration.py --model SFT --rounds 3"
    [rounds4]="expert_iteration.py --model SFT --rounds 4"
    [continue]="expert_iteration.py --model SFT --continue"
    [k16_once]="expert_iteration.py --model SFT --samples 16 --epochs 1"
    [ei_dedup]="expert_iteration.py --model SFT --deduplicate"
    [long_dedup]="expert_iteration.py --model SFT --deduplicate --epochs 12"
    [k16_dedup]="expert_iteration.py --model SFT --deduplicate --samples 16"
    [k16_round]="expert_iteration.py --model SFT --samples 16 --rounds 1"
)
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-sft ei ppo phases36 phases72 backtracking plr rounds3 rounds4 continue k16_once ei_dedup long_dedup k16_dedup k16_round}; do
        is_recorded $name $seed && continue
        run=$work/hard_${name}_$seed ei=$work/hard_ei_$seed
        if [[ $name = rounds? ]] && [ -d "$ei/model" ] && [ ! -e "$run" ]; then # its first two rounds are those of ei
            rm -rf "$run.part" && cp -r "$ei" "$run.part" && rm -f "$run.part"/test.* && mv "$run.part" "$run"
        fi
        train_and_test "$run" $name $seed ${flags[$name]//SFT/$work/hard_sft_$seed/model} --dataset $dataset
    done
done
python results/table.py "$records"
