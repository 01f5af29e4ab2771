# What the other scripts of this folder share, to be sourced.
#
# A script NAME.sh adds its runs to results/NAME.jsonl: one line per run, with the name of a method
# and a seed. Runs with weights and samples are in $work. A run that is recorded is skipped. With
# RECORDS=runs/records, in a clean checkout, everything is run again, and the new records are in that
# folder, to compare with those of results/.
cd "$(dirname "$0")/../.."
records=${RECORDS:-results}/$(basename "$0" .sh).jsonl
work=${WORK:-runs/results}
dataset=arithmetic # the policies are tested on it
# Tokens per micro-batch, as in the records. 1024, the default on a CPU, is faster and rounds differently.
budget=${TOKEN_BUDGET:-16384}

is_recorded() { # name, seed
    grep -qs "^{\"name\": \"$1\", \"seed\": $2, " "$records"
}

record() { # run folder, name, seed
    python results/record.py "$1" "$records" "$2" "$3" --work "$work"
}

test_and_record() { # run folder, name, seed[, model]
    python evaluate.py --model "${4:-$1/model}" --dataset $dataset --samples 16 --seed "$3" --resume --out "$1/test.json" >"$1/test.txt"
    record "$1" "$2" "$3"
}

test_labels_and_record() { # run folder of rcrl.py, name, seed: after [BAD], without a label, after [GOOD]
    local labels="bad none good" label file samples condition
    [[ $2 != *control* ]] || labels=no # a control has no labels
    for label in $labels; do
        file=$label samples=4 condition="--condition $label"
        [[ $label != good && $label != no ]] || file=test samples=16
        [ $label != no ] || condition=
        python evaluate.py --model "$1/model" --dataset $dataset $condition --samples $samples --seed "$3" --resume \
            --out "$1/$file.json" >"$1/$file.txt"
    done
    record "$1" "$2" "$3"
}

fine_tune() { # run folder, seed: SFT on $dataset, where a later run starts. Returns at once if it is complete
    python sft.py --seed "$2" --dataset $dataset --token-budget $budget --out "$1" --resume
}

train_and_test() { # run folder, name, seed, script and its flags
    local run=$1 name=$2 seed=$3 script=$4 && shift 4
    python "$script" --seed "$seed" --token-budget $budget "$@" --out "$run" --resume
    test_and_record "$run" "$name" "$seed"
}
