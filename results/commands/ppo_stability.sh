#!/usr/bin/env bash
# What the KL penalty and the detached value branch do where PPO is not stable: at five times the default learning rate, the
# default coefficient of 0.05 (kl), none (kl0), 0.05 with the value attached (attached), four times that coefficient (kl4),
# none and phases that end where a minibatch is 0.02 nats per token from the policy that sampled (limit), the same beside the
# default coefficient (both); 20 phases from SFT each. Recorded are seven seeds of kl, attached and limit, three of kl0 and
# both, two of kl4. Five to six minutes a run on one core. Restartable.
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
