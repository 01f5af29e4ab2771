"""Several processes: the same samples as one, the same weights up to the rounding of sums, and nothing lost when they are
killed. And memory that runs out in training."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_scripts import cli, rows_of, snapshot, without_time  # noqa: F401

import common
import sft

SMALL = [
    "--model",
    "tiny",
    "--device",
    "cpu",
    "--limit-eval",
    "12",
    "--max-new-tokens",
    "60",
    "--gen-batch-size",
    "48",
]
TRAIN = [*SMALL, "--limit-train", "40"]
RUNS = {
    "sft": [*SMALL, "--epochs", "2", "--batch-size", "8"],
    "expert_iteration": [*TRAIN, "--samples", "2", "--rounds", "1", "--epochs", "2", "--pass-k", "2"],
    "ppo": [*TRAIN, "--questions", "7", "--samples", "3", "--phases", "3", "--value-warmup", "1", "--eval-every", "1",
            "--batch-size", "5", "--token-budget", "300", "--reward", "dense"],
    "rcrl": [*TRAIN, "--base", "tiny", "--samples", "3", "--completions", "2", "--epochs", "1", "--ratio", "1"],
    "reward_model": [*TRAIN, "--samples", "3", "--eval-samples", "3", "--epochs", "1"],
    "evaluate": [*SMALL, "--samples", "3"],
}  # fmt: skip


def launch(script: str, n: int, out, *argv) -> subprocess.Popen:
    """`python script.py` or `torchrun --nproc-per-node n script.py`, in a process group of its own."""
    out = out.with_suffix(".json") if script == "evaluate" else out
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *torchrun, ROOT / f"{script}.py", *RUNS[script], "--out", out, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                            start_new_session=True, cwd=out.parent)  # fmt: skip


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
    """Runs of one process and of several: the samples to the byte, weights and metrics up to the rounding of sums."""
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
    several("expert_iteration", 2, always=True), several("sft", 2, 4), several("expert_iteration", 4),
    several("ppo", 4), several("rcrl", 2, 4), several("reward_model", 2, 4), several("evaluate", 2, 4),
])  # fmt: skip
def test_several_processes_give_the_samples_and_the_weights_of_one(script, counts, tmp_path):
    """PPO with two in the next test."""
    once = finished(launch(script, 1, tmp_path / "1"))
    for n in counts:
        printed = finished(launch(script, n, tmp_path / str(n)))
        said = "written to" if script == "evaluate" else "; model in "
        assert once.count(said) == printed.count(said) == 1, "only the first process prints"
        assert_equal_runs(script, tmp_path / "1", tmp_path / str(n))


def test_killed_processes_resume_to_the_same_weights(tmp_path):
    """PPO with one process and with two; then both killed at a random moment (seeded), and --resume: as if nothing had
    happened."""
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
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "broken")])  # torchrun and its workers
    process.communicate()
    finished(launch("ppo", 2, tmp_path / "broken", *every))
    assert without_time(tmp_path / "whole" / "metrics.jsonl") == without_time(
        tmp_path / "broken" / "metrics.jsonl"
    )
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_error_of_the_user_stays_one_with_several_processes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    process = launch("sft", 2, tmp_path / "run")
    printed, _ = process.communicate()
    assert process.returncode != 0 and "error: " in printed and "already holds a run" in printed


def test_what_the_first_process_cannot_read_or_write_all_hear_of(monkeypatch):
    """Else the others would wait for it for days."""
    said = []
    monkeypatch.setattr(common, "process_count", lambda: 2)
    monkeypatch.setattr(
        common.dist, "broadcast_object_list", lambda values, source: said.append([*values, source])
    )
    for error in (OSError(28, "No space left on device"), common.UserError("not a checkpoint")):

        def fail(error=error):
            raise error

        with pytest.raises(common.UserError, match="No space left|not a checkpoint"):
            common.on_first(fail)
    assert common.on_first(lambda: 5) == 5
    assert said == [
        [None, "[Errno 28] No space left on device", 0],
        [None, "not a checkpoint", 0],
        [5, None, 0],
    ]


# ---- memory


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_gradient_stays(
    nano, monkeypatch, capsys
):
    """More than 120 padded tokens at a time do not fit, and the failing backward pass leaves half a gradient behind."""
    policy = common.Policy(nano, device="cpu")
    rng = np.random.default_rng(0)
    examples = [
        (rng.integers(5, 300, 9).tolist(), rng.integers(5, 300, int(n)).tolist())
        for n in rng.integers(3, 40, 12)
    ]
    weights = list(policy.model.parameters())

    def gradient(budget) -> torch.Tensor:
        common._halvings.clear()
        n_tokens = sum(len(r) for _, r in examples)

        def backward(indices):
            loss = (
                -common.response_logprobs(policy, [examples[i] for i in indices]).sum() / n_tokens
            )
            loss.backward()
            if (
                limit
                and len(indices) * max(len(examples[i][0]) + len(examples[i][1]) for i in indices)
                > limit
            ):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return [loss.item()]

        (loss,) = common.backward_in_parts(
            [len(p) + len(r) for p, r in examples], budget, backward, weights
        )
        found = torch.cat([p.grad.flatten() for p in weights])
        policy.model.zero_grad(set_to_none=True)
        return torch.cat([found, torch.tensor([loss])])

    limit = None
    expected = gradient(10000)
    limit = 120
    torch.testing.assert_close(gradient(500), expected, atol=1e-6, rtol=1e-4)
    said = capsys.readouterr().err
    assert "going on with 250" in said and "going on with 125" in said
    assert common._halvings[500] == said.count("warning")
    limit = 1
    with pytest.raises(
        torch.OutOfMemoryError
    ):  # a single sequence does not fit: there is nothing to halve
        gradient(500)
    common._halvings.clear()


def test_scoring_goes_on_when_memory_runs_out(capsys):
    examples, largest = [([0] * 4, [i] * (1 + i % 7)) for i in range(30)], []

    def run(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        largest.append(len(batch))
        return [response[0] for _, response in batch]

    common._halvings.clear()
    assert common.in_batches(run, examples, 100) == list(range(30))
    assert "going on with 50" in capsys.readouterr().err and max(largest) == 3
    common._halvings.clear()


def test_the_loss_is_measured_when_memory_runs_out(tiny, monkeypatch, capsys):
    prompt, solution = tiny.encode_prompt("Question: ..."), tiny.encode_solution("1+2=<<1+2=3>>3")
    examples = [(prompt, solution[i:]) for i in range(len(solution))]
    logprobs, expected = common.response_logprobs, sft.cross_entropy(tiny, examples, 1000)

    def small_memory(policy, examples):
        if len(examples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(policy, examples)

    monkeypatch.setattr(common, "response_logprobs", small_memory)
    assert sft.cross_entropy(tiny, examples, 1000) == pytest.approx(expected, rel=1e-5)
    assert "going on with" in capsys.readouterr().err
    common._halvings.clear()


@pytest.mark.parametrize(
    "name, rank, number",
    [("auto", None, 0), ("cuda", None, 0), ("cuda:1", None, 1), ("auto", "3", 3)],
)
def test_a_gpu_is_chosen_by_its_number(name, rank, number, monkeypatch):
    """`torch.cuda.set_device` refuses a device without one. Imitated, so that it is tested without a GPU, too."""
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
    assert common.torch_device(name) == torch.device("cuda", number) and chosen == [number]


def test_training_goes_on_when_memory_runs_out(cli, nano, tmp_path, monkeypatch, capsys):  # noqa: F811
    argv = [
        "--model",
        nano,
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--limit-eval",
        "4",
        "--max-new-tokens",
        "8",
    ]
    assert cli(sft, *argv, "--out", tmp_path / "whole")[0] == 0
    logprobs = common.response_logprobs

    def small_memory(policy, examples, *args):
        if torch.is_grad_enabled() and len(examples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs(policy, examples, *args)

    monkeypatch.setattr(common, "response_logprobs", small_memory)
    assert cli(sft, *argv, "--out", tmp_path / "small")[0] == 0
    common._halvings.clear()
    rows = [rows_of(tmp_path / name / "metrics.jsonl")[-1] for name in ("whole", "small")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
    one, several = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "small")
    )
    assert all(torch.allclose(one[name], several[name], atol=1e-5) for name in one)
