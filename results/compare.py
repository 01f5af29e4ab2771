"""Compare recorded runs with a control, seed by seed: `python results/compare.py results/pre_ppo original [metric ...]`.

For each method and metric the mean over seeds, the differences to the control of the same seed, and the 95 % interval of
their mean (Student's t: with three seeds its half-width is 4.30 standard errors). Where the interval holds 0 these runs
cannot tell the two apart."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def recorded(folder: Path, file: str = "test.json") -> dict[str, dict[int, dict]]:
    """method -> seed -> what a file of its record holds"""
    runs: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob(f"*/{file}")):
        if named := re.fullmatch(r"(.+)_(\d+)", path.parent.name):
            runs.setdefault(named[1], {})[int(named[2])] = json.loads(path.read_text())
    return runs


def paired(values: dict[int, float], control: dict[int, float]) -> tuple[list[float], str]:
    """The differences of the seeds that both have, and their mean with its 95 % interval as text."""
    pairs = [values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())]
    if len(pairs) < 2:
        return pairs, f"{pairs[0]:+.3f} (one seed)" if pairs else ""
    half = T95[len(pairs)] * np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    return pairs, f"{np.mean(pairs):+.3f} ({np.mean(pairs) - half:+.3f} to {np.mean(pairs) + half:+.3f})"


def main(folder: str, control: str, *metrics: str) -> None:
    runs = recorded(Path(folder))
    for metric in metrics or ("maj@1", "pass@1", "pass@16"):
        print(f"\n| {metric} | mean | - {control}, by seed | mean difference and 95 % interval |\n|---|---|---|---|")
        values = {name: {s: r[metric]["value"] for s, r in by_seed.items()} for name, by_seed in runs.items()}
        for name, by_seed in values.items():
            pairs, apart = paired(by_seed, values[control]) if name != control else ([], "")
            print(
                f"| {name} | {np.mean(list(by_seed.values())):.3f} | {', '.join(f'{p:+.3f}' for p in pairs)} | {apart} |"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
