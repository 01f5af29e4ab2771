"""Compare recorded runs with a control, seed by seed: `python results/compare.py results/pre_ppo original [metric ...]`.

For each method and metric the mean over seeds, the differences to the control of the same seed, and the 95 % interval of
their mean. Where the interval holds 0 these runs cannot tell the two apart."""

import sys
from pathlib import Path

import numpy as np
from records import methods, paired, test_metric


def main(folder: str, control: str, *metrics: str) -> None:
    path = Path(folder).resolve()
    for metric in metrics or ("maj@1", "pass@1", "pass@16"):
        print(
            f"\n| {metric} | mean | - {control}, by seed | mean difference and 95 % interval |\n|---|---|---|---|"
        )
        for name in methods(path):
            values = test_metric(path / name, metric)
            pairs, apart = (
                paired(values, test_metric(path / control, metric)) if name != control else ([], "")
            )
            each = ", ".join(f"{pair:+.3f}" for pair in pairs)
            print(f"| {name} | {np.mean(list(values.values())):.3f} | {each} | {apart} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
