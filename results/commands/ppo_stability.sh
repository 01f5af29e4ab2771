#!/usr/bin/env bash
# What the KL penalty and the detached value branch do where PPO is unstable.
#
# 20 phases from SFT at five times the default learning rate, 5 to 6 minutes on one core:
#     kl         KL coefficient 0.05, the default
#     kl0        no KL penalty
#     attached   0.05, and the value loss trains the policy too
#     kl4        four times the coefficient
#     limit      no KL penalty. A phase ends when a minibatch is 0.02 nats per token from the sampler
#     both       0.05 and the limit
# Recorded are seven seeds of kl, attached and limit, three of kl0 and both, two of kl4.
set -euo pipefail
source "$(dirname "$0")/steps.sh"
declare -A flags=([kl]="" [kl0]="--kl-coef 0" [attached]="--no-detach-value" [kl4]="--kl-coef 0.2"
    [limit]="--kl-coef 0 --kl-limit 0.02" [both]="--kl-limit 0.02")
for seed in ${SEEDS:-0 1 2}; do
    for name in ${VARIANTS:-kl kl0 attached kl4 limit both}; do
        is_recorded $name $seed && continue
        fine_tune "$work/sft_$seed" $seed
        train_and_test "$work/ppo_stability_${name}_$seed" $name $seed ppo.py --model "$work/sft_$seed/model" --lr 1e-3 ${flags[$name]}
    done
done
python results/table.py "$records"
