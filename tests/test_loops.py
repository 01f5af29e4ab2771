"""Check the data that the scripts pass to the sampler, to the formulas and to the disk.

Formulas have tests of their own. Here the scripts run, and the tests look at the data between the
parts. Which policy samples, and with which settings? On which examples does the script train, and
from which weights? Which weights does it keep, and which metrics does it log?
"""

import argparse
import dataclasses
import itertools
import json
import math
import signal
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train_step
from test_scripts import cli, rows_of, without_time  # noqa: F401

import common
import evaluate
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

SMALL = ["--max-new-tokens", "60", "--gen-batch-size", "32", "--limit-eval", "8", "--seed", "7"]


def weights_of(policy) -> int:
    """Return a checksum of the weights."""
    return zlib.crc32(
        b"".join(tensor.numpy().tobytes() for tensor in policy.model.state_dict().values())
    )


@pytest.fixture
def start(tmp_path) -> str:
    """Return a folder with the embedded model, its weights changed a little."""
    policy = common.Policy("tiny", "cpu")
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.001)
    policy.save(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Record each call of the sampler: the weights of the policy, the settings and the samples."""
    calls, generate = [], common.generate

    def spied(policy, problems, **how):
        state, samples = weights_of(policy), generate(policy, problems, **how)
        calls.append(
            SimpleNamespace(**{"few_shot": False} | how | {"weights": state, "samples": samples})
        )
        return samples

    monkeypatch.setattr(common, "generate", spied)
    return calls


@pytest.fixture
def measured(monkeypatch) -> list:
    """Replace the accuracies on dev and record the weights. The third accuracy is the best."""
    accuracies, states = iter([0.1, 0.2, 0.5, 0.3]), []

    def dev_metrics(policy, *_, **__):
        with policy.merged():
            states.append(weights_of(policy))
        return {"maj@1": next(accuracies), "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    return states


@pytest.fixture
def trained(monkeypatch) -> list:
    """Record each step of the scripts: the weights before it and its examples."""
    steps = []

    def spy(script, step):
        def spied(policy, optimizer, batch, *more):
            steps.append(SimpleNamespace(before=weights_of(policy), policy=policy, examples=batch))
            return step(policy, optimizer, batch, *more)

        monkeypatch.setattr(script, "train_step", spied)

    for script in (sft, expert_iteration, rcrl):
        spy(script, script.train_step)
    return steps


def saved_weights(folder) -> int:
    return weights_of(common.Policy(str(folder), "cpu"))


# ---- supervised fine-tuning


def test_among_equally_good_epochs_the_one_with_more_answers_is_kept(cli, tmp_path, monkeypatch):
    """While a model learns the format, all its answers may be incorrect for some epochs.

    Then the first epoch is the worst choice.
    """
    unreadable, states = iter([1.0, 0.9, 0.2, 0.4]), []

    def dev_metrics(policy, *_, **__):
        states.append(weights_of(policy))
        return {"maj@1": 0.0, "no_answer": next(unreadable), "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 8, "--epochs", 3, "--out", tmp_path / "run"]
    assert cli(sft, *argv)[0] == 0
    assert len(states) == 4 and saved_weights(tmp_path / "run" / "model") == states[2]


# ---- expert iteration


@pytest.mark.parametrize("flags", [[], ["--continue"]])
def test_a_round_samples_from_the_last_policy_and_trains_from_the_base(
    flags, cli, start, tmp_path, drawn, measured, trained
):
    """A round trains on all solutions so far. With --continue it trains the last policy.

    The third evaluation, after round 2, is the best.
    """
    argv = ["--model", start, *SMALL, "--limit-train", 24, "--samples", 2, "--epochs", 2]
    argv += ["--batch-size", 1000, "--pass-k", 0, "--few-shot", "--rounds", 3]
    argv += ["--max-new-tokens", 40, *flags, "--out", tmp_path / "run"]
    assert cli(expert_iteration, *argv)[0] == 0
    base, first = weights_of(common.Policy("tiny", "cpu")), saved_weights(start)
    assert measured[0] == first and len({base, *measured}) == 5
    assert [call.weights for call in drawn] == measured[:3], (
        "each round samples from the policy that was evaluated last"
    )
    assert [(call.seed, call.temperature, call.few_shot) for call in drawn] == [
        ([7, 1], 1.0, True), ([7, 2], 1.0, False), ([7, 3], 1.0, False)
    ]  # fmt: skip
    # A round is two epochs of one batch.
    begins = [step.before for step in trained[::2]]
    assert begins == ([base] * 3 if not flags else measured[:3]) and len(trained) == 6
    assert saved_weights(tmp_path / "run" / "model") == measured[2]

    # The 24 written solutions are trained on as well.
    rows, kept = rows_of(tmp_path / "run" / "metrics.jsonl")[1:], 24
    for i, (row, call) in enumerate(zip(rows, drawn, strict=True)):
        good = [s for s in call.samples if s.correct and s.finished]
        kept += len(good)
        assert row["kept"] == len(good) > 0 and row["train_size"] == kept
        epochs = [step.examples for step in trained[2 * i : 2 * i + 2]]
        assert all(len(examples) == kept for examples in epochs) and sorted(epochs[0]) == sorted(
            epochs[1]
        )
        decoded = [trained[0].policy.decode(solution) for _, solution in epochs[0]]
        assert set(decoded) >= {s.solution for s in good}
        groups = common.by_problem(call.samples)
        follow = [common.equations(s.text) == common.equations(s.problem.reference) for s in good]
        expected = {
            "correct": np.mean([s.correct for s in call.samples]),
            "solved": np.mean([any(s.correct for s in group) for group in groups]),
            "follows_reference": np.mean(follow),
            "sampled_no_answer": np.mean([s.answer is None for s in call.samples]),
            "sampled_truncated": np.mean([not s.finished for s in call.samples]),
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert rows[0]["sampled_truncated"] not in (0, 0.5, 1)


@pytest.mark.parametrize("flags", [[], ["--continue"]])
def test_a_finished_run_of_expert_iteration_resumes_with_more_rounds(flags, cli, tmp_path):
    """The result equals a run that had this number of rounds from the start, bit for bit.

    Fewer rounds are refused.
    """
    argv = [*SMALL, "--model", "tiny", "--limit-train", 24, "--samples", 2, "--epochs", 1]
    argv += ["--pass-k", 0, *flags]
    at_once, later = tmp_path / "at_once", tmp_path / "later"
    assert cli(expert_iteration, *argv, "--rounds", 2, "--out", at_once)[0] == 0
    assert cli(expert_iteration, *argv, "--rounds", 1, "--out", later)[0] == 0
    assert len(rows_of(later / "metrics.jsonl")) == 2
    assert cli(expert_iteration, *argv, "--rounds", 2, "--out", later, "--resume")[0] == 0
    assert without_time(later / "metrics.jsonl") == without_time(at_once / "metrics.jsonl")
    assert len(rows_of(later / "metrics.jsonl")) == 3
    for name in ("model/model.safetensors", "samples/round_2.jsonl", "args.json"):
        assert (later / name).read_bytes() == (at_once / name).read_bytes(), name
    code, message = cli(expert_iteration, *argv, "--rounds", 1, "--out", later, "--resume")
    assert code == 2 and "rounds" in message


def test_expert_iteration_that_stopped_early_does_not_resume(cli, tmp_path, measured):
    out = tmp_path / "run"
    argv = [*SMALL, "--model", "tiny", "--limit-train", 24, "--samples", 2, "--epochs", 1]
    argv += ["--pass-k", 0, "--out", out]
    assert cli(expert_iteration, *argv, "--rounds", 4)[0] == 0
    # The last round is not better. So the run stops.
    assert [row["maj@1"] for row in rows_of(out / "metrics.jsonl")] == [0.1, 0.2, 0.5, 0.3]
    assert cli(expert_iteration, *argv, "--rounds", 5, "--resume")[0] == 0
    assert len(measured) == 4 and saved_weights(out / "model") == measured[2]


def test_expert_iteration_removes_duplicates_only_with_the_flag(cli, tmp_path):
    argv = [*SMALL, "--model", "tiny", "--limit-train", 24, "--samples", 6, "--rounds", 1]
    argv += ["--epochs", 1, "--pass-k", 0]
    kept = {}
    for flag in ("--deduplicate", "--no-deduplicate"):
        assert cli(expert_iteration, *argv, flag, "--out", tmp_path / flag)[0] == 0
        kept[flag] = rows_of(tmp_path / flag / "metrics.jsonl")[1]["kept"]
    right = [
        row
        for row in rows_of(tmp_path / flag / "samples" / "round_1.jsonl")
        if row["correct"] and row["finished"]
    ]
    keys = {(row["problem"], common.equations(row["text"])) for row in right}
    assert kept == {"--deduplicate": len(keys), "--no-deduplicate": len(right)} and len(keys) < len(
        right
    )


def test_max_per_question_limits_the_solutions_of_a_question(cli, tmp_path, trained):
    """The solutions are chosen from all rounds. The written one is always among them.

    The batch size of sampling does not matter.
    """
    argv = ["--model", "tiny", *SMALL, "--limit-train", 24, "--samples", 6, "--rounds", 2]
    argv += ["--epochs", 1, "--pass-k", 0, "--sft-data", "--batch-size", 1000]
    argv += ["--max-per-question", 3]
    for name, batch_size in (("run", 32), ("again", 16)):
        out = ["--gen-batch-size", batch_size, "--out", tmp_path / name]
        assert cli(expert_iteration, *argv, *out)[0] == 0
    problems = {common.prompt_text(p): p for p in common.load_problems("arithmetic", "train", 24)}
    available = {p.id: [p.solution] for p in problems.values()}
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")[1:]
    for i, (row, step) in enumerate(zip(rows, trained[:2], strict=True), 1):
        accepted = rows_of(tmp_path / "run" / "samples" / f"round_{i}.jsonl")
        for sample in [s for s in accepted if s["correct"] and s["finished"]]:
            available[sample["problem"]].append(sample["text"].strip())
        found = {name: [] for name in available}
        for prompt, solution in step.examples:
            problem = problems[step.policy.decode(prompt)]
            found[problem.id].append(step.policy.decode(solution))
        for problem in problems.values():
            assert len(found[problem.id]) == min(3, len(available[problem.id]))
            assert problem.solution in found[problem.id]
            assert not Counter(found[problem.id]) - Counter(available[problem.id])
        assert row["train_size"] == len(step.examples) < sum(map(len, available.values()))
        assert step.examples == trained[i + 1].examples


def test_the_choice_of_solutions_is_random_and_seeded():
    solutions = dict(enumerate(["written", *"abcde"]))
    for limit in (None, 6, 7):
        chosen = expert_iteration.choose_solutions(solutions, 1, limit, 0)
        assert chosen == ["written", *"abcde"]
    assert expert_iteration.choose_solutions(solutions, 1, 1, 0) == ["written"]
    chosen = [expert_iteration.choose_solutions(solutions, 1, 3, seed) for seed in range(1000)]
    assert chosen == [expert_iteration.choose_solutions(solutions, 1, 3, s) for s in range(1000)]
    for first, *two in chosen:
        assert first == "written" and two == sorted(set(two)) and len(two) == 2
    counts = Counter(itertools.chain(*chosen))
    assert all(330 < counts[letter] < 470 for letter in "abcde"), "all are equally likely"
    without = [expert_iteration.choose_solutions(solutions, 0, 2, seed) for seed in range(50)]
    assert any("written" not in two for two in without) and {len(two) for two in without} == {2}


def guesser(nano, folder, answers: dict[str, str]) -> str:
    """Write a model that answers each of the questions with 1 or 2 at random. Return its folder."""
    policy = common.Policy(nano, "cpu")
    optimizer = torch.optim.AdamW(policy.model.parameters())
    prompts = [policy.encode_prompt(common.prompt_text(common.Problem("", q, 0))) for q in answers]
    data = [(prompt, policy.encode_solution(f"#### {a}")) for prompt in prompts for a in "12"]
    for _ in range(80):
        train_step(policy, optimizer, data, 3e-3, 4096)
    policy.save(folder / "start")
    lines = [json.dumps({"question": q, "answer": f"#### {a}"}) + "\n" for q, a in answers.items()]
    (folder / "train.jsonl").write_text("".join(lines * 10))
    return str(folder / "start")


def test_expert_iteration_reaches_the_known_optimum_of_a_bandit(cli, tmp_path, nano):
    """There are two questions. At first the policy answers both with 1 or 2 at random.

    One round on correct samples is enough to learn both answers. Untrained weights answer 38 of 40
    samples correctly with probability 1e-9.
    """
    model = guesser(nano, tmp_path, {"Is it odd?": "1", "Is it even?": "2"})
    argv = ["--model", model, "--base", model, "--dataset", tmp_path, "--max-new-tokens", 8]
    argv += ["--samples", 8, "--epochs", 20, "--lr", "3e-3", "--rounds", 1, "--pass-k", 0]
    assert cli(expert_iteration, *argv, "--out", tmp_path / "run")[0] == 0
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[1]
    assert 0.2 < row["correct"] < 0.8 and row["maj@1"] == 1
    problems = common.load_problems(str(tmp_path), "train")[:2]
    answers = common.generate(
        common.Policy(str(tmp_path / "run" / "model"), "cpu"),
        problems,
        samples=20,
        max_new_tokens=8,
    )
    assert sum(s.correct for s in answers) >= 38


# ---- PPO


@pytest.mark.parametrize("rank", [0, 4])
def test_a_phase_of_ppo_uses_the_correct_data_in_every_step(
    rank, cli, tmp_path, drawn, measured, monkeypatch
):
    """Run three phases, with and without adapters.

    Check the task reward, the KL to the initial policy, advantages, returns and clipping. Check the
    minibatches, the learning rate and the policy that is kept.
    """
    seen = {}

    def spy(owner, name):
        function, seen[name] = getattr(owner, name), []

        def spied(*args):
            result = function(*args)
            result = list(result) if name == "micro_batches" else result
            if name in ("policy_loss", "value_loss"):
                args[0].retain_grad()
            seen[name].append(SimpleNamespace(args=args, result=result))
            return result

        monkeypatch.setattr(owner, name, spied)

    for name in ("penalised_rewards", "gae", "whiten", "policy_loss", "value_loss"):
        spy(ppo, name)
    for name in ("micro_batches", "response_logprobs"):
        spy(common, name)
    spy(runtime, "sum_gradients")
    save, heads = runtime.Run.checkpoint, []

    def checkpoint(run, **state):
        if "critic" in state:
            heads.append(state["critic"]["head.weight"].clone())
        save(run, **state)

    monkeypatch.setattr(runtime.Run, "checkpoint", checkpoint)
    monkeypatch.setattr(ppo, "LR_WARMUP", 12)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 64, "--questions", 6, "--samples", 4]
    argv += ["--phases", 3, "--epochs", 2, "--batch-size", 10, "--temperature", 1.2]
    argv += ["--kl-coef", 0.3, "--gae-lambda", 0.9, "--clip-range", 0.15]
    argv += ["--lr", 2e-3, "--eval-every", 1, "--lora-rank", rank]
    argv += ["--max-new-tokens", 52, "--token-budget", 100000, "--out", tmp_path / "run"]
    assert cli(ppo, *argv)[0] == 0
    # The code below is not recorded.
    monkeypatch.undo()
    phases = rows_of(tmp_path / "run" / "metrics.jsonl")[1:]
    initial, policy_steps = common.Policy("tiny", "cpu"), 0
    # 24 samples in batches of 10, twice.
    n_steps = 6
    for p, row in enumerate(phases):
        call, samples = drawn[p], drawn[p].samples
        penalised, gae, whiten = (seen[n][p] for n in ("penalised_rewards", "gae", "whiten"))
        assert call.seed == [7, p + 1] and call.temperature == 1.2
        assert len(samples) == 24 and len({s.problem.id for s in samples}) == 6

        # The reward is at the last token of a correct sample. The penalty is relative to the
        # initial policy, at the same temperature.
        task, logprobs, reference, kl_coef = penalised.args
        lengths = [len(s.tokens) for s in samples]
        assert all(
            task[i, : n - 1].sum() == 0 and task[i, n:].sum() == 0 for i, n in enumerate(lengths)
        )
        paid = [float(s.correct and s.finished) for s in samples]
        assert [task[i, n - 1].item() for i, n in enumerate(lengths)] == paid and kl_coef == 0.3
        examples = [(list(s.prompt), s.tokens.tolist()) for s in samples]
        with torch.no_grad():
            said = common.by_example(common.response_logprobs(initial, examples, 1.2), examples)
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(reference[i, :n], said[i], atol=1e-4)
            np.testing.assert_allclose(logprobs[i, :n], samples[i].logprobs, atol=1e-3)
        moved = (logprobs - reference).abs().max().item()
        assert moved < 1e-5 if p < 2 else moved > 1e-2, "the policy moves in phase 2"

        # Advantages and returns.
        assert gae.args[0] is penalised.result and gae.args[2:] == (1.0, 0.9)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        assert whiten.args[0].shape == (sum(lengths),)
        (advantages, returns), values = gae.result, gae.args[1]
        assert torch.equal(advantages[real], whiten.result)
        assert torch.equal(advantages[~real], torch.zeros((~real).sum()))

        # An epoch has every sample once. Only the value function trains in phase 1.
        look_back, _, *updates = seen["response_logprobs"][
            p * (n_steps + 2) : (p + 1) * (n_steps + 2)
        ]
        (order,) = seen["micro_batches"][p * (n_steps + 1)].result
        places = {id(example): i for example, i in zip(look_back.args[1], order, strict=True)}
        minibatches = [[places[id(example)] for example in step.args[1]] for step in updates]
        for epoch in (minibatches[:3], minibatches[3:]):
            assert [len(minibatch) for minibatch in epoch] == [10, 10, 4]
            assert sorted(itertools.chain(*epoch)) == list(range(24))
        for step, minibatch in enumerate(minibatches, p * n_steps):
            policy, value = seen["policy_loss"][step], seen["value_loss"][step]
            n_tokens = sum(lengths[i] for i in minibatch)
            assert policy.result.shape == value.result.shape == (n_tokens,)
            clips = (0.15, math.inf if p == 0 else 0.15)
            for loss, clip, tables in zip(
                (policy, value), clips, ((logprobs, advantages), (values, returns)), strict=True
            ):
                for given, table in zip(loss.args[1:3], tables, strict=True):
                    assert torch.equal(given, table[minibatch][real[minibatch]])
                assert loss.args[3] == clip
            # The gradient is the gradient of the mean over the tokens of the minibatch.
            for loss, formula in ((policy, ppo.policy_loss), (value, ppo.value_loss)):
                if loss is policy and p == 0:
                    assert loss.args[0].grad is None
                    continue
                at = loss.args[0].detach().requires_grad_()
                (expected,) = torch.autograd.grad(formula(at, *loss.args[1:]).mean(), at)
                torch.testing.assert_close(loss.args[0].grad, expected)
            means = [loss.result.mean().item() for loss in (policy, value)]
            assert seen["sum_gradients"][step].result[:2] == pytest.approx(
                means, rel=1e-4, abs=1e-7
            )
        policy_steps += n_steps * (p > 0)
        assert row["lr"] == pytest.approx(2e-3 * min(1, policy_steps / 12) * (1 - p / 3), rel=1e-5)

        # Logged metrics.
        groups = np.reshape(paid, (6, 4)).mean(1)
        expected = {
            "correct": np.mean(paid),
            "informative": np.mean((0 < groups) & (groups < 1)),
            "sampled_truncated": np.mean([not s.finished for s in samples]),
            "sampled_no_answer": np.mean([s.answer is None for s in samples]),
            "ref_kl_k1": (logprobs - reference)[real].mean().item(),
            "ref_kl_k3": ((reference - logprobs).exp() - 1 - (reference - logprobs))[real]
            .mean()
            .item(),
            "reward_if_incorrect": 0.0,
            "entropy": -logprobs[real].mean().item(),
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert phases[0]["sampled_truncated"] not in (0, 0.5, 1) and any(
        0 < row["informative"] < 1 for row in phases
    )
    assert measured[0] == measured[1] == weights_of(initial) and len(set(measured)) == 3
    assert saved_weights(tmp_path / "run" / "model") == measured[2]
    assert (
        len(heads) == 3
        and heads[0].any()
        and not torch.equal(heads[1], heads[0])
        and not torch.equal(heads[2], heads[1])
    )


@pytest.fixture
def run(tmp_path) -> runtime.Run:
    """Return a run that has started."""
    handler = signal.getsignal(signal.SIGINT)
    run = runtime.Run(argparse.Namespace(out=tmp_path / "run", checkpoint_every=100, resume=False))
    run.begin()
    yield run
    signal.signal(signal.SIGINT, handler)


def resumed(run) -> runtime.Run:
    again = runtime.Run(argparse.Namespace(out=run.out, checkpoint_every=100, resume=True))
    again.begin()
    return again


def test_a_resumed_run_counts_its_time_up_to_the_checkpoint_only(run):
    run.started -= 50
    run.checkpoint(now=True)
    # The work after the checkpoint is lost and will be repeated.
    run.started -= 50
    assert 50 <= resumed(run).clock() < 75


def test_a_row_that_was_logged_after_the_checkpoint_is_not_logged_twice(run):
    run.log(step=1)
    run.checkpoint(now=True)
    run.log(step=2)
    resumed(run).log(step=2)
    assert [row["step"] for row in rows_of(run.metrics_file)] == [1, 2]


def test_tensorboard_gets_each_number_once_over_samples_or_steps(run, monkeypatch):
    class SummaryWriter:
        """Replace the writer of TensorBoard, which may be missing."""

        def __init__(self, folder):
            self.folder, self.scalars = folder, []

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def flush(self):
            pass

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    run.log(step=1, samples=8, phase=1, correct=0.5, explained_variance=None)
    run.checkpoint(now=True)
    run.log(step=2, samples=16, phase=2, correct=0.75)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    # Rows that were logged without TensorBoard are added as well.
    again = resumed(run)
    again.log(step=2, samples=16, phase=2, correct=1.0)
    again.log(step=9, samples=0, epoch=1, loss=0.25)
    assert Path(again.writer.folder) == run.out / "tensorboard"
    keys = "correct", "loss", "explained_variance"
    found = [scalar for scalar in again.writer.scalars if scalar[0] in keys]
    assert found == [("correct", 0.5, 8), ("correct", 1.0, 16), ("loss", 0.25, 9)]


def test_without_tensorboard_a_run_writes_no_tensorboard_files(run, monkeypatch):
    # Importing TensorBoard fails.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run.out /= "in"
    other = resumed(run)
    other.log(step=1)
    assert other.writer is None and not (other.out / "tensorboard").exists()


def test_a_checkpoint_is_written_after_its_interval_and_at_ctrl_c(run):
    """Without checkpoints a killed run would start again.

    Without a checkpoint at Ctrl-C a run would lose its last minutes.
    """
    run.checkpoint(place=1)
    assert not run.state_file.exists()
    run.saved -= run.checkpoint_every
    # The second call does not write again at once.
    for place in (2, 3):
        run.checkpoint(place=place)
        assert resumed(run).state["place"] == 2
    run.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        run.checkpoint(place=4)
    assert resumed(run).state["place"] == 4 and not resumed(run).is_finished
    run.interrupted = False
    run.finish()
    assert resumed(run).is_finished


def test_a_run_resumes_on_another_device_and_after_half_a_replacement_of_the_model(run):
    settings = dict(out=run.out.with_name("other"), lr=0.1, resume=True)
    first = runtime.Run(argparse.Namespace(**settings, device="cpu", checkpoint_every=100))
    first.begin()
    first.checkpoint(now=True)
    # The run was killed after the old model was renamed, before the new one had its name.
    (first.out / "model.old").mkdir()
    (first.out / "model.old" / "config.json").write_text("{}")
    runtime.Run(argparse.Namespace(**settings, device="cuda", checkpoint_every=5)).begin()
    assert [path.name for path in first.out.glob("model*/*")] == ["config.json"] and (
        first.out / "model"
    ).exists()
    with pytest.raises(runtime.UserError, match=r"other settings \(lr\)"):
        runtime.Run(
            argparse.Namespace(**settings | {"lr": 0.2}, device="cpu", checkpoint_every=100)
        )


def test_sampling_to_a_file_resumes_with_whole_groups_and_repeats_no_line(
    tiny, tmp_path, monkeypatch
):
    """A group has 16 problems.

    If the second group was written in part, all of it is sampled again. The last bits of a sample
    depend on the other samples of its batch.
    """
    problems, asked, content = common.load_problems("arithmetic", "train", 40), [], ""

    def made(policy, problems, *, samples, **how):
        asked.append(len(problems))
        return [common.Sample(p, k, p.reference, True) for p in problems for k in range(samples)]

    monkeypatch.setattr(common, "generate", made)
    file, how = (
        tmp_path / "samples.jsonl",
        dict(samples=2, batch_size=1, max_new_tokens=4, progress=""),
    )
    for lines, expected in ((0, [16, 16, 8]), (50, [16, 8]), (64, [8]), (79, [8]), (80, [])):
        if lines:
            file.write_text(
                "".join(content.splitlines(keepends=True)[:lines])
                + '{"problem": "arith' * (lines < 80)
            )
        asked.clear()
        samples = common.sample_to_file(tiny, problems, file, **how)
        assert asked == expected
        assert [(s.problem.id, s.number) for s in samples] == [
            (p.id, k) for p in problems for k in range(2)
        ]
        content = file.read_text()
        assert content == "".join(s.to_json() + "\n" for s in samples)


def test_ctrl_c_during_sampling_stops_after_the_group_and_loses_no_sample(tiny, run, monkeypatch):
    problems, asked = common.load_problems("arithmetic", "train", 40), []

    def made(policy, problems, *, samples, **how):
        run.interrupted = not asked
        asked.append(len(problems))
        return [common.Sample(p, k, p.reference, True) for p in problems for k in range(samples)]

    monkeypatch.setattr(common, "generate", made)
    file, how = run.out / "samples" / "x.jsonl", dict(samples=2, batch_size=1, progress="")
    with pytest.raises(KeyboardInterrupt):
        common.sample_to_file(tiny, problems, file, run, **how)
    assert asked == [16] and len(rows_of(file)) == 32
    assert len(common.sample_to_file(tiny, problems, file, run, **how)) == 80
    assert asked == [16, 16, 8]


def test_samples_of_a_file_belong_to_problems_with_the_same_question_and_answer(tmp_path):
    problem, file = common.load_problems("arithmetic", "train", 1)[0], tmp_path / "x.jsonl"
    common.write_samples(file, [common.Sample(problem, 0, problem.reference, True)])
    assert common.read_samples(file, [problem])[0].correct
    for change in ({"question": "another?"}, {"answer": problem.answer + 1}, {"id": "other"}):
        with pytest.raises(runtime.UserError, match="line 1: not a sample of"):
            common.read_samples(file, [dataclasses.replace(problem, **change)])


# ---- return-conditioned RL


def test_rcrl_samples_from_the_model_and_trains_the_base(
    cli, start, tmp_path, drawn, measured, trained
):
    """Completions continue the prefix whose value they estimate."""
    argv = ["--model", start, *SMALL, "--limit-train", 24, "--samples", 3, "--completions", 2]
    argv += ["--epochs", 4, "--ratio", 1, "--batch-size", 1000]
    argv += ["--max-new-tokens", 40, "--out", tmp_path / "run"]
    assert cli(rcrl, *argv)[0] == 0
    samples, completions = drawn
    assert {call.weights for call in drawn} == {saved_weights(start)}
    assert [call.seed for call in drawn] == [[7, 0], [7, 1]] and {
        call.temperature for call in drawn
    } == {1.0}
    policy = common.Policy("tiny", "cpu")
    for sample in completions.samples:
        prompt = policy.encode_prompt(common.prompt_text(sample.problem)) + policy.encode_prefix(
            sample.prefix
        )
        assert list(sample.prompt) == prompt and sample.prefix.endswith("\n")
    q = {}
    for sample in completions.samples:
        q.setdefault((sample.problem.id.rsplit("/", 1)[0], sample.prefix), []).append(
            sample.correct and sample.finished
        )
    labelled = rows_of(tmp_path / "run" / "samples" / "labelled.jsonl")
    for row in labelled:
        texts = list(itertools.accumulate(line["text"] for line in row["lines"]))
        for line, text in zip(row["lines"][:-1], texts, strict=False):
            assert line["q"] == np.mean(q[row["problem"], text])
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["sampled_truncated"] == pytest.approx(
        np.mean([not s.finished for s in samples.samples]), rel=1e-5
    )
    assert row["sampled_truncated"] not in (0, 0.5, 1) and row["completions"] == len(
        completions.samples
    )
    assert len(trained) == 4 and all(len(step.examples) == len(labelled) for step in trained)
    assert saved_weights(tmp_path / "run" / "model") == measured[2]


def test_rcrl_starts_from_the_weights_of_the_base(cli, start, tmp_path, monkeypatch, measured):
    first = []

    def stop(policy, *_):
        first.append(policy.model.model.layers[0].self_attn.q_proj.weight.clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(rcrl, "train_step", stop)
    argv = ["--model", start, *SMALL, "--limit-train", 16, "--samples", 2, "--labels", "outcome"]
    argv += ["--out", tmp_path / "run"]
    assert cli(rcrl, *argv)[0] == 130
    base, model = (
        common.Policy(name, "cpu").model.model.layers[0].self_attn.q_proj.weight
        for name in ("tiny", start)
    )
    assert torch.equal(first[0], base) and not torch.equal(first[0], model)


# ---- reward models


def test_the_reward_model_learns_to_score_correct_solutions_higher(
    cli, start, tmp_path, drawn, monkeypatch
):
    """--model samples and --base is trained. The labels come from the answer check.

    The best epoch is kept.
    """
    step, steps, aucs, states = reward_model.train_step, [], iter([0.6, 0.9, 0.7]), []
    assert next(aucs)

    def spied(orm, optimizer, batch, *more):
        examples, labels, _ = zip(*batch, strict=True)
        steps.append(
            SimpleNamespace(before=weights_of(orm), orm=orm, examples=examples, labels=labels)
        )
        return step(orm, optimizer, batch, *more)

    def quality(*_):
        states.append(weights_of(steps[-1].orm))
        return {
            "auc": next(aucs),
            "best_of_n": [{"n": 1, "orm": 0.0, "majority": 0.0, "oracle": 0.0}],
        }

    monkeypatch.setattr(reward_model, "train_step", spied)
    monkeypatch.setattr(reward_model, "quality", quality)
    argv = ["--model", start, "--base", "tiny", *SMALL, "--limit-train", 24, "--samples", 3]
    argv += ["--eval-samples", 2, "--epochs", 2, "--batch-size", 1000, "--max-new-tokens", 40]
    argv += ["--out", tmp_path / "run"]
    assert cli(reward_model, *argv)[0] == 0
    assert {call.weights for call in drawn} == {saved_weights(start)} and [
        call.seed for call in drawn
    ] == [[7, 0], [7, 1]]
    new = reward_model.RewardModel("tiny", "cpu", new=True)
    assert steps[0].before == weights_of(new) and len(steps) == 2
    answers = {s.problem.question: s.problem.answer for s in drawn[0].samples}
    distinct = {(s.problem.id, s.solution, s.correct) for s in drawn[0].samples}
    for each in steps:
        assert len(each.examples) == len(distinct) and 0 < np.mean(each.labels) < 1
        for (prompt, solution), label in zip(each.examples, each.labels, strict=True):
            question = new.decode(prompt).removeprefix("Question: ").removesuffix("\nAnswer:\n")
            # A truncated sample is incorrect, even with the correct answer.
            if label:
                assert common.extract_answer(new.decode(solution)) == answers[question]
    assert sum(steps[0].labels) == sum(correct for *_, correct in distinct)
    assert (
        weights_of(reward_model.RewardModel(str(tmp_path / "run" / "model"), "cpu"))
        == states[0]
        != states[1]
    )
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["sampled_truncated"] == pytest.approx(
        np.mean([not s.finished for s in drawn[0].samples]), rel=1e-5
    )

    problem = common.load_problems("arithmetic", "train", 1)[0]
    pair = [
        common.Sample(problem, i, text, True)
        for i, text in enumerate((problem.reference, "#### 99"))
    ]
    optimizer = torch.optim.AdamW(new.model.parameters(), lr=1e-3)
    for _ in range(20):
        batch = [(new.encode(s), label, 1.0) for s, label in zip(pair, (1.0, 0.0), strict=True)]
        step(new, optimizer, batch, 1024)
    right, wrong = (scores[-1] for scores in new.scores(pair))
    assert right > 0.8 and wrong < 0.2


# ---- SFT and evaluation


def test_an_epoch_of_sft_uses_every_solution_once(cli, tmp_path, measured, trained):
    argv = ["--model", "tiny", *SMALL, "--epochs", 3, "--batch-size", 7, "--out", tmp_path / "run"]
    assert cli(sft, *argv)[0] == 0
    assert [len(step.examples) for step in trained] == [7, 7, 7, 3] * 3
    epochs = [
        [tuple(s) for step in trained[i : i + 4] for _, s in step.examples] for i in (0, 4, 8)
    ]
    assert (
        len({tuple(sorted(epoch)) for epoch in epochs}) == 1
        and len({tuple(epoch) for epoch in epochs}) == 3
    )
    assert saved_weights(tmp_path / "run" / "model") == measured[2]


def test_an_evaluation_has_one_greedy_and_n_sampled_solutions(cli, tmp_path, drawn):
    argv = ["--model", "tiny", *SMALL, "--limit-eval", 12, "--samples", 3, "--temperature", 0.9]
    argv += ["--max-new-tokens", 36]
    for name, flags in (("plain", []), ("few", ["--few-shot"])):
        assert cli(evaluate, *argv, *flags, "--out", tmp_path / f"{name}.json")[0] == 0
    assert [(call.temperature, len(call.samples), call.seed, call.few_shot) for call in drawn] == [
        (0, 12, 7, False), (0.9, 36, 7, False), (0, 12, 7, True), (0.9, 36, 7, True)
    ]  # fmt: skip
    report = json.loads((tmp_path / "plain.json").read_text())
    greedy, samples = drawn[0].samples, drawn[1].samples
    for key, group in (("truncated@1", greedy), ("truncated", samples)):
        assert report[key]["value"] == pytest.approx(np.mean([not s.finished for s in group]))
        assert report[key]["value"] not in (0, 0.5, 1)
    for key, group in (("no_answer@1", greedy), ("no_answer", samples)):
        assert report[key]["value"] == pytest.approx(np.mean([s.answer is None for s in group]))
    assert report["maj@1"]["value"] == pytest.approx(np.mean([s.correct for s in greedy]))


def test_samples_of_training_questions_for_a_selection_have_their_own_seed(cli, tmp_path, drawn):
    """Without a reward model, --split train has the samples of the seed [seed, 0].

    A reward model was trained on these samples. So it scores other ones.
    """
    reward_model.RewardModel("tiny", "cpu", new=True).save(tmp_path / "orm")
    argv = ["--model", "tiny", *SMALL, "--limit-eval", 4, "--samples", 2, "--split", "train"]
    for name, flags in (("plain", []), ("scored", ["--orm", tmp_path / "orm"])):
        assert cli(evaluate, *argv, *flags, "--out", tmp_path / f"{name}.json")[0] == 0
    assert [(call.temperature, call.seed) for call in drawn] == [
        (0, 7), (0.7, [7, 0]), (0, 7), (0.7, 7)
    ]  # fmt: skip
    assert cli(evaluate, *argv[:-1], "dev", "--out", tmp_path / "dev.json")[0] == 0
    assert [call.seed for call in drawn[4:]] == [7, 7]
    written = common.read_samples(tmp_path / "plain.samples.jsonl")
    assert [s.text for s in written] == [s.text for s in drawn[1].samples]
    again = common.generate(
        common.Policy("tiny", "cpu"),
        common.load_problems("arithmetic", "train", 4),
        samples=2,
        max_new_tokens=60,
        temperature=0.7,
        seed=[7, 0],
    )
    assert [s.text for s in written] == [s.text for s in again]


def test_a_single_sample_is_scored_but_there_is_no_reranking(cli, tmp_path):
    reward_model.RewardModel("tiny", "cpu", new=True).save(tmp_path / "orm")
    argv = ["--model", "tiny", *SMALL, "--limit-eval", 4, "--samples", 1, "--max-new-tokens", 46]
    assert cli(evaluate, *argv, "--orm", tmp_path / "orm", "--out", tmp_path / "one.json")[0] == 0
    report, rows = (
        json.loads((tmp_path / "one.json").read_text()),
        rows_of(tmp_path / "one.samples.jsonl"),
    )
    assert report["score"]["value"] == np.mean([row["score"] for row in rows]) == 0.5
    assert not [key for key in report if key.startswith(("rerank", "weighted"))]


def test_dev_is_evaluated_with_greedy_samples(tiny, tmp_path, drawn):
    # With an odd number, no fraction of them is a half.
    problems = common.load_problems("arithmetic", "dev", 13)
    args = argparse.Namespace(max_new_tokens=46, gen_batch_size=16, seed=5, temperature=0.9)
    args.samples, args.out = 2, tmp_path
    (tmp_path / "samples").mkdir()
    common.dev_metrics(tiny, problems[:2], args, 1, samples=1, few_shot=True)
    metrics = common.dev_metrics(tiny, problems, args, 2, samples=4)
    assert len(rows_of(tmp_path / "samples" / "dev_2.jsonl")) == 13
    *_, greedy, samples = drawn
    assert (greedy.temperature, samples.temperature, samples.samples[-1].number) == (0, 0.9, 3)
    assert [call.few_shot for call in drawn] == [True, True, False, False] and {
        call.seed for call in drawn
    } == {5}
    assert (
        metrics["truncated"] == np.mean([not s.finished for s in greedy.samples]) not in (0, 0.5, 1)
    )
    assert metrics["maj@1"] == np.mean([s.correct for s in greedy.samples])
    counts = [sum(s.correct for s in group) for group in common.by_problem(samples.samples)]
    for k in (1, 2, 4):
        assert metrics[f"pass@{k}"] == pytest.approx(
            np.mean([common.pass_at_k(4, c, k) for c in counts])
        )


@pytest.mark.parametrize(
    "flags", [["--curriculum", "backtracking"], ["--curriculum", "plr", "--few-shot"]]
)
def test_a_curriculum_gets_the_results_of_the_questions_that_it_chose(
    flags, cli, tmp_path, drawn, measured, monkeypatch
):
    """It gets their fraction of correct samples and the mean error of the value.

    Its prefixes come before the samples.
    """
    chose, told, sizes, draw, update, gae = (
        [],
        [],
        [],
        ppo.Curriculum.draw,
        ppo.Curriculum.update,
        ppo.gae,
    )

    def spied(kept, function, see=lambda found: found):
        def call(*args):
            found = function(*args)
            kept.append(see(found))
            return found

        return call

    # This records the advantages before whitening.
    monkeypatch.setattr(ppo, "gae", spied(sizes, gae, lambda found: found[0].abs()))
    monkeypatch.setattr(ppo.Curriculum, "draw", spied(chose, draw))
    monkeypatch.setattr(
        ppo.Curriculum, "update", lambda self, *what: told.append(what) or update(self, *what)
    )
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--questions", 6, "--samples", 4]
    argv += ["--phases", 2, *flags]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    train = common.load_problems("arithmetic", "train", 16)
    for call, (chosen, prefixes), (again, solved, errors), size in zip(
        drawn, chose, told, sizes, strict=True
    ):
        groups = common.by_problem(call.samples)
        asked = [(train[i], prefix) for i, prefix in zip(chosen, prefixes, strict=True)]
        assert [(group[0].problem, group[0].prefix) for group in groups] == asked
        assert again == chosen and solved == [
            np.mean([s.correct and s.finished for s in group]) for group in groups
        ]
        means = [
            row[: len(s.tokens)].mean().item() for row, s in zip(size, call.samples, strict=True)
        ]
        assert errors == pytest.approx(np.reshape(means, (6, 4)).mean(1).tolist(), rel=1e-4)
        assert call.few_shot == ("--few-shot" in flags)
    assert any(prefixes) == ("backtracking" in flags) and len(drawn) == 2


def test_the_value_function_has_its_own_learning_rate(cli, tmp_path, measured, monkeypatch):
    rates, adam_w = [], common.adam_w

    def watched(*args):
        optimizer = adam_w(*args)
        optimizer.register_step_pre_hook(
            lambda *_: rates.append([group["lr"] for group in optimizer.param_groups])
        )
        return optimizer

    monkeypatch.setattr(common, "adam_w", watched)
    monkeypatch.setattr(ppo, "LR_WARMUP", 1)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--questions", 2, "--samples", 2]
    argv += ["--phases", 2, "--epochs", 1, "--lr", 1e-3, "--value-lr", 3e-3]
    argv += ["--out", tmp_path / "run"]
    assert cli(ppo, *argv)[0] == 0
    assert rates == [[0.0, 3e-3], [5e-4, 3e-3]]


@pytest.mark.parametrize(
    "script", [sft, expert_iteration, rcrl, reward_model], ids=lambda script: script.__name__
)
def test_the_learning_rate_falls_over_the_whole_training(
    script, cli, tmp_path, measured, monkeypatch
):
    rates = []

    def step(model, optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        return 1.0, 1.0

    monkeypatch.setattr(script, "train_step", step)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 24, "--samples", 2, "--epochs", 2]
    argv += ["--batch-size", 2]
    argv += {expert_iteration: ["--rounds", 1], rcrl: ["--labels", "outcome"]}.get(script, [])
    assert cli(script, *argv, "--lr", 1e-3, "--out", tmp_path / "run")[0] == 0
    how = {"warmup": 0.1} if script in (expert_iteration, rcrl) else {}
    assert len(rates) >= 6 and rates == [
        common.cosine_lr(i, len(rates), 1e-3, **how) for i in range(len(rates))
    ]


def test_few_shot_examples_are_used_in_the_first_round_only(cli, tmp_path, trained, monkeypatch):
    """They are not trained on. The trained policy is evaluated without them."""
    shown = []

    def dev_metrics(policy, problems, args, number, samples=0, few_shot=False):
        shown.append(few_shot)
        return {"maj@1": 0.5, "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--samples", 2, "--rounds", 1]
    argv += ["--epochs", 1, "--few-shot"]
    assert cli(expert_iteration, *argv, "--sft-data", "--out", tmp_path / "run")[0] == 0
    prompts = {trained[0].policy.decode(prompt) for step in trained for prompt, _ in step.examples}
    assert shown == [True, False]
    assert prompts == {
        common.prompt_text(p) for p in common.load_problems("arithmetic", "train", 16)
    }


def test_expert_iteration_stops_at_a_round_that_is_not_better(cli, tmp_path, monkeypatch):
    accuracies, states = iter([0.1, 0.5, 0.5, 0.9]), []

    def dev_metrics(policy, *_, **__):
        states.append(weights_of(policy))
        return {"maj@1": next(accuracies), "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    argv = [*SMALL, "--model", "tiny", "--limit-train", 16, "--samples", 2, "--epochs", 1]
    argv += ["--pass-k", 0, "--sft-data"]
    assert cli(expert_iteration, *argv, "--rounds", 3, "--out", tmp_path / "run")[0] == 0
    assert len(states) == 3 and saved_weights(tmp_path / "run" / "model") == states[1]


def test_rcrl_evaluates_its_policy_conditioned_on_good(cli, tmp_path, monkeypatch):
    labels = []

    def dev_metrics(policy, *_, **__):
        labels.append(policy.tokenizer.convert_ids_to_tokens(policy.label))
        return {"maj@1": 0.5, "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--samples", 2, "--epochs", 1]
    argv += ["--labels", "outcome"]
    assert cli(rcrl, *argv, "--out", tmp_path / "run")[0] == 0
    assert labels == ["[GOOD]"]


def test_the_fraction_of_good_lines_in_incorrect_solutions_is_logged(cli, tmp_path, measured):
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--samples", 3, "--completions", 2]
    argv += ["--epochs", 1]
    assert cli(rcrl, *argv, "--ratio", 1, "--out", tmp_path / "run")[0] == 0
    row, labelled = (
        rows_of(tmp_path / "run" / name) for name in ("metrics.jsonl", "samples/labelled.jsonl")
    )
    shares = [
        [line["label"] == "good" for r in labelled if r["correct"] in kinds for line in r["lines"]]
        for kinds in ((0,), (0, 1))
    ]
    assert [row[0][key] for key in ("good_if_incorrect", "good_lines")] == pytest.approx(
        [*map(np.mean, shares)], rel=1e-5
    )


def test_the_dev_loss_is_computed_on_the_dev_problems(cli, tmp_path, measured, monkeypatch):
    asked, file = [], tmp_path / "p.jsonl"
    rows = [
        {"question": f"q{i}", "answer": f"1+{i}=<<1+{i}={1 + i}>>{1 + i}\n#### {1 + i}"}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def cross_entropy(policy, examples, token_budget):
        asked.append([tuple(map(policy.decode, example)) for example in examples])
        return 1.5

    monkeypatch.setattr(sft, "cross_entropy", cross_entropy)
    assert (
        cli(
            sft,
            "--model",
            "tiny",
            "--dataset",
            file,
            *SMALL,
            "--epochs",
            1,
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    dev = common.load_problems(str(file), "dev", 8)
    assert asked == [[(common.prompt_text(p), p.solution) for p in dev]] * 2 and len(dev) > 1
    assert [row["dev_loss"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [1.5, 1.5]


def test_the_interval_of_a_count_may_exceed_one(cli, tmp_path, nano, monkeypatch):
    columns = {"maj@1": [1.0, 0.0, 1.0], "distinct@4": [2.0, 3.0, 4.0]}
    monkeypatch.setattr(evaluate, "metrics_per_problem", lambda *_: columns)
    argv = ["--model", nano, "--limit-eval", 3, "--samples", 4, "--max-new-tokens", 2]
    assert cli(evaluate, *argv, "--out", tmp_path / "report.json")[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    for name, highest in (("maj@1", 1), ("distinct@4", 4)):
        assert report[name]["ci95"] == evaluate.confidence_interval(columns[name], highest)


def test_a_run_that_finished_while_the_model_was_loaded_is_not_replaced(run):
    late = runtime.Run(argparse.Namespace(out=run.out / "in", checkpoint_every=9, resume=False))
    first = runtime.Run(argparse.Namespace(out=run.out / "in", checkpoint_every=9, resume=False))
    first.begin()
    first.log(step=1)
    first.finish()
    before = (run.out / "in" / "metrics.jsonl").read_text()
    with pytest.raises(runtime.UserError, match="already holds a run"):
        late.begin()
    assert (run.out / "in" / "metrics.jsonl").read_text() == before


def test_a_linked_model_folder_is_replaced_and_its_target_is_kept(tiny, tmp_path):
    tiny.save(tmp_path / "elsewhere")
    (tmp_path / "model").symlink_to("elsewhere")
    for _ in range(2):
        tiny.save(tmp_path / "model")
    assert not (tmp_path / "model").is_symlink() and (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_a_run_does_not_resume_with_other_files_of_samples(tmp_path):
    file = tmp_path / "scores.jsonl"
    for key, value in (("scores", [str(file)]), ("references", str(file))):
        settings = dict(out=tmp_path / key, checkpoint_every=9, **{key: value})
        file.write_text("one\n")
        begun = runtime.Run(argparse.Namespace(**settings, resume=False))
        begun.begin()
        begun.log(step=1)
        runtime.Run(argparse.Namespace(**settings, resume=True))
        file.write_text("two\n")
        with pytest.raises(runtime.UserError, match=f"other settings .{key}_fingerprint"):
            runtime.Run(argparse.Namespace(**settings, resume=True))


@pytest.mark.parametrize(
    "change",
    [
        {"problem": [1]},
        {"problem": {}},
        {"question": None},
        {"question": 5},
        {"question": " "},
        {"question": ["a"]},
        {"reference": "1e100000000"},
        {"reference": "x"},
        {"score": float("nan")},
        {"score": "high"},
        {"text": None},
        {"sample": "first"},
    ],
    ids=str,
)
def test_the_error_names_a_broken_line_of_a_samples_file(tmp_path, change):
    problem, file = common.load_problems("arithmetic", "train", 1)[0], tmp_path / "x.jsonl"
    row = json.loads(common.Sample(problem, 0, problem.reference, True, score=0.5).to_json())
    file.write_text(json.dumps(row) + "\n")
    (sample,) = common.read_samples(file)
    assert sample.correct and sample.score == 0.5 and sample.problem.answer == problem.answer
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(runtime.UserError, match="x.jsonl line 2: not a sample$"):
        common.read_samples(file)


def test_different_questions_with_the_same_id_are_refused(tmp_path):
    problems = common.load_problems("arithmetic", "train", 2)
    rows = [json.loads(common.Sample(p, 0, p.reference, True).to_json()) for p in problems]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row | {"problem": "p"}) + "\n" for row in rows))
    with pytest.raises(runtime.UserError, match="different questions have the same id"):
        common.read_samples(file)
