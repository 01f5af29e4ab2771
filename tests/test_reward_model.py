"""Check the outcome reward model: its formulas against brute force, its scores and their use."""

import itertools
import json
import shutil
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from test_generation import ARCHITECTURES, SMALL, random_policy, write_model
from test_scripts import cli, rows_of, without_time  # noqa: F401

import common
import evaluate
import expert_iteration
import ppo
import reward_model
import runtime

PROBLEMS = common.load_problems("arithmetic", "train", 40)
RUN = ["--model", "tiny", "--limit-train", "24", "--limit-eval", "12", "--samples", "4",
       "--eval-samples", "4", "--epochs", "2", "--batch-size", "8", "--max-new-tokens", "60",
       "--gen-batch-size", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def orm() -> reward_model.RewardModel:
    """Return the embedded model with a random head. Its scores differ from token to token."""
    model = reward_model.RewardModel("tiny", "cpu", new=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.linear.weight)
    return model


@pytest.fixture(scope="module")
def orm_folder(orm, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("orm") / "model"
    orm.save(folder)
    return str(folder)


def sample_of(problem, text, number=0, finished=True, score=None) -> common.Sample:
    sample = common.Sample(problem, number, text, finished)
    sample.score = score
    return sample


class Known:
    """Stand in for a reward model with known probabilities."""

    def __init__(self, probabilities):
        self.probabilities = probabilities

    def scores(self, samples, token_budget):
        return self.probabilities


def right(problem) -> str:
    return problem.reference


def wrong(problem) -> str:
    return f"1+1=<<1+1=2>>2\n#### {problem.answer + 1}"


# ---- formulas


def test_auc_is_the_fraction_of_pairs_in_the_correct_order():
    rng = np.random.default_rng(0)
    for _ in range(20):
        # Few different scores give many ties.
        scores, labels = rng.integers(0, 6, 30) / 5, rng.random(30) < 0.4
        pairs = list(itertools.product(scores[labels], scores[~labels]))
        expected = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
        assert reward_model.auc(scores, labels) == pytest.approx(expected)
    assert reward_model.auc(scores, np.ones(30, bool)) is None


def test_calibration_equals_a_calculation_by_hand():
    """Bin 0.8 to 0.9 has two samples, one of them correct. The last bin has the score 1.0."""
    scores, labels = np.array([0.05, 0.8, 0.85, 1.0]), np.array([False, True, False, True])
    table, error = reward_model.calibration(scores, labels)
    assert [(row["n"], row["correct"]) for row in table] == [(1, 0.0), (2, 0.5), (1, 1.0)]
    assert [row["from"] for row in table] == [0.0, 0.8, 0.9]
    assert error == pytest.approx((0.05 + 2 * (0.825 - 0.5) + 0.0) / 4)


def test_both_classes_of_a_question_have_the_same_weight():
    assert reward_model.balanced_weights([True, False, False, False]) == pytest.approx(
        [2, 2 / 3, 2 / 3, 2 / 3]
    )
    assert reward_model.balanced_weights([True, True]) == [1, 1]
    for labels in itertools.product([True, False], repeat=4):
        weights = reward_model.balanced_weights(list(labels))
        assert sum(weights) == pytest.approx(4)
        if len(set(labels)) == 2:
            assert sum(w for w, y in zip(weights, labels, strict=True) if y) == pytest.approx(2)


def test_equal_solutions_are_merged_without_changing_the_loss(orm):
    problem, other = PROBLEMS[:2]
    texts = [right(problem), wrong(problem), wrong(problem), wrong(problem) + "\n"]
    samples = [sample_of(problem, text, i) for i, text in enumerate(texts)]
    samples += [sample_of(other, right(other))]
    data = reward_model.training_data(samples)
    assert [weight for _, _, weight in data] == pytest.approx([2, 2, 1])
    assert [label for _, label, _ in data] == [1, 0, 1]

    def loss(samples, weights):
        pairs = zip(samples, weights, strict=True)
        batch = [(orm.encode(s), float(s.correct), weight) for s, weight in pairs]
        optimizer = torch.optim.SGD(orm.model.parameters(), lr=0.0)
        return reward_model.train_step(orm, optimizer, batch, 9999)[0]

    every = [*reward_model.balanced_weights([s.correct for s in samples[:4]]), 1.0]
    distinct, weights = [sample for (sample,), _, _ in data], [weight for _, _, weight in data]
    assert loss(samples, every) == pytest.approx(loss(distinct, weights), rel=1e-5)


def test_best_of_n_equals_a_calculation_by_hand():
    """Two questions have four samples each. n = 2 makes two groups per question."""
    p, q = PROBLEMS[:2]
    rows = [(p, True, 0.1), (p, False, 0.9), (p, False, 0.2), (p, True, 0.3)]
    rows += [(q, False, 0.5), (q, False, 0.4), (q, False, 0.3), (q, True, 0.6)]
    samples = [
        sample_of(problem, right(problem) if y else wrong(problem), i % 4, score=score)
        for i, (problem, y, score) in enumerate(rows)
    ]
    table = {row["n"]: row for row in reward_model.best_of_n(samples)}
    assert table[1] == {"n": 1, "orm": 3 / 8, "majority": 3 / 8, "oracle": 3 / 8}
    # If a vote is tied, the first answer wins.
    assert table[2] == {"n": 2, "orm": 2 / 4, "majority": 1 / 4, "oracle": 3 / 4}
    assert table[4] == {"n": 4, "orm": 1 / 2, "majority": 1 / 2, "oracle": 2 / 2}


def test_a_position_is_a_fraction_of_the_tokens():
    """One solution has four tokens with the probabilities 0.1, 0.2, 0.6, 0.7. One has a token."""
    labels = [common.Problem("a", "?", Fraction(1)), common.Problem("b", "?", Fraction(2))]
    samples = [common.Sample(problem, 0, "#### 1", finished=True) for problem in labels]
    orm = Known([np.array([0.1, 0.2, 0.6, 0.7]), np.array([0.55])])
    found = reward_model.quality(samples, orm, 1000)["by_position"]
    right = [
        {0.0: 0.1, 0.25: 0.1, 0.5: 0.2, 0.75: 0.6, 1.0: 0.7}[row["position"]] >= 0.5
        for row in found
    ]
    # The score of the incorrect sample is always above 0.5.
    assert [row["accuracy"] for row in found] == [right_one / 2 for right_one in right]


def test_the_paired_interval_stays_within_minus_one_and_one():
    low, high = evaluate.paired_test([1.0] * 2000, [0.0] * 2000)["ci95"]
    assert 0.99 < low < high == 1.0


def test_the_p_value_of_mcnemar_equals_an_enumeration():
    """Enumerate all 2^n outcomes of the n problems that differ. Count the uneven outcomes.

    An outcome counts if it is at least as uneven as the observed outcome.
    """
    for better, worse in ((5, 1), (3, 3), (0, 4), (0, 0), (7, 2)):
        values = [1.0] * better + [0.0] * worse + [1.0] * 3
        others = [0.0] * better + [1.0] * worse + [1.0] * 3
        n, gap = better + worse, abs(better - worse)
        ways = [abs(2 * sum(way) - n) >= gap for way in itertools.product([0, 1], repeat=n)]
        test = evaluate.paired_test(values, others)
        assert test["p"] == pytest.approx(np.mean(ways)) and (test["better"], test["worse"]) == (
            better,
            worse,
        )
        assert test["difference"] == pytest.approx((better - worse) / len(values))


# ---- scores


def test_long_solutions_do_not_count_more(orm):
    """A correct solution of 5 tokens and an incorrect one of 80 are each half of the loss."""
    problem = PROBLEMS[0]
    short, long = (
        sample_of(problem, f"#### {problem.answer}"),
        sample_of(problem, "1+1=<<1+1=2>>2\n" * 8 + "#### 99"),
    )
    examples = [orm.encode(s) for s in (short, long)]
    optimizer = torch.optim.SGD(orm.model.parameters(), lr=0.0)
    alone = [
        reward_model.train_step(orm, optimizer, [(example, y, 1.0)], 9999)[0]
        for example, y in zip(examples, (1.0, 0.0), strict=True)
    ]
    with torch.no_grad():
        odds = [
            sign * orm.log_odds([example]) for sign, example in zip((-1, 1), examples, strict=True)
        ]
        means = [torch.nn.functional.softplus(x).mean() for x in odds]
    assert alone == pytest.approx([mean.item() for mean in means], rel=1e-4)
    batch = list(zip(examples, (1.0, 0.0), (1.0, 1.0), strict=True))
    both = reward_model.train_step(orm, optimizer, batch, 9999)[0]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "opt"])
