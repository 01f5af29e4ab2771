"""Compare methods with a control: `python results/compare.py results/pre_ppo.jsonl original`.

For each method the table has the mean over its seeds. It has the differences to the control with
the same seed and the 95 % interval of their mean. If the interval contains 0, these runs cannot
tell the methods apart. Name the metrics to compare after the control (default: maj@1 pass@1
pass@16).
"""

import sys
from pathlib import Path

from records import mean, paired, test_metric, tested_methods


def main(file: str, control: str, *names: str) -> None:
    experiment = Path(file).resolve().with_suffix("")
    for metric in names or ("maj@1", "pass@1", "pass@16"):
        columns = metric, "mean", f"- {control}, by seed", "mean difference and 95 % interval"
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name in tested_methods(experiment):
            values, pairs, interval = test_metric(experiment / name, metric), [], ""
            if name != control:
                pairs, interval = paired(values, test_metric(experiment / control, metric))
            each = ", ".join(f"{pair:+.3f}" for pair in pairs)
            print(f"| {name} | {mean(values):.3f} | {each} | {interval} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
