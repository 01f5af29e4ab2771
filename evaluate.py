"""Evaluation: maj@1, maj@n, pass@k and the diversity of a model's solutions on a split.

    1. one greedy solution per problem                      -> maj@1
    2. n sampled solutions per problem at temperature 0.7   -> everything else, all from the same samples
         maj@n      the answer that most samples agree on is right (samples without an answer do not vote; of answers
                    with equally many votes the one that appeared first wins)
         pass@k     at least one of k samples is right, estimated without bias from n (`common.pass_at_k`)
         distinct@n number of correct solutions that differ in their sequence of arithmetic operations
         no_answer, truncated: share of samples without an answer, and of those that hit the length limit
    3. with --orm, a reward model scores the same samples
         rerank@n   the best-scored sample is right
         weighted@n the vote again, every sample weighted with its score
    4. a 95 % interval over the problems for every number, and for the two of --orm a paired test against maj@n

"Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et al. 2024), section "Metrics"; the paper
uses n = 96. The tie rule is ours.

CPU, under a minute after `python sft.py`:
    python evaluate.py --model runs/sft/model
    python evaluate.py --model runs/sft/model --orm runs/reward_model/model --resume    # scores the same samples
One GPU:
    python evaluate.py --model runs/gsm8k/sft/model --dataset gsm8k --samples 96 --max-new-tokens 512
"""

import math
import sys
import time
from pathlib import Path

import numpy as np

import common


def parse_args(argv: list[str]):
    parser = common.common_parser(__doc__, model="runs/sft/model", samples=16, temperature=0.7)
    add = parser.add_argument
    add(
        "--out",
        help="JSON file; the samples go beside it (default: runs/evaluate/, named after model and dataset)",
    )
    add(
        "--split",
        choices=["train", "dev", "test", "all"],
        default="test",
        help="all: the whole of a single file",
    )
    add("--few-shot", action="store_true", help="two worked examples in the prompt, for a base that never saw the format")  # fmt: skip
    add(
        "--lenient",
        action="store_true",
        help="without an answer line, take the last number of the text as the answer",
    )
    add("--condition", choices=["good", "bad", "none"],
        help="for a model of rcrl.py, the label that is put before every line (default: good if it has labels)")  # fmt: skip
    add("--orm",
        help="folder of a reward model, for rerank@n and weighted@n; with --resume, of the samples that are there")  # fmt: skip
    args = parser.parse_args(argv)
    if args.temperature == 0 and args.samples > 1:
        parser.error(
            "--temperature 0: all samples of a problem are the same; the greedy one is maj@1"
        )
    if args.orm and args.samples == 1:
        parser.error("--orm chooses among the samples of a problem: --samples of at least 2")
    return args


def distinct_correct(samples: list[common.Sample]) -> int:
    """Number of correct solutions with different sequences of arithmetic operations."""
    return len({common.equations(sample.text) for sample in samples if sample.correct})


def confidence_interval(values: list[float], highest: float = 1.0) -> list[float]:
    """95 % interval of the mean of one value per problem, each between 0 and `highest`; of a single value between them
    everything. Wilson (1927) for shares of yes and no. Of shares between them, as pass@k is, mean +- 1.96 standard errors
    after two problems with 0 and two with 1 were added, as Agresti and Coull (1998) do for yes and no: where all problems
    but a few agree, the plain standard error is too small. Of counts (`highest` above 1), unless all are 0 or 1, the
    plain one."""
    mean, n, z = float(np.mean(values)), len(values), 1.96
    if set(values) <= {0.0, 1.0}:
        centre, half = (
            mean + z * z / (2 * n),
            z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)),
        )
        centre, half = centre / (1 + z * z / n), half / (1 + z * z / n)
    elif n == 1:
        centre, half = mean, highest
    else:
        values = [*values, 0.0, 0.0, 1.0, 1.0] if highest == 1 else values
        centre, half = (
            float(np.mean(values)),
            z * float(np.std(values, ddof=1)) / math.sqrt(len(values)),
        )
    return [max(0.0, centre - half), min(highest, centre + half)]


def paired_test(values: list[float], others: list[float]) -> dict:
    """Two yes-or-no metrics of the same problems: the mean difference with its 95 % interval (Agresti and Min 2005), and
    the probability of a split at least this uneven among the problems on which they differ if neither were better
    (McNemar's exact test)."""
    differences = np.array(values) - np.array(others)
    better, worse, total = (
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        len(differences),
    )
    n, fewer = better + worse, min(better, worse)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    centre = (better - worse) / (
        total + 2
    )  # half a problem added to each of the four cases, or it has no width at 0
    half = 1.96 * math.sqrt(n + 1 - (better - worse) ** 2 / (total + 2)) / (total + 2)
    found = {
        "difference": float(differences.mean()),
        "ci95": [max(-1.0, centre - half), min(1.0, centre + half)],
    }
    return found | {"better": better, "worse": worse, "p": p}


