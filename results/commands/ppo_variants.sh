#!/usr/bin/env bash
# What the parts of PPO are worth. Each variant changes one thing in ppo of arithmetic.sh.
#
# Seeds, start (SFT) and number of samples are the same. Run arithmetic.sh first. lora: adapters
# instead of all weights, with the learning rate that they need. lam095: the usual lambda of GAE.
# orm_outcome: the score of the reward model plus 1 for a correct answer. 5 to 14 minutes a run on one
# core.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
declare -A flags=(
    [kl0]="--kl-coef 0"
    [attached]="--no-detach-value"
    [dense]="--reward dense"
    [orm]="--reward orm --orm ORM"
    [orm_dense]="--reward orm_dense --orm ORM"
    [orm_outcome]="--reward orm --add-outcome --orm ORM"
    [lora]="--lora-rank 16 --lr 2e-3"
    [lam095]="--gae-lambda 0.95"
)
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-kl0 attached dense orm orm_dense orm_outcome lora lam095}; do
        is_recorded $name $seed && continue
        [[ $name != orm* ]] || bash results/commands/orm.sh train $seed
        train_and_test "$work/ppo_${name}_$seed" $name $seed ppo.py --model "$work/sft_$seed/model" \
            ${flags[$name]//ORM/$work/orm_$seed/model}
    done
done
python results/table.py "$records"
