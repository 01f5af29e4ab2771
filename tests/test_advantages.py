"""Check advantages without a value function: group, loo and mc (`ppo.py --advantage`)."""

import itertools
import json
import os
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_scripts import cli, rows_of, without_time  # noqa: F401

import common
import ppo
import rcrl

SMALL = "--model tiny --limit-train 24 --limit-eval 8 --max-new-tokens 60 --questions 8 --samples 3"
SMALL = f"{SMALL} --phases 2 --eval-every 2 --gen-batch-size 24".split()


def test_loo_is_k_over_k_minus_one_times_group():
    rewards = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
    group, loo = (ppo.group_advantages(rewards, 4, kind) for kind in ("group", "loo"))
    torch.testing.assert_close(loo, group * 4 / 3)
    # By hand: the return minus the mean of the other three.
    totals = rewards.sum(1)
    assert loo[1, 2].item() == pytest.approx((totals[1] - totals[[0, 2, 3]].mean()).item())


@pytest.mark.parametrize("kind", ["group", "loo"])
def test_the_advantages_of_a_question_sum_to_zero(kind):
    rewards = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    for task in (None, rewards):
        advantages = ppo.group_advantages(rewards, 3, kind, task)
        # Every token has the advantage of its sample.
        assert (advantages == advantages[:, :1]).all()
        torch.testing.assert_close(advantages[:, 0].view(4, 3).sum(1), torch.zeros(4))
    if kind == "group":
        torch.testing.assert_close(advantages[:, 0].view(4, 3).std(1, correction=0), torch.ones(4))


@pytest.mark.parametrize("kind", ["group", "loo"])
def test_equal_samples_have_no_advantage(kind):
    for reward in (0.0, 1.0):
        rewards = torch.full((6, 4), reward / 4)
        for task in (None, rewards):
            assert (ppo.group_advantages(rewards, 3, kind, task).abs() < 1e-6).all()


