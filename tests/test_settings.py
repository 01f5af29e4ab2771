"""Every setting has its effect, and every logged key has the meaning that docs/metrics.md gives it.

Each test fails if a script forgets one setting or key. Formulas have tests of their own. So has
the data that passes between the parts of a loop.
"""

import argparse
import json
import math
import signal

import numpy as np
import pytest
import torch
import transformers
from test_generation import SMALL as SIZES
from test_generation import write_model
from test_genrm import PPO, folders  # noqa: F401
from test_loops import SMALL, drawn, measured, saved_weights, start, weights_of  # noqa: F401
from test_ppo import curriculum_of
from test_scripts import cli, rows_of  # noqa: F401

import common
import evaluate
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

TRAIN = common.load_problems("arithmetic", "train", 64)
# This answer is incorrect for all of the problems.
LOST = "1+1=<<1+1=2>>2\n#### 99"
scripts = {"ids": lambda script: script.__name__}


def last_row(run) -> dict:
    return rows_of(run / "metrics.jsonl")[-1]


# ---- temperature, seed, order of the data


@pytest.mark.parametrize("script", [expert_iteration, rcrl, reward_model], **scripts)
def test_samples_have_the_temperature_of_the_flag(script, cli, tmp_path, drawn, measured):
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--samples", 3, "--epochs", 1]
    argv += ["--temperature", 1.3]
    argv += {
        expert_iteration: ["--rounds", 1],
        rcrl: ["--completions", 2, "--ratio", 1],
        reward_model: ["--eval-samples", 2],
    }[script]
    assert cli(script, *argv, "--out", tmp_path / "run")[0] == 0
    assert [call.temperature for call in drawn] == [1.3] * (1 if script is expert_iteration else 2)


@pytest.mark.parametrize("script", [sft, expert_iteration, rcrl, reward_model], **scripts)
def test_every_epoch_has_its_own_order_and_logs_its_own_loss(
    script, cli, tmp_path, measured, monkeypatch
):
    seen, seeds, shuffled = [], set(), common.shuffled

    def step(policy, optimizer, batch, *_):
        seen.append([entry[0] for entry in batch] if script is reward_model else batch)
        return float(len(seen)), 1.0

    monkeypatch.setattr(
        common, "shuffled", lambda n, *seed: seeds.add(seed[0]) or shuffled(n, *seed)
    )
    monkeypatch.setattr(script, "train_step", step)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 24, "--samples", 2, "--epochs", 2]
    argv += ["--batch-size", 1000]
    argv += {expert_iteration: ["--rounds", 1], rcrl: ["--labels", "outcome"]}.get(script, [])
    assert cli(script, *argv, "--out", tmp_path / "run")[0] == 0
    first, second = seen
    assert sorted(first) == sorted(second) and first != second and seeds == {7}
    # Labels are no targets.
    labels = 2 * len(first) if script is rcrl else 0
    assert (
        last_row(tmp_path / "run")["tokens"]
        == 2 * sum(len(response) for _, response in first) - labels
    )
    assert last_row(tmp_path / "run")["loss"] == 2.0


def test_the_learning_rate_follows_a_cosine_and_adam_has_beta2_of_095():
    # A quarter of the way. A linear schedule would give 0.75.
    assert common.cosine_lr(54, 200, 1.0) == pytest.approx(0.8565, abs=1e-3)
    assert common.adam_w([torch.nn.Parameter(torch.zeros(1))], 0.1).defaults["betas"] == (0.9, 0.95)


def test_ppo_clips_the_gradients_of_policy_and_value_function_separately(
    cli, tmp_path, measured, monkeypatch
):
    """The gradient of the policy has norm 3, the gradient of the value function 0.5."""
    adam_w, sum_gradients, optimizers, clipped = common.adam_w, runtime.sum_gradients, [], []

    def norms(optimizer):
        groups = ([w.grad for w in group["params"]] for group in optimizer.param_groups)
        groups = ([gradient for gradient in group if gradient is not None] for group in groups)
        return [torch.nn.utils.get_total_norm(group).item() for group in groups]

    def watched(*args):
        optimizers.append(adam_w(*args))
        optimizers[0].register_step_pre_hook(lambda it, *_: clipped.append(norms(it)))
        return optimizers[0]

    def scaled(*args):
        groups = optimizers[0].param_groups
        for group, norm, wanted in zip(groups, norms(optimizers[0]), (3, 0.5), strict=True):
            for weight in group["params"] if norm else ():
                weight.grad *= wanted / norm
        return sum_gradients(*args)

    monkeypatch.setattr(common, "adam_w", watched)
    monkeypatch.setattr(runtime, "sum_gradients", scaled)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--questions", 8, "--samples", 4]
    argv += ["--phases", 2, "--epochs", 2]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    # In the first phase only the value function has gradients.
    expected = [pytest.approx(both, rel=1e-4) for both in ([0, 0.5], [1, 0.5])]
    assert clipped == [expected[0]] * 2 + [expected[1]] * 2
    row = last_row(tmp_path / "run")
    assert (row["grad_norm"], row["value_grad_norm"]) == pytest.approx((3, 0.5), rel=1e-4)


