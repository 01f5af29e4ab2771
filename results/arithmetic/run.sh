#!/usr/bin/env bash
# The recorded runs on the embedded task: base, SFT, more SFT, expert iteration and PPO from SFT and from the base; three
# seeds. About an hour on two cores. Restartable: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
source "$(dirname "$0")/../steps.sh"

train() { # name, script and its flags
    local name=$1_$seed script=$2 && shift 2
    train_and_test "$work/$name" $name $seed $script "$@"
}

mkdir -p "$work/base" && test_and_record "$work/base" base 0 tiny
for seed in 0 1 2; do
    train sft sft.py
    train ei expert_iteration.py --model "$work/sft_$seed/model"
    train ei_base expert_iteration.py --model tiny --samples 8 --epochs 3
    train ppo ppo.py --model "$work/sft_$seed/model"
    train ppo_base ppo.py --model tiny
    # control: 840 updates on the 24 written solutions alone
    train sft_more sft.py --batch-size 1 --epochs 35
done
python results/table.py "$here"
