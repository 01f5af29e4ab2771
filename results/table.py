"""Print one table of records: `python results/table.py results/arithmetic.jsonl [FILE.jsonl ...]`.

A row is a method. A cell is the mean over its seeds, with the lowest and the highest seed. The
columns are the metrics on the test split. If they were evaluated, maj@1 after [BAD] and without a
label follow. The 95 % interval over problems of a single run is in its record.
"""

import re
import sys
from pathlib import Path

import numpy as np
from records import evaluations, metrics, spread, test_metric, tested_methods

METRIC = r"(maj|rerank|weighted|pass|distinct)@\d+"


def columns_of(method: Path) -> dict[str, tuple[str, str]]:
    """Return title -> (metric, kind of evaluation) of every metric that was measured."""
    reports = evaluations(method).values()
    names = [name for report in reports for name in report if re.fullmatch(METRIC, name)]
    columns = {name: (name, "test") for name in names}
    labels = [kind for kind in ("bad", "none") if evaluations(method, kind)]
    return columns | {f"maj@1 {kind}": ("maj@1", kind) for kind in labels}


def main(files: list[str]) -> None:
    experiments = [Path(file).resolve().with_suffix("") for file in files]
    methods = [file / name for file in experiments for name in tested_methods(file)]
    columns = {}
    for method in methods:
        columns |= columns_of(method)
    print("| method | seeds | " + " | ".join(columns) + " | rollouts | minutes |")
    print("|---" * (len(columns) + 4) + "|")
    for method in methods:
        cells = [str(len(evaluations(method)))]
        for metric, kind in columns.values():
            values = test_metric(method, metric, kind)
            cells.append(spread(values) if values else "")
        last = [log[-1] for log in metrics(method).values()]
        samples, seconds = ([row.get(key, 0) for row in last] for key in ("samples", "seconds"))
        cells += [f"{np.mean(samples):,.0f}", f"{np.mean(seconds) / 60:.1f}"] if last else ["", ""]
        print(f"| {method.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