# ---- the best epoch, round, phase


@pytest.mark.parametrize("script", [ppo, rcrl], **scripts)
def test_among_equally_good_checkpoints_the_first_is_kept(script, cli, tmp_path, monkeypatch):
    states = []

    def dev_metrics(policy, *_, **__):
        states.append(weights_of(policy))
        return {"maj@1": 0.5, "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--samples", 2, "--epochs", 2]
    phases = ["--phases", 3, "--questions", 8, "--eval-every", 2]
    argv += phases if script is ppo else ["--labels", "outcome"]
    assert cli(script, *argv, "--out", tmp_path / "run")[0] == 0
    assert (
        len(set(states)) == len(states) > 1
        and saved_weights(tmp_path / "run" / "model") == states[0]
    )


def test_a_reward_model_starts_from_the_policy_and_keeps_the_first_of_equal_epochs(
    cli, start, tmp_path, monkeypatch
):
    states, begun, step = [], [], reward_model.train_step

    def spied(orm, *more):
        begun.append(weights_of(orm))
        found = step(orm, *more)
        states.append(weights_of(orm))
        return found

    blocks = [
        {"n": 1, "orm": 0.0, "majority": 0.0, "oracle": 0.0},
        {"n": 2, "orm": 0.1, "majority": 0.2, "oracle": 0.3},
    ]
    monkeypatch.setattr(reward_model, "train_step", spied)
    monkeypatch.setattr(reward_model, "best_of_n", lambda *_: blocks)
    monkeypatch.setattr(reward_model, "auc", lambda *_: 0.6)
    argv = ["--model", start, *SMALL, "--limit-train", 24, "--samples", 2, "--eval-samples", 2]
    argv += ["--epochs", 2]
    assert cli(reward_model, *argv, "--batch-size", 1000, "--out", tmp_path / "run")[0] == 0
    assert begun[0] == weights_of(reward_model.RewardModel(start, "cpu", new=True))
    assert (
        weights_of(reward_model.RewardModel(str(tmp_path / "run" / "model"), "cpu"))
        == states[0]
        != states[1]
    )
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[0]
    assert [row[f"{key}@2"] for key in ("rerank", "maj", "pass")] == [0.1, 0.2, 0.3]
    groups = common.by_problem(
        common.read_samples(tmp_path / "run" / "samples" / "train.jsonl", TRAIN[:24])
    )
    assert row["informative"] == pytest.approx(
        np.mean([len({s.correct for s in g}) == 2 for g in groups]), rel=1e-5
    )


