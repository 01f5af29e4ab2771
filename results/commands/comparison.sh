#!/usr/bin/env bash
# PPO with each estimator of the advantages on both tasks, from SFT, with 18,432 samples. Run
# arithmetic.sh and hard.sh before. Expert iteration with as many samples is that of clipping.sh.
#
# *_ppo *_loo *_group_std   144 phases of 128 samples
# *_mc                      Completions are samples too, so its phases have 64 solutions and three
#                           completions of each prefix
# *_ei                      expert iteration again, seed 0 alone, for the seconds
# *_mc_small                *_mc with minibatches of 16
# hard_ppo_more             PPO with twice as many phases
# *_mc_more                 VinePPO with the phases of PPO, so with far more samples
#
# The last three run only if VARIANTS names them. Recorded are seeds 0 to 3, seeds 4 to 6 of
# hard_ppo_more and seed 0 of *_mc_more, all made with TOKEN_BUDGET=1024. Those of seed 0 are of
# one day, each on one core, but *_mc and *_more. One run is recorded that this script leaves out,
# because it needs other code: hard_group_std_penalty divides the KL penalty too.
set -euo pipefail
source "$(dirname "$0")/steps.sh"

start="ppo.py --model SFT --temperature 1"
long="$start --questions 32 --phases 144 --eval-every 16"
declare -A flags=(
    [ppo]="$long"
    [loo]="$long --advantage loo"
    [group_std]="$long --advantage group --group-std"
    [mc]="$start --questions 16 PHASES --batch-size 64 --advantage mc --mc-samples 3"
    [mc_small]="$start --questions 16 PHASES --batch-size 16 --advantage mc --mc-samples 3"
    [ei]="expert_iteration.py --model SFT"
    [ppo_more]="$start --questions 32 --phases 288 --eval-every 32"
    [mc_more]="$long --advantage mc --mc-samples 3"
)
for seed in ${SEEDS:-0 1 2}; do
    for task in ${TASKS:-easy hard}; do
        sft=$work/sft_$seed dataset=arithmetic phases="--phases 72 --eval-every 8" # of mc
        [ $task = easy ] || sft=$work/hard_sft_$seed dataset=arithmetic-hard phases="--phases 33 --eval-every 4"
        for name in ${VARIANTS:-ppo loo group_std mc ei}; do
            is_recorded ${task}_$name $seed && continue
            command=${flags[$name]/SFT/$sft/model}
            command=${command/PHASES/$phases}
            train_and_test "$work/comparison_${task}_${name}_$seed" ${task}_$name $seed \
                $command --dataset $dataset
        done
    done
done