def test_a_family_without_a_token_classifier_is_refused_as_reward_model(family, tmp_path):
    """Gemma 3 has embeddings of images. The saved text part of Qwen 3.5 is its own family."""
    sight = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    grouped = dict(num_key_value_heads=2, head_dim=8, **SMALL)
    linear = dict(
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    families = {
        "gemma3": lambda v: transformers.Gemma3Config(
            text_config=dict(sliding_window=8, query_pre_attn_scalar=8, vocab_size=v, **grouped),
            vision_config=dict(image_size=16, patch_size=8, **sight), mm_tokens_per_image=4,
            image_token_index=v - 1, boi_token_index=v - 2, eoi_token_index=v - 3,
        ),
        "qwen3_5": lambda v: transformers.Qwen3_5Config(
            text_config=linear | grouped | {"vocab_size": v, "num_hidden_layers": 4},
            vision_config=dict(
                depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32
            ),
        ),
        "opt": lambda v: transformers.OPTConfig(
            vocab_size=v, ffn_dim=64, word_embed_proj_dim=16, **SMALL
        ),
    }  # fmt: skip
    write_model(families[family], tmp_path)
    common.Policy(str(tmp_path), "cpu")
    with pytest.raises(runtime.UserError, match=f"no token classifier for the family {family}"):
        reward_model.RewardModel(str(tmp_path), "cpu", new=True)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma3"])
def test_a_reward_model_starts_from_the_weights_of_the_policy_and_reloads(
    name, tmp_path_factory, tmp_path
):
    """All trained weights are saved and loaded again."""
    policy = random_policy(name, tmp_path_factory)
    policy.save(tmp_path / "policy")
    orm = reward_model.RewardModel(str(tmp_path / "policy"), "cpu", new=True)
    samples = [sample_of(p, right(p)) for p in PROBLEMS[:3]]
    examples = [orm.encode(sample) for sample in samples]
    ids = torch.tensor([examples[0][0]])
    with torch.no_grad():
        torch.testing.assert_close(
            orm.hidden_states(ids), policy.hidden_states(ids), atol=1e-4, rtol=1e-4
        )
    torch.nn.init.normal_(orm.linear.weight)
    before, optimizer = orm.scores(samples), common.adam_w(orm.model.parameters(), 1e-3)
    batch = list(zip(examples, [1.0, 0.0, 1.0], [1.0] * 3, strict=True))
    assert reward_model.train_step(orm, optimizer, batch, 999)[1] > 0
    assert not np.allclose(before[0], orm.scores(samples)[0], atol=1e-4)
    orm.save(tmp_path / "orm")
    assert runtime.is_reward_model(transformers.AutoConfig.from_pretrained(tmp_path / "orm"))
    again = reward_model.RewardModel(str(tmp_path / "orm"), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(ids).logits, orm.model(ids).logits, atol=1e-4, rtol=1e-4
        )
    for a, b in zip(again.scores(samples), orm.scores(samples), strict=True):
        assert np.allclose(a, b)
    with pytest.raises(runtime.UserError, match="a reward model, not a language model"):
        common.Policy(str(tmp_path / "orm"))


def test_a_reward_model_without_all_its_weights_is_refused(nano, tmp_path):
    from safetensors.torch import load_file, save_file

    reward_model.RewardModel(nano, "cpu", new=True).save(tmp_path / "orm")
    file = tmp_path / "orm" / "model.safetensors"
    weights = load_file(file)
    for lost in ("score.weight", "model.norm.weight"):
        save_file(
            {key: weight for key, weight in weights.items() if key != lost},
            file,
            metadata={"format": "pt"},
        )
        with pytest.raises(runtime.UserError, match=f"lacks 1 weights of the model.*{lost}"):
            reward_model.RewardModel(str(tmp_path / "orm"), "cpu")


# transformers has no token classifier for Gemma 3.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma3"])
def test_a_new_reward_model_gives_one_half_and_a_saved_one_loads_with_transformers(
    name, tmp_path_factory, tmp_path
):
    from transformers import AutoModelForTokenClassification

    random_policy(name, tmp_path_factory).save(tmp_path / "policy")
    orm = reward_model.RewardModel(str(tmp_path / "policy"), "cpu", new=True)
    samples = [sample_of(p, right(p)) for p in PROBLEMS[:3]]
    assert all((p == 0.5).all() for p in orm.scores(samples))
    torch.nn.init.normal_(orm.linear.weight)
    orm.save(tmp_path / "orm")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "orm").eval()
    for sample, said in zip(samples, orm.scores(samples), strict=True):
        prompt, response = orm.encode(sample)
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0, len(prompt) :, 0]
        torch.testing.assert_close(torch.from_numpy(said), logits.sigmoid(), atol=1e-5, rtol=1e-4)
    again = reward_model.RewardModel(str(tmp_path / "orm"), "cpu")
    assert all(
        np.allclose(a, b) for a, b in zip(again.scores(samples), orm.scores(samples), strict=True)
    )


