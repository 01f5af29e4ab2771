"""Compare several processes with one: same samples, and same weights up to the rounding of sums.

A run of several processes loses nothing if it is killed.
"""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from test_scripts import rows_of, snapshot, without_time

import common
import ppo
import reward_model
import runtime

SMALL = "--model tiny --device cpu --limit-eval 12 --max-new-tokens 60 --gen-batch-size 48"
TRAIN = f"{SMALL} --limit-train 40"
PPO = "--questions 7 --samples 3 --phases 3 --eval-every 1 --batch-size 5"
RUNS = {
    "sft": f"{SMALL} --epochs 2 --batch-size 8",
    "expert_iteration": f"{TRAIN} --samples 2 --rounds 1 --epochs 2 --pass-k 2",
    "ppo": f"{TRAIN} {PPO} --token-budget 300 --reward dense",
    "rcrl": f"{TRAIN} --base tiny --samples 3 --completions 2 --epochs 1 --ratio 1",
    "reward_model": f"{TRAIN} --samples 3 --eval-samples 3 --epochs 1",
    "evaluate": f"{SMALL} --samples 3",
}


def launch(script: str, n: int, out, *argv) -> subprocess.Popen:
    """Start `python script.py`, or `torchrun --nproc-per-node n script.py`, in a new session."""
    out = out.with_suffix(".json") if script == "evaluate" else out
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node".split()
    torchrun = [*torchrun, str(n)] if n > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, ROOT / f"{script}.py", *RUNS[script].split()]
    return subprocess.Popen(
        [*command, "--out", out, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=out.parent,
    )


def children(pid: int) -> list[int]:
    """Return the ids of the child processes of a process."""
    return [
        int(n) for f in Path(f"/proc/{pid}/task").glob("*/children") for n in f.read_text().split()
    ]


def finished(process: subprocess.Popen) -> str:
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed


def several(script: str, *counts: int, always: bool = False):
    skip = pytest.mark.skipif(
        not always and "LONG_TESTS" not in os.environ, reason="set LONG_TESTS=1 to run it"
    )
    return pytest.param(script, counts, marks=skip, id=f"{script} {counts}")


ROUNDED = {
    "logprob_mismatch",
    "max_ratio_deviation",
    "approx_kl",
    "ref_kl_k1",
    "ref_kl_k3",
    "grad_norm",
    "policy_loss",
}


def assert_equal_runs(script: str, one, several) -> None:
    """Compare a run of one process with a run of several.

    Samples must be equal to the byte. Weights and metrics may differ by the rounding of sums.
    """
    if script == "evaluate":
        for kind in ("greedy", "samples"):
            first, second = (run.with_suffix(f".{kind}.jsonl") for run in (one, several))
            assert first.read_bytes() == second.read_bytes()
        return
    for file in (one / "samples").glob("*.jsonl"):
        assert file.read_bytes() == (several / "samples" / file.name).read_bytes(), file.name
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, several))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)
    for row, other in zip(
        *(without_time(run / "metrics.jsonl") for run in (one, several)), strict=True
    ):
        assert row.keys() == other.keys()
        for key in row.keys() - ROUNDED:
            assert row[key] == other[key] or row[key] == pytest.approx(
                other[key], rel=1e-2, abs=1e-4
            ), key
        if script == "ppo" and row.get("grad_norm"):
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)
            assert other["max_ratio_deviation"] < 1e-4 and other["logprob_mismatch"] < 1e-3


@pytest.mark.parametrize("script, counts", [
    several("expert_iteration", 2, always=True), several("sft", 2, 4),
    several("expert_iteration", 4), several("ppo", 4), several("rcrl", 2, 4),
    several("reward_model", 2, 4), several("evaluate", 2, 4),
])  # fmt: skip
def test_several_processes_give_the_samples_and_weights_of_one(script, counts, tmp_path):
    """The next test covers PPO with two processes."""
    once = finished(launch(script, 1, tmp_path / "1"))
    for n in counts:
        printed = finished(launch(script, n, tmp_path / str(n)))
        said = "written to" if script == "evaluate" else "; model in "
        assert once.count(said) == printed.count(said) == 1, "only the first process prints"
        assert_equal_runs(script, tmp_path / "1", tmp_path / str(n))


