"""The tables of the pages that are made of records: `python results/tables.py`.

One row per method: the mean over its seeds, of some metrics with the lowest and the highest seed. tests/test_results.py
compares what this prints with README.md, docs/ and results/README.md."""

import numpy as np
from records import recorded, spread, test_metric


def logged(name: str, key: str) -> dict[int, float]:
    """seed -> what the last row of metrics.jsonl says, 0 where it does not have the key"""
    return {seed: log[-1].get(key, 0) for seed, log in recorded(name).items()}


def mean_of_sums(names: list[tuple[str, str]], seeds: dict[int, float]) -> float:
    """Of several runs of a seed, (name, key of the last row) each, the mean over these seeds."""
    return sum(float(np.mean([logged(name, key)[seed] for seed in seeds])) for name, key in names)


def print_methods(
    title: str, with_spread: list[str], without: list[str], rows: dict[str, tuple[str, list]]
) -> None:
    """rows: label -> (where it was tested, the runs that were made for it: a name, of which rollouts and minutes
    count, or (name, "seconds", "samples", ...), of which these count)"""
    columns = ["seeds", *with_spread, *without, "rollouts", "minutes"]
    print(f"\n{title}\n\n| method | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for label, (tested, runs) in rows.items():
        found = {metric: test_metric(tested, metric) for metric in with_spread + without}
        cells = [str(len(found["maj@1"])), *(spread(found[metric]) for metric in with_spread)]
        cells += [f"{np.mean(list(found[metric].values())):.3f}" for metric in without]
        parts = [(run, "seconds", "samples") if isinstance(run, str) else run for run in runs]
        rollouts = [(name, key) for name, *keys in parts for key in keys if key != "seconds"]
        seconds = [(name, key) for name, *keys in parts for key in keys if key == "seconds"]
        seeds = found["maj@1"]
        cells += [
            f"{mean_of_sums(rollouts, seeds):,.0f}",
            f"{mean_of_sums(seconds, seeds) / 60:.1f}",
        ]
        print(f"| {label} | {' | '.join(cells)} |")


def print_rerank(rows: dict[str, str]) -> None:
    metrics = ("maj@1", "maj@32", "rerank@32", "weighted@32", "pass@32")
    print(
        f"\nReranking\n\n| samples of | {' | '.join(metrics)} | rerank@32 - maj@32, by seed |\n{'|---' * 7}|"
    )
    for label, name in rows.items():
        tests = [report["rerank@32 - maj@32"] for report in recorded(name, "test.json").values()]
        each = ", ".join(f"{test['difference']:+.3f}" for test in tests)
        ps = [f"{test['p']:.3f}" if test["p"] < 0.0095 else f"{test['p']:.2f}" for test in tests]
        said = (
            "each p < 0.001" if all(test["p"] < 0.001 for test in tests) else f"p = {', '.join(ps)}"
        )
        print(
            f"| {label} | {' | '.join(spread(test_metric(name, m)) for m in metrics)} | {each} ({said}) |"
        )


def print_of_one_run(title: str, metrics: dict[str, bool], rows: dict[str, str]) -> None:
    """metrics: name -> whether with its interval over problems; rows: label -> where the run is. Blank what was not measured."""
    print(
        f"\n{title}\n\n| | {' | '.join(metrics)} | rollouts | minutes |\n{'|---' * (len(metrics) + 3)}|"
    )
    for label, name in rows.items():
        (report,), cells = recorded(name, "test.json").values(), []
        for metric, with_interval in metrics.items():
            found = report.get(metric)
            cells.append(f"{found['value']:.3f}" if found else "")
            cells[-1] += (
                " ({:.3f} - {:.3f})".format(*found["ci95"]) if found and with_interval else ""
            )
        (drawn,), (seconds,) = logged(name, "samples").values(), logged(name, "seconds").values()
        print(f"| {label} | {' | '.join(cells)} | {drawn:,.0f} | {seconds / 60:.1f} |")


def print_labels(title: str, without: list[str], rows: dict[str, tuple[str, str | None]]) -> None:
    """rows: label -> (where it was tested, the run whose mixture it was trained on, if any); of the others only the seeds
    that a mixture was made from"""
    columns = [
        "seeds",
        "correct + incorrect",
        "maj@1 after `[GOOD]`",
        "after `[BAD]`",
        "no label",
        *without,
    ]
    print(f"\n{title}\n\n| mixture | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    seeds = {
        seed for name, mixture in rows.values() if mixture for seed in test_metric(name, "maj@1")
    }

    def tested(name: str, metric: str, file: str = "test.json") -> dict[int, float]:
        return {
            seed: value for seed, value in test_metric(name, metric, file).items() if seed in seeds
        }

    for label, (name, mixture) in rows.items():
        parts = (
            [np.mean(list(logged(mixture, key).values())) for key in ("n_correct", "n_incorrect")]
            if mixture
            else []
        )
        cells = [str(len(tested(name, "maj@1"))), " + ".join(f"{part:,.0f}" for part in parts)]
        after = {file: tested(name, "maj@1", f"{file}.json") for file in ("test", "bad", "none")}
        if not after["bad"]:
            after["test"], after["none"] = {}, after["test"]
        cells += [spread(values) if values else "" for values in after.values()]
        cells += [f"{np.mean(list(tested(name, metric).values())):.3f}" for metric in without]
        print(f"| {' | '.join([label, *cells])} |".replace("|  |", "| |").replace("|  |", "| |"))


def print_variants(rows: dict[str, str]) -> None:
    print(f"\nPPO\n\n| variant | maj@1 | pass@1 | pass@16 | phase kept (of 20) |\n{'|---' * 5}|")
    for label, name in rows.items():
        if not recorded(name):
            continue
        cells = [spread(test_metric(name, "maj@1"))]
        cells += [
            f"{np.mean(list(test_metric(name, metric).values())):.3f}"
            for metric in ("pass@1", "pass@16")
        ]
        kept = []
        for log in recorded(name).values():
            tried = [row for row in log if "maj@1" in row]
            kept.append(
                str(max(tried, key=lambda row: row["maj@1"])["phase"])
            )  # the first of equal ones
        print(f"| {label} | {' | '.join(cells)} | {', '.join(kept)} |")


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
            "RCRL": (  # its samples were drawn by the run of another ratio
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
            "PPO, 72 phases": ("hard/phases72", ["hard/phases72"]),
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
        "Learning rates of expert iteration",
        ["maj@1"],
        ["pass@1", "pass@4"],
        {
            "one round of seed 0, rounded in four ways, `--lr 1e-3` (the default)": (
                "ei_lr/round_1e-3",
                ["ei_lr/round_1e-3"],
            ),
            "the same, `--lr 3e-4`": ("ei_lr/round_3e-4", ["ei_lr/round_3e-4"]),
            "two rounds, `--lr 1e-3`": ("arithmetic/ei", ["arithmetic/ei"]),
            "two rounds, `--lr 3e-4`": ("ei_lr/easy_3e-4", ["ei_lr/easy_3e-4"]),
            "from the base, `--lr 1e-3`": ("arithmetic/ei_base", ["arithmetic/ei_base"]),
            "from the base, `--lr 3e-4`": ("ei_lr/base_3e-4", ["ei_lr/base_3e-4"]),
            "harder task, two rounds, `--lr 1e-3`": ("hard/ei", ["hard/ei"]),
            "harder task, two rounds, `--lr 3e-4`": ("ei_lr/hard_3e-4", ["ei_lr/hard_3e-4"]),
        },
    )
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
            "1 : 1, label per line": ("rcrl/ratio1", "rcrl/ratio1"),
            "10 : 1, label per line": ("rcrl/ratio10", "rcrl/ratio10"),
            "100 : 1, label per line": ("rcrl/ratio100", "rcrl/ratio100"),
            "1 : 1, one label per solution": ("rcrl/outcome1", "rcrl/outcome1"),
            "control: only the correct ones, no labels": ("rcrl/control", "rcrl/control"),
            "control: the correct ones of 1 : 1, no labels": (
                "rcrl/control_1600",
                "rcrl/control_1600",
            ),
            "control: all of 1 : 1, no labels": ("rcrl/control_mixed", "rcrl/control_mixed"),
            "the expert iteration that it samples from": ("arithmetic/ei_dedup", None),
            "SFT": ("arithmetic/sft", None),
        },
    )
    print_labels(
        "Return-conditioned RL on all samples",
        ["pass@1", "pass@16"],
        {
            "10 : 1 of all samples, label per line": ("rcrl_all/ratio10", "rcrl_all/ratio10"),
            "control: its correct ones, no labels": ("rcrl_all/control", "rcrl_all/control"),
            "harder task, 10 : 1 of all samples": (
                "rcrl_all/hard_ratio10",
                "rcrl_all/hard_ratio10",
            ),
            "harder task, control: its correct ones, no labels": (
                "rcrl_all/hard_control",
                "rcrl_all/hard_control",
            ),
            "harder task, the expert iteration that both sample from": (
                "rcrl_all/hard_policy",
                None,
            ),
        },
    )
    print_labels(
        "Return-conditioned RL, harder task",
        ["pass@1", "pass@16", "distinct@16"],
        {
            "10 : 1, label per line": ("hard_rcrl/ratio10", "hard_rcrl/ratio10"),
            "control: only the correct ones, no labels": ("hard_rcrl/control", "hard_rcrl/control"),
            "the expert iteration that it samples from": ("hard/ei", None),
            "the same with a third round": ("hard/rounds3", None),
            "SFT": ("hard/sft", None),
        },
    )
    print_of_one_run(
        "GSM8K",
        {"maj@1": True, "maj@96": True, "rerank@96": True, "weighted@96": False, "pass@1": True, "pass@32": False,
         "pass@96": True},
        {
            "SFT, 4 epochs": "gsm8k_smollm2/sft",
            "one round of expert iteration, K = 8": "gsm8k_smollm2/ei",
            "PPO, 16 phases, `--lr 1e-5`": "gsm8k_smollm2/ppo",
            "PPO, 7 phases, `--lr 1e-4`": "gsm8k_smollm2/ppo_1e-4",
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