def test_a_score_does_not_depend_on_the_batch(orm):
    samples = [sample_of(p, right(p) if i % 2 else wrong(p)) for i, p in enumerate(PROBLEMS)]
    together = orm.scores(samples)
    alone = [orm.scores([sample])[0] for sample in samples]
    narrow = orm.scores(samples[::-1], token_budget=200)[::-1]
    for a, b, c, sample in zip(together, alone, narrow, samples, strict=True):
        assert len(a) == len(orm.encode(sample)[1])
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_ten_thousand_solutions_are_scored_with_bounded_memory(orm, monkeypatch):
    """A forward pass has no more tokens than the budget. Only one number per token is kept.

    Equal texts run once.
    """
    sizes, forward = [], orm.hidden_states
    monkeypatch.setattr(orm, "hidden_states", lambda ids: sizes.append(ids.numel()) or forward(ids))
    samples = [
        sample_of(PROBLEMS[i % 40], f"{i % 97}+1=<<{i % 97}+1=2>>2\n#### 2", i)
        for i in range(10_000)
    ]
    scores = orm.scores(samples, token_budget=4096)
    assert len(scores) == 10_000 and all(s.ndim == 1 and s.dtype == np.float32 for s in scores)
    assert max(sizes) <= 4096
    assert sum(sizes) < 1.5 * 40 * 97 * max(
        len(p) + len(r) for p, r in map(orm.encode, samples[:200])
    )


