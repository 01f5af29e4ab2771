#!/usr/bin/env bash
# The paper's table for a model from the hub, on one GPU. Not yet run at full size.
#
#     MODEL=HuggingFaceTB/SmolLM2-135M bash results/commands/gsm8k.sh
#
# SFT, expert iteration, PPO and RCRL on GSM8K with the commands of README.md, and an outcome reward
# model that was trained on samples of SFT. It scores the test samples of every policy.
#
# Sizes, with their defaults:
#     K (96), N (96)               samples per training and test problem
#     RCRL_K (32)                  samples per training problem of RCRL
#     PHASES (250)                 of PPO
#     QUESTIONS (256)              per phase of PPO
#     LIMIT_TRAIN, LIMIT_EVAL      number of problems
#     MAX_NEW_TOKENS (512)         of a solution
#     ROWS (1024)                  batch slots of generation
#     TOKEN_BUDGET (32768)         tokens of a micro-batch
#     EPOCHS (4), LR (2e-5), BATCH (128)   of SFT, expert iteration and RCRL
#     PPO_LR (1e-6), ORM_LR (1e-5)
#     SEEDS (0)
# For SmolLM2-135M LR=1e-3 BATCH=64 was the best of three in SFT. results/gsm8k_smollm2.jsonl has PPO
# and a reward model at other learning rates.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
budget=${TOKEN_BUDGET:-32768} model=${MODEL:-HuggingFaceTB/SmolLM2-135M} dataset=${DATASET:-gsm8k} k=${K:-96}
test=(--dataset $dataset --max-new-tokens ${MAX_NEW_TOKENS:-512} --gen-batch-size ${ROWS:-1024} ${LIMIT_EVAL:+--limit-eval $LIMIT_EVAL} --resume)
train=("${test[@]}" --token-budget $budget ${LIMIT_TRAIN:+--limit-train $LIMIT_TRAIN})
fit=(--epochs ${EPOCHS:-4} --lr ${LR:-2e-5} --batch-size ${BATCH:-128})

for seed in ${SEEDS:-0}; do
    run=$work/gsm8k_$seed
    python sft.py --model "$model" "${train[@]}" "${fit[@]}" --seed $seed --out "$run/sft"
    python expert_iteration.py --model "$run/sft/model" --base "$model" "${train[@]}" "${fit[@]}" --samples $k --seed $seed --out "$run/ei"
    python ppo.py --model "$run/sft/model" "${train[@]}" --lr ${PPO_LR:-1e-6} --value-lr 1e-5 --questions ${QUESTIONS:-256} --epochs 4 \
        --batch-size 256 --phases ${PHASES:-250} --seed $seed --out "$run/ppo"
    python reward_model.py --model "$run/sft/model" "${train[@]}" --samples $k --epochs 2 --lr ${ORM_LR:-1e-5} --batch-size 128 --seed $seed --out "$run/orm"
    python rcrl.py --model "$run/ei/model" --base "$model" "${train[@]}" "${fit[@]}" --samples ${RCRL_K:-32} --seed $seed --out "$run/rcrl"
    record "$run/orm" orm $seed
    for name in sft ei ppo rcrl; do
        is_recorded $name $seed && continue
        precision= && [ $name != ppo ] || precision="--dtype float32" # merged adapters: changes smaller than bfloat16 resolves
        python evaluate.py --model "$run/$name/model" --orm "$run/orm/model" "${test[@]}" $precision --samples ${N:-96} --seed $seed \
            --out "$run/$name/test.json" >"$run/$name/test.txt"
        record "$run/$name" $name $seed
    done
done
python results/table.py "$records"
