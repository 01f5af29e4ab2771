"""Check PPO: formulas by brute force, values, adapters, and a problem with a known optimum."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from test_generation import ARCHITECTURES, SMALL, random_policy, write_model
from test_loops import guesser
from test_scripts import cli, rows_of, without_time  # noqa: F401

import adapters
import common
import engine
import ppo
import runtime

TINY_RUN = ["--device", "cpu", "--model", "tiny", "--questions", "8", "--samples", "3",
            "--batch-size", "10", "--max-new-tokens", "60", "--gen-batch-size", "16",
            "--limit-eval", "16", "--limit-train", "64", "--eval-every", "2",
            "--checkpoint-every", "0"]  # fmt: skip
EXAMPLES = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 1]), ([4, 4, 4, 4, 4], [3])]


@pytest.fixture(autouse=True)
def every_warning_is_printed():
    """Clear the cache of warnings. A process prints equal warnings once."""
    runtime.warn.cache_clear()


# ---- formulas


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_gae_equals_the_sum_of_its_definition(gamma, lam):
    """A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}).

    The samples have different lengths. Padding after the end of a sample must not leak into it.
    """
    torch.manual_seed(0)
    lengths = [1, 4, 7]
    rewards, values = torch.zeros(3, 7), torch.zeros(3, 7)
    for i, n in enumerate(lengths):
        rewards[i, :n], values[i, :n] = torch.randn(n), torch.randn(n)
    advantages, returns = ppo.gae(rewards, values, gamma, lam)
    for i, n in enumerate(lengths):
        v = [*values[i, :n].tolist(), 0.0]
        for t in range(n):
            expected = sum(
                (gamma * lam) ** (k - t) * (rewards[i, k].item() + gamma * v[k + 1] - v[k])
                for k in range(t, n)
            )
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
        assert not advantages[i, n:].any()
        if lam == 1 and gamma == 1:
            to_go = rewards[i, :n].flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(returns[i, :n], to_go)


@pytest.mark.parametrize("distance", [0.05, 1.0, 3.0])
def test_both_kl_estimators_are_unbiased(distance):
    """In expectation under pi both are KL(pi, ref), computed exactly over 6 outcomes.

    If the distributions are far apart, a flipped sign or direction has an error above the KL.
    """
    torch.manual_seed(1)
    log_pi = torch.randn(6).log_softmax(0)
    log_ref = (log_pi + distance * torch.randn(6)).log_softmax(0)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()
    reverse = (log_ref.exp() * (log_ref - log_pi)).sum()
    kl_k1 = -ppo.penalised_rewards(torch.zeros(6), log_pi, log_ref, kl_coef=1.0)
    kl_k3 = ppo.kl_k3(log_pi, log_ref)
    for estimate in (kl_k1, kl_k3):
        expected = (log_pi.exp() * estimate).sum()
        torch.testing.assert_close(expected, exact, atol=1e-6, rtol=1e-5)
    assert distance < 3 or abs(exact - reverse) > 0.2
    assert (kl_k3 >= 0).all() and (kl_k1 < 0).any()


def test_the_clipped_policy_loss_equals_a_calculation_by_hand():
    """The ratios are 1, 1.5 and 0.5 with both signs of the advantage. The clip range is 0.2.

    The gradient is 0 exactly where the loss is clipped.
    """
    old = torch.zeros(6)
    ratios, advantages = torch.tensor([1.0, 1.0, 1.5, 1.5, 0.5, 0.5]), torch.tensor([2.0, -2.0] * 3)
    logprobs = ratios.log().requires_grad_()
    losses = ppo.policy_loss(logprobs, old, advantages, 0.2, 0.2)
    torch.testing.assert_close(losses, torch.tensor([-2.0, 2.0, -2.4, 3.0, -1.0, 1.6]))
    losses.sum().backward()
    assert (logprobs.grad == 0).tolist() == [False, False, True, False, False, True]


def test_the_clipped_value_loss_equals_a_calculation_by_hand():
    values, old, returns = (
        torch.tensor([0.0, 0.5, 0.5]),
        torch.zeros(3),
        torch.tensor([1.0, 1.0, 0.4]),
    )
    # Unclipped 1, 0.25, 0.01. Clipped to 0.2 around 0: 1, 0.64, 0.04. The larger one is halved.
    torch.testing.assert_close(
        ppo.value_loss(values, old, returns, 0.2), torch.tensor([0.5, 0.32, 0.02])
    )


def test_whitening_gives_mean_0_and_variance_1_and_the_kl_penalty_has_its_sign():
    x = ppo.whiten(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.mean().item() == pytest.approx(0, abs=1e-6) and x.var(
        correction=0
    ).item() == pytest.approx(1)
    assert not ppo.whiten(torch.ones(1)).any() and not ppo.whiten(torch.ones(5)).any()
    got = ppo.penalised_rewards(
        torch.tensor([0.0, 1.0]), torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), 0.1
    )
    # A token that became more likely is penalised.
    torch.testing.assert_close(got, torch.tensor([-0.1, 1.1]))


# ---- rewards


def reward_args(reward: str, add_outcome: bool = False) -> SimpleNamespace:
    return SimpleNamespace(reward=reward, add_outcome=add_outcome, token_budget=1024)


def sampled(policy, problem, text, finished=True, prefix="") -> common.Sample:
    ids = policy.encode_solution(text.removeprefix(prefix))[: None if finished else -1]
    return common.Sample(problem, 0, text, finished, np.array(ids), (), (), prefix)


REFERENCE = common.Problem(
    "p", "q", 30, None, "2+3=<<2+3=5>>5\n5*2=<<5*2=10>>10\n10*3=<<10*3=30>>30\n#### 30"
)


def test_the_sparse_reward_is_on_the_last_token_and_a_truncated_solution_has_none(tiny):
    right, wrong, cut = (
        sampled(tiny, REFERENCE, "10*3=<<10*3=30>>30\n#### 30"),
        sampled(tiny, REFERENCE, "10*3=<<10*3=30>>30\n#### 31"),
        sampled(tiny, REFERENCE, "10*3=<<10*3=30>>30\n#### 30\n", finished=False),
    )
    assert right.tokens[-1] == tiny.tokenizer.eos_token_id and cut.correct
    for sample, total in ((right, 1.0), (wrong, 0.0), (cut, 0.0)):
        (reward,) = ppo.task_rewards(reward_args("sparse"), tiny, [sample])
        assert len(reward) == len(sample.tokens) and reward[-1] == total and not reward[:-1].any()


def test_the_dense_reward_credits_each_reference_value_once_at_the_end_of_its_line(tiny):
    text = "2+3=<<2+3=5>>5\n7+3=<<7+3=10>>10\n2+3=<<2+3=5>>5\n9+9=<<9+9=18>>18\n#### 30"
    dense = reward_args("dense")
    sample = sampled(tiny, REFERENCE, text)
    (reward,) = ppo.task_rewards(dense, tiny, [sample])
    credit = {place: float(r) for place, r in enumerate(reward) if r}
    lines = tiny.line_ends(sample.tokens)
    assert credit == {
        lines[0]: pytest.approx(1 / 3),
        lines[1]: pytest.approx(1 / 3),
        len(reward) - 1: 1.0,
    }
    prefix = "2+3=<<2+3=5>>5\n"
    truncated = sampled(tiny, REFERENCE, text, finished=False)
    assert not ppo.task_rewards(dense, tiny, [truncated])[0].any()
    (reward,) = ppo.task_rewards(dense, tiny, [sampled(tiny, REFERENCE, text, prefix=prefix)])
    assert reward.sum() == pytest.approx(1 + 1 / 3), "the prefix has no reward"
    run_on = sampled(tiny, REFERENCE, "2+3=<<2+3=5>>5\n#### 5\n\nQuestion: 5*2=<<5*2=10>>10?")
    (reward,) = ppo.task_rewards(dense, tiny, [run_on])
    assert reward.sum() == pytest.approx(1 / 3), "text after the answer has no reward"
    whole = sampled(tiny, REFERENCE, REFERENCE.reference)
    assert ppo.task_rewards(dense, tiny, [whole])[0].sum() == pytest.approx(2.0)


# ---- value function and adapters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_value_branch_copies_the_top_of_the_policy_and_starts_at_zero(name, tmp_path_factory):
    """Until training changes the copy, the head reads the policy's own last hidden state.

    This is the state before the final norm. The value is exactly 0 and independent of padding.
    """
    policy = random_policy(name, tmp_path_factory)
    critic = ppo.ValueFunction(policy, detach=True)
    assert len(critic.layers) == 1

    def run(examples):
        logprobs, values = critic(policy, examples, 1.0)
        assert torch.equal(logprobs, common.response_logprobs(policy, examples))
        return values

    with torch.no_grad():
        assert (run(EXAMPLES) == 0).all()
        last = {}
        top = policy.layers()[-1]
        hook = top.register_forward_hook(
            lambda m, i, out: last.update(out=out[0] if isinstance(out, tuple) else out)
        )
        torch.nn.init.normal_(critic.head.weight)
        together = run(EXAMPLES)
        rows, columns = common.response_positions(EXAMPLES, policy.device)
        torch.testing.assert_close(
            together, critic.head(critic.norm(last["out"][rows, columns - 1]))[:, 0]
        )
        hook.remove()
        alone = torch.cat([run([example]) for example in EXAMPLES])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("detach", [True, False])
def test_the_value_loss_reaches_the_policy_only_if_attached(detach, nano):
    policy = common.Policy(nano)
    critic = ppo.ValueFunction(policy, detach=detach)
    torch.nn.init.normal_(critic.head.weight)
    critic(policy, EXAMPLES, 1.0)[1].sum().backward()
    assert all(p.grad is not None for p in critic.layers.parameters())
    touched = [
        name for name, p in policy.model.named_parameters() if p.grad is not None and p.grad.any()
    ]
    assert bool(touched) != detach
    assert not any("layers.1" in name for name in touched), (
        "the value does not use the policy's own top layer"
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_adapters_start_as_the_identity_and_can_be_switched_off_and_merged(
    name, tmp_path_factory, tmp_path
):
    policy = random_policy(name, tmp_path_factory)
    policy = common.Policy(policy.model.config._name_or_path, device="cpu", dtype="float32")
    with torch.no_grad():
        initial = common.response_logprobs(policy, EXAMPLES)
        lora = policy.lora = adapters.Lora(policy, 3)
        assert torch.equal(common.response_logprobs(policy, EXAMPLES), initial)
    common.response_logprobs(policy, EXAMPLES).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.up) and not any(
        p.requires_grad for p in policy.model.parameters()
    )
    with torch.no_grad():
        for p in lora.up:
            p.normal_(std=0.05)
        adapted = common.response_logprobs(policy, EXAMPLES)
        assert (adapted - initial).abs().max() > 1e-3
        with lora.off():
            assert torch.equal(common.response_logprobs(policy, EXAMPLES), initial)
        with pytest.raises(KeyboardInterrupt), lora.merged():
            raise KeyboardInterrupt
        assert torch.equal(common.response_logprobs(policy, EXAMPLES), adapted)
        with lora.merged():
            merged = common.response_logprobs(policy, EXAMPLES)
        torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
        policy.save(tmp_path / "model")
        assert torch.equal(common.response_logprobs(policy, EXAMPLES), adapted)
        plain = common.Policy(str(tmp_path / "model"), device="cpu", dtype="float32")
        torch.testing.assert_close(
            common.response_logprobs(plain, EXAMPLES), adapted, atol=1e-4, rtol=1e-4
        )


def test_small_adapters_are_not_rounded_to_zero_in_bfloat16(tiny):
    """Move all weights of a bfloat16 checkpoint a little along the gradient.

    The log-probability rises by about 0.85 of the rise in float32. If the sum were computed in
    bfloat16, it would rise by about 0.25 of it.
    """
    problems = common.load_problems("arithmetic", "train", 64)
    examples = [
        (tiny.encode_prompt(common.prompt_text(p)), tiny.encode_solution(p.reference))
        for p in problems
    ]
    gains, signs = {}, []
    for dtype in ("float32", "bfloat16"):
        policy = common.Policy("tiny", "cpu", dtype)
        for weight in policy.model.parameters():
            weight.data = weight.data.bfloat16().float()
        torch.manual_seed(0)
        lora = policy.lora = adapters.Lora(policy, 16)
        with torch.no_grad():
            before = common.response_logprobs(policy, examples)
        if not signs:
            common.response_logprobs(policy, examples).sum().backward()
            signs = [up.grad.sign() for up in lora.up]
        for up, sign in zip(lora.up, signs, strict=True):
            up.data = 1e-4 * sign
        with torch.no_grad():
            gains[dtype] = (
                (common.response_logprobs(policy, examples) - before).double().mean().item()
            )
    assert gains["float32"] > 1e-3 and 0.6 < gains["bfloat16"] / gains["float32"] < 1.4


def test_adapters_start_as_the_initial_policy_in_bfloat16(tiny):
    policy = common.Policy("tiny", "cpu", "bfloat16")
    lora = policy.lora = adapters.Lora(policy, 4)
    problem = common.load_problems("arithmetic", "train", 1)[0]
    example = (
        tiny.encode_prompt(common.prompt_text(problem)),
        tiny.encode_solution(problem.reference),
    )
    with torch.no_grad():
        with_adapters = common.response_logprobs(policy, [example])
        with lora.off():
            assert torch.equal(common.response_logprobs(policy, [example]), with_adapters)


def test_adapters_keep_the_cache_in_bfloat16(monkeypatch):
    """Sums with adapters are float32. Keys and values in float32 would take twice the memory."""
    policy, dtypes, keep = (
        common.Policy("tiny", "cpu", "bfloat16"),
        set(),
        engine.cache.PagedCache.keep_prompts,
    )

    def watching(self):
        slots = keep(self)
        dtypes.update(
            t.dtype for pool in (self.prompts, self.own) for layer in pool.layers for t in layer
        )
        return slots

    policy.lora = adapters.Lora(policy, 3)
    monkeypatch.setattr(engine.cache.PagedCache, "keep_prompts", watching)
    common.generate(policy, common.load_problems("arithmetic", "dev", 2), max_new_tokens=4)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("family", ["Mixtral", "Phimoe"])
def test_experts_and_their_routers_get_no_adapters(family, tmp_path):
    """The router of Phimoe is a subclass of a linear layer and returns two values."""
    sizes = SMALL | dict(num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4)
    write_model(lambda v: getattr(transformers, f"{family}Config")(vocab_size=v, **sizes), tmp_path)
    policy = common.Policy(str(tmp_path), "cpu")
    with torch.no_grad():
        initial = common.response_logprobs(policy, EXAMPLES)
        lora = policy.lora = adapters.Lora(policy, 3)
        assert torch.equal(common.response_logprobs(policy, EXAMPLES), initial)
    # The projections of the attention have adapters.
    assert len(lora.targets) == 2 * 4


# ---- curricula


def curriculum_of(kind: str, problems, seed: int = 0) -> ppo.Curriculum:
    args = SimpleNamespace(curriculum=kind, seed=seed)
    return ppo.Curriculum(args, problems, {problem.id: "verifier" for problem in problems})


def test_backtracking_starts_before_the_answer_and_shortens_the_prefix_after_success():
    problems = common.load_problems("arithmetic", "train", 4)
    curriculum = curriculum_of("backtracking", problems)
    chosen, prefixes = curriculum.draw(1, 4)
    assert sorted(chosen) == [0, 1, 2, 3]
    for i, prefix in zip(chosen, prefixes, strict=True):
        assert problems[i].reference.startswith(prefix) and problems[i].reference[
            len(prefix) :
        ].startswith("####")
    curriculum.update(chosen, [0.5, 0.5, 0.25, 0.0], [0.0] * 4)
    assert dict(zip(*curriculum.draw(2, 4), strict=True)) == dict(
        zip(chosen, prefixes, strict=True)
    )
    for phase in range(2, 8):
        curriculum.update(chosen, [1.0, 1.0, 0.25, 0.0], [0.0] * 4)
        following = dict(zip(*curriculum.draw(phase, 4), strict=True))
        assert all(
            len(following[i]) < len(p) or not p for i, p in zip(chosen, prefixes, strict=True)
        )
        prefixes = [following[i] for i in chosen]
    assert prefixes == [""] * 4
    json.dumps(curriculum.state)


def test_prioritised_replay_prefers_large_value_errors_and_still_asks_new_questions():
    problems = common.load_problems("arithmetic", "train", 400)
    curriculum = curriculum_of("plr", problems)
    chosen, _ = curriculum.draw(1, 40)
    errors = [1.0 if rank < 5 else 0.0 for rank in range(40)]
    curriculum.update(chosen, [0.5] * 40, errors)
    hits, new = 0, set()
    for phase in range(2, 10):
        drawn, _ = curriculum.draw(phase, 20)
        assert len(set(drawn)) == 20
        hits += sum(i in chosen[:5] for i in drawn)
        new |= set(drawn) - set(chosen)
    assert hits > 8 * 10 * 5 / 40 * 2, (
        "more than twice as often as by chance for the five questions with an error"
    )
    assert len(new) == 8 * 10
    # With one question per phase, new questions come first.
    alone = curriculum_of("plr", problems[:4])
    asked = []
    for phase in range(1, 5):
        asked += alone.draw(phase, 1)[0]
        alone.update(asked[-1:], [0.5], [1.0])
    assert sorted(asked) == [0, 1, 2, 3]


def test_without_a_curriculum_every_question_comes_once_per_pass():
    curriculum = curriculum_of("none", common.load_problems("arithmetic", "train", 30))
    drawn = [curriculum.draw(phase, 10)[0] for phase in range(1, 7)]
    for turn in (drawn[:3], drawn[3:]):
        assert sorted(itertools.chain(*turn)) == list(range(30))
    assert drawn[:3] != drawn[3:]
    assert sorted(curriculum.draw(7, 64)[0]) == list(range(30)), (
        "a question comes at most once per phase, because its samples would be equal"
    )


# ---- the algorithm


def test_without_clipping_the_gradient_is_the_exact_policy_gradient():
    """There are two questions. Answers have two tokens out of three. All 9 are enumerated.

    Train for one epoch with lambda 1 and no baseline. Then the expected gradient of the loss is
    minus the gradient of E[reward] - kl_coef * KL. autograd computes the latter from the
    definition.
    """
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    ref_first, ref_second = torch.randn(2, 3).log_softmax(-1), torch.randn(2, 3, 3).log_softmax(-1)
    reward, kl_coef = torch.rand(2, 3, 3), 0.3
    pairs = list(itertools.product(range(2), range(3), range(3)))

    def logprobs_of(log_first, log_second):
        return torch.stack(
            [torch.stack([log_first[q, a], log_second[q, a, b]]) for q, a, b in pairs]
        )  # [18, 2]

    logprobs = logprobs_of(first.log_softmax(-1), second.log_softmax(-1))
    ref = logprobs_of(ref_first, ref_second)
    probability = logprobs.sum(1).exp()
    task = torch.tensor([[0.0, reward[q, a, b]] for q, a, b in pairs])
    objective = (probability * (task.sum(1) - kl_coef * (logprobs - ref).sum(1))).sum()
    exact = torch.autograd.grad(objective, (first, second), retain_graph=True)

    old = logprobs.detach()
    advantages, _ = ppo.gae(
        ppo.penalised_rewards(task, old, ref, kl_coef), torch.zeros_like(old), 1.0, 1.0
    )
    loss = (
        probability.detach()[:, None] * ppo.policy_loss(logprobs, old, advantages, 1e9, 1e9)
    ).sum()
    for got, expected in zip(torch.autograd.grad(loss, (first, second)), exact, strict=True):
        torch.testing.assert_close(got, -expected, atol=1e-6, rtol=1e-5)


def test_ppo_reaches_the_known_optimum_of_a_bandit(cli, tmp_path, nano):
    """There are two questions. At first the policy answers both with 1 or 2 at random.

    This runs the whole script. The reward is 0.5 at first. Untrained weights answer 40 of 40
    samples correctly with probability 1e-12.
    """
    model = guesser(nano, tmp_path, {"Is it odd?": "1", "Is it even?": "2"})
    argv = ["--model", model, "--dataset", tmp_path, "--max-new-tokens", 8, "--questions", 18,
            "--phases", 40, "--temperature", 1, "--lr", "1e-3", "--batch-size", 12,
            "--eval-every", 40]  # fmt: skip
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    _, first, *_, last = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert first["correct"] < 0.75 and last["correct"] > 0.9 and last["maj@1"] == 1
    problems = common.load_problems(str(tmp_path), "train")[:2]
    drawn = common.generate(
        common.Policy(str(tmp_path / "run" / "model")), problems, samples=20, max_new_tokens=8
    )
    assert sum(s.correct for s in drawn) >= 38


def test_a_run_logs_its_metrics_and_the_first_ratio_is_one(cli, tmp_path):
    out = tmp_path / "run"
    assert cli(ppo, *TINY_RUN, "--phases", 3, "--out", out)[0] == 0
    start, *phases = rows_of(out / "metrics.jsonl")
    assert (
        start["phase"] == 0
        and "maj@1" in start
        and [row["samples"] for row in phases] == [24, 48, 72]
    )
    assert "maj@1" not in phases[0] and "maj@1" in phases[1] and "maj@1" in phases[2]
    for row in phases:
        assert row["logprob_mismatch"] < 1e-3, "sampling and training disagree about the policy"
        assert row["max_ratio_deviation"] < 1e-4
        assert (
            0 <= row["correct"] <= 1
            and row["reward"] == pytest.approx(row["correct"])
            and row["minibatches"] == 6
        )
        for key in ("ref_kl_k1", "ref_kl_k3", "entropy", "clip_fraction", "value_loss",
                    "explained_variance", "response_length", "sampled_truncated", "sampled_no_answer", "grad_norm",
                    "seconds_sampling", "seconds_training"):  # fmt: skip
            assert np.isfinite(row[key])
    assert phases[0]["ref_kl_k3"] == pytest.approx(0, abs=1e-8) and phases[0]["grad_norm"] == 0, (
        "in phase 1 only the value function trains"
    )
    assert phases[2]["ref_kl_k3"] > 0 and phases[1]["grad_norm"] > 0
    written = rows_of(out / "samples" / "phase_2.jsonl")
    assert len(written) == 24 and sum(r["correct"] for r in written) / 24 == pytest.approx(
        phases[1]["correct"], rel=1e-5
    )
    common.Policy(str(out / "model"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward", "dense", "--lora-rank", "4"],
        ["--curriculum", "backtracking", "--no-detach-value"],
        ["--curriculum", "plr", "--kl-limit", "1e-12", "--few-shot"],
    ],
)
def test_a_resumed_run_of_each_variant_equals_an_uninterrupted_one(
    flags, cli, tmp_path, monkeypatch
):
    argv = [*TINY_RUN, "--phases", 3, *flags, "--device", "cpu"]
    assert cli(ppo, *argv, "--out", tmp_path / "whole")[0] == 0
    log, calls = runtime.Run.log, []

    def interrupted(run, **metrics):
        log(run, **metrics)
        calls.append(1)
        if len(calls) == 3:
            # Phase 2 was logged, but its checkpoint was not written.
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.Run, "log", interrupted)
    assert cli(ppo, *argv, "--out", tmp_path / "broken")[0] == 130
    monkeypatch.setattr(runtime.Run, "log", log)
    assert cli(ppo, *argv, "--out", tmp_path / "broken", "--resume")[0] == 0
    assert without_time(tmp_path / "broken" / "metrics.jsonl") == without_time(
        tmp_path / "whole" / "metrics.jsonl"
    )
    for name in ("model.safetensors",):
        assert (tmp_path / "broken" / "model" / name).read_bytes() == (
            tmp_path / "whole" / "model" / name
        ).read_bytes()
    rows = rows_of(tmp_path / "whole" / "metrics.jsonl")
    if "--kl-limit" in flags:
        assert rows[-1]["minibatches"] < 6
    if "--no-detach-value" in flags:
        # In phase 1 only the value function trains, but its gradient reaches the policy.
        assert rows[1]["grad_norm"] > 0


def test_merged_adapters_are_evaluated_in_float32(cli, tmp_path, monkeypatch):
    """bfloat16 would round small changes to zero. Then the initial policy would be evaluated."""
    dtypes, generate = [], common.generate

    def spied(policy, problems, **how):
        with policy.autocast():
            dtypes.append((how["progress"], torch.is_autocast_enabled("cpu")))
        return generate(policy, problems, **how)

    monkeypatch.setattr(common, "generate", spied)
    flags = [
        "--phases",
        1,
        "--questions",
        2,
        "--epochs",
        1,
        "--limit-eval",
        2,
        "--dtype",
        "bfloat16",
    ]
    assert cli(ppo, *TINY_RUN, *flags, "--lora-rank", 4, "--out", tmp_path / "run")[0] == 0
    assert dtypes == [("dev", False), ("phase 1", True), ("dev", False)]


def test_the_weights_that_were_evaluated_on_dev_are_saved(cli, tmp_path, monkeypatch):
    """This includes merged adapters. Rounding the merged weights to bfloat16 changes the policy."""
    measured = []

    def dev_metrics(policy, *_, **__):
        with policy.merged():
            measured.append(
                {name: weight.clone() for name, weight in policy.model.state_dict().items()}
            )
        return {"maj@1": len(measured) / 10, "no_answer": 0.0, "truncated": 0.0}

    monkeypatch.setattr(common, "dev_metrics", dev_metrics)
    assert (
        cli(
            ppo, *TINY_RUN, "--phases", 2, "--lora-rank", 4, "--lr", 0.1, "--out", tmp_path / "run"
        )[0]
        == 0
    )
    saved = common.Policy(str(tmp_path / "run" / "model"), "cpu").model.state_dict()
    assert len(measured) == 2
    assert all(torch.equal(weight, saved[name]) for name, weight in measured[-1].items())
    assert any(not torch.equal(weight, saved[name]) for name, weight in measured[0].items())


def test_flags_and_data_that_do_not_fit_give_a_one_line_error(cli, tiny, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": str(i)}) + "\n" for i in range(20))
    )
    for flags in (["--reward", "dense"], ["--curriculum", "backtracking"]):
        code, message = cli(
            ppo, "--model", "tiny", "--dataset", file, "--out", tmp_path / "run", *flags
        )
        assert code == 2 and flags[0] in message and message.count("\n") == 1
    long = tmp_path / "long.jsonl"
    questions = ["How many? " * 2000] + ["How many?"] * 24
    long.write_text(
        "".join(
            json.dumps({"question": f"{i}: {q}", "answer": "1"}) + "\n"
            for i, q in enumerate(questions)
        )
    )
    argv = ["--model", "tiny", "--samples", 1, "--limit-eval", 2, "--phases", 1, "--epochs", 1]
    argv += ["--max-new-tokens", 8]
    code, message = cli(ppo, *argv, "--dataset", long, "--out", tmp_path / "long")
    assert code == 2 and "positions" in message and message.count("\n") == 1
    # The questions alone fit. With the few-shot examples they do not.
    words, room = "How many? " * 300, tiny.max_length
    asked = [common.Problem("p", f"{i}: {words}", 1) for i in range(20)]
    lengths = [
        [len(tiny.encode_prompt(common.prompt_text(p, few_shot))) for p in asked]
        for few_shot in (False, True)
    ]
    assert max(lengths[0]) < room <= min(lengths[1])
    file.write_text(
        "".join(json.dumps({"question": p.question, "answer": "1"}) + "\n" for p in asked)
    )
    argv += ["--dataset", file, "--questions", 2]
    assert cli(ppo, *argv, "--out", tmp_path / "fits")[0] == 0
    code, message = cli(ppo, *argv, "--few-shot", "--out", tmp_path / "few")
    assert code == 2 and "positions" in message and message.count("\n") == 1
    for flags in (
        ["--temperature", "0"],
        ["--clip-range", "-1"],
        ["--gae-lambda", "2"],
        ["--reward", "nothing"],
        ["--phases", "0"],
    ):
        assert cli(ppo, *flags, "--out", tmp_path / "run")[0] == 2
    assert not (tmp_path / "run").exists()


def test_the_explained_variance_of_constant_returns_is_none():
    returns = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert ppo.explained_variance(returns, returns) == 1
    assert ppo.explained_variance(returns, torch.full((4,), 0.5)) == pytest.approx(0)
    assert ppo.explained_variance(returns, torch.tensor([0.5, 0.0, 0.5, 0.0])) == pytest.approx(
        0.75
    )
    for same in (torch.zeros(4), torch.ones(1)):
        assert ppo.explained_variance(same, torch.zeros(len(same))) is None


@pytest.mark.parametrize("token_budget", [1, 18, 9999])
@pytest.mark.parametrize("value_only", [False, True])
def test_gradient_and_metrics_of_a_minibatch_do_not_depend_on_its_micro_batches(
    token_budget, value_only, cli, nano, tmp_path, monkeypatch
):
    """Compare the script with the formulas over all tokens of a minibatch at once.

    Four samples of different lengths make two minibatches. Tables replace the log-probabilities
    and values of the script. The gradients of the tables can be read.
    """
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 4, 2])
    real = torch.arange(4) < lengths[:, None]
    old_logprobs, old_values, advantages, returns = torch.randn(4, 4, 4) * real
    logprobs, values = (
        (old + 0.4 * torch.randn(4, 4)).requires_grad_() for old in (old_logprobs, old_values)
    )
    with torch.no_grad():
        # The largest deviation is in the first of several micro-batches.
        logprobs[2, 0] = old_logprobs[2, 0] + 1
    drawn = [
        common.Sample(
            problem, k, "#### 1", True, np.full(lengths[i], 10 + i, np.int32),
            old_logprobs[i, : lengths[i]].numpy(), [5] * 8,
        )
        for i, (problem, k) in enumerate(itertools.product(
            common.load_problems("arithmetic", "train", 2), range(2)
        ))
    ]  # fmt: skip

    def look_up(examples, old, new):
        rows = [response[0] - 10 for _, response in examples]
        return (new if torch.is_grad_enabled() else old)[rows][real[rows]]

    seen, sum_gradients = [], runtime.sum_gradients

    def spied(parameters, *sums):
        seen.append((sums, logprobs.grad, values.grad))
        logprobs.grad = values.grad = None
        return sum_gradients(parameters, *sums)

    metrics = {"maj@1": 0.0, "no_answer": 0.0, "truncated": 0.0}
    monkeypatch.setattr(common, "dev_metrics", lambda *_, **__: metrics)
    monkeypatch.setattr(common, "generate", lambda *_, **__: drawn)
    monkeypatch.setattr(
        common, "response_logprobs", lambda _, e, *__: look_up(e, old_logprobs, logprobs)
    )

    def forward(self, policy, examples, temperature):
        return look_up(examples, old_logprobs, logprobs), look_up(examples, old_values, values)

    monkeypatch.setattr(ppo.ValueFunction, "forward", forward)
    monkeypatch.setattr(ppo, "gae", lambda *_: (advantages.clone(), returns))
    monkeypatch.setattr(runtime, "sum_gradients", spied)
    # Only the value function trains in phase 1.
    phases = 1 if value_only else 2
    argv = ["--model", nano, "--phases", phases, "--questions", 2, "--samples", 2, "--epochs", 1]
    argv += ["--batch-size", 3, "--limit-train", 2, "--token-budget", token_budget]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0

    advantages[real] = ppo.whiten(advantages[real])
    order, logged = common.shuffled(4, 0, phases, 0), []
    assert 2 in order[:3] and len(seen) == 2 * phases
    for minibatch, (sums, *gradients) in zip((order[:3], order[3:]), seen[-2:], strict=True):
        wanted = real & torch.isin(torch.arange(4), torch.tensor(minibatch))[:, None]
        value_clip = np.inf if value_only else 0.2
        policy_loss = ppo.policy_loss(logprobs, old_logprobs, advantages, 0.2, 0.2)[wanted].mean()
        value_loss = ppo.value_loss(values, old_values, returns, value_clip)[wanted].mean()
        change = (logprobs - old_logprobs)[wanted].detach()
        deviations = (change.exp() - 1).abs()
        clipped, approx_kl = (deviations > 0.2).float().mean(), (change.exp() - 1 - change).mean()
        logged.append([x.item() for x in (policy_loss, value_loss, clipped, approx_kl)])
        assert sums == pytest.approx(logged[-1], rel=1e-4)
        exact = torch.autograd.grad(policy_loss + value_loss, (logprobs, values))
        if value_only:
            assert gradients[0] is None
        else:
            torch.testing.assert_close(gradients[0], exact[0])
        torch.testing.assert_close(gradients[1], exact[1])
        if minibatch[0] == order[0]:
            furthest = deviations.max().item()
            # This range keeps the clip fraction apart from the other metrics.
            assert 0.2 < clipped < 0.45 or 0.55 < clipped < 1
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["max_ratio_deviation"] == pytest.approx(furthest, rel=1e-4)
    keys = "policy_loss", "value_loss", "clip_fraction", "approx_kl"
    assert [row[key] for key in keys] == pytest.approx(np.mean(logged, 0).tolist(), rel=1e-4)


def test_a_policy_that_did_not_improve_gives_a_warning(cli, tmp_path):
    code, message = cli(ppo, *TINY_RUN, "--phases", 2, "--lr", 0, "--out", tmp_path / "run")
    assert code == 0 and "no phase was better on dev" in message


def test_a_phase_ends_early_above_the_kl_limit(cli, tmp_path, monkeypatch):
    """Phase 1 is complete because the policy does not move in it."""
    monkeypatch.setattr(ppo, "LR_WARMUP", 1)
    argv = [*TINY_RUN, "--phases", 2, "--lr", 1e-2, "--kl-limit", 0.01]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    _, first, second = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert first["minibatches"] == 6 > second["minibatches"] > 0


def test_a_model_without_plain_linear_layers_is_refused_adapters(tmp_path):
    """The layers of Falcon belong to a class of their own."""
    write_model(
        lambda v: transformers.FalconConfig(
            vocab_size=v, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2
        ),
        tmp_path,
    )
    with pytest.raises(runtime.UserError, match="--lora-rank: .* no plain linear layers"):
        adapters.Lora(common.Policy(str(tmp_path), "cpu"), 3)
