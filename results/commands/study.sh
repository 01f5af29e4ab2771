#!/usr/bin/env bash
# What the verdicts on the claims rest on, one seed after the other, 2.1 hours each on two cores.
#
#     SEEDS=3 TOKEN_BUDGET=1024 RECORDS=runs/records bash results/commands/study.sh
#
# Two jobs of one thread run at the same time. results/README.md says how long each part takes. Side
# studies are left out, though the tables have some: run the other scripts without VARIANTS for them.
# What the jobs print is in $WORK/study_1.log and study_2.log, their times in study.log.
set -euo pipefail
cd "$(dirname "$0")/../.."
export WORK=${WORK:-runs/results} OMP_NUM_THREADS=1
mkdir -p "$WORK"

part() { # NAME=VALUE of the environment ..., experiment
    local began=$SECONDS
    env "${@:1:$#-1}" bash "results/commands/${!#}.sh"
    echo "$* $((SECONDS - began)) s" >>"$WORK/study.log"
}

on_core() { # number, command
    if command -v taskset >/dev/null; then taskset -cp "$1" $BASHPID >/dev/null; fi
    "${@:2}" >>"$WORK/study_$(($1 + 1)).log" 2>&1
}

easy() { # seed
    part SEEDS=$1 VARIANTS="sft ei ei_dedup ei_base ppo ppo_base sft_more" arithmetic
    part SEEDS=$1 orm
    part SEEDS=$1 VARIANTS="ratio1 ratio10 ratio100" rcrl
    part SEEDS=$1 rerank
    part SEEDS=$1 VARIANTS="kl0 attached dense orm orm_dense" ppo_variants
}

hard_and_epochs() { # seed
    part SEEDS=$1 VARIANTS="sft ei k16_once continue rounds3" hard
    part SEEDS=$1 VARIANTS=ratio10 hard_rcrl
    part SEEDS=$1 VARIANTS=phases36 hard
    part SEEDS=$1 ppo_longer # from the other job's SFT, which is done by now
    part SEEDS=$1 sft_epochs
}

for seed in ${SEEDS:-0 1 2}; do
    on_core 0 easy $seed &
    first=$!
    on_core 1 hard_and_epochs $seed &
    wait $first
    wait $!
done