def test_the_gradient_does_not_depend_on_the_micro_batches(nano):
    gradients = []
    for budget in (10_000, 60):
        orm = reward_model.RewardModel(nano, "cpu", new=True)
        torch.nn.init.constant_(orm.linear.weight, 0.1)
        examples = [orm.encode(sample_of(p, wrong(p))) for p in PROBLEMS[:6]]
        optimizer = torch.optim.SGD(orm.model.parameters(), lr=1.0)
        before = {n: p.detach().clone() for n, p in orm.model.named_parameters()}
        batch = list(zip(examples, [1.0, 0.0] * 3, [0.5, 2.0, 1.0] * 2, strict=True))
        reward_model.train_step(orm, optimizer, batch, budget)
        gradients.append(
            torch.cat([(before[n] - p.detach()).flatten() for n, p in orm.model.named_parameters()])
        )
    assert 1e-3 < gradients[0].norm() < 1.001
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_a_policy_is_refused_as_reward_model_and_a_reward_model_as_policy(
    cli, orm_folder, nano, tmp_path
):
    out = ["--out", tmp_path / "r.json", "--model", nano]
    for argv, words in (
        ([*out, "--orm", nano], "not a reward model"),
        (["--out", tmp_path / "r.json", "--model", orm_folder], "not a language model"),
        ([*out, "--orm", "runs/none/model"], "--orm runs/none/model: no such folder"),
    ):
        code, message = cli(evaluate, *argv)
        assert code == 2 and words in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "script", [expert_iteration, ppo, evaluate, reward_model], ids=lambda m: m.__name__
)
def test_a_reward_model_with_too_few_positions_gives_a_one_line_error(
    script, cli, orm_folder, nano, tmp_path
):
    narrow = tmp_path / "narrow"
    shutil.copytree(nano if script is reward_model else orm_folder, narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    with_orm = ["--reward", "orm", "--orm", narrow] if script is ppo else ["--orm", narrow]
    argv = ["--model", "tiny", *(["--base", narrow] if script is reward_model else with_orm)]
    argv += [] if script is evaluate else ["--limit-train", 8]
    argv += ["--samples", 2, "--limit-eval", 4, "--max-new-tokens", 60]
    code, message = cli(script, *argv, "--out", tmp_path / "out.json")
    assert code == 2 and "the model has 48 positions" in message and message.count("\n") == 1
    if script is evaluate:
        assert not (tmp_path / "out.json").exists()


# ---- rewards


def test_the_reward_model_keeps_to_the_token_budget(cli, orm_folder, tmp_path, monkeypatch):
    budgets, split = set(), common.micro_batches

    def spied(lengths, budget):
        budgets.add(budget)
        return split(lengths, budget)

    monkeypatch.setattr(common, "micro_batches", spied)
    argv = [
        "--model",
        "tiny",
        "--reward",
        "orm",
        "--orm",
        orm_folder,
        "--phases",
        "1",
        "--questions",
        "2",
        "--epochs",
        "1",
    ]
    argv += [
        "--limit-eval",
        "2",
        "--max-new-tokens",
        "30",
        "--token-budget",
        "300",
        "--out",
        tmp_path / "run",
    ]
    assert cli(ppo, *argv)[0] == 0
    assert budgets == {300}
    budgets.clear()
    argv = [
        "--model",
        "tiny",
        "--orm",
        orm_folder,
        "--samples",
        "2",
        "--limit-eval",
        "2",
        "--max-new-tokens",
        "30",
    ]
    assert cli(evaluate, *argv, "--token-budget", "200", "--out", tmp_path / "test.json")[0] == 0
    assert budgets == {200}


def reward_args(reward: str, add_outcome: bool = False) -> SimpleNamespace:
    return SimpleNamespace(reward=reward, add_outcome=add_outcome, token_budget=1024)


def sampled(policy, problem, text, finished=True, prefix="") -> common.Sample:
    ids = policy.encode_prefix(text[len(prefix) :]) + [policy.tokenizer.eos_token_id] * finished
    return common.Sample(problem, 0, text, finished, np.array(ids, np.int32), prefix=prefix)


def test_the_reward_of_an_orm_is_its_last_probability_whole_or_by_line(tiny, orm):
    """`orm` has its reward on the last token, `orm_dense` on the last token of every line.

    Both rewards have the same sum. A truncated solution has no reward. --add-outcome adds to both.
    """
    problem = next(p for p in PROBLEMS if right(p).count("\n") == 3)
    samples = [
        sampled(tiny, problem, right(problem)),
        sampled(tiny, problem, wrong(problem), finished=False),
    ]
    (scores, _) = orm.scores(samples)
    whole, cut = ppo.task_rewards(reward_args("orm"), tiny, samples, orm)
    assert whole[-1] == pytest.approx(scores[-1]) and not whole[:-1].any() and not cut.any()
    dense, cut = ppo.task_rewards(reward_args("orm_dense"), tiny, samples, orm)
    ends = tiny.line_ends(samples[0].tokens)
    assert set(np.flatnonzero(dense)) == set(ends) and len(ends) == 4 and not cut.any()
    assert dense.sum() == pytest.approx(scores[-1], abs=1e-6)
    # The tokenizers are the same, so the positions are the same.
    assert dense[ends[0]] == pytest.approx(scores[ends[0]], abs=1e-6)
    assert dense[ends[1]] == pytest.approx(scores[ends[1]] - scores[ends[0]], abs=1e-6)
    for kind, plain in (("orm", whole), ("orm_dense", dense)):
        added = ppo.task_rewards(reward_args(kind, True), tiny, samples, orm)[0]
        assert added[-1] == pytest.approx(plain[-1] + 1) and (added[:-1] == plain[:-1]).all()


def test_blank_lines_get_no_reward_and_shift_no_reward(tiny, orm):
    """A line break at the start and an empty line have reward 0."""
    problem = next(p for p in PROBLEMS if right(p).count("\n") == 3)
    plain, blank = (
        sampled(tiny, problem, text) for text in (right(problem), "\n" + right(problem))
    )
    scores = orm.scores([plain])[0]
    expected = ppo.potential_rewards(tiny, plain, orm, scores)
    reward = ppo.potential_rewards(tiny, blank, orm, scores)
    assert tiny.breaks_line[blank.tokens[0]]
    np.testing.assert_allclose(reward, np.concatenate([[0], expected]), atol=1e-6)


def test_line_rewards_match_with_a_prefix_and_with_another_tokenizer(tiny, orm):
    """A given first line has no reward. Another tokenizer has its rewards at its own line ends."""
    problem = next(p for p in PROBLEMS if right(p).count("\n") == 3)
    first = right(problem).splitlines(keepends=True)[0]
    sample = sampled(tiny, problem, right(problem), prefix=first)
    scores = orm.scores([sample])[0]
    places = orm.line_ends(orm.encode(sample)[1])
    ends = tiny.line_ends(sample.tokens)
    reward = ppo.potential_rewards(tiny, sample, orm, scores)
    assert len(ends) == 3 and reward.sum() == pytest.approx(scores[-1], abs=1e-6)
    assert reward[ends[0]] == pytest.approx(scores[places[1]], abs=1e-6)

    # The tokens of this policy are characters.
    text = right(problem)
    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    letters.breaks_line = np.array([chr(i) == "\n" for i in range(128)])
    letters.line_ends = lambda ids: common.Policy.line_ends(letters, ids)
    spelled = common.Sample(problem, 0, text, True, np.array([ord(c) for c in text]))
    reward = ppo.potential_rewards(letters, spelled, orm, scores)
    ends = letters.line_ends(spelled.tokens)
    assert len(ends) == 4 and np.flatnonzero(reward).tolist() == ends
    np.testing.assert_allclose(
        reward[ends[:3]], np.diff(scores[places[:3]], prepend=0.0), atol=1e-6
    )
    assert reward.sum() == pytest.approx(scores[-1], abs=1e-6)


# ---- the scripts


def test_a_sample_truncated_at_the_last_position_can_be_scored(orm):
    """No position is left for the end-of-text token that is added to a truncated sample."""
    problem = PROBLEMS[0]
    room = orm.max_length - len(orm.encode_prompt(common.prompt_text(problem)))
    text = orm.tokenizer.decode(
        orm.encode_prefix("1+1=2\n" * room)[:room], clean_up_tokenization_spaces=False
    )
    cut = sample_of(problem, text, finished=False)
    assert len(orm.encode_prefix(cut.solution)) == room or len(orm.encode_prefix(text)) == room
    assert [len(p) for p in orm.scores([cut])] == [len(orm.encode(cut)[1])]
    prompt, response = orm.encode(cut)
    assert len(prompt + response) <= orm.max_length
    assert orm.check_length((prompt, [5] * room)) == (prompt, [5] * room)
    with pytest.raises(runtime.UserError, match="positions"):
        orm.check_length((prompt, [5] * (room + 1)))
    with pytest.raises(runtime.UserError, match="positions"):
        orm.scores([sample_of(problem, text + "7\n8", finished=False)])


def test_without_an_auc_the_last_epoch_is_kept(cli, tmp_path, monkeypatch):
    """If all dev samples are incorrect, no metric prefers the first epoch."""
    for name in ("auc", "auc_within"):
        monkeypatch.setattr(reward_model, name, lambda *_: None)
    code, message = cli(reward_model, *RUN, "--out", tmp_path / "run")
    assert code == 0 and "there is no AUC" in message
    assert json.loads((tmp_path / "run" / "quality.json").read_text())["epoch"] == 2


def test_an_orm_is_trained_and_used_by_evaluation_ppo_and_expert_iteration(cli, tmp_path):
    """The ORM is trained on samples of the base model."""
    out, report_file = tmp_path / "orm", tmp_path / "report.json"
    assert cli(reward_model, *RUN, "--out", out)[0] == 0
    rows = rows_of(out / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2] and rows[0]["samples"] == 96
    quality = json.loads((out / "quality.json").read_text())
    assert quality["auc"] == max(row["auc"] for row in rows) or quality["auc"] == pytest.approx(
        max(row["auc"] for row in rows), rel=1e-5
    )
    assert [row["n"] for row in quality["best_of_n"]] == [1, 2, 4] and len(
        quality["by_position"]
    ) == 5
    assert sum(row["n"] for row in quality["reliability"]) == 48
    again = [*RUN, "--out", tmp_path / "again", "--train-samples", out / "samples" / "train.jsonl"]
    # The same samples are read from the file.
    assert cli(reward_model, *again)[0] == 0
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == (
        out / "model" / "model.safetensors"
    ).read_bytes()

    argv = [
        "--model",
        "tiny",
        "--samples",
        "6",
        "--limit-eval",
        "10",
        "--gen-batch-size",
        "64",
        "--max-new-tokens",
        "60",
    ]
    argv += ["--orm", out / "model", "--out", report_file]
    assert cli(evaluate, *argv)[0] == 0
    report, lines = json.loads(report_file.read_text()), rows_of(tmp_path / "report.samples.jsonl")
    groups = [lines[i : i + 6] for i in range(0, 60, 6)]
    best = [max(group, key=lambda row: row["score"])["correct"] for group in groups]
    assert report["rerank@6"]["value"] == pytest.approx(np.mean(best))
    assert report["maj@1"]["value"] <= 1 and 0 <= report["rerank@6 - maj@6"]["p"] <= 1
    votes = []
    for group in groups:
        sums: dict[str, float] = {}
        for row in group:
            if row["answer"] is not None:
                sums[row["answer"]] = sums.get(row["answer"], 0) + row["score"]
        votes.append(bool(sums) and max(sums, key=sums.get) == group[0]["reference"])
    assert report["weighted@6"]["value"] == pytest.approx(np.mean(votes))
    # The files have scores already.
    assert cli(evaluate, *argv, "--resume")[0] == 0

    tiny_ppo = ["--model", "tiny", "--orm", out / "model", "--questions", "8", "--samples", "3",
                "--phases", "2", "--gen-batch-size", "16", "--max-new-tokens", "60",
                "--limit-eval", "8", "--limit-train", "64", "--eval-every", "2"]  # fmt: skip
    for name in ("orm", "orm_dense"):
        assert cli(ppo, *tiny_ppo, "--reward", name, "--out", tmp_path / f"ppo_{name}")[0] == 0
        row = rows_of(tmp_path / f"ppo_{name}" / "metrics.jsonl")[-1]
        assert (
            0 < row["reward"] < 1
            and 0 <= row["correct"] <= 1
            and 0 < row["reward_if_incorrect"] < 1
        )
    rewards = [
        rows_of(tmp_path / f"ppo_{name}" / "metrics.jsonl")[1]["reward"]
        for name in ("orm", "orm_dense")
    ]
    # The samples of the first phase are the same.
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)

    argv = ["--model", "tiny", "--limit-train", "32", "--samples", "4", "--epochs", "1",
            "--rounds", "1", "--pass-k", "0", "--limit-eval", "8", "--max-new-tokens", "60",
            "--orm", out / "model"]  # fmt: skip
    assert cli(expert_iteration, *argv, "--orm-threshold", "0", "--out", tmp_path / "ei")[0] == 0
    row = rows_of(tmp_path / "ei" / "metrics.jsonl")[1]
    # At threshold 0 every solution with an answer is kept.
    assert row["kept"] > 0 and row["kept_correct"] < 1
    code, message = cli(expert_iteration, *argv, "--orm-threshold", "1", "--out", tmp_path / "none")
    assert code == 2 and "nothing to keep" in message