def metrics_per_problem(
    greedy: list[common.Sample], samples: list[common.Sample]
) -> dict[str, list[float]]:
    """Metric name -> one value per problem."""
    values = {
        "maj@1": [s.correct for s in greedy],
        "no_answer@1": [s.answer is None for s in greedy],
        "truncated@1": [not s.finished for s in greedy],
    }
    groups = common.by_problem(samples)
    n = len(groups[0])
    if n > 1:
        values[f"maj@{n}"] = [
            common.vote([s.answer for s in group]) == group[0].problem.answer for group in groups
        ]
        if samples[0].score is not None:
            values[f"rerank@{n}"] = [max(group, key=lambda s: s.score).correct for group in groups]
            values[f"weighted@{n}"] = [
                common.vote([s.answer for s in group], [s.score for s in group])
                == group[0].problem.answer
                for group in groups
            ]
    for k in common.powers_of_two(n):
        values[f"pass@{k}"] = [
            common.pass_at_k(n, sum(s.correct for s in group), k) for group in groups
        ]
    values[f"distinct@{n}"] = [distinct_correct(group) for group in groups]
    values["no_answer"] = [np.mean([s.answer is None for s in group]) for group in groups]
    values["truncated"] = [np.mean([not s.finished for s in group]) for group in groups]
    return {name: [float(v) for v in column] for name, column in values.items()}


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    name = args.model.strip("./").replace("/", "-")
    out = Path(args.out or f"runs/evaluate/{name}-{Path(args.dataset).stem}-{args.split}.json")
    ignored = ("resume", "overwrite", "device", "out", "token_budget", "gen_batch_size")
    settings = {key: value for key, value in vars(args).items() if key not in ignored}
    settings["model_fingerprint"] = common.fingerprint(args.model)
    if args.orm:
        settings["orm_fingerprint"] = common.fingerprint(args.orm, "--orm")
    if out.suffix != ".json" or out.is_dir():
        raise common.UserError(f"--out {out}: must be the name of a .json file")
    problems = common.load_problems(args.dataset, args.split, args.limit_eval)
    files = [out.with_suffix(f".{kind}.jsonl") for kind in ("greedy", "samples")]
    lock = out.with_suffix(
        ".json.lock"
    )  # several evaluations may share a folder, but not their files
    started_file = out.with_suffix(
        ".args.json"
    )  # there from the start, so that --resume knows what the samples are of

    def occupied() -> list[Path]:
        taken = [file for file in (out, started_file, *files) if file.exists()]
        if taken and args.resume:
            before, may_change = (
                common.read_json(started_file),
                {"orm", "orm_fingerprint"} if args.orm else set(),
            )
            if any(
                before.get(key) != settings.get(key)
                for key in (before.keys() | settings.keys()) - may_change
            ):
                raise common.UserError(
                    f"--resume: {out} was begun with other settings; they are in {started_file}"
                )
        if taken and not (args.resume or args.overwrite):
            raise common.UserError(
                f"{taken[0]} is there already: add --resume to go on, --overwrite to replace it, or choose another --out"
            )
        return [] if args.resume else taken

    def prepare() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        common.lock(lock, out)
        for file in (
            occupied()
        ):  # again, because another evaluation may have come and gone while the model was loaded
            file.unlink()
        common.write_json(started_file, settings)

    common.on_first(occupied)
    policy = common.Policy(args.model, args.device, args.dtype)
    if args.condition:
        policy.condition(args.condition)
    orm = None
    if args.orm:
        import reward_model

        orm = reward_model.RewardModel(args.orm, args.device, args.dtype)
    common.encode_prompts(policy, problems, args.few_shot)
    common.on_first(prepare)

    # 1. and 2. sample; an evaluation that was interrupted goes on with --resume
    started = time.monotonic()
    resumed = common.on_first(lambda: any(file.exists() for file in files))
    timed = common.on_first(lambda: common.read_json(out).get("seconds") if out.exists() else None)
    how = dict(
        max_new_tokens=args.max_new_tokens,
        batch_size=args.gen_batch_size,
        seed=args.seed,
        few_shot=args.few_shot,
    )
    greedy = common.sample_to_file(
        policy, problems, files[0], samples=1, temperature=0, progress="greedy", **how
    )
    samples = common.sample_to_file(
        policy,
        problems,
        files[1],
        samples=args.samples,
        temperature=args.temperature,
        progress="samples",
        **how,
    )
    if args.lenient:
        for sample in greedy + samples:
            sample.grade(lenient=True)

    # 3. scores of the reward model; they, and what was read leniently, then stand in the files of samples, too
    for file, group in zip(files, (greedy, samples), strict=True) if orm or args.lenient else ():
        if orm:
            orm.grade(group, args.token_budget)
        common.write_samples(file, group)

    # 4. every metric is a mean over problems
    columns = metrics_per_problem(greedy, samples)
    n = args.samples
    report = {
        name: {
            "value": float(np.mean(v)),
            "ci95": confidence_interval(v, n if name.startswith("distinct") else 1.0),
        }
        for name, v in columns.items()
    }
    paired = {
        f"{name} - maj@{n}": paired_test(columns[name], columns[f"maj@{n}"])
        for name in (f"rerank@{n}", f"weighted@{n}") if name in columns
    }  # fmt: skip
    seconds = (
        timed if resumed else round(time.monotonic() - started, 1)
    )  # null: interrupted, so nobody measured it
    common.write_json(
        out, report | paired | {"n_problems": len(problems), "seconds": seconds} | settings
    )
    print(
        f"{args.model} on {len(problems)} problems of {args.dataset} {args.split}, temperature {args.temperature:g}"
    )
    for name, entry in report.items():
        print(
            f"{name:>16}  {entry['value']:6.3f}  [{entry['ci95'][0]:.3f}, {entry['ci95'][1]:.3f}]"
        )
    for name, test in paired.items():
        print(
            f"{name:>24}  {test['difference']:+.3f}  [{test['ci95'][0]:+.3f}, {test['ci95'][1]:+.3f}]  p {test['p']:.2g}"
        )
    if common.process_rank() == 0:
        lock.unlink(missing_ok=True)
        print(f"written to {out}; samples in {files[1]}", file=sys.stderr)


if __name__ == "__main__":
    common.run_main(main)
