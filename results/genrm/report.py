"""The tables and numbers of docs/findings.md on the generative reward model: `python results/genrm/report.py`."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from records import over_phases, paired, recorded, test_metric  # noqa: E402

ROWS = {
    "verifier": "arithmetic/ppo",
    "GenRM next to the gold solution": "genrm/gold",
    "GenRM next to the best of 16": "genrm/best",
    "half checked, a quarter each GenRM": "genrm/hybrid",
    "the same, verifiable questions first": "genrm/hybrid_first",
}


SEEDS = recorded("genrm/gold").keys()  # of the verifier there are more


def spread(values: list[float], digits: int) -> str:
    return (
        f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"
        if values
        else ""
    )


def of_these(values: dict[int, float]) -> list[float]:
    return [value for seed, value in values.items() if seed in SEEDS]


print(
    "| model, seed | AUC | right score | wrong score | wrong, 0.5 or more | order gap | order bias | nonsense at most |"
)
print("|---" * 8 + "|")
for seed, found in recorded("genrm/genrm", "quality.json").items():
    keys = (
        "auc",
        "score_if_correct",
        "score_if_incorrect",
        "false_positive_rate",
        "order_gap",
        "order_bias",
        "nonsense_worst",
    )
    print(f"| {seed} | " + " | ".join(f"{found[key]:.3f}" for key in keys) + " |")
print("\n| reward | maj@1 | pass@16 | samples correct, phases 17-20 | mean reward, phases 17-20 | incorrect samples scored 0.5 or more, phases 1-2 → 17-20 | better than the gold solution, phases 17-20 |")  # fmt: skip
print("|---" * 7 + "|")
for label, name in ROWS.items():
    if found := test_metric(name, "maj@1"):
        tested = [test_metric(name, metric) for metric in ("maj@1", "pass@16")]
        cells = [spread(of_these(values), 3) for values in tested]
        cells += [
            spread(of_these(over_phases(name, key, 17, 20)), 2) for key in ("correct", "reward")
        ]
        pleased = [
            spread(of_these(over_phases(name, "false_positive_rate", *ends)), 2)
            for ends in ((1, 2), (17, 20))
        ]
        above = spread(of_these(over_phases(name, "beats_gold_rate", 17, 20)), 2)
        cells += [" → ".join(pleased) if all(pleased) else "", above]
        print(f"| {label} | {' | '.join(cells)} |")
print()
for place, (label, name) in enumerate(ROWS.items()):
    for control, other in list(ROWS.items())[:place] if test_metric(name, "maj@1") else []:
        pairs, apart = paired(test_metric(name, "maj@1"), test_metric(other, "maj@1"))
        print(
            f"maj@1, {label} - {control}: {apart}; by seed {', '.join(f'{pair:+.3f}' for pair in pairs)}"
        )
    kl = [
        max(row["ref_kl_k3"] for row in log if "ref_kl_k3" in row)
        for log in recorded(name).values()
    ]
    if kl:
        print(f"highest KL of a phase, {label}: {', '.join(f'{k:.3f}' for k in kl)} nats per token")
