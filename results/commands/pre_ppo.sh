#!/usr/bin/env bash
# Pre-PPO prompt selection: PPO from SFT on 230 training questions and a part of the 2,074 others.
#
# original   the 230 alone
# all        with all others
# lowest     with the tenth that the initial policy scores lowest (lowest20, lowest50: fifth, half)
# floor      with the tenth scored lowest among those solved at least once in 8 samples
# frontier   with the tenth that it solves nearest to half of the time
# random     with a random tenth
# small_*    the scores are those of a model of 0.13 million parameters (tiny/make.py, two minutes)
#
# Everything else is the same: 12 phases of 64 questions with 4 samples, 3,072 in all. Run
# arithmetic.sh first.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
declare -A flags=(
    [original]="--limit-train 230"
    [all]=""
    [lowest]="--limit-train 230 --select lowest"
    [floor]="--limit-train 230 --select floor"
    [frontier]="--limit-train 230 --select frontier"
    [random]="--limit-train 230 --select random"
    [lowest20]="--limit-train 230 --select lowest --select-fraction 0.2"
    [lowest50]="--limit-train 230 --select lowest --select-fraction 0.5"
    [small_lowest]="--limit-train 230 --select lowest"
    [small_frontier]="--limit-train 230 --select frontier"
)

score() { # policy, seed: scores of the training questions, in $work/scores_POLICY_SEED.samples.jsonl
    python evaluate.py --model "$work/$1_$2/model" --split train --samples 8 --seed "$2" --resume --out "$work/scores_$1_$2.json"
}

for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-original all lowest floor frontier random lowest20 lowest50 small_lowest small_frontier}; do
        is_recorded $name $seed && continue
        policy=sft scores=
        if [[ $name = small_* ]]; then
            policy=small_sft
            [ -f "$work/small/config.json" ] || python tiny/make.py --hidden-size 64 --layers 2 --out "$work/small"
            python sft.py --seed $seed --token-budget $budget --model "$work/small" --out "$work/small_sft_$seed" --resume
        fi
        if [[ $name != original && $name != all ]]; then
            score $policy $seed
            scores="--scores $work/scores_${policy}_$seed.samples.jsonl"
        fi
        run=$work/select_${name}_$seed
        train_and_test "$run" $name $seed ppo.py --phases 12 --questions 64 --batch-size 64 \
            --model "$work/sft_$seed/model" ${flags[$name]} $scores
    done
done
python results/table.py "$records"
