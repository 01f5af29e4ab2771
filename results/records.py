"""The records of the runs, for the scripts beside this file: results/FOLDER/METHOD_SEED/ holds what a run wrote."""

import json
import math
import re
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def methods(folder: str | Path, file: str = "test.json") -> list[str]:
    """The methods of a folder that have this file, without their seeds."""
    return list(
        dict.fromkeys(
            re.sub(r"_\d+$", "", path.parent.name)
            for path in sorted(Path(folder).glob(f"*/{file}"))
        )
    )


def recorded(name: str | Path, file: str = "metrics.jsonl") -> dict[int, list | dict]:
    """seed -> what a file of the method's record holds: the rows of a .jsonl file or the object of a .json file. name:
    folder/method, below results/ or absolute. A record without a seed counts as seed 0. Empty where nothing is recorded."""
    path, found = RESULTS / name, {}
    for record in sorted(path.parent.glob(f"{path.name}*")):
        named = re.fullmatch(re.escape(path.name) + r"(?:_(\d+))?", record.name)
        if named and (record / file).exists():
            text = (record / file).read_text()
            rows = (
                [json.loads(line) for line in text.splitlines()]
                if file.endswith(".jsonl")
                else json.loads(text)
            )
            found[int(named[1] or 0)] = rows
    return found


def test_metric(name: str | Path, metric: str, file: str = "test.json") -> dict[int, float]:
    """seed -> a metric of an evaluation; the seeds that have it"""
    return {
        seed: report[metric]["value"]
        for seed, report in recorded(name, file).items()
        if metric in report
    }


def over_phases(name: str | Path, key: str, first: int, last: int) -> dict[int, float]:
    """seed -> the mean of a metric over these phases of PPO, those left out where it is null"""
    found = {
        seed: [
            row[key] for row in log if row.get(key) is not None and first <= row["phase"] <= last
        ]
        for seed, log in recorded(name).items()
    }
    return {seed: float(np.mean(values)) for seed, values in found.items() if values}


def spread(values: dict[int, float]) -> str:
    """The mean of the seeds, of several with the lowest and the highest."""
    # numpy's mean, because Python's sum rounds otherwise from 3.12 on, and some means lie in the middle of two numbers
    mean, low, high = np.mean(list(values.values())), min(values.values()), max(values.values())
    return f"{mean:.3f}" + (f" ({low:.3f} - {high:.3f})" if len(values) > 1 else "")


def paired(values: dict[int, float], control: dict[int, float]) -> tuple[list[float], str]:
    """The differences of the seeds that both have, and their mean with its 95 % interval as text (Student's t: with three
    seeds its half-width is 4.30 standard errors)."""
    pairs = [values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())]
    if len(pairs) < 2:
        return pairs, f"{pairs[0]:+.3f} (one seed)" if pairs else ""
    half = T95[len(pairs)] * np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    return (
        pairs,
        f"{np.mean(pairs):+.3f} ({np.mean(pairs) - half:+.3f} to {np.mean(pairs) + half:+.3f})",
    )
