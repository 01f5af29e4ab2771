"""Print tables and numbers of the generative reward model: `python results/genrm.py`."""

from records import evaluations, metrics, over_phases, paired, spread, test_metric

# label -> method
REWARDS = {
    "verifier": "arithmetic/ppo",
    "GenRM next to the gold solution": "genrm/gold",
    "GenRM next to the best of 16": "genrm/best",
    "half checked, a quarter each GenRM": "genrm/hybrid",
    "the same, others join in two steps": "genrm/hybrid_two_steps",
    "the same, `verifiable_first`": "genrm/hybrid_first",
}


def print_quality() -> None:
    """Print how good each reward model is on dev."""
    columns = {
        "AUC": "auc",
        "right score": "score_if_correct",
        "wrong score": "score_if_incorrect",
        "wrong, 0.5 or more": "false_positive_rate",
        "order gap": "order_gap",
        "order bias": "order_bias",
        "nonsense at most": "nonsense_worst",
    }
    print(f"| model, seed | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for seed, report in evaluations("genrm/genrm", "quality").items():
        print(f"| {seed} | {' | '.join(f'{report[key]:.3f}' for key in columns.values())} |")


def print_ppo() -> None:
    """Print the results of PPO with each reward. The verifier has only the seeds of the others."""
    columns = [
        "maj@1",
        "pass@16",
        "samples correct, phases 17-20",
        "mean reward, phases 17-20",
        "incorrect samples scored 0.5 or more, phases 1-2 → 17-20",
        "better than the gold solution, phases 17-20",
    ]
    print(f"\n| reward | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    seeds = evaluations("genrm/gold")

    def cell(values: dict[int, float], digits: int) -> str:
        values = {seed: value for seed, value in values.items() if seed in seeds}
        return spread(values, digits) if values else ""

    for label, method in REWARDS.items():
        cells = [cell(test_metric(method, metric), 3) for metric in ("maj@1", "pass@16")]
        cells += [cell(over_phases(method, key, 17, 20), 2) for key in ("correct", "reward")]
        phases = (1, 2), (17, 20)
        positive = [over_phases(method, "false_positive_rate", *ends) for ends in phases]
        cells += [" → ".join(cell(values, 2) for values in positive) if all(positive) else ""]
        cells += [cell(over_phases(method, "beats_gold_rate", 17, 20), 2)]
        print(f"| {label} | {' | '.join(cells)} |")


def print_differences() -> None:
    """Print the differences of maj@1 between rewards, and how far PPO moved from SFT."""
    print()
    labels = list(REWARDS)
    for i, (label, method) in enumerate(REWARDS.items()):
        for control in labels[:i]:
            values, others = (test_metric(name, "maj@1") for name in (method, REWARDS[control]))
            pairs, interval = paired(values, others)
            each = ", ".join(f"{pair:+.3f}" for pair in pairs)
            print(f"maj@1, {label} - {control}: {interval}; by seed {each}")
        logs = metrics(method).values()
        kl = [max(row["ref_kl_k3"] for row in log if "ref_kl_k3" in row) for log in logs]
        each = ", ".join(f"{value:.3f}" for value in kl)
        print(f"highest KL of a phase, {label}: {each} nats per token")


if __name__ == "__main__":
    print_quality()
    print_ppo()
    print_differences()