def test_an_evaluation_reports_the_metric_minus_majority_voting(cli, tmp_path, nano, monkeypatch):
    columns = {
        "maj@1": [0.0] * 3,
        "maj@4": [1.0, 0.0, 0.0],
        "rerank@4": [1.0, 1.0, 0.0],
        "weighted@4": [0.0] * 3,
    }
    monkeypatch.setattr(evaluate, "metrics_per_problem", lambda *_: columns)
    argv = ["--model", nano, "--limit-eval", 3, "--samples", 4, "--max-new-tokens", 2]
    assert cli(evaluate, *argv, "--out", tmp_path / "report.json")[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    said = [report[f"{name}@4 - maj@4"]["difference"] for name in ("rerank", "weighted")]
    assert said == pytest.approx([1 / 3, -1 / 3])


# ---- defaults that are set after parsing, and the settings that a resumed run compares


def test_defaults_that_depend_on_other_flags():
    assert expert_iteration.parse_args(["--orm", "x"]).orm_threshold == 0.5
    args = reward_model.parse_args(["--kind", "genrm"])
    assert (args.out, args.lr, args.epochs, args.batch_size) == ("runs/genrm", 5e-4, 3, 8)
    assert reward_model.parse_args(["--kind", "genrm", "--lr", "1"]).lr == 1
    assert reward_model.parse_args([]).lr == 1e-3


def begin(args) -> None:
    handler = signal.getsignal(signal.SIGINT)
    run = runtime.Run(args)
    run.begin()
    run.checkpoint(now=True)
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("script, flags, condition", [
    (ppo, ["--switch", "0.1"], "--curriculum verifiable_first"),
    (ppo, ["--select-fraction", "0.5"], "--select"),
    (ppo, ["--scores", "x.jsonl"], "--select"),
    (ppo, ["--references", "x.jsonl"], "--reward genrm"),
    (ppo, ["--hide", "0.5", "0"], "--reward genrm"),
    (ppo, ["--genrm", "x"], "--reward genrm"),
    (ppo, ["--orm", "x"], "--reward orm"),
    (ppo, ["--add-outcome"], "--reward orm"),
    (reward_model, ["--pairs", "3"], "--kind genrm"),
    (rcrl, ["--labels", "outcome", "--label-rule", "any"], "--labels step"),
    (rcrl, ["--label-rule", "any", "--labels", "outcome"], "--labels step"),
    (rcrl, ["--monotone", "--labels", "none"], "--labels step"),
])  # fmt: skip
def test_a_flag_without_an_effect_names_the_flag_that_it_needs(
    script, flags, condition, capsys, tmp_path
):
    flags = [*flags, "--out", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit) as left:
        script.parse_args(flags)
    said = capsys.readouterr().err
    assert (
        left.value.code == 2
        and f"does nothing without {condition}" in said
        and said.count("\n") == 1
    )
    # A run that was started with the flag can be resumed.
    (tmp_path / "args.json").write_text("{}")
    script.parse_args(flags)


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("script, flags", [
    (sft, []), (expert_iteration, []), (expert_iteration, ["--sft-data"]), (rcrl, []), (ppo, []),
    (reward_model, ["--kind", "genrm"]), (evaluate, []),
])  # fmt: skip
def test_a_question_that_is_too_long_is_refused_before_sampling(
    script, flags, split, cli, tmp_path, drawn
):
    """One question of 30 is too long. The run stops before it writes or samples."""
    rows = [{"question": f"q{i}", "answer": f"1+1=2\n#### {i}"} for i in range(30)]
    # sft.py trains on written solutions only. A GenRM is evaluated next to them.
    written = script is reward_model or (script is sft and split == "train")
    answer = "1+1=2\n#### 5" if written else "5"
    rows[{"train": 5, "dev": 29}[split]] = {"question": "How many?" * 600, "answer": answer}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / ("run.json" if script is evaluate else "run")
    argv = ["--model", "tiny", "--dataset", tmp_path / "data", "--samples", 2, "--out", out]
    argv += ["--split", split] if script is evaluate else []
    code, message = cli(script, *argv, *flags)
    assert code == 2 and "positions" in message and message.count("\n") == 1
    assert not drawn and [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("key", ["model", "base", "orm", "genrm"])
def test_a_run_does_not_resume_with_another_model(key, tmp_path):
    given, policy = tmp_path / "given", common.Policy("tiny", "cpu")
    policy.save(given)
    args = argparse.Namespace(
        out=tmp_path / "run",
        resume=True,
        checkpoint_every=100,
        **{key: str(given)},
    )
    begin(args)
    # Nothing has changed.
    runtime.Run(args)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.add_(1.0)
    policy.save(given)
    with pytest.raises(runtime.UserError, match=f"{key}_fingerprint"):
        runtime.Run(args)


# ---- PPO


def test_a_phase_of_ppo_logs_its_own_questions_samples_and_minibatches(
    cli, tmp_path, drawn, measured, monkeypatch
):
    asked, losses, estimates, states = [], [], [], []
    forward, policy_loss, value_loss = common.response_logprobs, ppo.policy_loss, ppo.value_loss
    gae, save = ppo.gae, runtime.Run.checkpoint
    monkeypatch.setattr(common, "response_logprobs", lambda *a: asked.append(a[1]) or forward(*a))
    monkeypatch.setattr(ppo, "gae", lambda *a: estimates.append((a, gae(*a))) or estimates[-1][1])

    def spied(function):
        def loss(*args):
            losses.append((args, function(*args)))
            return losses[-1][1]

        return loss

    monkeypatch.setattr(ppo, "policy_loss", spied(policy_loss))
    monkeypatch.setattr(ppo, "value_loss", spied(value_loss))
    monkeypatch.setattr(
        runtime.Run, "checkpoint", lambda run, **state: states.append(state) or save(run, **state)
    )
    argv = ["--model", "tiny", *SMALL, "--limit-train", 64, "--questions", 6, "--samples", 4]
    argv += ["--phases", 2, "--epochs", 2, "--batch-size", 10, "--eval-every", 9]
    argv += ["--lora-rank", 3, "--token-budget", 100000, "--lr", 2e-3]
    monkeypatch.setattr(ppo, "LR_WARMUP", 1)
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    curriculum = curriculum_of("none", TRAIN, 7)
    for i, row in enumerate(rows_of(tmp_path / "run" / "metrics.jsonl")[1:]):
        samples = drawn[i].samples
        chosen = [group[0].problem for group in common.by_problem(samples)]
        assert chosen == [TRAIN[j] for j in curriculum.draw(i + 1, 6)[0]]
        # Two passes over all samples come first. Then each epoch has 10, 10 and 4 samples.
        minibatches = [set(map(id, examples)) for examples in asked[8 * i : 8 * i + 8][2:]]
        assert list(map(len, minibatches)) == [10, 10, 4] * 2
        assert minibatches[0] != minibatches[3], "every epoch has its own order"
        columns = {"policy_loss": [], "value_loss": [], "clip_fraction": [], "approx_kl": []}
        both = losses[12 * i : 12 * i + 12]
        for (args, policy), (_, value) in zip(both[::2], both[1::2], strict=True):
            change = args[0].detach() - args[1]
            columns["policy_loss"].append(policy.mean().item())
            columns["value_loss"].append(value.mean().item())
            columns["clip_fraction"].append(((change.exp() - 1).abs() > 0.2).float().mean().item())
            columns["approx_kl"].append((change.exp() - 1 - change).mean().item())
        for key, column in columns.items():
            assert row[key] == pytest.approx(np.mean(column), rel=1e-4, abs=1e-8)
        # In phase 1 the policy does not move.
        assert (row["clip_fraction"] > 0) == (i > 0)
        lengths = torch.tensor([len(sample.tokens) for sample in samples])
        real = torch.arange(lengths.max()) < lengths[:, None]
        (_, values, *_), (_, returns) = estimates[i]
        assert row["explained_variance"] == pytest.approx(
            ppo.explained_variance(returns[real], values[real]), rel=1e-3
        )
        assert row["response_length"] == pytest.approx(lengths.float().mean().item(), rel=1e-5)
    assert states[-2]["trained"]["down.0"].shape[0] == 3


def test_the_policy_trains_from_phase_2_on(cli, tmp_path, measured):
    argv = ["--model", "tiny", *SMALL, "--limit-train", 16, "--questions", 4, "--samples", 4]
    argv += ["--phases", 3, "--epochs", 1, "--eval-every", 9, "--out", tmp_path / "run"]
    assert cli(ppo, *argv)[0] == 0
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [row["grad_norm"] > 0 for row in rows] == [False, True, True]


def test_the_value_function_has_at_most_half_of_the_layers(tmp_path, monkeypatch):
    sizes = SIZES | {"num_hidden_layers": 6}
    write_model(
        lambda v: transformers.LlamaConfig(vocab_size=v, num_key_value_heads=2, **sizes), tmp_path
    )
    examples = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 1])]
    for asked, n in ((1, 1), (2, 2), (4, 3)):
        policy, last = common.Policy(str(tmp_path), "cpu"), []
        monkeypatch.setattr(ppo, "VALUE_LAYERS", asked)
        critic = ppo.ValueFunction(policy, detach=True)
        assert len(critic.layers) == n
        torch.nn.init.normal_(critic.head.weight)
        policy.layers()[-1].register_forward_hook(
            lambda module, given, out, last=last: last.append(out)
        )
        with torch.no_grad():
            values = critic(policy, examples, 1.0)[1]
            top = last[0][0] if isinstance(last[0], tuple) else last[0]
            rows, columns = common.response_positions(examples, policy.device)
            expected = critic.head(critic.norm(top[rows, columns - 1]))[:, 0]
            torch.testing.assert_close(values, expected)


