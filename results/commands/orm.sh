#!/usr/bin/env bash
# Outcome reward models on the embedded task, three seeds: trained on the samples of the SFT policy; reranking that policy's
# test samples (32 each) and those of another policy (PPO), of which it saw none.
# The policies come from results/commands/arithmetic.sh. `orm.sh train SEED` only trains the first. orm_again are the records of the
# same training with a later version of the sampling; results/rerank/ei is scored with it. Restartable.
set -euo pipefail
source "$(dirname "$0")/steps.sh"

train() { # name, student, seed
    python reward_model.py --seed "$3" --token-budget $budget --model "$work/$2_$3/model" --out "$work/$1_$3" --resume
    record "$work/$1_$3" $1 $3
}

rerank() { # orm, policy, seed
    is_recorded $1_on_$2 $3 && return
    local run=$work/$1_on_$2_$3
    mkdir -p "$run"
    python evaluate.py --model "$work/$2_$3/model" --orm "$work/$1_$3/model" --samples 32 --seed "$3" --resume \
        --out "$run/test.json" >"$run/test.txt"
    record "$run" $1_on_$2 $3
}

if [ "${1:-}" = train ]; then
    train orm sft "$2"
    exit
fi
for seed in ${SEEDS:-0 1 2}; do
    train orm sft $seed # returns at once where it is done
    rerank orm sft $seed
    rerank orm ppo $seed
done
