# What the run.sh of the folders share, to be sourced. A record, $here/NAME_SEED, is what is kept in the repository; a run,
# with its weights and samples, lies under $work. What is recorded is skipped; with RECORDS=runs/records, in a clean checkout,
# all is made again, and its records are put there, to be compared with those of results/.
cd "$(dirname "$0")"
here=${RECORDS:-results}/${PWD##*/}
cd ../..
work=${WORK:-runs/results}
dataset=arithmetic # what policies are tested on
budget=${TOKEN_BUDGET:-16384} # tokens per micro-batch, as in the records; 1024, the default on a CPU, is quicker and rounds otherwise

keep() { # name of the record, files ...: those that exist, with the paths of runs as they are by default
    local to=$here/$1 file text && shift
    mkdir -p "$to"
    for file in "$@"; do
        [ -f "$file" ] || continue
        text=$(<"$file")
        printf '%s\n' "${text//"$work/"/runs/results/}" >"$to/unfinished" && mv "$to/unfinished" "$to/${file##*/}"
    done
}

test_and_record() { # run folder, name of the record, seed[, model]
    python evaluate.py --model "${4:-$1/model}" --dataset $dataset --samples 16 --seed "$3" --resume --out "$1/test.json" >"$1/test.txt"
    keep "$2" "$1"/{args.json,metrics.jsonl,test.json}
}

test_and_record_labels() { # run folder, name of the record, seed: of rcrl.py, after [BAD], no label and [GOOD]; a control has no labels
    local on samples file condition
    for on in bad none good; do
        samples=4 file=$on && [ $on != good ] || samples=16 file=test
        condition="--condition $on" && [[ $2 != *control* ]] || condition=
        [ "$condition" ] || [ $on = good ] || continue
        python evaluate.py --model "$1/model" --dataset $dataset $condition --samples $samples --seed "$3" --resume \
            --out "$1/$file.json" >"$1/$file.txt"
    done
    keep "$2" "$1"/{args.json,metrics.jsonl,bad.json,none.json,test.json}
}

fine_tune() { # run folder, seed: SFT on $dataset, where a later run starts; nothing where it is complete
    python sft.py --seed "$2" --dataset $dataset --token-budget $budget --out "$1" --resume
}

train_and_test() { # run folder, name of the record, seed, script and its flags
    local run=$1 name=$2 seed=$3 script=$4 && shift 4
    python "$script" --seed "$seed" --token-budget $budget "$@" --out "$run" --resume
    test_and_record "$run" "$name" "$seed"
}
