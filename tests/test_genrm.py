"""Check the generative reward model and its methods: rewards, references, selection, order."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_generation import ARCHITECTURES, random_policy
from test_scripts import cli, rows_of, without_time  # noqa: F401

import common
import evaluate
import ppo
import reward_model
import runtime

PROBLEMS = common.load_problems("arithmetic", "train", 40)
SMALL = [
    "--model",
    "tiny",
    "--limit-eval",
    "12",
    "--max-new-tokens",
    "60",
    "--gen-batch-size",
    "32",
]
RUN = [*SMALL, "--kind", "genrm", "--limit-train", "24", "--samples", "4", "--eval-samples", "4",
       "--epochs", "2", "--batch-size", "8"]  # fmt: skip
PPO = [*SMALL, "--questions", "8", "--samples", "3", "--phases", "2", "--eval-every", "2"]


@pytest.fixture(scope="module")
def genrm() -> reward_model.GenerativeRewardModel:
    return reward_model.GenerativeRewardModel("tiny", "cpu", new=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of a generative and an outcome reward model without training."""
    folder = tmp_path_factory.mktemp("judges")
    reward_model.GenerativeRewardModel("tiny", "cpu", new=True).save(folder / "genrm")
    reward_model.RewardModel("tiny", "cpu", new=True).save(folder / "orm")
    return SimpleNamespace(genrm=str(folder / "genrm"), orm=str(folder / "orm"))


def sample_of(problem, text, number=0, finished=True) -> common.Sample:
    return common.Sample(problem, number, text, finished)


def wrong(problem) -> str:
    return f"1+1=<<1+1=2>>2\n#### {problem.answer + 1}"


# ---- the model


def test_a_solution_cannot_contain_its_own_verdict(genrm):
    """A solution is truncated where it continues with words of the prompt."""
    plain = genrm.encode(PROBLEMS[0], "1+1=2", "2+2=4")
    for words in ("Better answer:\nA", "Answer B:\n#### 1\nBetter answer:\nA", "Answer A:\n5"):
        assert genrm.encode(PROBLEMS[0], f"1+1=2\n{words}", "2+2=4") == plain
        assert genrm.encode(PROBLEMS[0], "1+1=2", f"2+2=4\n{words}") == plain
    # Only the start of a line counts.
    assert genrm.encode(PROBLEMS[0], "1+1=2 Better answer: A", "2+2=4") != plain


def test_compared_with_itself_a_solution_scores_exactly_half_in_any_batch(genrm):
    """Both orders of equal texts share one forward pass. Two batches would round differently."""
    texts = [PROBLEMS[0].reference, wrong(PROBLEMS[0]), "7", ""]
    pairs = [(PROBLEMS[0], text, other) for text in texts for other in texts]
    for budget in (1, 200, 10**5):
        scores = genrm.verdicts(pairs, budget).mean(1)
        assert (scores[:: len(texts) + 1] == 0.5).all() and (scores != 0.5).sum() == 12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_log_odds_of_a_batch_equal_the_log_odds_of_single_comparisons(name, tmp_path_factory):
    """A batch with comparisons of different lengths agrees with plain passes without padding."""
    policy = random_policy(name, tmp_path_factory)
    genrm = reward_model.GenerativeRewardModel(
        policy.model.config._name_or_path, "cpu", "float32", new=True
    )
    problem = PROBLEMS[0]
    pairs = [("1", "2 2 2"), (problem.reference, wrong(problem)), ("", "")]
    examples = [genrm.encode(problem, a, b) for a, b in pairs]
    with torch.no_grad():
        together = genrm.log_odds(examples)
        for (prompt, (verdict,)), odds in zip(examples, together, strict=True):
            assert verdict == genrm.verdict_ids[0] != genrm.verdict_ids[1]
            logits = genrm.model(torch.tensor([prompt])).logits[0, -1]
            a, b = (logits[i] for i in genrm.verdict_ids)
            torch.testing.assert_close(odds, a - b, atol=1e-4, rtol=1e-4)


def test_a_score_is_the_mean_over_both_orders_and_half_for_equal_texts(genrm):
    problem = PROBLEMS[0]
    candidates = [problem.reference, wrong(problem), problem.reference]
    comparisons = [(problem, text, problem.reference.strip()) for text in candidates]
    asked = genrm.verdicts([(p, c.strip(), r) for p, c, r in comparisons])
    with torch.no_grad():
        odds = genrm.log_odds(
            [genrm.encode(problem, wrong(problem), problem.reference.strip()),
             genrm.encode(problem, problem.reference.strip(), wrong(problem))]
        )  # fmt: skip
    assert asked[1] == pytest.approx(
        [odds[0].sigmoid().item(), 1 - odds[1].sigmoid().item()], abs=1e-5
    )
    samples = [sample_of(problem, text, i) for i, text in enumerate(candidates)]
    scores = genrm.scores(samples, {problem.id: problem.reference.strip()})
    assert scores == pytest.approx(asked.mean(1).tolist())
    assert scores[0] == pytest.approx(0.5, abs=1e-6) and scores[2] == scores[0]
    assert genrm.scores(
        samples, {problem.id: problem.reference.strip()}, token_budget=1
    ) == pytest.approx(scores, abs=1e-5)


