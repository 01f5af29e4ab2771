"""Print the table of a folder of recorded runs: `python results/table.py results/arithmetic`.

One row per method (a run folder's name without its seed): the mean over seeds and the lowest and highest seed of each
metric on the test split, and of maj@1 with [BAD] and without a label where those were evaluated. The 95 % interval over problems of a single run is in its test.json."""

import json
import re
import sys
from pathlib import Path

folder = Path(sys.argv[1])
runs: dict[str, list[dict]] = {}
for file in sorted(folder.glob("*/test.json")):
    report = json.loads(file.read_text())
    for other in ("bad", "none"):
        if (conditioned := file.with_name(f"{other}.json")).exists():
            report[f"maj@1 {other}"] = json.loads(conditioned.read_text())["maj@1"]
    runs.setdefault(re.sub(r"_\d+$", "", file.parent.name), []).append(report)
keys = dict.fromkeys(key for reports in runs.values() for key in reports[0])
names = [key for key in keys if re.fullmatch(r"(maj|rerank|weighted|pass|distinct)@\d+( bad| none)?", key)]
print("| method | seeds | " + " | ".join(names) + " | rollouts | minutes |")
print("|---" * (len(names) + 4) + "|")
for method, reports in runs.items():
    cells = []
    for name in names:
        values = [report[name]["value"] for report in reports if name in report]
        spread = f" ({min(values):.3f} - {max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):.3f}{spread}" if values else "")
    logs = [p / "metrics.jsonl" for p in sorted(folder.glob(f"{method}_[0-9]")) if (p / "metrics.jsonl").exists()]
    last = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    spent = f"{sum(row['seconds'] for row in last) / len(last) / 60:.1f}" if last else ""
    drawn = f"{sum(row.get('samples', 0) for row in last) / len(last):,.0f}" if last else ""
    print(f"| {method} | {len(reports)} | {' | '.join(cells)} | {drawn} | {spent} |")
