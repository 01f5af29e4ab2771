"""Check that the benchmarks run and report consistent numbers.

The speed itself is not tested, because machines differ.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def test_the_generation_benchmark_compares_engines_and_computes_the_limit(tmp_path):
    out = tmp_path / "deep" / "report.json"
    argv = [
        "--problems",
        "2",
        "--samples",
        "2",
        "4",
        "--gen-batch-size",
        "4",
        "--max-new-tokens",
        "40",
        "--repeats",
        "1",
        "--engines",
        "generate",
        "plain loop",
        "model.generate",
        "--out",
        out,
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "generation.py", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sampling uses the plain loop") == 1
    report = json.loads(out.read_text())
    assert [(row["samples"], row["problems"]) for row in report["table"]] == [(2, 4), (4, 2)], (
        "all rows have the same number of samples"
    )
    for row in report["table"]:
        ours, plain, theirs = row["generate"], row["plain loop"], row["model.generate"]
        assert row["gen_batch_size"] == 4
        for key, loop in (("speedup", ours), ("plain_loop_speedup", plain)):
            speed = loop["tokens_per_second"]
            assert row[key] * theirs["tokens_per_second"] == pytest.approx(speed)
        assert ours["mean_length"] == plain["mean_length"], "the same samples"
        assert (
            0 < row["fraction_of_limit"] < 1 and (ours["wasted"] or 0) == 0 <= theirs["wasted"] < 1
        )
        assert row["limit"] * row["fraction_of_limit"] == pytest.approx(ours["tokens_per_second"])
        assert row["weights"] == 385 * 128 + 3 * (4 * 128 * 128 + 3 * 128 * 352), (
            "the weights that a token is multiplied with"
        )
    for key in ("speedup", "plain_loop_speedup", "fraction_of_limit"):
        assert report[key] == report["table"][-1][key]
