"""Check a fork: a script with common.py, runtime.py and tiny/ in a new folder, without engine/."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file


@pytest.fixture
def fork(tmp_path) -> Path:
    """Return a folder with only ppo.py, evaluate.py, common.py, runtime.py and tiny/."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for name in ("ppo.py", "evaluate.py", "common.py", "runtime.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tiny", folder / "tiny", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(folder: Path, command: str, *argv) -> str:
    """Run `python command argv...` in a folder, on a CPU. Return its standard error."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command.split(), "--device", "cpu", *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_fork_trains_with_ppo(fork):
    command = "ppo.py --model tiny --phases 2 --questions 4 --samples 2 --limit-train 32"
    command += " --limit-eval 4 --max-new-tokens 60 --eval-every 1 --lr 4e-3"
    printed = run(fork, f"{command} --out run")
    assert printed.count("plain loop") == 1, printed
    lines = (fork / "run" / "metrics.jsonl").read_text().splitlines()
    start, _, last = [json.loads(line) for line in lines]
    assert start["phase"] == 0 and last["phase"] == 2 and last["samples"] == 16
    assert last["logprob_mismatch"] < 1e-3 and last["max_ratio_deviation"] < 1e-4
    # The policy moved in this phase.
    assert last["grad_norm"] > 0 and last["approx_kl"] > 1e-5
    saved = torch.load(fork / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert saved["finished"]
    before = load_file(ROOT / "tiny" / "model.safetensors")
    after = load_file(fork / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not (fork / "engine").exists()


def test_a_fork_evaluates_with_the_same_samples(fork, tmp_path):
    """The plain loop uses the same uniforms as engine/. So the files are equal."""
    command = "evaluate.py --model tiny --limit-eval 16 --samples 4"
    assert "plain loop" in run(fork, f"{command} --out ev.json")
    assert "plain loop" not in run(ROOT, command, "--out", str(tmp_path / "ev.json"))
    for kind, n in (("greedy", 16), ("samples", 64)):
        with_engine = (tmp_path / f"ev.{kind}.jsonl").read_bytes()
        assert with_engine.count(b"\n") == n
        assert (fork / f"ev.{kind}.jsonl").read_bytes() == with_engine
    reports = [json.loads((f / "ev.json").read_text()) for f in (fork, tmp_path)]
    for report in reports:
        assert report.pop("seconds") > 0
    assert reports[0] == reports[1]
