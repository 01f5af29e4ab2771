r"""Evaluate a model on a split: maj@1, maj@n, pass@k and the diversity of its solutions.

    1. Sample one greedy solution per problem. Its correctness is maj@1.
    2. Sample n solutions per problem at temperature 0.7. All other metrics are from these samples.
         maj@n       the answer of most samples is correct. Samples without an answer do not vote.
                     Of answers with equally many votes the first to appear wins.
         pass@k      at least one of k samples is correct (`common.pass_at_k`, without bias)
         distinct@n  number of correct solutions that differ in their arithmetic operations
         no_answer   fraction of samples without an answer
         truncated   fraction of samples that reached the length limit
    3. Score the same samples with a reward model: --orm, or --genrm next to the gold solution.
         score       mean score of the samples
         rerank@n    (--orm) the sample with the best score is correct
         weighted@n  (--orm) maj@n with the scores as weights of the votes
    4. Report the mean of every metric over the problems, with a 95 % interval. rerank@n and
       weighted@n also get a paired test against maj@n.

Every sample is a line of a JSON file next to the report. `ppo.py --scores` and `--references` read
it. The metrics are from "Teaching Large Language Models to Reason with Reinforcement Learning"
(Havrilla et al. 2024), where n = 96. The rule for equally many votes is ours.

CPU, under a minute, after `python sft.py`. The second command scores the samples of the first:
    python evaluate.py --model runs/sft/model
    python evaluate.py --model runs/sft/model --orm runs/reward_model/model --resume
One GPU:
    python evaluate.py --model runs/gsm8k/sft/model --dataset gsm8k --samples 96 \
        --max-new-tokens 512
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

import common
import runtime

FILES = ".args.json", ".greedy.jsonl", ".samples.jsonl"  # next to the report
Z = 1.96  # standard errors, half of a 95 % interval


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = runtime.common_parser(__doc__, model="runs/sft/model", samples=16, temperature=0.7)
    add = parser.add_argument
    about = "JSON file, with the samples next to it (default: runs/evaluate/MODEL-DATASET-SPLIT)"
    add("--out", help=about)
    add("--split", choices=["train", "dev", "test", "all"], default="test", help="all of a file")
    add("--few-shot", action="store_true", help="show two worked examples, for a base model")
    add("--lenient", action="store_true", help="read the last number if there is no answer line")
    about = "label before every line, for a model of rcrl.py (default: good if it has labels)"
    add("--condition", choices=["good", "bad", "none"], help=about)
    add("--orm", help="outcome reward model that scores the samples, with --resume old ones")
    add("--genrm", help="generative reward model that compares them with the gold solution")
    args = parser.parse_args(argv)
    if args.temperature == 0 and args.samples > 1:
        parser.error("--temperature 0: all samples of a problem are the same; maj@1 is greedy")
    if args.orm and args.genrm:
        parser.error("a sample has one score: give --orm or --genrm")
    return args


def metrics_per_problem(greedy: list, samples: list[common.Sample], rerank: bool) -> dict:
    """Return one value per problem, by metric. rerank: the scores choose among the samples."""
    groups = common.by_problem(samples)
    answers = [[s.answer for s in group] for group in groups]
    gold, n = [group[0].problem.answer for group in groups], len(groups[0])
    values = {
        "maj@1": [s.correct for s in greedy],
        "no_answer@1": [s.answer is None for s in greedy],
        "truncated@1": [not s.finished for s in greedy],
    }
    if n > 1:
        votes = map(common.vote, answers)
        values[f"maj@{n}"] = [vote == a for vote, a in zip(votes, gold, strict=True)]
    if n > 1 and rerank:
        values[f"rerank@{n}"] = [max(group, key=lambda s: s.score).correct for group in groups]
        votes = map(common.vote, answers, [[s.score for s in group] for group in groups])
        values[f"weighted@{n}"] = [vote == a for vote, a in zip(votes, gold, strict=True)]
    if samples[0].score is not None:
        values["score"] = [common.mean(s.score for s in group) for group in groups]
    counts = [sum(s.correct for s in group) for group in groups]
    for k in common.powers_of_two(n):
        values[f"pass@{k}"] = [common.pass_at_k(n, count, k) for count in counts]
    distinct = [{common.equations(s.text) for s in group if s.correct} for group in groups]
    values[f"distinct@{n}"] = map(len, distinct)
    values["no_answer"] = [common.mean(s.answer is None for s in group) for group in groups]
    values["truncated"] = [common.mean(not s.finished for s in group) for group in groups]
    return {name: [float(v) for v in column] for name, column in values.items()}


def confidence_interval(values: list[float], highest: float = 1.0) -> list[float]:
    """Return the 95 % interval of the mean of one value per problem, each in [0, highest].

    Values of 0 and 1: Wilson (1927). Fractions, as of pass@k: mean +- 1.96 standard errors, after
    adding two problems with 0 and two with 1 (Agresti and Coull 1998), because nearly all problems
    may agree. Counts (`highest` above 1): mean +- 1.96 standard errors. One value: everything.
    """
    mean, n = float(np.mean(values)), len(values)
    if set(values) <= {0.0, 1.0}:
        shrink = 1 + Z * Z / n
        center = (mean + Z * Z / (2 * n)) / shrink
        half = Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n)) / shrink
    elif n == 1:
        center, half = mean, highest
    else:
        values = [*values, 0.0, 0.0, 1.0, 1.0] if highest == 1 else values
        center = float(np.mean(values))
        half = Z * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [max(0.0, center - half), min(highest, center + half)]


def paired_test(values: list[float], others: list[float]) -> dict:
    """Compare two metrics of the same problems. Their values are 0 or 1.

    ci95: interval of the mean difference (Agresti and Min 2005). p: McNemar's exact test.
    """
    differences = np.array(values) - np.array(others)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    n, total = better + worse, len(differences) + 2
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n)
    # Half a problem is added to each of the four cases. Otherwise 0 differences have no interval.
    center = (better - worse) / total
    half = Z * math.sqrt(n + 1 - (better - worse) ** 2 / total) / total
    interval = [max(-1.0, center - half), min(1.0, center + half)]
    found = {"difference": float(differences.mean()), "ci95": interval}
    return found | {"better": better, "worse": worse, "p": p}


def check_files(out: Path, settings: dict, args: argparse.Namespace) -> None:
    """Raise UserError if files of another evaluation are there already."""
    found = [file for file in (out, *map(out.with_suffix, FILES)) if file.exists()]
    if found and not args.resume:
        advice = "add --resume to go on, delete it, or choose another --out"
        raise runtime.UserError(f"{found[0]} is there already: {advice}")
    if found:
        before = runtime.read_json(out.with_suffix(".args.json"))
        # A reward model may score the samples of an evaluation without one, or with another one.
        scoring = {"orm", "genrm", "orm_fingerprint", "genrm_fingerprint"}
        keys = (before.keys() | settings) - (scoring if args.orm or args.genrm else set())
        same = all(before.get(key) == settings.get(key) for key in keys)
        runtime.require(same, f"--resume: {out} was started with other settings")


def begin(out: Path, settings: dict, args: argparse.Namespace) -> None:
    """Lock the files of this evaluation and write its settings."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_suffix(".json.lock")
    lock.touch()
    runtime.lock(lock, out)
    # Look again: another evaluation may have come and gone while the model was loaded.
    check_files(out, settings, args)
    runtime.write_json(out.with_suffix(".args.json"), settings)


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # 0. Load the problems and the models.
    name = args.model.strip("./").replace("/", "-")
    out = Path(args.out or f"runs/evaluate/{name}-{Path(args.dataset).stem}-{args.split}.json")
    ignored = ("resume", "device", "out", "token_budget", "gen_batch_size")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    for flag in [flag for flag in ("model", "orm", "genrm") if settings[flag]]:
        settings[f"{flag}_fingerprint"] = runtime.fingerprint(settings[flag], f"--{flag}")
    runtime.require(out.suffix == ".json", f"--out {out}: must be the name of a .json file")
    problems = common.load_problems(args.dataset, args.split, args.limit_eval)
    can_score = not args.genrm or all(problem.reference for problem in problems)
    runtime.require(can_score, "--genrm compares with gold solutions; some problems have none")
    runtime.on_first(lambda: check_files(out, settings, args))
    policy, reward_model = common.Policy(args.model, args.device, args.dtype), None
    if args.condition:
        policy.condition(args.condition)
    if args.orm or args.genrm:
        from reward_model import GenerativeRewardModel, RewardModel  # not part of every fork

        kind = RewardModel if args.orm else GenerativeRewardModel
        reward_model = kind(args.orm or args.genrm, args.device, args.dtype)
    common.encode_prompts(policy, problems, args.few_shot)
    runtime.on_first(lambda: begin(out, settings, args))

    # 1., 2. Sample one greedy solution and n solutions per problem. --resume reads samples back.
    started, (_, greedy_file, samples_file) = time.monotonic(), map(out.with_suffix, FILES)
    resumed = runtime.on_first(greedy_file.exists)
    how = common.sampling(args) | dict(seed=args.seed, few_shot=args.few_shot)
    one = how | dict(samples=1, temperature=0, progress="greedy")
    greedy = common.sample_to_file(policy, problems, greedy_file, **one)
    how |= dict(progress="samples")
    # A reward model was trained on samples of the training questions with the seed [seed, 0].
    how |= dict(seed=[args.seed, 0]) if args.split == "train" and not reward_model else {}
    samples = common.sample_to_file(policy, problems, samples_file, **how)

    # 3. Read answers leniently and score the samples. The files of samples get both.
    for file, group in ((greedy_file, greedy), (samples_file, samples)):
        for sample in group if args.lenient else ():
            sample.grade(lenient=True)
        if reward_model:
            reward_model.grade(group, args.token_budget)
        if reward_model or args.lenient:
            common.write_samples(file, group)

    # 4. Average every metric over the problems.
    columns, n = metrics_per_problem(greedy, samples, bool(args.orm)), args.samples
    report, paired = {}, {}
    for name, values in columns.items():
        interval = confidence_interval(values, n if name.startswith("distinct") else 1.0)
        report[name] = {"value": float(np.mean(values)), "ci95": interval}
    for name in (f"rerank@{n}", f"weighted@{n}"):
        if name in columns:
            paired[f"{name} - maj@{n}"] = paired_test(columns[name], columns[f"maj@{n}"])
    seconds = None if resumed else round(time.monotonic() - started, 1)
    facts = {"n_problems": len(problems), "seconds": seconds}
    runtime.write_json(out, report | paired | facts | settings)
    split = f"{len(problems)} problems of {args.dataset} {args.split}"
    print(f"{args.model} on {split}, temperature {args.temperature:g}")
    for name, entry in report.items():
        low, high = entry["ci95"]
        print(f"{name:>16}  {entry['value']:6.3f}  [{low:.3f}, {high:.3f}]")
    for name, test in paired.items():
        interval = "[{:+.3f}, {:+.3f}]".format(*test["ci95"])
        print(f"{name:>24}  {test['difference']:+.3f}  {interval}  p {test['p']:.2g}")
    if runtime.process_rank() == 0:
        out.with_suffix(".json.lock").unlink(missing_ok=True)
        print(f"written to {out}; samples in {samples_file}", file=sys.stderr)


if __name__ == "__main__":
    runtime.run_main(main)
