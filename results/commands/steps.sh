# What the other scripts of this folder share, to be sourced.
#
# A script NAME.sh adds its runs to results/NAME.jsonl: one line per run, with the name of a method
# and a seed. A run that is recorded is skipped, and a run that was interrupted continues. Variables:
#     SEEDS           seeds to run (default: 0 1 2)
#     VARIANTS        methods to run (default: all)
#     WORK            folder of the runs, with weights and samples (default: runs/results)
#     RECORDS         folder of the records (default: results). With RECORDS=runs/records everything
#                     is run again, to compare with results/
#     TOKEN_BUDGET    tokens per micro-batch (default: 16384, as in most records). 1024, the default
#                     of the scripts on a CPU, is faster and rounds differently
cd "$(dirname "$0")/../.."
records=${RECORDS:-results}/$(basename "$0" .sh).jsonl
work=${WORK:-runs/results}
dataset=arithmetic # the policies are tested on it
budget=${TOKEN_BUDGET:-16384}

is_recorded() { # name, seed
    grep -qs "^{\"name\": \"$1\", \"seed\": $2, " "$records"
}

record() { # run folder, name, seed
    python results/record.py "$1" "$records" "$2" "$3" --work "$work"
}

test_and_record() { # run folder, name, seed[, model]
    python evaluate.py --model "${4:-$1/model}" --dataset $dataset --samples 16 --seed "$3" --resume \
        --out "$1/test.json" >"$1/test.txt"
    record "$1" "$2" "$3"
}

test_labels_and_record() { # run folder of rcrl.py, name, seed
    # Test with [BAD], without a label and with [GOOD]. A control has no labels.
    local labels="bad none good" label file samples condition
    [[ $2 != *control* ]] || labels=no
    for label in $labels; do
        file=$label samples=4 condition="--condition $label"
        [[ $label != good && $label != no ]] || file=test samples=16
        [ $label != no ] || condition=
        python evaluate.py --model "$1/model" --dataset $dataset $condition --samples $samples \
            --seed "$3" --resume --out "$1/$file.json" >"$1/$file.txt"
    done
    record "$1" "$2" "$3"
}

fine_tune() { # run folder, seed: SFT on $dataset. Returns at once if it is complete
    python sft.py --seed "$2" --dataset $dataset --token-budget $budget --out "$1" --resume
}

train_and_test() { # run folder, name, seed, script and its flags
    local run=$1 name=$2 seed=$3 script=$4 && shift 4
    python "$script" --seed "$seed" --token-budget $budget "$@" --out "$run" --resume
    test_and_record "$run" "$name" "$seed"
}
