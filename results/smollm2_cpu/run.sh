#!/usr/bin/env bash
# SmolLM2-135M-Instruct on real data, at sizes that two cores allow (about 75 minutes): that the scripts work on a
# pretrained model, not how well the method does. MODEL: its folder or hub name. DATA: where GSM8K and SVAMP load by name.
# 1. SFT on 320 GSM8K problems, 4 epochs; 2. one round of expert iteration on SVAMP with a two-shot prompt, K = 4.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)" code="$(cd "$(dirname "$0")/../.." && pwd)"
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} work="$(realpath "${WORK:-$code/runs/smollm2_cpu}")"
cd "${DATA:-.}"
python "$code/sft.py" --model "$model" --dataset gsm8k --limit-train 320 --limit-eval 48 --epochs 4 --batch-size 8 \
    --lr 5e-4 --max-new-tokens 256 --rows 48 --token-budget 4096 --out "$work/sft_gsm8k" --resume
python "$code/expert_iteration.py" --model "$model" --base "$model" --dataset svamp --few-shot --limit-train 48 \
    --limit-eval 16 --samples 4 --rounds 1 --epochs 1 --batch-size 8 --lr 5e-5 --max-new-tokens 100 --rows 32 \
    --pass-k 0 --token-budget 4096 --out "$work/ei_svamp" --resume
for run in sft_gsm8k ei_svamp; do
    mkdir -p "$here/$run" && cp "$work/$run/metrics.jsonl" "$work/$run/args.json" "$here/$run/"
done