def test_grading_compares_every_sample_with_the_reference_of_its_problem(genrm):
    samples = [
        sample_of(p, text, k)
        for p in PROBLEMS[:2]
        for k, text in enumerate((wrong(p), p.reference, p.reference + "\n"))
    ]
    genrm.grade(samples, token_budget=300)
    pairs = [(s.problem, s.solution, s.problem.reference) for s in samples]
    expected = genrm.verdicts(pairs).mean(1)
    assert [sample.score for sample in samples] == pytest.approx(expected, abs=1e-5)
    assert all((sample.score == 0.5) == sample.correct for sample in samples)


def test_a_question_without_a_gold_solution_needs_room_for_two_samples(genrm):
    """With a gold solution one sample has to fit. Without one two samples have to fit."""
    assert len(genrm.encode_prefix("7" * 50)) == 50
    for solution, n in (("1+1=2\n#### 2", 1), (None, 2)):
        problem = common.Problem("p", "How many?", 2, solution, solution)
        room = genrm.max_length - sum(map(len, genrm.encode(problem, "", solution or "")))
        for extra in (0, 1):
            text = "7" * (room // n + extra)
            pairs = [(text, solution or text), (solution or text, text)]
            for a, b in pairs:
                if extra:
                    with pytest.raises(runtime.UserError, match="positions"):
                        genrm.encode(problem, a, b)
                else:
                    assert sum(map(len, genrm.encode(problem, a, b))) > genrm.max_length - n


def test_a_saved_genrm_is_an_ordinary_language_model_and_other_models_are_refused(
    genrm, tmp_path, nano, folders
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders.genrm)
    ids = torch.tensor([genrm.encode(PROBLEMS[0], "1", "2")[0]])
    torch.testing.assert_close(model(ids).logits, genrm.model(ids).logits, atol=1e-4, rtol=1e-4)
    reward_model.GenerativeRewardModel(folders.genrm, "cpu")
    for folder, words in (
        (nano, "not a generative reward model"),
        (folders.orm, "not a language model"),
    ):
        with pytest.raises(runtime.UserError, match=words):
            reward_model.GenerativeRewardModel(folder, "cpu")


# ---- training data and quality


def test_comparisons_have_the_target_of_their_kind_in_both_orders():
    problem, other = PROBLEMS[0], PROBLEMS[1]
    right = [problem.reference, "so " + problem.reference]
    bad = [wrong(problem), "no answer", ""]
    samples = [sample_of(problem, text, i) for i, text in enumerate([*right, *bad, bad[0]])]
    samples += [sample_of(other, wrong(other), i) for i in range(2)]
    gold, turned = problem.reference.strip(), 0
    for n_pairs, expected in ((10, 3 + 2 + 6 + 1), (1, 1 + 1 + 1 + 1)):
        for seed in range(10):
            data = reward_model.comparisons(samples, n_pairs, seed)
            asked = [pair for pair, _, _ in data]
            # The question and a prefix for both problems. For one, the solution of the other.
            assert len(data) == expected + 2 + 2 + 1
            assert all(any(q.question in pair[1:] for pair in asked) for q in (problem, other))
            for (p, a, b), target, weight in data:
                is_right = [sample_of(p, text).correct for text in (a, b)]
                assert target == (0.5 if all(is_right) else float(is_right[0])) and any(is_right)
                assert weight == 1
                turned += p is problem and b == gold
    # The gold solution comes second as well. So its position tells nothing.
    assert turned
    without = common.Problem("x", "q", problem.answer)
    ((_, target, _),) = reward_model.comparisons(
        [sample_of(without, gold), sample_of(without, "1")], 5, 0
    )
    assert target in (0.0, 1.0)
    data = reward_model.comparisons(
        [sample_of(without, t) for t in (gold, f"so {gold}", "1", "2")], 4, 0
    )
    asked = [pair for pair, _, _ in data]
    # Two correct and two incorrect texts: each pair occurs once.
    assert len({frozenset(pair[1:]) for pair in asked}) == len(asked) == 4


class Oracle:
    """Prefer correct texts. Other texts are equally good. The first text gets 0.1 more."""

    def verdicts(self, comparisons, token_budget):
        def value(problem, text):
            return float(sample_of(problem, text).correct)

        score = [0.5 + 0.4 * (value(p, c) - value(p, r)) for p, c, r in comparisons]
        return np.array([[s + 0.05, s - 0.05] for s in score])


def test_the_quality_of_a_known_reward_model():
    samples = []
    for problem in PROBLEMS[:6]:
        samples += [
            sample_of(problem, problem.reference),
            sample_of(problem, wrong(problem), 1),
            sample_of(problem, "", 2),
        ]
    report = reward_model.genrm_quality(samples, Oracle(), 1000)
    assert report["auc"] == report["auc_within"] == 1 and report["base_rate"] == pytest.approx(
        1 / 3
    )
    assert report["score_if_correct"] == pytest.approx(0.5) and report[
        "score_if_incorrect"
    ] == pytest.approx(0.1)
    assert (
        report["false_positive_rate"] == 0
        and report["order_bias"] == pytest.approx(0.1) == report["order_gap"]
    )
    # A correct sample is as good as the reference, not better.
    assert report["beats_gold_rate"] == 0
    assert [row["candidate"] for row in report["nonsense"]] == [
        "empty",
        "colon",
        "thinking",
        "question",
    ]
    assert report["nonsense_worst"] == pytest.approx(0.1)


def test_a_correct_sample_replaces_a_missing_gold_solution_and_is_not_scored():
    bare = [common.Problem(p.id, p.question, p.answer) for p in PROBLEMS[:2]]
    other = f"0+0=<<0+0=0>>0\n{PROBLEMS[0].reference}"
    texts = [wrong(bare[0]), PROBLEMS[0].reference, PROBLEMS[0].reference, other]
    samples = [sample_of(bare[0], text, k) for k, text in enumerate(texts)]
    samples += [sample_of(bare[1], "1", 2), sample_of(PROBLEMS[2], PROBLEMS[2].reference)]
    kept = reward_model.with_references(samples)
    # A question without a correct sample is left out. Compared with itself a sample scores 0.5.
    assert [sample.solution for sample in kept] == [texts[0], other, PROBLEMS[2].reference]
    references = [sample.problem.reference for sample in kept]
    assert references == [PROBLEMS[0].reference] * 2 + [PROBLEMS[2].reference]
    assert reward_model.genrm_quality(kept[:2], Oracle(), 1000)["base_rate"] == 0.5
    with pytest.raises(runtime.UserError, match="no dev question"):
        reward_model.with_references([samples[4]])


# ---- rewards


def test_the_reference_is_the_gold_solution_or_else_the_best_finished_sample(tmp_path):
    """A truncated sample is the reference only if no sample is finished."""
    first, second, with_gold, checked = PROBLEMS[:4]
    samples = [
        sample_of(p, f"{n}+1=<<{n}+1=2>>2\n#### 2", n) for p in (first, second) for n in range(3)
    ]
    samples.append(sample_of(with_gold, "1+1=<<1+1=2>>2\n#### 2"))
    scores = [0.9, 0.2, 0.4, 0.1, 0.8, 0.3, 1.0]
    for sample, score in zip(samples, scores, strict=True):
        sample.score = score
        sample.finished = sample.problem is first and sample.number > 0
    file = tmp_path / "scored.samples.jsonl"
    common.write_samples(file, samples)
    sources = {first.id: "genrm_sampled", second.id: "genrm_sampled"}
    sources |= {with_gold.id: "genrm_gold", checked.id: "verifier"}
    expected = {first.id: samples[2].solution, second.id: samples[4].solution}
    expected[with_gold.id] = with_gold.reference
    assert ppo.find_references(PROBLEMS[:4], sources, str(file)) == expected
    # The question identifies a problem, because another dataset may use the same id.
    renamed = [dataclasses.replace(p, id=f"other {p.id}") for p in (first, second)]
    found = ppo.find_references(renamed, {p.id: "genrm_sampled" for p in renamed}, str(file))
    assert list(found.values()) == [samples[2].solution, samples[4].solution]


def test_the_error_names_a_question_without_gold_solution_and_scored_sample(tmp_path):
    file, sources = tmp_path / "samples.jsonl", dict.fromkeys([PROBLEMS[0].id], "genrm_sampled")
    samples = [sample_of(p, "1", k) for p in PROBLEMS[:2] for k in range(2)]
    message = f"^{PROBLEMS[0].id} has no gold solution and no sample with a score in --references"
    for scored in ([], samples[2:]):
        for sample in scored:
            sample.score = 0.5
        common.write_samples(file, samples)
        for given in (str(file), None):
            with pytest.raises(runtime.UserError, match=message) as error:
                ppo.find_references(PROBLEMS[:1], sources, given)
            assert "\n" not in str(error.value)
    with pytest.raises(runtime.UserError, match="no such file of samples"):
        ppo.find_references(PROBLEMS[:1], sources, str(tmp_path / "missing.jsonl"))


def test_reward_sources_hide_the_given_fractions_and_depend_on_the_seed_only():
    problems = [
        *PROBLEMS[:30],
        *[common.Problem(f"bare{i}", "q", PROBLEMS[0].answer) for i in range(10)],
    ]
    sources = ppo.reward_sources(problems, [0.5, 0.25], 0)
    assert sources == ppo.reward_sources(problems, [0.5, 0.25], 0)
    assert sources != ppo.reward_sources(problems, [0.5, 0.25], 1)
    assert list(sources) == [problem.id for problem in problems]
    counts = Counter(sources.values())
    assert counts["verifier"] == 20 and counts["genrm_sampled"] >= 5
    assert all(sources[p.id] != "genrm_gold" for p in problems if p.reference is None)
    assert set(ppo.reward_sources(problems, [0, 1], 0).values()) == {"verifier"}
    for hide, source in (([1, 0], "genrm_gold"), ([1, 1], "genrm_sampled")):
        assert [*ppo.reward_sources(PROBLEMS, hide, 0).values()] == [source] * 40


def test_the_hybrid_reward_asks_the_model_only_if_the_answer_is_hidden(tiny, genrm):
    checked, hidden = PROBLEMS[:2]
    references = {hidden.id: hidden.reference}
    sources = {checked.id: "verifier", hidden.id: "genrm_gold"}
    args = SimpleNamespace(reward="hybrid", add_outcome=False, token_budget=1000)
    texts = [
        (checked, checked.reference),
        (checked, wrong(checked)),
        (hidden, hidden.reference),
        (hidden, wrong(hidden)),
    ]
    samples = [sample_of(p, text) for p, text in texts]
    for sample in samples:
        sample.tokens = np.array(tiny.encode_solution(sample.text), np.int32)
    expected = genrm.scores(samples[2:], references)
    assert expected[0] == pytest.approx(0.5, abs=1e-6)
    rewards = ppo.task_rewards(args, tiny, samples, genrm, references)
    assert [r[-1] for r in rewards] == pytest.approx([1, 0, *expected])
    assert not any(r[:-1].any() for r in rewards)
    metrics = ppo.sample_metrics(samples, rewards, [0.5, 0.5], sources)
    assert metrics["score_if_correct"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["false_positive_rate"] == float(expected[1] >= 0.5)
    assert metrics["beats_gold_rate"] == (expected[1] > 0.5) / 2
    assert metrics["reward"] == pytest.approx((1 + sum(expected)) / 4)
    keys = "score_if_correct", "false_positive_rate", "beats_gold_rate"
    # If the model scored nothing, the metrics are None. Without a model there are no such keys.
    nothing = ppo.sample_metrics(samples[:2], rewards[:2], [0.5], sources)
    assert {nothing[key] for key in keys} == {None}
    alone = ppo.sample_metrics(samples[:2], rewards[:2], [0.5], {checked.id: "verifier"})
    assert not alone.keys() & set(keys) and alone["correct"] == 0.5
    samples[3].finished = False
    # This text is too long for a comparison. A truncated sample needs no comparison.
    samples[3].text = "1" * 9999
    rewards = ppo.task_rewards(args, tiny, samples, genrm, references)
    assert [r[-1] for r in rewards] == pytest.approx([1, 0, expected[0], 0])
    truncated = ppo.sample_metrics(samples, rewards, [0.5, 0.5], sources)
    assert truncated["false_positive_rate"] is None and truncated["beats_gold_rate"] == 0
    assert truncated["score_if_correct"] == metrics["score_if_correct"]


def test_a_sampled_reference_does_not_count_as_gold():
    """beats_gold_rate leaves out the questions that are compared with a sample."""
    samples = [sample_of(p, wrong(p)) for p in PROBLEMS[:2]]
    rewards = [np.array([score], np.float32) for score in (0.25, 0.75)]
    sources = dict(zip((p.id for p in PROBLEMS), ("genrm_gold", "genrm_sampled"), strict=False))
    metrics = ppo.sample_metrics(samples, rewards, [0.0, 0.0], sources)
    assert metrics["beats_gold_rate"] == 0 and metrics["false_positive_rate"] == 0.5
    sources[PROBLEMS[0].id] = "genrm_sampled"
    assert ppo.sample_metrics(samples, rewards, [0, 0], sources)["beats_gold_rate"] is None


def test_the_order_of_questions_is_independent_of_their_reward_source():
    """About half of the questions in the first half of a pass are for the verifier."""
    problems = [common.Problem(f"p{i}", "?", 1, "#### 1", "#### 1") for i in range(400)]
    sources = ppo.reward_sources(problems, [0.5, 0.0], seed=0)
    checked = np.array([sources[problem.id] == "verifier" for problem in problems])
    for turn in range(20):
        half = checked[common.shuffled(400, 0, turn)[:200]].mean()
        # 0.5 +- 6 standard errors
        assert 0.35 < half < 0.65, turn


# ---- selection


def write_scores(file, problems, scores, finished=(True, True)) -> str:
    """Write a file of correct samples. Each problem gets one sample per entry of `finished`."""
    samples = []
    for problem, score in zip(problems, scores, strict=True):
        for k, is_finished in enumerate(finished):
            text = f"1+1=<<1+1=2>>2\n#### {problem.answer}\n"
            samples.append(sample_of(problem, text, k, is_finished))
            samples[-1].score = score
    common.write_samples(file, samples)
    return str(file)


def questions_of(*files, dataset="arithmetic", train=()) -> list[dict]:
    return ppo.read_scores(SimpleNamespace(dataset=dataset, scores=[*files]), [*train])


def test_scores_are_standardised_within_a_file(tmp_path):
    easy = write_scores(tmp_path / "easy.jsonl", PROBLEMS[:2], [0.0, 1.0])
    hard = write_scores(tmp_path / "hard.jsonl", PROBLEMS[2:5], [0.2, 0.4, 0.9])
    same = write_scores(tmp_path / "same.jsonl", PROBLEMS[5:7], [0.5, 0.5])
    questions = questions_of(easy, hard, same)
    assert [q["problem"] for q in questions] == PROBLEMS[:7]
    assert [q["file"] for q in questions] == [easy] * 2 + [hard] * 3 + [same] * 2
    assert [q["score"] for q in questions] == [0.0, 1.0, 0.2, 0.4, 0.9, 0.5, 0.5]
    z = np.array([q["standardised"] for q in questions])
    assert z[:2] == pytest.approx([-1, 1], abs=1e-6) and z[5:].tolist() == [0, 0]
    assert z[2:5].mean() == pytest.approx(0) and z[2:5].std() == pytest.approx(1)
    assert sorted(z[2:5]) == z[2:5].tolist()


def test_the_lowest_scores_are_selected_from_a_hard_file_and_an_easy_one(tmp_path):
    """Without standardisation the hard file would fill the selection."""
    scores = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    easy = write_scores(tmp_path / "easy.jsonl", PROBLEMS[:10], [s + 0.95 for s in scores])
    hard = write_scores(tmp_path / "hard.jsonl", PROBLEMS[10:20], scores)
    kept = ppo.choose("lowest", questions_of(easy, hard), 0.2, 0)
    assert [q["problem"] for q in kept] == [PROBLEMS[i] for i in (0, 1, 10, 11)]


def test_the_score_of_a_truncated_sample_counts_as_zero(tmp_path):
    half = write_scores(tmp_path / "half.jsonl", PROBLEMS[:1], [0.8], finished=(True, False))
    none = write_scores(tmp_path / "none.jsonl", PROBLEMS[1:2], [0.8], finished=(False, False))
    rows = [json.loads(line) for line in Path(half).read_text().splitlines()]
    assert all(row["correct"] for row in rows)
    for question, score, correct in zip(questions_of(half, none), (0.4, 0), (0.5, 0), strict=True):
        assert question["score"] == pytest.approx(score) and question["correct"] == correct


def test_without_a_reward_model_the_score_is_the_fraction_of_correct_samples(tmp_path):
    file, problem = tmp_path / "samples.jsonl", PROBLEMS[0]
    texts = [problem.reference, wrong(problem), "", wrong(problem)]
    common.write_samples(file, [sample_of(problem, text, k) for k, text in enumerate(texts)])
    (question,) = questions_of(str(file))
    assert question["score"] == question["correct"] == 0.25


def test_questions_of_train_dev_and_test_are_not_selected(tmp_path):
    splits = {s: common.load_problems("arithmetic", s) for s in ("train", "dev", "test")}
    train = splits["train"][:3]
    mixed = [*splits["train"][:5], *splits["dev"][:2], *splits["test"][:2]]
    # The same questions under other ids are left out as well, as in another dataset.
    mixed += [dataclasses.replace(p, id=f"other-{p.id}") for p in mixed if p not in mixed[3:5]]
    file = write_scores(tmp_path / "mixed.jsonl", mixed, [0.5] * len(mixed))
    assert [q["problem"] for q in questions_of(file, train=train)] == splits["train"][3:5]
    file = write_scores(tmp_path / "taken.jsonl", train, [0.5] * 3)
    with pytest.raises(runtime.UserError, match="no question beyond train, dev and test"):
        questions_of(file, train=train)
    # A folder may have no test split.
    rows = [{"question": p.question, "answer": p.reference} for p in PROBLEMS[:20]]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = common.load_problems(str(tmp_path / "set"), "train")
    file = write_scores(tmp_path / "own.jsonl", own, [0.5] * len(own))
    questions = questions_of(file, dataset=str(tmp_path / "set"), train=own[:4])
    assert [q["problem"] for q in questions] == own[4:]


def test_a_question_of_another_dataset_gets_its_own_id(tmp_path):
    """A problem of the training set is found by id and question. It keeps its solution."""
    own, same_id = PROBLEMS[0], dataclasses.replace(PROBLEMS[1], question="Another question?")
    one = write_scores(tmp_path / "one.jsonl", [own, same_id], [0.1, 0.2])
    third = dataclasses.replace(same_id, question="A third question?")
    two = write_scores(tmp_path / "two.jsonl", [third], [0.3])
    problems = [q["problem"] for q in questions_of(one, two)]
    assert problems[0] is not own and problems[0] == own and problems[0].solution == own.solution
    assert [p.id for p in problems[1:]] == [f"{one}: {same_id.id}", f"{two}: {same_id.id}"]
    assert [p.question for p in problems[1:]] == [same_id.question, third.question]
    assert all(p.answer == same_id.answer and p.reference is None for p in problems[1:])


def test_two_files_with_the_same_question_are_refused(tmp_path):
    """The samples of both would be equal and would be trained on twice."""
    one = write_scores(tmp_path / "one.jsonl", PROBLEMS[:2], [0.1, 0.2])
    two = write_scores(tmp_path / "two.jsonl", PROBLEMS[1:3], [0.3, 0.4])
    with pytest.raises(runtime.UserError, match="^--scores: a question occurs twice"):
        questions_of(one, two)


def test_each_selection_keeps_its_kind_of_questions():
    def chosen(kind, correct, fraction, scores=None, seed=0):
        pairs = zip(correct, scores or correct, strict=True)
        questions = [{"i": i, "correct": c, "standardised": z} for i, (c, z) in enumerate(pairs)]
        return [q["i"] for q in ppo.choose(kind, questions, fraction, seed)]

    correct = [0.0, 0.0, 0.125, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert chosen("lowest", correct, 0.3) == [0, 1, 2]
    assert chosen("floor", correct, 0.3) in ([2, 3, 4], [2, 3, 5])
    assert chosen("frontier", correct, 0.2) == [4, 5]
    # Scores of a reward model, in another order than the fractions of correct samples.
    scores = [0.5, 0.9, 0.1]
    assert chosen("lowest", [0.0, 0.5, 1.0], 0.3, scores) == [2]
    assert chosen("frontier", [0.0, 0.5, 1.0], 0.3, scores) == [1]
    assert chosen("floor", [0.5, 0.5, 0.0], 0.3, scores) == [0]
    drawn = [chosen("random", correct, 0.3, seed=seed) for seed in range(30)]
    assert {i for d in drawn for i in d} == set(range(10)) and all(len(set(d)) == 3 for d in drawn)
    ties = [chosen("lowest", correct, 0.1, seed=seed) for seed in range(30)]
    # Ties are broken at random.
    assert sorted({i for (i,) in ties}) == [0, 1]
    for kind in ("lowest", "floor", "frontier", "random"):
        for seed in (0, 1):
            assert chosen(kind, correct, 0.3, None, seed) == chosen(kind, correct, 0.3, None, seed)
    assert chosen("floor", [0.0, 0.0, 1.0], 1.0) == [2]
    # A small fraction of few questions still keeps one.
    assert chosen("lowest", [0.0, 0.5, 1.0], 0.1) == [0]


# ---- verifiable questions first


def test_questions_without_a_gold_solution_join_after_the_switch():
    kinds = ["verifier", "genrm_gold"] * 2 + ["verifier"] + ["genrm_sampled"] * 3
    sources = {p.id: kind for p, kind in zip(PROBLEMS, kinds, strict=False)}
    args = SimpleNamespace(curriculum="verifiable_first", seed=0, phases=10, switch=0.4)

    def begin() -> ppo.Curriculum:
        return ppo.Curriculum(args, PROBLEMS[:8], sources)

    curriculum = begin()
    drawn = {phase: curriculum.draw(phase, 4)[0] for phase in range(1, 11)}
    assert all(len(set(chosen)) == 4 for chosen in drawn.values())
    early, late = ({i for p in phases for i in drawn[p]} for phases in (range(1, 5), range(5, 11)))
    assert early == {0, 1, 2, 3, 4} and late == set(range(8))
    assert set(drawn[5]) - early, "they join in the first phase after the switch"
    # Resume a run before the switch, at it and after it.
    for last in (3, 4, 5):
        again = begin()
        for phase in range(1, last + 1):
            again.draw(phase, 4)
        state, again = json.loads(json.dumps(again.state)), begin()
        again.state = state
        following = range(last + 1, 11)
        assert [again.draw(phase, 4)[0] for phase in following] == [drawn[p] for p in following]


def test_a_switch_needs_questions_with_and_without_a_gold_solution():
    sources = {p.id: "genrm_sampled" for p in PROBLEMS[:4]}
    args = SimpleNamespace(curriculum="verifiable_first", seed=0, phases=10, switch=0.0)
    assert sorted(ppo.Curriculum(args, PROBLEMS[:4], sources).draw(1, 4)[0]) == [0, 1, 2, 3]
    args.switch = 0.1
    # Without both kinds the switch would change nothing.
    for kinds in (sources, {p.id: "genrm_gold" for p in PROBLEMS[:4]}):
        with pytest.raises(runtime.UserError, match="with and without gold"):
            ppo.Curriculum(args, PROBLEMS[:4], kinds)


# ---- the scripts


@pytest.fixture(scope="module")
def scored(tmp_path_factory, folders) -> str:
    """Return samples of the first 60 training questions with the scores of a reward model."""
    folder, samples = tmp_path_factory.mktemp("scored"), []
    for i, problem in enumerate(common.load_problems("arithmetic", "train", 60)):
        # Of three questions in a row, two, one and none of two samples are correct.
        for k in range(2):
            is_correct = k >= i % 3
            text = problem.reference if is_correct else wrong(problem)
            samples.append(sample_of(problem, text, k))
    reward_model.RewardModel(folders.orm, "cpu").grade(samples, 1000)
    # The reward model is new and scores all samples equally.
    for sample in samples:
        sample.score += 0.1 * sample.correct + 0.01 * sample.number
    common.write_samples(folder / "scores.samples.jsonl", samples)
    return str(folder / "scores.samples.jsonl")


def test_a_generative_reward_model_is_trained_and_ppo_maximises_it(cli, tmp_path, folders, scored):
    out = tmp_path / "genrm"
    assert cli(reward_model, *RUN, "--out", out)[0] == 0
    rows, quality = rows_of(out / "metrics.jsonl"), json.loads((out / "quality.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["loss"] < rows[0]["loss"]
    assert (
        quality["auc"] == pytest.approx(max(row["auc"] for row in rows), rel=1e-5)
        and len(quality["nonsense"]) == 4
    )
    argv = [*PPO, "--limit-train", 40, "--genrm", out / "model"]
    runs = {"gold": ["--reward", "genrm"],
            "best": ["--reward", "genrm", "--hide", 1, 1, "--references", scored],
            "hybrid": ["--reward", "hybrid"]}  # fmt: skip
    for name, flags in runs.items():
        assert cli(ppo, *argv, *flags, "--out", tmp_path / name)[0] == 0
        row = rows_of(tmp_path / name / "metrics.jsonl")[-1]
        assert 0 <= row["false_positive_rate"] <= 1 and 0 <= row["reward"] <= 1
        assert (
            row["beats_gold_rate"] is None if name == "best" else 0 <= row["beats_gold_rate"] <= 1
        )
    first = [rows_of(tmp_path / name / "samples" / "phase_1.jsonl") for name in ("gold", "best")]
    # The references do not change the samples.
    assert first[0] == first[1]
    rewards = [rows_of(tmp_path / name / "metrics.jsonl")[1]["reward"] for name in ("gold", "best")]
    assert rewards[0] != rewards[1]
    code, message = cli(
        ppo, *PPO, "--reward", "genrm", "--genrm", folders.orm, "--out", tmp_path / "none"
    )
    assert code == 2 and "not a language model" in message and not (tmp_path / "none").exists()


def test_a_run_with_verifiable_questions_first_resumes_across_the_switch(
    cli, tmp_path, folders, scored, monkeypatch
):
    argv = [*PPO, "--limit-train", 24, "--phases", 3, "--genrm", folders.genrm]
    argv += ["--reward", "hybrid", "--hide", 0.75, 0.5, "--references", scored]
    argv += ["--curriculum", "verifiable_first", "--switch", 0.34, "--checkpoint-every", 0]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli(ppo, *argv, "--out", whole)[0] == 0
    sources = ppo.reward_sources(PROBLEMS[:24], [0.75, 0.5], 0)
    assert Counter(sources.values()) == {"verifier": 6, "genrm_gold": 9, "genrm_sampled": 9}
    asked = [
        {sources[row["problem"]] for row in rows_of(whole / "samples" / f"phase_{phase}.jsonl")}
        for phase in (1, 2, 3)
    ]
    assert asked[0] == {"verifier", "genrm_gold"} and asked[1] == asked[2] == set(sources.values())
    log, calls = runtime.Run.log, []

    def interrupted(run, **metrics):
        log(run, **metrics)
        calls.append(1)
        if len(calls) == 3:
            # Phase 2 was logged, but its checkpoint was not written.
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.Run, "log", interrupted)
    assert cli(ppo, *argv, "--out", broken)[0] == 130
    monkeypatch.setattr(runtime.Run, "log", log)
    assert cli(ppo, *argv, "--out", broken, "--resume")[0] == 0
    assert without_time(whole / "metrics.jsonl") == without_time(broken / "metrics.jsonl")
    files = ["model/model.safetensors", *(f"samples/phase_{phase}.jsonl" for phase in (1, 2, 3))]
    for name in files:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_selected_questions_are_added_to_the_training_questions(cli, tmp_path, scored):
    argv = [*PPO, "--limit-train", 20, "--questions", 24, "--phases", 1, "--samples", 2]
    argv += ["--select", "lowest", "--scores", scored, "--select-fraction", 0.1]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 0
    train = common.load_problems("arithmetic", "train", 60)
    selected = json.loads((tmp_path / "run" / "samples" / "selected.json").read_text())
    # A tenth of the 40 questions that are scored and not in train.
    assert len(selected) == 4
    for row in selected:
        samples = [s for s in rows_of(Path(scored)) if s["problem"] == row["problem"]]
        assert row["problem"] in [p.id for p in train[20:]] and row["file"] == scored
        assert row["correct"] == np.mean([s["correct"] for s in samples]) == 0
        assert row["score"] == pytest.approx(np.mean([s["score"] for s in samples]))
        assert row["standardised"] < 0
    asked = {row["problem"] for row in rows_of(tmp_path / "run" / "samples" / "phase_1.jsonl")}
    assert asked == {p.id for p in train[:20]} | {row["problem"] for row in selected}


@pytest.mark.parametrize("kind", ["lowest", "floor", "frontier", "random"])
def test_the_selection_that_is_written_has_the_questions_of_its_kind(kind, scored):
    flags = ["--limit-train", "20", "--select", kind, "--scores", scored]
    train, selected = ppo.load_questions(ppo.parse_args(flags))
    assert train[:20] == PROBLEMS[:20] and train[20:] == [row["problem"] for row in selected]
    assert len(selected) == 4
    allowed = {"lowest": {0}, "floor": {0.5}, "frontier": {0.5}, "random": {0, 0.5, 1}}[kind]
    assert {row["correct"] for row in selected} <= allowed
    again = ppo.load_questions(ppo.parse_args(flags))
    other = ppo.load_questions(ppo.parse_args([*flags, "--seed", "1"]))
    assert again == (train, selected) and other != again, "the seed breaks ties at random"


def test_flags_that_do_not_fit_together_give_a_one_line_error(cli, tmp_path, scored):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"questions": []}\n')
    for flags, part in (
        (["--select", "lowest"], "--select needs --scores"),
        (["--select", "lowest", "--limit-train", "60", "--scores", scored], "no question beyond"),
        (["--select", "lowest", "--scores", "nowhere"], "nowhere: no such file"),
        (["--select", "lowest", "--scores", broken], "broken.jsonl line 1: not a sample"),
        (["--scores", scored], "--select"),
        (["--references", scored], "--reward genrm or hybrid"),
        (["--reward", "genrm", "--hide", "1", "1"], "has no gold solution"),
        (["--reward", "genrm", "--hide", "1"], "expected 2 arguments"),
        (["--reward", "genrm", "--hide", "2", "0"], "(0 to 1)"),
        (["--curriculum", "verifiable_first"], "--reward genrm or hybrid"),
        (["--curriculum", "backtracking", "--reward", "hybrid"], "runs/genrm/model"),
        (["--add-outcome"], "--reward orm"),
        (["--reward", "genrm", "--genrm", "nowhere/at/all"], "nowhere/at/all"),
        # Otherwise a reward model that no reward uses would be ignored silently.
        (["--orm", "tiny"], "--reward orm"),
        (["--reward", "orm", "--genrm", "tiny"], "--reward genrm"),
    ):
        code, message = cli(ppo, *PPO, *flags, "--out", tmp_path / "run")
        assert code == 2 and part in message and message.count("\n") == 1, message
    assert not (tmp_path / "run").exists()
    staged = ["--curriculum", "verifiable_first", "--reward", "genrm", "--hide", "1", "1"]
    staged += ["--limit-train", "20", "--references", scored]
    code, message = cli(ppo, *PPO, *staged, "--out", tmp_path / "run")
    assert code == 2 and "with and without gold" in message and message.count("\n") == 1


def test_an_evaluation_scores_its_samples_next_to_the_gold_solutions(
    cli, tmp_path, folders, monkeypatch
):
    out, scored = tmp_path / "report.json", tmp_path / "report.samples.jsonl"
    argv = [*SMALL, "--limit-eval", 4, "--samples", 3, "--out", out]
    assert cli(evaluate, *argv)[0] == 0
    before, texts = json.loads(out.read_text()), [row["text"] for row in rows_of(scored)]
    assert "score" not in before and "score" not in rows_of(scored)[0]
    monkeypatch.setattr(common, "generate", lambda *_, **__: pytest.fail("sampled again"))
    assert cli(evaluate, *argv, "--genrm", folders.genrm, "--resume")[0] == 0
    report, rows = json.loads(out.read_text()), rows_of(scored)
    assert [row["text"] for row in rows] == texts
    assert all(report[key] == before[key] for key in before if "@" in key)
    new = report.keys() - before.keys()
    assert new == {"score", "genrm_fingerprint"}, "no rerank@n, no weighted@n"
    samples = common.read_samples(scored, common.load_problems("arithmetic", "test", 4))
    references = {s.problem.id: s.problem.reference for s in samples}
    genrm = reward_model.GenerativeRewardModel(folders.genrm, "cpu")
    expected = genrm.scores(samples, references)
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert report["score"]["value"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert all("score" in row for row in rows_of(tmp_path / "report.greedy.jsonl"))
    assert report["genrm_fingerprint"] == runtime.fingerprint(folders.genrm)
    # Without --genrm the report would name no reward model, but its files would have scores.
    code, message = cli(evaluate, *argv, "--resume")
    assert code == 2 and "other settings" in message


def test_an_evaluation_with_a_generative_reward_model_needs_gold_solutions(
    cli, tmp_path, folders, monkeypatch
):
    file = tmp_path / "answers.jsonl"
    rows = [{"question": f"q{i}", "answer": f"1+0=1\n#### {i}"} for i in range(4)]
    rows[2]["answer"] = "2"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(common, "Policy", lambda *_: pytest.fail("loaded"))
    argv = [*SMALL, "--dataset", file, "--split", "all", "--out", tmp_path / "out" / "report.json"]
    code, message = cli(evaluate, *argv, "--genrm", folders.genrm)
    assert code == 2 and "gold solutions" in message and message.count("\n") == 1
    code, message = cli(evaluate, *argv, "--genrm", folders.genrm, "--orm", folders.orm)
    assert code == 2 and "one score" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_genrm_without_pairs_to_train_on_is_not_saved(cli, tmp_path):
    """Only dev has solutions. Each question has one sample, so no question has both outcomes."""
    file, samples = tmp_path / "answers.jsonl", tmp_path / "samples.jsonl"
    answers = [f"{i % 3}" if i < 40 else f"1+0=1\n#### {i % 3}" for i in range(60)]
    rows = [json.dumps({"question": f"q{i}", "answer": a}) for i, a in enumerate(answers)]
    file.write_text("\n".join(rows) + "\n")
    argv = ["--kind", "genrm", "--model", "tiny", "--dataset", file, "--samples", 1]
    argv += ["--eval-samples", 2, "--train-samples", samples, "--max-new-tokens", 20]
    train = common.load_problems(str(file), "train", 40)
    text = "1+0=<<1+0=1>>1\n#### 1"
    samples.write_text("".join(common.Sample(p, 0, text, True).to_json() + "\n" for p in train))
    code, message = cli(reward_model, *argv, "--out", tmp_path / "run")
    assert code == 2 and "raise --samples" in message
    assert not (tmp_path / "run" / "model").exists()


def test_a_dev_split_without_references_is_refused_before_training(cli, tmp_path, monkeypatch):
    """There are no solutions, and no dev question has a correct sample."""
    file, samples = tmp_path / "answers.jsonl", tmp_path / "samples.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": f"q{i}", "answer": i // 40 * 98765 + 1}) + "\n"
            for i in range(60)
        )
    )
    train = common.load_problems(str(file), "train")
    rows = [
        common.Sample(p, k, f"1+0=<<1+0=1>>1\n#### {k}", True).to_json()
        for p in train[:30]
        for k in (1, 2)
    ]
    samples.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(reward_model, "train_step", lambda *_: pytest.fail("trained"))
    argv = [
        "--kind",
        "genrm",
        "--model",
        "tiny",
        "--dataset",
        file,
        "--eval-samples",
        2,
        "--train-samples",
        samples,
    ]
    code, message = cli(reward_model, *argv, "--max-new-tokens", 20, "--out", tmp_path / "run")
    assert code == 2 and "no dev question has a gold solution or a correct sample" in message
