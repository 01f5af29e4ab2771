#!/usr/bin/env bash
# A generative reward model, trained on the samples of the ORM of orm.sh, and PPO with its rewards.
#
# gold          the GenRM compares with the gold solution
# best          it compares with the best of 16 SFT samples, chosen by the ORM
# hybrid        half of the questions have verifiable answers, a quarter are as gold, a quarter as best
# hybrid_first  the same without the last quarter in the first 30 % of the phases
#
# Everything else is as in ppo of arithmetic.sh, which is the row of the verifier. Run that first.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
declare -A flags=(
    [gold]="--reward genrm"
    [best]="--reward genrm --hide 1 1"
    [hybrid]="--reward hybrid --hide 0.5 0.5"
    [hybrid_first]="--reward hybrid --hide 0.5 0.5 --curriculum verifiable_first"
)
for seed in ${SEEDS:-0 1 2}; do
    orm=$work/orm_$seed genrm=$work/genrm_$seed sft=$work/sft_$seed/model
    for name in ${VARIANTS:-gold best hybrid hybrid_first}; do
        is_recorded $name $seed && continue
        bash results/commands/orm.sh train $seed # returns at once where it is done, as the next line does
        python reward_model.py --kind genrm --seed $seed --token-budget $budget --model "$sft" --out "$genrm" --resume \
            --train-samples "$orm/samples/train.jsonl"
        record "$genrm" genrm $seed
        references=
        if [ $name != gold ]; then
            python evaluate.py --model "$sft" --split train --orm "$orm/model" --seed $seed --resume --out "$work/references_$seed.json"
            references="--references $work/references_$seed.samples.jsonl"
        fi
        train_and_test "$work/genrm_ppo_${name}_$seed" $name $seed ppo.py --model "$sft" --genrm "$genrm/model" \
            ${flags[$name]} $references
    done
done
python results/genrm.py