def test_killed_processes_resume_to_the_same_weights(tmp_path):
    """Run PPO with one process and with two. Kill both processes at a random, seeded moment.

    After --resume the run equals an uninterrupted one.
    """
    every = ["--checkpoint-every", "0", "--phases", "4", "--resume"]
    once, printed = (
        finished(launch("ppo", n, tmp_path / name, *every))
        for n, name in ((1, "one"), (2, "whole"))
    )
    assert once.count("; model in ") == printed.count("; model in ") == 1, (
        "only the first process prints"
    )
    assert_equal_runs("ppo", tmp_path / "one", tmp_path / "whole")
    process = launch("ppo", 2, tmp_path / "broken", *every)
    changes, last = random.Random(3).randrange(4, 9), snapshot(tmp_path / "broken")
    while process.poll() is None and changes:
        if (now := snapshot(tmp_path / "broken")) != last:
            last, changes = now, changes - 1
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[0]
    # torchrun and its workers.
    killed = [process.pid, *children(process.pid)]
    assert len(killed) >= 3
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    finished(launch("ppo", 2, tmp_path / "broken", *every))
    assert without_time(tmp_path / "whole" / "metrics.jsonl") == without_time(
        tmp_path / "broken" / "metrics.jsonl"
    )
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_user_error_is_reported_with_several_processes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    process = launch("sft", 2, tmp_path / "run")
    printed, _ = process.communicate()
    assert process.returncode != 0 and "error: " in printed and "already holds a run" in printed


def test_all_processes_stop_if_the_first_cannot_read_or_write(monkeypatch):
    """Otherwise the other processes would wait for the first for days."""
    said = []
    monkeypatch.setattr(runtime, "process_count", lambda: 2)
    monkeypatch.setattr(
        runtime.dist, "broadcast_object_list", lambda values, source: said.append([*values, source])
    )
    for error in (OSError(28, "No space left on device"), runtime.UserError("not a checkpoint")):

        def fail(error=error):
            raise error

        with pytest.raises(runtime.UserError, match="No space left|not a checkpoint"):
            runtime.on_first(fail)
    assert runtime.on_first(lambda: 5) == 5
    assert said == [
        [None, "[Errno 28] No space left on device", 0],
        [None, "not a checkpoint", 0],
        [5, None, 0],
    ]


@pytest.mark.parametrize(
    "name, rank, number",
    [("auto", None, 0), ("cuda", None, 0), ("cuda:1", None, 1), ("auto", "3", 3)],
)
def test_a_gpu_is_chosen_by_its_number(name, rank, number, monkeypatch):
    """`torch.cuda.set_device` refuses a device without a number. A fake GPU is enough here."""
    chosen, zero = [], torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: zero)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: chosen.append(torch.cuda._utils._get_device_index(d))
    )
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert runtime.torch_device(name) == torch.device("cuda", number) and chosen == [number]