def test_the_outcome_is_added_to_the_score_of_the_reward_model(cli, tmp_path, folders):
    argv = [*PPO, "--phases", 1, "--limit-train", 24, "--reward", "orm", "--orm", folders.orm]
    argv += ["--add-outcome"]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    # A new reward model gives 0.5 to every sample that was not truncated.
    row = last_row(tmp_path / "run")
    assert (
        row["reward"]
        == pytest.approx(row["correct"] + (1 - row["sampled_truncated"]) / 2, rel=1e-4)
        and row["correct"] > 0
    )


def test_dev_is_evaluated_with_the_few_shot_prompt_of_the_rollouts(cli, tmp_path, monkeypatch):
    shown = []

    def dev_metrics(policy, problems, args, number, samples=0, few_shot=False):
        shown.append((samples, few_shot))
        return {"maj@1": 0.5, "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 8, "--questions", 2, "--samples", 2]
    argv += ["--phases", 1]
    assert cli(ppo, *argv, "--few-shot", "--out", tmp_path / "run")[0] == 0
    assert shown == [(0, True)] * 2


def test_a_sampler_that_disagrees_with_training_shows_in_logprob_mismatch(
    cli, tmp_path, monkeypatch
):
    generate = common.generate

    def off(*args, **how):
        samples = generate(*args, **how)
        if how["progress"].startswith("phase"):
            samples[1].logprobs[0] -= math.log(1.5)
        return samples

    monkeypatch.setattr(common, "generate", off)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 8, "--questions", 2, "--samples", 2]
    argv += ["--phases", 1]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    assert last_row(tmp_path / "run")["logprob_mismatch"] == pytest.approx(0.5, abs=1e-3)


