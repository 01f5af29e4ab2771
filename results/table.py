"""Print the table of a folder of recorded runs: `python results/table.py results/arithmetic`.

One row per method (a run folder's name without its seed): the mean over seeds and the lowest and highest seed of each
metric on the test split. The 95 % interval over problems of a single run is in its test.json."""

import json
import re
import sys
from pathlib import Path

folder = Path(sys.argv[1])
runs: dict[str, list[dict]] = {}
for file in sorted(folder.glob("*/test.json")):
    runs.setdefault(re.sub(r"_\d+$", "", file.parent.name), []).append(json.loads(file.read_text()))
names = [key for key in next(iter(runs.values()))[0] if re.fullmatch(r"(maj|rerank|weighted|pass|distinct)@\d+", key)]
print("| method | seeds | " + " | ".join(names) + " | minutes |")
print("|---" * (len(names) + 3) + "|")
for method, reports in runs.items():
    cells = []
    for name in names:
        values = [report[name]["value"] for report in reports]
        spread = f" ({min(values):.3f} - {max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):.3f}{spread}")
    logs = [p / "metrics.jsonl" for p in sorted(folder.glob(f"{method}_[0-9]")) if (p / "metrics.jsonl").exists()]
    minutes = [json.loads(log.read_text().splitlines()[-1])["seconds"] / 60 for log in logs]
    spent = f"{sum(minutes) / len(minutes):.1f}" if minutes else ""
    print(f"| {method} | {len(reports)} | {' | '.join(cells)} | {spent} |")
