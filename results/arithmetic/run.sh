#!/usr/bin/env bash
# The recorded runs on the embedded task: base, SFT, more SFT, expert iteration and PPO from SFT and from the base; three
# seeds. About an hour on two cores. Restartable: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=results/arithmetic work=${WORK:-runs/results}

evaluate() { # name, model
    python evaluate.py --model "$2" --samples 16 --seed "$seed" --resume --out "$work/$1/test.json" >"$work/$1/test.txt"
    mkdir -p "$here/$1" && cp "$work/$1/test.json" "$here/$1/"
    for file in args.json metrics.jsonl; do [ ! -f "$work/$1/$file" ] || cp "$work/$1/$file" "$here/$1/"; done
}

seed=0 && mkdir -p "$work/base" && evaluate base tiny
for seed in 0 1 2; do
    python sft.py --seed $seed --out "$work/sft_$seed" --resume
    evaluate sft_$seed "$work/sft_$seed/model"
    python expert_iteration.py --seed $seed --model "$work/sft_$seed/model" --out "$work/ei_$seed" --resume
    evaluate ei_$seed "$work/ei_$seed/model"
    python expert_iteration.py --seed $seed --model tiny --samples 8 --epochs 3 --out "$work/ei_base_$seed" --resume
    evaluate ei_base_$seed "$work/ei_base_$seed/model"
    python ppo.py --seed $seed --model "$work/sft_$seed/model" --out "$work/ppo_$seed" --resume
    evaluate ppo_$seed "$work/ppo_$seed/model"
    python ppo.py --seed $seed --model tiny --out "$work/ppo_base_$seed" --resume
    evaluate ppo_base_$seed "$work/ppo_base_$seed/model"
    # control: 840 updates on the 24 written solutions alone
    python sft.py --seed $seed --batch-size 1 --epochs 35 --out "$work/sft_more_$seed" --resume
    evaluate sft_more_$seed "$work/sft_more_$seed/model"
done
python results/table.py "$here"
