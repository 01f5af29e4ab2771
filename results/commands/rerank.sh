#!/usr/bin/env bash
# The policies of expert iteration, as it is by default and de-duplicated, and of RCRL with the reward model of results/orm,
# which was trained on the SFT policy's samples: maj@32, rerank@32 and pass@32 of the same 32 samples per test problem, and
# the greedy maj@1, three seeds. For SFT and PPO they are in results/orm. The policies come from results/arithmetic and
# results/rcrl. Restartable.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
for seed in ${SEEDS:-0 1 2}; do
    for name in ${POLICIES:-ei ei_dedup rcrl_ratio10}; do
        [ -f "$here/${name}_$seed/test.json" ] && continue
        mkdir -p "$work/rerank_${name}_$seed"
        python evaluate.py --model "$work/${name}_$seed/model" --orm "$work/orm_$seed/model" --samples 32 --seed $seed --resume \
            --out "$work/rerank_${name}_$seed/test.json" >"$work/rerank_${name}_$seed/test.txt"
        keep ${name}_$seed "$work/rerank_${name}_$seed/test.json"
    done
done
python results/table.py "$here"
shopt -s nullglob
# of the runs measured now the new line, of the others the recorded one
python results/rerank/slips.py "$work"/{orm_on_sft,orm_on_ppo,rerank_ei,rerank_ei_dedup,rerank_rcrl_ratio10}_[0-9]/test.samples.jsonl |
    sed "s|^$work/|runs/results/|" | sort -u -t: -k1,1 - "$here/slips.txt" >"$here/unfinished"
mv "$here/unfinished" "$here/slips.txt"
