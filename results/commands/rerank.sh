#!/usr/bin/env bash
# Three policies with the reward model of orm.sh, which was trained on samples of SFT.
#
# maj@32, rerank@32 and pass@32 of the same 32 samples per test problem, and the greedy maj@1. orm.sh
# has SFT and PPO. Run arithmetic.sh, orm.sh and rcrl.sh first.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    for name in ${POLICIES:-ei ei_dedup rcrl_ratio10}; do
        is_recorded $name $seed && continue
        run=$work/rerank_${name}_$seed
        mkdir -p "$run"
        python evaluate.py --model "$work/${name}_$seed/model" --orm "$work/orm_$seed/model" --samples 32 --seed $seed --resume \
            --out "$run/test.json" >"$run/test.txt"
        record "$run" $name $seed
    done
done
python results/table.py "$records"
shopt -s nullglob
slips=$(dirname "$records")/slips.txt
touch "$slips"
# The lines of runs that were measured now are new, the others are kept.
python results/slips.py "$work"/{orm_on_sft,orm_on_ppo,rerank_ei,rerank_ei_dedup,rerank_rcrl_ratio10}_[0-9]/test.samples.jsonl |
    sed "s|^$work/|runs/results/|" | sort -u -t: -k1,1 - "$slips" >"$slips.part"
mv "$slips.part" "$slips"
