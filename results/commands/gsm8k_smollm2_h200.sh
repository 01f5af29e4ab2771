#!/usr/bin/env bash
# SmolLM2-135M-Instruct on GSM8K, on one H200.
#
# SFT at three learning rates, of which dev accuracy chose 1e-3, and its test with 96 samples. One
# round of expert iteration with K = 4 and its test with 32 samples. MODEL and DATA are as in
# gsm8k_smollm2.sh. The runs shared the GPU, so their seconds mean little. The files of expert
# iteration and of both tests were lost with the machine. Their records, added by hand, are what the
# commands printed.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${WORK:-runs/results}/gsm8k_smollm2 how="--dataset ${DATA:-gsm8k} --max-new-tokens 300 --resume" model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
fit="--epochs 4 --batch-size 64"
for lr in 1e-4 3e-4 1e-3; do
    python sft.py --model "$model" $how $fit --lr $lr --gen-batch-size 1024 --out "$run/sft_$lr"
done
sft=$run/sft_1e-3/model
python evaluate.py --model "$sft" $how --samples 96 --gen-batch-size 4096 --out "$run/sft_test.json"
python expert_iteration.py --model "$sft" --base "$model" $how $fit --lr 1e-3 --samples 4 --rounds 1 --gen-batch-size 2048 --pass-k 4 --out "$run/ei"
python evaluate.py --model "$run/ei/model" $how --samples 32 --gen-batch-size 4096 --out "$run/ei_test.json"