def test_only_accepted_solutions_are_kept():
    problem = PROBLEMS[0]
    good, bad = (
        sample_of(problem, right(problem), score=0.4),
        sample_of(problem, wrong(problem), 1, score=0.9),
    )
    silent, cut = (
        sample_of(problem, "no answer", 2, score=0.99),
        sample_of(problem, right(problem), 3, False, 0.95),
    )
    everything = [good, bad, silent, cut]
    assert expert_iteration.keep_accepted(everything, {}) == [good]
    assert expert_iteration.keep_accepted(everything, {}, 0.5) == [bad]
    # The threshold itself is enough.
    assert expert_iteration.keep_accepted(everything, {}, 0.4) == [good, bad]


def test_a_resumed_run_equals_an_uninterrupted_one(cli, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    assert cli(reward_model, *RUN, "--device", "cpu", "--out", tmp_path / "whole")[0] == 0
    save, calls = torch.save, []

    def dying(state, file):
        save(state, file)
        calls.append(1)
        if len(calls) in (2, 5):
            file.flush()
            raise Killed

    monkeypatch.setattr(torch, "save", dying)
    argv = [
        *RUN,
        "--device",
        "cpu",
        "--out",
        tmp_path / "broken",
        "--checkpoint-every",
        "0",
        "--resume",
    ]
    for _ in range(2):
        with pytest.raises(Killed):
            cli(reward_model, *argv)
    monkeypatch.setattr(torch, "save", save)
    assert cli(reward_model, *argv)[0] == 0
    assert without_time(tmp_path / "whole" / "metrics.jsonl") == without_time(
        tmp_path / "broken" / "metrics.jsonl"
    )
    names = ["model/model.safetensors", "quality.json", "samples/train.jsonl"]
    assert all(
        (tmp_path / "whole" / n).read_bytes() == (tmp_path / "broken" / n).read_bytes()
        for n in names
    )


def test_samples_of_another_run_are_refused_with_file_and_line(cli, tmp_path):
    good = sample_of(PROBLEMS[0], right(PROBLEMS[0])).to_json()
    stranger = sample_of(common.Problem("x/1", "Why?", Fraction(1)), "#### 1").to_json()
    cases = [("not a sample of", line) for line in ("{", stranger, "[1]")] + [("no samples", "")]
    for i, (words, line) in enumerate(cases):
        file = tmp_path / f"{i}.jsonl"
        file.write_text(f"{good}\n{line}\n" if line else "\n")
        code, message = cli(reward_model, *RUN, "--out", tmp_path / "run", "--train-samples", file)
        assert code == 2 and words in message and message.count("\n") == 1 and str(file) in message
        assert not line or "line 2" in message
    code, message = cli(
        reward_model, *RUN, "--out", tmp_path / "run", "--train-samples", tmp_path / "none.jsonl"
    )
    assert code == 2 and "no such file" in message


def test_samples_of_a_file_come_in_the_order_of_the_problems(tmp_path):
    """The order in the file does not matter."""
    file = tmp_path / "samples.jsonl"
    samples = [sample_of(p, f"#### {i}", i) for p in PROBLEMS[:4] for i in range(3)]
    mixed = np.random.default_rng(0).permutation(len(samples))
    file.write_text("".join(samples[i].to_json() + "\n" for i in mixed))
    read = common.read_samples(file, PROBLEMS)
    assert [(s.problem, s.number, s.text) for s in read] == [
        (s.problem, s.number, s.text) for s in samples
    ]


def test_auc_within_does_not_compare_samples_of_different_questions():
    """Every correct sample scores above the incorrect sample of its own question.

    Not every correct sample scores above the incorrect sample of another question.
    """
    p, q, easy = PROBLEMS[:3]
    samples = [sample_of(x, text(x), i) for x in (p, q) for i, text in enumerate((right, wrong))]
    samples += [sample_of(easy, right(easy))]
    scores, labels = np.array([0.2, 0.1, 0.9, 0.8, 0.5]), np.array([s.correct for s in samples])
    assert reward_model.auc_within(samples, scores, labels) == 1 > reward_model.auc(scores, labels)


def test_the_quality_of_an_orm_uses_its_last_probability():
    samples = [
        sample_of(p, text(p), i) for p in PROBLEMS[:2] for i, text in enumerate((right, wrong))
    ]
    orm = Known([np.array([0.0, s.correct * 0.8 + 0.1]) for s in samples])
    report = reward_model.quality(samples, orm, 1000)
    assert report["auc"] == report["auc_within"] == report["accuracy"] == 1
    assert report["calibration_error"] == pytest.approx(0.1) and report["best_of_n"][-1]["orm"] == 1
    orm = Known([np.array([1.0 - s.correct, s.correct * 0.8 + 0.1]) for s in samples])
    reverse = reward_model.quality(samples, orm, 1000)
    assert reverse["auc"] == 1


def test_every_solution_is_trained_on_with_its_weight(cli, tmp_path, monkeypatch):
    """Both classes of a question have the same weight. The schedule sets the learning rate."""
    seen, step = [], reward_model.train_step

    def spied(orm, optimizer, batch, token_budget):
        seen.append(([(str(e), y, w) for e, y, w in batch], optimizer.param_groups[0]["lr"]))
        return step(orm, optimizer, batch, token_budget)

    monkeypatch.setattr(reward_model, "train_step", spied)
    argv = [*RUN, "--epochs", 1, "--batch-size", 8, "--limit-train", 16, "--limit-eval", 4]
    assert cli(reward_model, *argv, "--lr", 2e-3, "--out", tmp_path / "run")[0] == 0
    samples = common.read_samples(tmp_path / "run" / "samples" / "train.jsonl", PROBLEMS)
    data = reward_model.training_data(samples)
    orm = reward_model.RewardModel("tiny", "cpu", new=True)
    expected = [(str(orm.encode(sample)), label, weight) for (sample,), label, weight in data]
    assert all(label == float(sample.correct) for (sample,), label, _ in data)
    assert sorted(triple for batch, _ in seen for triple in batch) == sorted(expected)
    assert len({weight for _, _, weight in data}) > 2
    assert [lr for _, lr in seen] == [
        common.cosine_lr(i, len(seen), 2e-3) for i in range(len(seen))
    ]


def test_a_truncated_solution_gets_no_reward_from_verifier_and_orm(tiny, orm):
    """This holds even if its answer line is complete and correct."""
    problem = PROBLEMS[0]
    samples = [
        sampled(tiny, problem, right(problem)),
        sampled(tiny, problem, right(problem) + "\n", finished=False),
    ]
    assert samples[1].correct
    first, cut = ppo.task_rewards(reward_args("sparse"), tiny, samples)
    assert first.sum() == 1 and cut.sum() == 0
    first, cut = (r.sum() for r in ppo.task_rewards(reward_args("orm"), tiny, samples, orm))
    assert first == pytest.approx(orm.scores(samples[:1])[0][-1]) and first > 0 and cut == 0
