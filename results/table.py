"""Print one table of recorded runs: `python results/table.py results/arithmetic [results/ei_samples ...]`.

One row per method (a run folder's name without its seed): the mean over seeds and the lowest and highest seed of each
metric on the test split, and of maj@1 with [BAD] and without a label where those were evaluated. The 95 % interval over
problems of a single run is in its test.json."""

import re
import sys
from pathlib import Path

from records import methods, recorded, spread, test_metric

METRIC = r"(maj|rerank|weighted|pass|distinct)@\d+"
rows = [
    Path(folder).resolve() / name
    for folder in sys.argv[1:]
    for name in methods(Path(folder).resolve())
]
columns = {}
for row in rows:
    for file in ("test.json", "bad.json", "none.json"):
        for report in recorded(row, file).values():
            names = (
                [name for name in report if re.fullmatch(METRIC, name)]
                if file == "test.json"
                else ["maj@1"]
            )
            columns |= {
                name if file == "test.json" else f"maj@1 {file[:-5]}": (name, file)
                for name in names
            }
print("| method | seeds | " + " | ".join(columns) + " | rollouts | minutes |")
print("|---" * (len(columns) + 4) + "|")
for row in rows:
    cells = []
    for metric, file in columns.values():
        values = test_metric(row, metric, file)
        cells.append(spread(values) if values else "")
    last = [log[-1] for log in recorded(row).values()]
    spent = f"{sum(r['seconds'] for r in last) / len(last) / 60:.1f}" if last else ""
    drawn = f"{sum(r.get('samples', 0) for r in last) / len(last):,.0f}" if last else ""
    print(
        f"| {row.name} | {len(recorded(row, 'test.json'))} | {' | '.join(cells)} | {drawn} | {spent} |"
    )
