#!/usr/bin/env bash
# SmolLM2-135M-Instruct on GSM8K, on one H100 in 22 minutes.
#
# SFT, one round of expert iteration with K = 8, PPO at two learning rates, a reward model on the
# samples of that round, reranking with it, and RCRL on a part of these samples. RCRL was not tested:
# the time was up. MODEL: folder of the model (its 4-bit weights for llama.cpp, converted back to
# bfloat16). DATA: folder with train.jsonl and test.jsonl of GSM8K. greedy_right.json has the numbers
# of the test problems that the greedy solutions got right. Up to three runs shared the GPU, so most
# seconds mean little.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
run=$work/gsm8k_smollm2 how="--dataset ${DATA:-gsm8k} --max-new-tokens 300 --resume" model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
fit="--epochs 4 --batch-size 64 --lr 1e-3" small="--token-budget 8192"

tested() { # policy, samples: without a reward model, which may not be there yet
    python evaluate.py --model "$run/$1/model" $how --samples $2 --gen-batch-size 2048 --out "$run/$1/test.json"
}

python sft.py --model "$model" $how $fit --gen-batch-size 1024 --out "$run/sft"
sft=$run/sft/model
python expert_iteration.py --model "$sft" --base "$model" $how $fit $small --samples 8 --rounds 1 --gen-batch-size 2048 --pass-k 4 --out "$run/ei"
ppo="--lora-rank 0 --value-lr 1e-4 --questions 256 --samples 4 --epochs 2 --batch-size 128 --gen-batch-size 1024"
python ppo.py --model "$sft" $how $small $ppo --lr 1e-5 --phases 16 --eval-every 4 --out "$run/ppo"
python ppo.py --model "$sft" $how --token-budget 16384 $ppo --lr 1e-4 --phases 7 --eval-every 7 --out "$run/ppo_1e-4"
samples=$run/ei/samples/round_1.jsonl
python reward_model.py --model "$sft" $how $small --train-samples "$samples" --epochs 1 --lr 1e-4 --batch-size 64 --gen-batch-size 2048 --out "$run/orm"
python rcrl.py --model "$sft" --base "$model" $how $fit $small --train-samples "$samples" --train-size 6000 --gen-batch-size 2048 --out "$run/rcrl"
for policy in sft ei ppo; do tested $policy 96; done
tested ppo_1e-4 32
for policy in sft ei; do
    python evaluate.py --model "$run/$policy/model" $how --samples 96 --gen-batch-size 2048 --orm "$run/orm/model" --out "$run/$policy/test.json"
done
for name in sft ei ppo ppo_1e-4; do
    python -c 'import json, sys
right = (row["problem"] for row in map(json.loads, open(sys.argv[1])) if row["correct"])
print(sorted(int(name.rpartition("/")[2]) for name in right))' "$run/$name/test.greedy.jsonl" >"$run/$name/greedy_right.json"
done
for name in sft ei ppo ppo_1e-4 orm rcrl; do
    record "$run/$name" $name 0
done
