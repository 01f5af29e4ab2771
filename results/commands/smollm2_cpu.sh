#!/usr/bin/env bash
# SmolLM2-135M-Instruct on real data at sizes for two CPU cores, an hour and a half.
#
# It shows that the scripts work on a pretrained model, not how well the methods do:
#     1. SFT on 320 GSM8K problems, 4 epochs.
#     2. One round of expert iteration on SVAMP with a two-shot prompt, K = 4.
#     3. Four phases of PPO on SVAMP from 1., adapters of rank 128, with its peak of memory.
#     4. A reward model on samples of 1. for 64 GSM8K problems, K = 4.
# MODEL: folder or hub name of the model. DATA: folder from which GSM8K and SVAMP load by name. In the
# recorded PPO run the learning rate rose over 4 steps. It now rises over 20.
set -euo pipefail
code="$(cd "$(dirname "$0")/../.." && pwd)"
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} work="$(realpath -m "${WORK:-$code/runs/smollm2_cpu}")"
records="$(realpath -m "${RECORDS:-$code/results}")/smollm2_cpu.jsonl"
cd "${DATA:-.}"
python "$code/sft.py" --model "$model" --dataset gsm8k --limit-train 320 --limit-eval 48 --epochs 4 --batch-size 8 \
    --lr 5e-4 --max-new-tokens 256 --gen-batch-size 48 --token-budget 4096 --out "$work/sft_gsm8k" --resume
python "$code/expert_iteration.py" --model "$model" --base "$model" --dataset svamp --few-shot --limit-train 48 \
    --limit-eval 16 --samples 4 --rounds 1 --epochs 1 --batch-size 8 --lr 5e-5 --max-new-tokens 100 --gen-batch-size 32 \
    --pass-k 0 --token-budget 4096 --out "$work/ei_svamp" --resume
peak() { # file, command ...: run it, and write its peak memory
    python -c 'import json, resource, subprocess, sys
subprocess.run(sys.argv[2:], check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
json.dump({"peak_resident_GiB": round(peak / 2**20, 2)}, open(sys.argv[1], "w"))' "$@"
}
if [ ! -f "$work/ppo_svamp/memory.json" ]; then
    mkdir -p "$work"
    peak "$work/memory.json" python "$code/ppo.py" --model "$work/sft_gsm8k/model" --dataset svamp --phases 4 --lr 1e-4 \
        --questions 16 --samples 4 --epochs 1 --batch-size 16 --max-new-tokens 96 --gen-batch-size 64 --limit-eval 48 \
        --token-budget 2048 --out "$work/ppo_svamp" --resume
    mv "$work/memory.json" "$work/ppo_svamp/"
fi
python "$code/reward_model.py" --model "$work/sft_gsm8k/model" --dataset gsm8k --limit-train 64 --samples 4 --limit-eval 32 \
    --eval-samples 4 --epochs 1 --batch-size 16 --lr 5e-5 --max-new-tokens 160 --gen-batch-size 64 --token-budget 4096 \
    --out "$work/orm_gsm8k" --resume
python "$code/results/gsm8k/equations.py" --out "$work/equations"
python "$code/sft.py" --model "$model" --dataset "$work/equations" --limit-train 32 --limit-eval 4 --epochs 1 --lr 3e-4 \
    --batch-size 8 --max-new-tokens 64 --out "$work/sft_equations" --resume
# Seconds per step and peak memory. glibc would keep freed memory for itself.
export MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536
for rank in 0 16; do
    run=$work/memory_all && [ $rank = 0 ] || run=$work/memory_adapters
    peak "$work/memory.json" python "$code/sft.py" --model "$model" --dataset gsm8k --limit-train 20 --batch-size 10 \
        --epochs 1 --limit-eval 2 --max-new-tokens 8 --lr 5e-4 --token-budget 512 --lora-rank $rank --out "$run" --resume
    mv "$work/memory.json" "$run/"
    python "$code/results/record.py" "$run" "$records" "$(basename "$run")" 0 --work "$work"
done
for run in sft_gsm8k ei_svamp ppo_svamp orm_gsm8k sft_equations; do
    python "$code/results/record.py" "$work/$run" "$records" $run 0 --work "$work"
done
