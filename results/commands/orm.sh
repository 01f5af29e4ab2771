#!/usr/bin/env bash
# Outcome reward models, trained on the samples of the SFT policy. Run arithmetic.sh first.
#
# orm_on_sft reranks test samples of that policy, 32 per problem, orm_on_ppo those of PPO, of which the
# model saw none. `orm.sh train SEED` only trains. Recorded as orm_again is the same training with a
# later version of the sampler. It scored the records of rerank.sh for ei.
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