def test_the_largest_deviation_of_a_ratio_from_one_is_logged(cli, tmp_path, measured, monkeypatch):
    """The maximum is over all micro-batches of the first minibatch."""
    forward, policy_loss, deviations = common.response_logprobs, ppo.policy_loss, []
    noise = torch.Generator().manual_seed(0)

    def other_kernels(*args):
        logprobs = forward(*args)
        if logprobs.requires_grad:
            logprobs = logprobs + 0.4 * torch.randn(logprobs.shape, generator=noise)
        return logprobs

    def spied(logprobs, old, *more):
        deviations.append(((logprobs - old).exp() - 1).abs().max().item())
        return policy_loss(logprobs, old, *more)

    monkeypatch.setattr(common, "response_logprobs", other_kernels)
    monkeypatch.setattr(ppo, "policy_loss", spied)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 8, "--questions", 4, "--samples", 2]
    argv += ["--phases", 1, "--epochs", 1, "--batch-size", 4, "--token-budget", 1]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    # Each of two minibatches has 4 micro-batches of one sample.
    assert len(deviations) == 8
    largest = max(deviations[:4])
    assert largest not in (deviations[0], deviations[3]) and largest < max(deviations)
    assert last_row(tmp_path / "run")["max_ratio_deviation"] == pytest.approx(largest, rel=1e-5)


def test_the_prefix_of_backtracking_is_not_trained_on(cli, tmp_path, drawn, measured):
    argv = ["--model", "tiny", *SMALL, "--limit-train", 8, "--questions", 4, "--samples", 2]
    argv += ["--phases", 1]
    assert cli(ppo, *argv, "--curriculum", "backtracking", "--out", tmp_path / "run")[0] == 0
    row = last_row(tmp_path / "run")
    assert row["with_prefix"] == 1 and row["tokens"] == 2 * sum(
        len(sample.tokens) for sample in drawn[0].samples
    )


def test_backtracking_hides_one_more_line_if_half_of_the_samples_are_correct():
    curriculum = curriculum_of("backtracking", TRAIN[:2])
    curriculum.update([0, 1], [0.75, 0.25], [0.0, 0.0])
    assert curriculum.state["hidden"] == 2


# ---- the rewards and the selection of Shen et al.


def test_the_hidden_fractions_are_the_values_of_the_flags(cli, tmp_path, folders, monkeypatch):
    asked = []

    def sources(problems, *fractions_and_seed):
        asked.append(fractions_and_seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "reward_sources", sources)
    argv = [*PPO, "--genrm", folders.genrm, "--seed", 5, "--limit-train", 8]
    argv += ["--out", tmp_path / "run"]
    for flags in (["hybrid", "--hide", 0.25, 0.1], ["hybrid"], ["genrm"]):
        assert cli(ppo, *argv, "--reward", *flags)[0] == 130
    assert asked == [([0.25, 0.1], 5), ([0.5, 0], 5), ([1, 0], 5)]
    assert ppo.parse_args([]).hide == [0, 0]
    assert ppo.parse_args(["--reward", "genrm", "--hide", "0", "0"]).hide == [0, 0]