def test_grpo_divides_the_task_reward_and_not_the_penalty():
    """Where samples are equal, the small penalties stay small. Divided they would be near 1."""
    task = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]] + [[1.0, 0.0]] * 4)
    penalty = -0.01 * torch.rand(8, 2, generator=torch.Generator().manual_seed(2))
    found = ppo.group_advantages(task + penalty, 4, "group", task)[:, 0].view(2, 4)
    of_penalty = penalty.sum(1).view(2, 4) - penalty.sum(1).view(2, 4).mean(1, keepdim=True)
    torch.testing.assert_close(found[0] - of_penalty[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    torch.testing.assert_close(found[1], of_penalty[1], atol=1e-6, rtol=0)


def test_the_expected_gradient_of_loo_is_the_policy_gradient_of_a_bandit():
    """Enumerate all groups of K actions. The gradient of `group` is (K - 1) / K of the exact one."""
    k, reward = 3, torch.tensor([0.0, 1.0, 0.3, 0.7], dtype=torch.float64)
    logits = torch.tensor([0.1, -0.4, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    for kind, factor in (("loo", 1.0), ("group", (k - 1) / k)):
        expected = torch.zeros_like(exact)
        for actions in itertools.product(range(4), repeat=k):
            log_p = logits.log_softmax(0)[list(actions)]
            rewards = reward[list(actions)][:, None]
            advantages = ppo.group_advantages(rewards, k, kind)[:, 0]
            # At ratio 1 the clipped surrogate has the gradient of A log p.
            losses = ppo.policy_loss(log_p, log_p.detach(), advantages, 0.2, 0.2)
            (gradient,) = torch.autograd.grad(-losses.mean(), logits)
            expected += log_p.sum().exp().item() * gradient
        torch.testing.assert_close(expected, factor * exact)


def test_mc_gives_a_line_its_reward_plus_the_rise_of_the_value():
    rewards = torch.tensor([[0.0, -0.1, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    # Padded with 0.
    lines = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    values = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.0]])
    found = ppo.mc_advantages(rewards, lines, values)
    torch.testing.assert_close(found[0], torch.tensor([0.4, 0.4, 0.25, 0.25]))
    torch.testing.assert_close(found[1, :2], torch.tensor([-0.5, -0.5]))


def samples_of(policy, texts: list[str], answer: int) -> list[common.Sample]:
    problem = common.Problem("q", "?", Fraction(answer))
    ids = [np.array(policy.encode_solution(text), np.int32) for text in texts]
    return [common.Sample(problem, k, text, True, ids[k]) for k, text in enumerate(texts)]


def test_mc_with_one_line_equals_loo(tiny, tmp_path):
    samples = samples_of(tiny, ["#### 3", "#### 4", "#### 3", ""], 3)
    how = dict(samples=2, batch_size=8, temperature=1.0, max_new_tokens=8, seed=0)
    lines, values, n = ppo.complete_lines(tiny, samples, range(4), tmp_path / "c.jsonl", how)
    # One line has no prefix to complete.
    assert n == 0
    rewards = torch.zeros(lines.shape)
    for row, sample in zip(rewards, samples, strict=True):
        row[len(sample.tokens) - 1] = float(sample.passed)
    real = torch.arange(lines.shape[1]) < torch.tensor([[len(s.tokens)] for s in samples])
    mc, loo = ppo.mc_advantages(rewards, lines, values), ppo.group_advantages(rewards, 4, "loo")
    torch.testing.assert_close(mc[real], loo[real])


def test_mc_completes_the_prefixes_of_lines(tiny, tmp_path, monkeypatch):
    """The value of a line is the fraction of correct completions of the text up to its end."""
    texts = ["1+2=3\n3+4=7\n#### 7", "1+2=3\n3-4=-1\n#### -1", "1+2=3\n3+4=7\n#### 8"]
    samples = samples_of(tiny, [*texts, "\n2+2=4\n4+3=7\n#### 7"], 7)
    asked = []

    def estimate(policy, prefixes, file, run, **how):
        asked.extend(text for _, text in prefixes)
        return {key: {"1+2=3\n": 0.5, "1+2=3\n3+4=7\n": 0.9}.get(key[1], 0.1) for key in prefixes}

    monkeypatch.setattr(rcrl, "estimate_q", estimate)
    file, how = tmp_path / "c", {"samples": 9}
    lines, values, n = ppo.complete_lines(tiny, samples, range(3), file, how)
    assert asked == ["1+2=3\n", "1+2=3\n3+4=7\n", "1+2=3\n3-4=-1\n"] and n == 27
    torch.testing.assert_close(values[0], torch.tensor([1 / 3, 0.5, 0.9, 0.0]))
    torch.testing.assert_close(values[1], torch.tensor([2 / 3, 0.5, 0.1, 0.0]))
    # The lines of the last sample are not completed.
    torch.testing.assert_close(values[3], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
    for sample, row in zip(samples, lines, strict=True):
        of_text = [tiny.decode(sample.tokens[:i]).lstrip("\n") for i in range(len(sample.tokens))]
        assert row[: len(of_text)].tolist() == [text.count("\n") for text in of_text]


def test_ctrl_c_while_lines_are_completed_saves_the_phase(cli, tmp_path, monkeypatch):  # noqa: F811
    argv = [*SMALL, "--advantage", "mc", "--mc-samples", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli(ppo, *argv, "--out", whole)[0] == 0
    estimate = rcrl.estimate_q

    def interrupted(*args, **how):
        os.kill(os.getpid(), signal.SIGINT)
        return estimate(*args, **how)

    monkeypatch.setattr(rcrl, "estimate_q", interrupted)
    assert cli(ppo, *argv, "--out", broken)[0] == 130
    monkeypatch.undo()
    assert [row["phase"] for row in rows_of(broken / "metrics.jsonl")] == [0, 1]
    assert cli(ppo, *argv, "--out", broken, "--resume")[0] == 0
    assert without_time(whole / "metrics.jsonl") == without_time(broken / "metrics.jsonl")


@pytest.mark.parametrize(
    "flags", ["group --group-std", "loo --drop-uniform --clip-high 0.28", "mc --mc-samples 2"]
)
def test_a_run_without_values_resumes_to_the_same_weights(flags, cli, tmp_path, monkeypatch):  # noqa: F811
    argv = [*SMALL, "--advantage", *flags.split(), "--checkpoint-every", "0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli(ppo, *argv, "--out", whole)[0] == 0
    generate, calls = common.generate, []

    def stop(*args, **how):
        calls.append(1)
        if str(how.get("progress")).startswith("phase 2"):
            raise KeyboardInterrupt
        return generate(*args, **how)

    monkeypatch.setattr(common, "generate", stop)
    assert cli(ppo, *argv, "--out", broken)[0] == 130
    monkeypatch.undo()
    assert cli(ppo, *argv, "--out", broken, "--resume")[0] == 0
    assert without_time(whole / "metrics.jsonl") == without_time(broken / "metrics.jsonl")
    for folder in ("model", "samples"):
        for file in (whole / folder).iterdir():
            assert file.read_bytes() == (broken / folder / file.name).read_bytes(), file.name
    first, second = rows_of(whole / "metrics.jsonl")[1:]
    # There is no phase for the value function alone.
    assert first["lr"] > 0
    assert first["max_ratio_deviation"] < 1e-3 and first["explained_variance"] is None
    completions = sum(len(rows_of(file)) for file in (whole / "samples").glob("completions_*"))
    assert second["samples"] == 2 * 24 + completions and bool(completions) == flags.startswith("mc")


def test_questions_with_equal_outcomes_are_not_trained_on(cli, tmp_path, monkeypatch):  # noqa: F811
    seen, forward = [], common.response_logprobs

    def record(policy, examples, *args):
        if torch.is_grad_enabled():
            seen.extend(tuple(prompt) for prompt, _ in examples)
        return forward(policy, examples, *args)

    monkeypatch.setattr(common, "response_logprobs", record)
    argv = [*SMALL, "--phases", "1", "--epochs", "1", "--advantage", "loo", "--drop-uniform"]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    rows = rows_of(tmp_path / "run" / "samples" / "phase_1.jsonl")
    groups = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    passed = [sum(row["correct"] and row["finished"] for row in group) for group in groups]
    # Some questions have both outcomes, and some have one.
    assert 0 < sum(0 < n < 3 for n in passed) < 8
    assert len(seen) == 3 * sum(0 < n < 3 for n in passed)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert metrics["informative"] == pytest.approx(sum(0 < n < 3 for n in passed) / 8)


@pytest.mark.parametrize("flags, message", [
    ("--advantage group --samples 1", "--samples 1"),
    ("--drop-uniform --samples 1", "--samples 1"),
    ("--advantage mc --reward dense", "--advantage mc needs --reward sparse"),
    ("--drop-uniform --reward genrm", "--drop-uniform needs answers"),
    ("--select lowest", "--select needs --scores"),
    ("--advantage loo --group-std", "--group-std does nothing without --advantage group"),
    ("--mc-samples 4", "--mc-samples does nothing without --advantage mc"),
    ("--advantage loo --gae-lambda 0.9", "--gae-lambda does nothing without --advantage gae"),
    ("--advantage mc --value-lr 1", "--value-lr does nothing without --advantage gae"),
])  # fmt: skip
def test_flags_that_do_not_fit_the_advantage_are_refused(flags, message, cli, tmp_path):  # noqa: F811
    code, said = cli(ppo, *flags.split(), "--out", tmp_path / "run")
    assert code == 2 and message in said and not (tmp_path / "run").exists()


def test_a_phase_without_a_step_logs_no_learning_rate(cli, tmp_path):  # noqa: F811
    """Truncated at once, all samples are incorrect, and no question has both outcomes."""
    flags = "--advantage loo --drop-uniform --max-new-tokens 1 --phases 1".split()
    assert cli(ppo, *SMALL, *flags, "--out", tmp_path / "run")[0] == 0
    _, phase = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert phase["minibatches"] == 0 and "lr" not in phase and "policy_loss" not in phase


def test_clip_high_limits_rising_ratios_only():
    ratio = torch.tensor([0.5, 0.9, 1.25, 1.5])
    losses = ppo.policy_loss(ratio.log(), torch.zeros(4), torch.ones(4), 0.2, 0.28)
    torch.testing.assert_close(-losses, torch.tensor([0.5, 0.9, 1.25, 1.28]))
    losses = ppo.policy_loss(ratio.log(), torch.zeros(4), -torch.ones(4), 0.2, 0.28)
    torch.testing.assert_close(losses, torch.tensor([0.8, 0.9, 1.25, 1.5]))
