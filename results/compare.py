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

folder, control, *metrics = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]
runs: dict[str, dict[int, dict]] = {}
for file in sorted(folder.glob("*/test.json")):
    name, seed = re.fullmatch(r"(.+)_(\d+)", file.parent.name).groups()
    runs.setdefault(name, {})[int(seed)] = json.loads(file.read_text())
for metric in metrics or ["maj@1", "pass@1", "pass@16"]:
    print(f"\n| {metric} | mean | - {control}, by seed | mean difference and 95 % interval |\n|---|---|---|---|")
    for name, by_seed in runs.items():
        values = [report[metric]["value"] for report in by_seed.values()]
        pairs = [
            by_seed[s][metric]["value"] - runs[control][s][metric]["value"] for s in by_seed.keys() & runs[control]
        ]
        half = T95[len(pairs)] * np.std(pairs, ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        apart = (
            ""
            if name == control
            else f"{np.mean(pairs):+.3f} ({np.mean(pairs) - half:+.3f} to {np.mean(pairs) + half:+.3f})"
        )
        each = "" if name == control else ", ".join(f"{p:+.3f}" for p in pairs)
        print(f"| {name} | {np.mean(values):.3f} | {each} | {apart} |")