def test_the_number_of_comparisons_is_the_value_of_the_flag(cli, tmp_path, monkeypatch):
    asked = []

    def comparisons(samples, n_pairs, seed):
        asked.append((n_pairs, seed))
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "comparisons", comparisons)
    argv = ["--kind", "genrm", "--model", "tiny", *SMALL, "--limit-train", 4, "--samples", 2]
    argv += ["--eval-samples", 2]
    assert cli(reward_model, *argv, "--pairs", 2, "--out", tmp_path / "run")[0] == 130
    assert asked == [(2, 7)]


class Partial:
    """Prefer the first text by 0.1 for every other problem, the second for the others.

    ":" counts as the gold solution.
    """

    def verdicts(self, comparisons, token_budget):
        scores = np.array([0.5 if candidate == ":" else 0.1 for _, candidate, _ in comparisons])
        signs = np.array([1 if problem in TRAIN[::2] else -1 for problem, *_ in comparisons])
        return scores[:, None] + np.outer(signs, [0.05, -0.05])


def test_order_gap_and_nonsense_worst_show_a_biased_reward_model():
    samples = [
        common.Sample(p, k, text, True)
        for p in TRAIN[:2]
        for k, text in enumerate((p.reference, LOST))
    ]
    report = reward_model.genrm_quality(samples, Partial(), 1000)
    assert report["nonsense_worst"] == pytest.approx(0.5)
    assert report["order_bias"] == pytest.approx(0) and report["order_gap"] == pytest.approx(0.1)


# ---- return-conditioned RL, and samples from files


def test_the_logged_accuracy_of_rcrl_excludes_the_completions(
    cli, start, tmp_path, drawn, measured
):
    argv = ["--model", start, *SMALL, "--limit-train", 16, "--samples", 3, "--completions", 2]
    argv += ["--epochs", 1, "--ratio", 1, "--out", tmp_path / "run"]
    assert cli(rcrl, *argv)[0] == 0
    row, correct = last_row(tmp_path / "run"), [sample.correct for sample in drawn[0].samples]
    assert row["correct"] == pytest.approx(np.mean(correct), rel=1e-5)


def test_the_flags_set_the_size_of_the_mixture(cli, tmp_path, measured):
    # Each text occurs three times.
    texts, file = ("", LOST), tmp_path / "samples.jsonl"
    rows = [
        common.Sample(p, n, texts[n // 3] or p.reference, True) for p in TRAIN[:4] for n in range(6)
    ]
    common.write_samples(file, rows)
    argv = ["--model", "tiny", *SMALL, "--limit-train", 4, "--epochs", 1, "--labels", "outcome"]
    argv += ["--ratio", 1]
    for n, flags in ((4, []), (12, ["--no-deduplicate"]), (3, ["--train-size", 6])):
        assert cli(rcrl, *argv, "--train-samples", file, *flags, "--out", tmp_path / str(n))[0] == 0
        row = last_row(tmp_path / str(n))
        assert (row["n_correct"], row["n_incorrect"]) == (n, n)
        assert (row["correct"], row["samples"]) == (0.5, 0)


@pytest.mark.parametrize("script", [rcrl, reward_model], **scripts)
def test_samples_from_files_are_trained_on_but_are_no_rollouts(script, cli, tmp_path, measured):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, problems in zip(files, (TRAIN[:4], TRAIN[4:8]), strict=True):
        texts = (None, LOST)
        common.write_samples(
            file,
            [
                common.Sample(p, k, text or p.reference, True)
                for p in problems
                for k, text in enumerate(texts)
            ],
        )
    argv = ["--model", "tiny", *SMALL, "--limit-train", 8, "--epochs", 1, "--train-samples", *files]
    argv += ["--labels", "outcome", "--ratio", 1] if script is rcrl else ["--eval-samples", 2]
    assert cli(script, *argv, "--out", tmp_path / "run")[0] == 0
    row = last_row(tmp_path / "run")
    assert row["train_size"] == 16 and row["samples"] == 0


def test_a_truncated_sample_is_read_back_as_one(tmp_path):
    samples = [common.Sample(p, k, p.reference + "\n", k > 0) for p in TRAIN[:2] for k in range(2)]
    common.write_samples(tmp_path / "samples.jsonl", samples)
    assert [s.finished for s in common.read_samples(tmp_path / "samples.jsonl", TRAIN[:2])] == [
        False,
        True,
    ] * 2
