#!/usr/bin/env bash
# What rounding does to a round of expert iteration when gradients are clipped at norm 0.1 and the
# learning rate rises over 10 % of the steps. Older records have 1.0 and 3 %.
#
# round         one round of seed 0 with micro-batches of four sizes, as in ei_lr.sh. The seed of the
#               record is the size. So it is in moment, sft, rcrl and rcrl_old
# easy, hard    two rounds, to compare with arithmetic.sh and hard.sh
# rcrl          RCRL from one round, seed 0, two sizes, the same samples and labels
# sft           SFT of seed 0
#
# Three methods are recorded that this script leaves out, because they need other constants:
# moment        round with norm 1.0 (expert_iteration.py) and beta2 0.999 (adam_w in common.py)
# hard_moment   hard with the same
# rcrl_old      rcrl with norm 1.0 and a warm-up of 3 % (rcrl.py)
set -euo pipefail
source "$(dirname "$0")/steps.sh"
test_4_and_record() { # run folder, name, seed
    python evaluate.py --model "$1/model" --samples 4 --resume --out "$1/test.json" >"$1/test.txt"
    record "$1" $2 $3
}
fine_tune "$work/sft_0" 0
for tokens in 512 768 1024 1536; do
    run=$work/clipping_sft_$tokens
    is_recorded sft $tokens || {
        python sft.py --token-budget $tokens --out "$run" --resume
        test_4_and_record "$run" sft $tokens
    }
    run=$work/clipping_$tokens
    is_recorded round $tokens && continue
    python expert_iteration.py --model "$work/sft_0/model" --rounds 1 --token-budget $tokens --out "$run" --resume
    test_4_and_record "$run" round $tokens
done
for tokens in 1024 512; do
    run=$work/clipping_rcrl_$tokens first=$work/clipping_rcrl_1024
    is_recorded rcrl $tokens && continue
    if [ $tokens = 512 ] && [ ! -e "$run" ]; then # the same samples and labels
        mkdir -p "$run/samples" && cp "$first"/samples/{train,completions}.jsonl "$run/samples" && cp "$first/args.json" "$run"
    fi
    python rcrl.py --model "$work/clipping_1024/model" --token-budget $tokens --out "$run" --resume
    test_4_and_record "$run" rcrl $tokens
done
for seed in ${SEEDS:-0 1 2 3}; do
    is_recorded easy $seed && continue
    fine_tune "$work/sft_$seed" $seed
    train_and_test "$work/clipping_easy_$seed" easy $seed expert_iteration.py --model "$work/sft_$seed/model"
done
dataset=arithmetic-hard
for seed in ${SEEDS:-0 1 2 3}; do
    is_recorded hard $seed && continue
    fine_tune "$work/hard_sft_$seed" $seed
    train_and_test "$work/clipping_hard_$seed" hard $seed expert_iteration.py --model "$work/hard_sft_$seed/model" \
        --dataset $dataset
done
python results/table.py "$records"
