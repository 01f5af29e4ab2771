#!/usr/bin/env bash
# The paper's table for a model from the hub, on one GPU: SFT, expert iteration, PPO and RCRL on GSM8K with the commands of
# README.md, an outcome reward model trained on samples of SFT, and every policy tested with the same reward model. Then the
# table. Restartable: what is finished is skipped, what was interrupted goes on. Not yet run at full size.
#
#     MODEL=HuggingFaceTB/SmolLM2-135M bash results/gsm8k/run.sh
#
# Smaller: K and N samples per training and test problem (paper: 96), PHASES of PPO (250), RCRL_K (32), LIMIT_TRAIN and
# LIMIT_EVAL problems, MAX_NEW_TOKENS (512), ROWS that are sampled at a time (1024), TOKEN_BUDGET of a micro-batch (32768),
# EPOCHS (4) of SFT and of what trains like it. LR (2e-5) and BATCH (128) are theirs, too; PPO_LR (1e-6) and ORM_LR (1e-5) of
# the others; SEEDS as elsewhere, here 0 alone. For SmolLM2-135M LR=1e-3 BATCH=64 was the best of three in SFT; what PPO and a
# reward model did at other rates is in ../gsm8k_smollm2.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"
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
    keep orm_$seed "$run"/orm/{args.json,metrics.jsonl,quality.json}
    for name in sft ei ppo rcrl; do
        [ -f "$here/${name}_$seed/test.json" ] && continue
        precision= && [ $name != ppo ] || precision="--dtype float32" # merged adapters: changes smaller than bfloat16 resolves
        python evaluate.py --model "$run/$name/model" --orm "$run/orm/model" "${test[@]}" $precision --samples ${N:-96} --seed $seed \
            --out "$run/$name/test.json" >"$run/$name/test.txt"
        keep ${name}_$seed "$run/$name"/{args.json,metrics.jsonl,test.json}
    done
done
python results/table.py "$here"
