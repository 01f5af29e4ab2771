#!/usr/bin/env bash
# SmolLM2-135M-Instruct on GSM8K on one GPU: SFT at three learning rates, of which dev accuracy chose 1e-3; SFT's test with 96
# samples; one round of expert iteration with K = 4 and its test with 32. MODEL and DATA are folders: the model (its 4-bit
# weights as published for llama.cpp, made bfloat16 again), and train.jsonl and test.jsonl of GSM8K. Run once, on an H200, the
# three SFT runs beside each other, and expert iteration beside SFT's test: their seconds say little. Recorded are settings and
# metrics of SFT and what the other commands printed; their JSON files were lost with the machine.
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
