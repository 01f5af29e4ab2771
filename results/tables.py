"""Print the tables of the pages that are made of records: `python results/tables.py`.

A row is a method. Its cells are means over the seeds. Some have the lowest and the highest seed.
tests/test_results.py compares these rows with the pages.
"""

from records import evaluations, mean, metrics, over_phases, paired, runs, spread, test_metric


def row(cells: list[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def print_head(title: str, columns: list[str]) -> None:
    print(f"\n{title}\n\n{row(columns)}\n{'|---' * len(columns)}|")


def last_row(method: str, key: str) -> dict[int, float]:
    """Return a metric of the last row of metrics.jsonl by seed, or 0 if the row lacks it."""
    return {seed: log[-1].get(key, 0) for seed, log in metrics(method).items()}


def sum_of_means(parts: list[tuple[str, str]], seeds: dict[int, float]) -> float:
    """Return the sum over (method, key of the last row) of the means over these seeds."""
    total = 0.0
    for method, key in parts:
        values = last_row(method, key)
        total += mean({seed: values[seed] for seed in seeds})
    return total


def print_methods(
    title: str, with_spread: list[str], without: list[str], rows: dict[str, tuple[str, list]]
) -> None:
    """Print accuracy and cost of some methods.

    rows: label -> (tested method, runs that count for its cost). A run is a method or
    (method, key, ...). A method counts with its samples and minutes, otherwise only the keys count.
    """
    print_head(title, ["method", "seeds", *with_spread, *without, "rollouts", "minutes"])
    for label, (tested, cost) in rows.items():
        found = {metric: test_metric(tested, metric) for metric in with_spread + without}
        seeds = found["maj@1"]
        cells = [str(len(seeds)), *(spread(found[metric]) for metric in with_spread)]
        cells += [f"{mean(found[metric]):.3f}" for metric in without]
        parts = [(run, "seconds", "samples") if isinstance(run, str) else run for run in cost]
        parts = [(method, key) for method, *keys in parts for key in keys]
        rollouts = sum_of_means([part for part in parts if part[1] != "seconds"], seeds)
        seconds = sum_of_means([part for part in parts if part[1] == "seconds"], seeds)
        print(f"| {label} | {' | '.join(cells)} | {rollouts:,.0f} | {seconds / 60:.1f} |")


def print_trials(rows: dict[str, tuple[str, int]]) -> None:
    """Print single runs: the best maj@1 on dev. rows: label -> (method, seed)."""
    print_head("Trials on the harder task", ["", "maj@1", "pass@1", "rollouts", "updates"])
    for label, (method, seed) in rows.items():
        run = runs(method)[seed]
        best = max(
            (line for line in run["metrics"] if "maj@1" in line), key=lambda line: line["maj@1"]
        )
        report, last = run["evaluation"].get("dev"), run["metrics"][-1]
        cells = [f"{best['maj@1']:.3f}", f"{report['pass@1']['value']:.3f}" if report else ""]
        print(row([label, *cells, f"{last['samples']:,}", f"{last['step']:,}"]))


def print_comparison(title: str, rows: dict[str, str]) -> None:
    """Print methods with as many samples each. rows: label -> method."""
    names = ["maj@1", "pass@1", "pass@16", "entropy", "rollouts", "updates"]
    print_head(title, ["method", "seeds", *names])
    for label, method in rows.items():
        seeds = test_metric(method, "maj@1")
        cells = [str(len(seeds)), spread(seeds)]
        cells += [f"{mean(test_metric(method, metric)):.3f}" for metric in ("pass@1", "pass@16")]
        entropy = mean(last_row(method, "entropy"))  # 0 if it is not logged
        cells += [f"{entropy:.3f}" if entropy else ""]
        cells += [f"{sum_of_means([(method, key)], seeds):,.0f}" for key in ("samples", "step")]
        print(row([label, *cells]))


def print_rerank(rows: dict[str, str]) -> None:
    """Print how good the choices of a reward model are. rows: label -> method."""
    names = ["maj@1", "maj@32", "rerank@32", "weighted@32", "pass@32"]
    print_head("Reranking", ["samples of", *names, "rerank@32 - maj@32, by seed"])
    for label, method in rows.items():
        tests = [report["rerank@32 - maj@32"] for report in evaluations(method).values()]
        each = ", ".join(f"{test['difference']:+.3f}" for test in tests)
        p = ", ".join(f"{t['p']:.3f}" if t["p"] < 0.0095 else f"{t['p']:.2f}" for t in tests)
        p = "each p < 0.001" if all(test["p"] < 0.001 for test in tests) else f"p = {p}"
        cells = [spread(test_metric(method, name)) for name in names]
        print(f"| {label} | {' | '.join(cells)} | {each} ({p}) |")


def print_single_runs(title: str, names: dict[str, bool], rows: dict[str, str]) -> None:
    """Print methods with one run each. A cell is blank if the metric was not measured.

    names: metric -> whether to print its interval over the problems. rows: label -> method.
    """
    print_head(title, ["", *names, "rollouts", "minutes"])
    for label, method in rows.items():
        (run,), cells = runs(method).values(), []
        report, last = run["evaluation"]["test"], run["metrics"][-1]
        for name, with_interval in names.items():
            found = report.get(name)
            interval = " ({:.3f} - {:.3f})".format(*found["ci95"]) if found else ""
            cells.append(f"{found['value']:.3f}{interval * with_interval}" if found else "")
        cells += [f"{last.get('samples', 0):,.0f}", f"{last['seconds'] / 60:.1f}"]
        print(f"| {label} | {' | '.join(cells)} |")


def print_labels(title: str, without: list[str], rows: dict[str, tuple[str, bool]]) -> None:
    """Print return-conditioned RL and controls.

    rows: label -> (method, whether it was trained on a mixture). Other methods count only with the
    seeds of the mixtures.
    """
    columns = ["correct + incorrect", "maj@1 after `[GOOD]`", "after `[BAD]`", "no label", *without]
    print_head(title, ["mixture", "seeds", *columns])
    mixtures = [method for method, is_mixture in rows.values() if is_mixture]
    seeds = {seed for method in mixtures for seed in test_metric(method, "maj@1")}

    def tested(method: str, metric: str, kind: str = "test") -> dict[int, float]:
        values = test_metric(method, metric, kind)
        return {seed: value for seed, value in values.items() if seed in seeds}

    for label, (method, is_mixture) in rows.items():
        counts = ("n_correct", "n_incorrect") if is_mixture else ()
        size = " + ".join(f"{mean(last_row(method, key)):,.0f}" for key in counts)
        good, bad, none = (tested(method, "maj@1", kind) for kind in ("test", "bad", "none"))
        # The model has no labels.
        if not bad:
            good, none = {}, good
        cells = [str(len(tested(method, "maj@1"))), size]
        cells += [spread(values) if values else "" for values in (good, bad, none)]
        cells += [f"{mean(tested(method, metric)):.3f}" for metric in without]
        print(row([label, *cells]))


def print_variants(rows: dict[str, str]) -> None:
    """Print variants of PPO. rows: label -> method."""
    print_head("PPO", ["variant", "maj@1", "pass@1", "pass@16", "phase kept (of 20)"])
    for label, method in rows.items():
        cells = [spread(test_metric(method, "maj@1"))]
        cells += [f"{mean(test_metric(method, metric)):.3f}" for metric in ("pass@1", "pass@16")]
        kept = []
        for log in metrics(method).values():
            evaluated = [row for row in log if "maj@1" in row]
            # Among equally good phases the first one is kept.
            kept.append(str(max(evaluated, key=lambda row: row["maj@1"])["phase"]))
        print(f"| {label} | {' | '.join(cells)} | {', '.join(kept)} |")


def print_selections(rows: dict[str, tuple[str, int]]) -> None:
    """Print PPO on selected questions. rows: label -> (method, number of questions).

    Differences are to the method of the first row.
    """
    names = "number", "maj@1", "pass@1", "pass@16", "maj@1 less that of the first 230"
    print_head("Selections", ["questions", *names, "samples correct", "both outcomes"])
    control, _ = next(iter(rows.values()))
    for label, (method, number) in rows.items():
        cells = [f"{number:,}", spread(test_metric(method, "maj@1"))]
        cells += [f"{mean(test_metric(method, metric)):.3f}" for metric in ("pass@1", "pass@16")]
        values, others = (test_metric(name, "maj@1") for name in (method, control))
        cells += [paired(values, others)[1] if method != control else ""]
        for key in ("correct", "informative"):
            cells += [f"{mean(over_phases(method, key, 1, 12)):.2f}"]
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    rollouts = ("seconds", "samples")
    print_methods(
        "The paper's table",
        ["maj@1", "maj@32", "rerank@32", "weighted@32", "pass@32"],
        [],
        {
            "SFT": ("orm/orm_on_sft", ["arithmetic/sft"]),
            "expert iteration": ("rerank/ei", ["arithmetic/ei"]),
            "expert iteration, `--deduplicate`": ("rerank/ei_dedup", ["arithmetic/ei_dedup"]),
            "PPO": ("orm/orm_on_ppo", ["arithmetic/ppo"]),
            # Its samples are from the run of another ratio.
            "RCRL": (
                "rerank/rcrl_ratio10",
                [
                    "arithmetic/ei_dedup",
                    ("rcrl/ratio1", "samples"),
                    ("rcrl/ratio10", "seconds", "completions"),
                ],
            ),
        },
    )
    print_methods(
        "The harder task",
        ["maj@1"],
        ["pass@1", "pass@16", "distinct@16"],
        {
            "SFT": ("hard/sft", ["hard/sft"]),
            "PPO": ("hard/ppo", ["hard/ppo"]),
            "PPO, 36 phases": ("hard/phases36", ["hard/phases36"]),
            "PPO, 36 phases, `--temperature 1`": ("hard/phases36_t1", ["hard/phases36_t1"]),
            "the same, `--advantage loo` (RLOO)": ("advantages/hard_loo", ["advantages/hard_loo"]),
            "PPO, 144 phases of 128 samples, `--temperature 1`": (
                "comparison/hard_ppo",
                ["comparison/hard_ppo"],
            ),
            "PPO, 72 phases": ("hard/phases72", ["hard/phases72"]),
            "PPO, 288 phases of 128 samples, `--temperature 1`": (
                "comparison/hard_ppo_more",
                ["comparison/hard_ppo_more"],
            ),
            "PPO, `--curriculum backtracking`": ("hard/backtracking", ["hard/backtracking"]),
            "PPO, `--curriculum plr`": ("hard/plr", ["hard/plr"]),
            "expert iteration, K = 4": ("hard/ei", ["hard/ei"]),
            "the same, `--rounds 3`": ("hard/rounds3", ["hard/rounds3"]),
            "the same, `--rounds 4`": ("hard/rounds4", ["hard/rounds4"]),
            "expert iteration, K = 4, `--continue` (on from the last policy)": (
                "hard/continue",
                ["hard/continue"],
            ),
            "expert iteration, K = 16, 1 epoch a round (about as many updates as K = 4)": (
                "hard/k16_once",
                ["hard/k16_once"],
            ),
            "the same, `--max-per-question 10`": ("hard/k16_max10", ["hard/k16_max10"]),
            "RCRL, 10 : 1, from samples of expert iteration (K = 4)": (
                "hard_rcrl/ratio10",
                ["hard/ei", ("hard_rcrl/ratio10", *rollouts, "completions")],
            ),
            "the same correct solutions without labels (control)": (
                "hard_rcrl/control",
                ["hard/ei", ("hard_rcrl/ratio10", "samples"), ("hard_rcrl/control", "seconds")],
            ),
            "expert iteration, K = 4, `--deduplicate`": ("hard/ei_dedup", ["hard/ei_dedup"]),
            "the same, 12 epochs a round": ("hard/long_dedup", ["hard/long_dedup"]),
            "expert iteration, K = 16, `--deduplicate`": ("hard/k16_dedup", ["hard/k16_dedup"]),
        },
    )
    print_methods(
        "Rounding, learning rates and clipping",
        ["maj@1"],
        ["pass@1", "pass@4"],
        {
            f"{what}, {setting}": (record, [record])
            for what, settings in {
                "one round of seed 0, rounded in four ways": {
                    "norm 1": "ei_lr/round_1e-3",
                    "norm 1, `--lr 3e-4`": "ei_lr/round_3e-4",
                    "norm 1, beta2 0.999": "clipping/moment",
                    "norm 0.1 (the default)": "clipping/round",
                },
                "two rounds": {
                    "norm 1": "arithmetic/ei",
                    "norm 1, `--lr 3e-4`": "ei_lr/easy_3e-4",
                    "norm 0.1": "clipping/easy",
                },
                "from the base": {
                    "norm 1": "arithmetic/ei_base",
                    "norm 1, `--lr 3e-4`": "ei_lr/base_3e-4",
                },
                "harder task, two rounds": {
                    "norm 1": "hard/ei",
                    "norm 1, `--lr 3e-4`": "ei_lr/hard_3e-4",
                    "norm 1, beta2 0.999": "clipping/hard_moment",
                    "norm 0.1": "clipping/hard",
                },
            }.items()
            for setting, record in settings.items()
        },
    )
    print_trials(
        {
            "PPO, temperature 1 (*t1*)": ("tuning/t1", 0),
            "*t1*, `--lr 5e-4`": ("tuning/lr5e-4", 0),
            "*t1*, `--batch-size 32`": ("tuning/batch32", 0),
            "*t1*, `--epochs 4`": ("tuning/epochs4", 0),
            "*t1*, `--kl-coef 0`": ("tuning/kl0", 0),
            "*t1*, `--kl-coef 0.001`": ("tuning/kl1e-3", 0),
            "*t1*, `--gae-lambda 0.95`": ("tuning/lambda95", 0),
            "*t1*, `--value-lr 3e-3`": ("tuning/valuelr3e-3", 0),
            "*t1*, 32 phases of 256 samples": ("tuning/half", 0),
            "36 phases of 512 samples, temperature 0.7": ("hard/phases36", 0),
            "36 phases of 512": ("hard/phases36_t1", 0),
            "36 phases of 512, `--lr 5e-4`": ("tuning/long_lr5e-4", 0),
            "72 phases of 256": ("tuning/long_half", 0),
            "144 phases of 128": ("tuning/long_quarter", 0),
            "144 phases of 128, `--lr 5e-4`": ("tuning/long_quarter_lr5e-4", 0),
            "144 phases of 128, temperature 0.7": ("tuning/long_quarter_t07", 0),
            "288 phases of 64": ("tuning/long_eighth", 0),
            "expert iteration, `--deduplicate`": ("hard/ei_dedup", 0),
            "the same, `--epochs 12`": ("hard/long_dedup", 0),
            "expert iteration, norm 1": ("hard/ei", 0),
            "the same, `--lr 3e-4`": ("ei_lr/hard_3e-4", 0),
            "the same, beta2 0.999": ("clipping/hard_moment", 0),
            "the same, `--continue`": ("hard/continue", 0),
            "the same, `--samples 16 --epochs 1`": ("hard/k16_once", 0),
            "expert iteration, norm 0.1": ("clipping/hard", 0),
        }
    )
    for task in ("easy", "hard"):
        rows = {
            "PPO (`--advantage gae`)": f"comparison/{task}_ppo",
            "RLOO (`loo`)": f"comparison/{task}_loo",
            "GRPO (`group --group-std`)": f"comparison/{task}_group_std",
            "VinePPO (`mc --mc-samples 3`)": f"comparison/{task}_mc",
            "VinePPO, minibatches of 16": f"comparison/{task}_mc_small",
            "VinePPO, as many updates as PPO": f"comparison/{task}_mc_more",
            "expert iteration": f"clipping/{task}",
        }
        print_comparison(f"Methods with as many samples, {task} task", rows)
    print_variants(
        {
            "*ppo* as it is: sparse reward, KL 0.05, value detached": "arithmetic/ppo",
            "`--kl-coef 0`": "ppo_variants/kl0",
            "`--no-detach-value`": "ppo_variants/attached",
            "`--reward dense`": "ppo_variants/dense",
            "`--reward orm`": "ppo_variants/orm",
            "`--reward orm_dense`": "ppo_variants/orm_dense",
            "`--reward orm --add-outcome`": "ppo_variants/orm_outcome",
            "`--lora-rank 16 --lr 2e-3`": "ppo_variants/lora",
            "`--gae-lambda 0.95`": "ppo_variants/lam095",
        }
    )
    print_rerank(
        {
            "SFT, whose samples it was trained on": "orm/orm_on_sft",
            "PPO, of which it saw none": "orm/orm_on_ppo",
            "RCRL, of which it saw none": "rerank/rcrl_ratio10",
            "expert iteration, of which it saw none": "rerank/ei",
            "expert iteration (de-duplicated), of which it saw none": "rerank/ei_dedup",
        }
    )
    print_labels(
        "Return-conditioned RL",
        ["pass@1", "pass@16"],
        {
            "1 : 1, label per line": ("rcrl/ratio1", True),
            "10 : 1, label per line": ("rcrl/ratio10", True),
            "100 : 1, label per line": ("rcrl/ratio100", True),
            "1 : 1, one label per solution": ("rcrl/outcome1", True),
            "control: only the correct ones, no labels": ("rcrl/control", True),
            "control: the correct ones of 1 : 1, no labels": ("rcrl/control_1600", True),
            "control: all of 1 : 1, no labels": ("rcrl/control_mixed", True),
            "the expert iteration that it samples from": ("arithmetic/ei_dedup", False),
            "SFT": ("arithmetic/sft", False),
        },
    )
    print_labels(
        "Return-conditioned RL on all samples",
        ["pass@1", "pass@16"],
        {
            "10 : 1 of all samples, label per line": ("rcrl_all/ratio10", True),
            "control: its correct ones, no labels": ("rcrl_all/control", True),
            "harder task, 10 : 1 of all samples": ("rcrl_all/hard_ratio10", True),
            "harder task, control: its correct ones, no labels": ("rcrl_all/hard_control", True),
            "harder task, the expert iteration that both sample from": (
                "rcrl_all/hard_policy",
                False,
            ),
        },
    )
    print_labels(
        "Return-conditioned RL, harder task",
        ["pass@1", "pass@16", "distinct@16"],
        {
            "10 : 1, label per line": ("hard_rcrl/ratio10", True),
            "control: only the correct ones, no labels": ("hard_rcrl/control", True),
            "10 : 1 once more": ("hard_rcrl/again", True),
            "the same, `--monotone`": ("hard_rcrl/monotone", True),
            "the same, `--label-rule any --monotone`": ("hard_rcrl/any_monotone", True),
            "the expert iteration that it samples from": ("hard/ei", False),
            "the same with a third round": ("hard/rounds3", False),
            "SFT": ("hard/sft", False),
        },
    )
    print_single_runs(
        "GSM8K",
        {
            "maj@1": True,
            "maj@96": True,
            "rerank@96": True,
            "weighted@96": False,
            "pass@1": True,
            "pass@32": False,
            "pass@96": True,
        },
        {
            "SFT, 4 epochs": "gsm8k_smollm2/sft",
            "one round of expert iteration, K = 8": "gsm8k_smollm2/ei",
            "PPO, 16 phases, `--lr 1e-5`": "gsm8k_smollm2/ppo",
            "PPO, 7 phases, `--lr 1e-4`": "gsm8k_smollm2/ppo_1e-4",
        },
    )
    print_selections(
        {
            "the first 230 alone": ("pre_ppo/original", 230),
            "+ all 2,074 of the pool": ("pre_ppo/all", 2304),
            "+ `lowest` 10 %": ("pre_ppo/lowest", 437),
            "+ `floor` 10 %": ("pre_ppo/floor", 437),
            "+ `frontier` 10 %": ("pre_ppo/frontier", 437),
            "+ `random` 10 %": ("pre_ppo/random", 437),
            "+ `lowest` 20 %": ("pre_ppo/lowest20", 645),
            "+ `lowest` 50 %": ("pre_ppo/lowest50", 1267),
            "+ `lowest` 10 %, scored by a smaller model": ("pre_ppo/small_lowest", 437),
        }
    )


if __name__ == "__main__":
    main()
