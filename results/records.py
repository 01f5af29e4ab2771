"""Read the records of the runs: one file per experiment, one line per run.

A line of results/EXPERIMENT.jsonl is an object with five keys:

    name        The method.
    seed        Tells the runs of a method apart. It is mostly the seed of the run.
    args        The settings of the run (args.json). None if only an evaluation was recorded.
    metrics     The rows of metrics.jsonl.
    evaluation  The evaluations by name: test, bad, none, quality, ...

The scripts next to this file call a method EXPERIMENT/METHOD, for example "hard/ei".
"""

import functools
import json
import math
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent
# Student's t: 97.5 % quantile by number of pairs.
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@functools.cache
def read(experiment: str | Path) -> list[dict]:
    """Return the records of an experiment, sorted by name and seed. Empty if nothing is recorded.

    experiment: name of a file in results/, or an absolute path, with or without .jsonl.
    """
    path = RESULTS / experiment
    file = path.with_name(path.name.removesuffix(".jsonl") + ".jsonl")
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tested_methods(experiment: str | Path) -> list[str]:
    """Return the methods of an experiment that were evaluated on the test split."""
    names = (record["name"] for record in read(experiment) if "test" in record["evaluation"])
    return list(dict.fromkeys(names))


def runs(method: str | Path) -> dict[int, dict]:
    """Return the records of a method by seed."""
    experiment, name = Path(method).parent, Path(method).name
    return {record["seed"]: record for record in read(experiment) if record["name"] == name}


def metrics(method: str | Path) -> dict[int, list[dict]]:
    """Return the rows of metrics.jsonl by seed, of the runs that have any."""
    return {seed: run["metrics"] for seed, run in runs(method).items() if run["metrics"]}


def evaluations(method: str | Path, kind: str = "test") -> dict[int, dict]:
    """Return one kind of evaluation by seed, of the runs that have it."""
    found = {seed: run["evaluation"].get(kind) for seed, run in runs(method).items()}
    return {seed: report for seed, report in found.items() if report is not None}


def test_metric(method: str | Path, metric: str, kind: str = "test") -> dict[int, float]:
    """Return a metric of an evaluation by seed, of the runs that have it."""
    reports = evaluations(method, kind).items()
    return {seed: report[metric]["value"] for seed, report in reports if metric in report}


def over_phases(method: str | Path, key: str, first: int, last: int) -> dict[int, float]:
    """Return the mean of a metric over some phases of PPO by seed. Phases may lack it."""
    means = {}
    for seed, log in metrics(method).items():
        rows = [row for row in log if row.get(key) is not None and first <= row["phase"] <= last]
        if rows:
            means[seed] = float(np.mean([row[key] for row in rows]))
    return means


def mean(values: dict[int, float]) -> float:
    # The sum of Python rounds differently since 3.12. Some means are half-way between two digits.
    return float(np.mean(list(values.values())))


def spread(values: dict[int, float], digits: int = 3) -> str:
    """Return the mean of the seeds as text. With several seeds add the lowest and the highest."""
    low, high = min(values.values()), max(values.values())
    spread = f" ({low:.{digits}f} - {high:.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def paired(values: dict[int, float], control: dict[int, float]) -> tuple[list[float], str]:
    """Return the differences of the seeds that both have, and their mean as text.

    The text has the 95 % interval of Student's t. With three seeds its half-width is 4.30 standard
    errors.
    """
    pairs = [values[seed] - control[seed] for seed in sorted(values.keys() & control.keys())]
    if len(pairs) < 2:
        return pairs, f"{pairs[0]:+.3f} (one seed)" if pairs else ""
    center, half = np.mean(pairs), T95[len(pairs)] * np.std(pairs, ddof=1) / math.sqrt(len(pairs))
    return pairs, f"{center:+.3f} ({center - half:+.3f} to {center + half:+.3f})"