def in_two_processes(work, folder: Path, *args) -> list:
    """Run work(rank, *args) in two processes. Return a pair from each: its result and its calls.

    The calls are the names of the functions of torch.distributed that it called.
    """
    torch.multiprocessing.spawn(join_two, (work, folder, *args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def join_two(rank: int, work, folder: Path, *args) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    calls = []

    def spy(name: str, call) -> None:
        setattr(dist, name, lambda *args, **how: calls.append(name) or call(*args, **how))

    for name in COLLECTIVES:
        spy(name, getattr(dist, name))
    torch.save((work(rank, *args), calls), folder / f"{rank}.pt")
    dist.destroy_process_group()


COLLECTIVES = ["all_reduce", "all_gather", "broadcast", "all_gather_object", "gather_object"]
COLLECTIVES += ["broadcast_object_list", "scatter_object_list"]


def add_up(rank: int) -> tuple:
    """Sum gradients. The first parameter has one in both processes, the second in the second only.

    The third has none, the fourth one in the first process, and the fifth is frozen.
    """
    shapes = (2, 3), (4,), (5,), (), (1,)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters[-1].requires_grad_(False)
    for i, ranks in enumerate([(0, 1), (1,), (), (0,)]):
        if rank in ranks:
            n = parameters[i].numel()
            values = torch.arange(n, dtype=torch.float32).view_as(parameters[i])
            parameters[i].grad = values + 10 * (rank + 1)
    sums = runtime.sum_gradients(iter(parameters), 1.5 + rank, np.float64(-2.0))
    assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.float32}
    return [p.grad for p in parameters], sums


def test_gradients_and_sums_are_added_over_two_processes(tmp_path):
    """If one process has a gradient, both get it. If none has a gradient, none gets one."""
    (first, calls), (second, other_calls) = in_two_processes(add_up, tmp_path)
    assert calls == other_calls == ["all_reduce"], "one flat tensor"
    for gradients, sums in (first, second):
        assert sums == [4.0, -4.0]
        both, of_second, none, of_first, frozen = gradients
        assert torch.equal(both, 2 * torch.arange(6.0).view(2, 3) + 30)
        assert torch.equal(of_second, torch.arange(4.0) + 20)
        assert torch.equal(of_first, torch.tensor(10.0))
        assert none is None and frozen is None


def test_a_single_process_keeps_its_gradients(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("there is nobody to ask"))
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    weights[0].grad = gradient = torch.ones(2)
    assert runtime.sum_gradients(iter(weights), 0.5, 2.0) == [0.5, 2.0]
    assert weights[0].grad is gradient and weights[1].grad is None


SCRIPTS = "sft", "expert_iteration", "rcrl", "reward_model"


def train(rank: int, nano: str) -> dict:
    """Make two steps with every script: one on four examples and one on a single example.

    Returns the losses, the norms and the weights.
    """
    results = {}
    for script in SCRIPTS:
        module, rng = importlib.import_module(script), np.random.default_rng(0)
        torch.manual_seed(0)
        if script == "reward_model":
            policy = reward_model.RewardModel(nano, "cpu", new=True)
        else:
            policy = common.Policy(nano, "cpu")
        optimizer, found = common.adam_w(policy.model.parameters(), 1e-3), []
        for n in (4, 1):
            sizes = zip(rng.integers(1, 9, n), rng.integers(2, 20, n), strict=True)
            ids = rng.integers(5, 300, 100).tolist()
            batch, more = [(ids[:p], ids[p : p + r]) for p, r in sizes], []
            if script == "rcrl":
                more = [[[i % 3 != 1 for i in range(len(response))] for _, response in batch]]
            if script == "reward_model":
                batch = [(example, float(i % 2), 0.5 + i) for i, example in enumerate(batch)]
            found.append(module.train_step(policy, optimizer, batch, *more, 20))
        results[script] = found, [p.detach() for p in policy.model.parameters()]
    return results


def test_a_step_of_two_processes_equals_a_step_of_one_and_gathers_no_object(nano, tmp_path):
    """In the second step one process has no example. It adds zero to the sum."""
    alone = train(0, nano)
    for results, calls in in_two_processes(train, tmp_path, nano):
        assert calls == ["all_reduce"] * 2 * len(SCRIPTS), "one flat tensor per step"
        for script, (losses, weights) in alone.items():
            found, after = results[script]
            assert np.array(found) == pytest.approx(np.array(losses), rel=1e-4), script
            torch.testing.assert_close(after, weights, atol=1e-5, rtol=1e-3)


def count_calls_of_ppo(rank: int, out: Path, flags: str) -> int:
    sys.argv = ["ppo.py"]
    ppo.main([*f"{TRAIN} {PPO} {flags} --out".split(), str(out)])
    return len(rows_of(out / "metrics.jsonl"))


@pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="set LONG_TESTS=1 to run it")
def test_a_step_of_ppo_gathers_no_object(tmp_path):
    """The number of gathered objects does not depend on the number of steps. Only sums do."""
    counts = []
    for name, flags in (("few", "--epochs 1 --batch-size 1000"), ("many", "--epochs 2")):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "run"
        (rows, calls), _ = in_two_processes(count_calls_of_ppo, tmp_path / name, out, flags)
        assert rows == 4
        steps = rows_of(out / "metrics.jsonl")[-1]["step"]
        counts.append((Counter(calls), steps))
    (few, few_steps), (many, many_steps) = counts
    assert few_steps == 3 and many_steps == 3 * 2 * 5
    assert many["all_reduce"] - few["all_reduce"] == many_steps - few_steps
    del few["all_reduce"], many["all_reduce"]
    assert few == many and few["all_gather_object"] > 0
