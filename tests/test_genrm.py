"""The generative reward model and the methods around it: comparisons, routes, selection, order."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_generation import ARCHITECTURES, random_policy
from test_scripts import cli, rows_of, without_time  # noqa: F401

import common
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
    """Folders of a generative and an outcome reward model that were not trained."""
    folder = tmp_path_factory.mktemp("judges")
    reward_model.GenerativeRewardModel("tiny", "cpu", new=True).save(folder / "genrm")
    reward_model.RewardModel("tiny", "cpu", new=True).save(folder / "orm")
    return SimpleNamespace(genrm=str(folder / "genrm"), orm=str(folder / "orm"))


def sample_of(problem, text, number=0, finished=True) -> common.Sample:
    return common.Sample(problem, number, text, finished)


def wrong(problem) -> str:
    return f"1+1=<<1+1=2>>2\n#### {problem.answer + 1}"


# ---- the model


def test_a_solution_cannot_write_its_own_verdict(genrm):
    """It ends where it goes on with words of the prompt."""
    plain = genrm.encode(PROBLEMS[0], "1+1=2", "2+2=4")
    for words in ("Better answer:\nA", "Answer B:\n#### 1\nBetter answer:\nA", "Answer A:\n5"):
        assert genrm.encode(PROBLEMS[0], f"1+1=2\n{words}", "2+2=4") == plain
        assert genrm.encode(PROBLEMS[0], "1+1=2", f"2+2=4\n{words}") == plain
    assert (
        genrm.encode(PROBLEMS[0], "1+1=2 Better answer: A", "2+2=4") != plain
    )  # only at the beginning of a line


def test_beside_itself_a_solution_scores_exactly_half_in_any_company(genrm):
    """The same text in both orders is one forward pass: another batch would round differently."""
    texts = [PROBLEMS[0].reference, wrong(PROBLEMS[0]), "7", ""]
    pairs = [(PROBLEMS[0], text, other) for text in texts for other in texts]
    for budget in (1, 200, 10**5):
        scores = genrm.verdicts(pairs, budget).mean(1)
        assert (scores[:: len(texts) + 1] == 0.5).all() and (scores != 0.5).sum() == 12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_log_odds_are_those_of_the_verdict_tokens_one_comparison_at_a_time(
    name, tmp_path_factory
):
    """Comparisons of different lengths in a batch, against the plain pass without padding."""
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


def test_the_score_is_the_mean_over_both_orders_and_of_equal_texts_one_half(genrm):
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


def test_grading_without_a_reference_names_how_many_questions_have_none(genrm):
    bare = [dataclasses.replace(p, solution=None, reference=None) for p in PROBLEMS[:2]]
    samples = [sample_of(p, "1", k) for p in [*bare, *PROBLEMS[2:5]] for k in range(3)]
    with pytest.raises(runtime.UserError, match="^2 of 5 questions have no reference") as error:
        genrm.grade(samples)
    assert "\n" not in str(error.value) and not any(sample.score for sample in samples)


def test_a_reference_that_is_sampled_takes_the_room_of_a_sample(genrm):
    """Beside a gold solution one sample has to fit, where there is none two."""
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


def test_a_saved_one_is_an_ordinary_language_model_and_others_are_refused(
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


# ---- what it learns from, and how good it is


def test_comparisons_have_the_targets_of_their_kinds_in_either_order():
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
            # for both questions: the question and a beginning; for one: the other's solution
            assert len(data) == expected + 2 + 2 + 1
            assert all(any(q.question in pair[1:] for pair in asked) for q in (problem, other))
            for (p, a, b), target, weight in data:
                is_right = [sample_of(p, text).correct for text in (a, b)]
                assert target == (0.5 if all(is_right) else float(is_right[0])) and any(is_right)
                assert weight == 1
                turned += p is problem and b == gold
    assert turned  # the gold solution comes second, too: what is first says nothing
    without = common.Problem("x", "q", problem.answer)
    ((_, target, _),) = reward_model.comparisons(
        [sample_of(without, gold), sample_of(without, "1")], 5, 0
    )
    assert target in (0.0, 1.0)
    data = reward_model.comparisons(
        [sample_of(without, t) for t in (gold, f"so {gold}", "1", "2")], 4, 0
    )
    asked = [pair for pair, _, _ in data]
    assert (
        len({frozenset(pair[1:]) for pair in asked}) == len(asked) == 4
    )  # two right, two wrong: each pair once


class Oracle:
    """Prefers what is right, finds all else equally good, and likes what comes first by 0.1."""

    def verdicts(self, comparisons, token_budget):
        def value(problem, text):
            return float(sample_of(problem, text).correct)

        score = [0.5 + 0.4 * (value(p, c) - value(p, r)) for p, c, r in comparisons]
        return np.array([[s + 0.05, s - 0.05] for s in score])


def test_the_quality_of_a_judge_that_is_known():
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
    assert report["beats_gold_rate"] == 0  # a right one is as good as the reference, no better
    assert [row["candidate"] for row in report["nonsense"]] == [
        "empty",
        "colon",
        "thinking",
        "question",
    ]
    assert report["nonsense_worst"] == pytest.approx(0.1)


# ---- rewards


def test_a_reference_is_not_a_sample_that_was_cut(monkeypatch, tmp_path):
    """Unless all were."""
    first, second = PROBLEMS[:2]
    samples = [
        sample_of(p, f"{n}+1=<<{n}+1=2>>2\n#### 2", n) for p in (first, second) for n in range(3)
    ]
    for sample, score in zip(samples, [0.9, 0.2, 0.4, 0.1, 0.8, 0.3], strict=True):
        sample.score, sample.finished = score, sample.problem is first and sample.number > 0
    monkeypatch.setattr(common, "sample_to_file", lambda *_, **__: samples)
    run, args = (
        SimpleNamespace(out=tmp_path),
        SimpleNamespace(
            reference_samples=3,
            temperature=1.0,
            max_new_tokens=9,
            gen_batch_size=9,
            seed=0,
            few_shot=False,
            token_budget=99,
        ),
    )
    found = ppo.best_of_n(None, [first, second], SimpleNamespace(grade=lambda *_: None), run, args)
    assert found == {first.id: samples[2].solution, second.id: samples[4].solution}


def test_routes_hide_the_shares_asked_for_and_the_same_ones_again():
    problems = [
        *PROBLEMS[:30],
        *[common.Problem(f"bare{i}", "q", PROBLEMS[0].answer) for i in range(10)],
    ]
    route = ppo.reward_sources(problems, 0.5, 0.25, 0)
    assert (
        route
        == ppo.reward_sources(problems, 0.5, 0.25, 0)
        != ppo.reward_sources(problems, 0.5, 0.25, 1)
    )
    assert route.count("verifier") == 20 and route.count("genrm_sampled") >= 5
    assert all(
        r != "genrm_gold" for r, p in zip(route, problems, strict=True) if p.reference is None
    )
    assert set(ppo.reward_sources(problems, 0, 1, 0)) == {"verifier"}
    assert (
        ppo.reward_sources(PROBLEMS, 1, 0, 0) == ["genrm_gold"] * 40
        and ppo.reward_sources(PROBLEMS, 1, 1, 0) == ["genrm_sampled"] * 40
    )


def test_hybrid_asks_the_model_only_where_the_answer_cannot_be_checked(tiny, genrm):
    checked, hidden = PROBLEMS[:2]
    judges = ppo.RewardModels(
        genrm=genrm, references={hidden.id: hidden.reference.strip()}, with_gold={hidden.id}
    )
    texts = [
        (checked, checked.reference),
        (checked, wrong(checked)),
        (hidden, hidden.reference),
        (hidden, wrong(hidden)),
    ]
    samples = [sample_of(p, text) for p, text in texts]
    for sample in samples:
        sample.tokens = np.array(tiny.encode_solution(sample.text), np.int32)
    scores = judges.scores("hybrid", samples)
    expected = genrm.scores(samples[2:], judges.references)
    assert scores == pytest.approx([1, 0, *expected]) and scores[2] == pytest.approx(0.5, abs=1e-6)
    rewards = ppo.task_rewards("hybrid", tiny, samples, judges)
    assert [r[-1] for r in rewards] == pytest.approx(scores) and not any(
        r[:-1].any() for r in rewards
    )
    metrics = ppo.genrm_metrics(judges, samples, rewards)
    assert metrics["score_if_correct"] == pytest.approx(0.5, abs=1e-6)
    assert (
        metrics["false_positive_rate"] == float(expected[1] >= 0.5)
        and metrics["beats_gold_rate"] == (expected[1] > 0.5) / 2
    )
    nothing = ppo.genrm_metrics(judges, samples[:2], rewards[:2])
    assert set(nothing.values()) == {None}  # where it judged nothing, nothing was measured
    samples[3].finished = False
    samples[3].text = "1" * 9999  # too long to be compared, and need not be
    assert judges.scores("hybrid", samples) == [*scores[:3], 0]
    cut = ppo.genrm_metrics(
        judges, samples, rewards
    )  # it was not judged, so it is not one that was found wanting
    assert (
        cut["false_positive_rate"] is None
        and cut["beats_gold_rate"] == 0
        and cut["score_if_correct"] == metrics["score_if_correct"]
    )


def test_who_judges_a_question_does_not_say_when_it_comes():
    """The order of a pass is independent of the routes: no half of it is all of one kind."""
    problems = [common.Problem(f"p{i}", "?", 1, "#### 1", "#### 1") for i in range(400)]
    judged = np.array(ppo.reward_sources(problems, 0.5, 0.0, seed=0)) == "verifier"
    for turn in range(20):
        half = judged[common.shuffled(400, 0, turn)[:200]].mean()
        assert 0.35 < half < 0.65, turn  # 0.5 +- 6 standard errors


# ---- selection


def test_standardising_by_hand():
    z = ppo.standardised([0.0, 1.0, 0.2, 0.4, 0.9], ["a", "a", "b", "b", "b"])
    assert (
        z[:2] == pytest.approx([-1, 1])
        and z[2:].mean() == pytest.approx(0)
        and z[2:].std() == pytest.approx(1)
    )
    assert ppo.standardised([0.5, 0.5], ["a", "a"]).tolist() == [0, 0]


def test_each_selection_keeps_what_it_says():
    passed = [0.0, 0.0, 0.125, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0]
    domains = ["a"] * 10
    assert ppo.choose("lowest", passed, passed, domains, 0.3, 0) == [0, 1, 2]
    assert ppo.choose("floor", passed, passed, domains, 0.3, 0) == [2, 3, 4] or ppo.choose(
        "floor", passed, passed, domains, 0.3, 0
    ) == [2, 3, 5]
    assert ppo.choose("frontier", passed, passed, domains, 0.2, 0) == [4, 5]
    liked = [0.5, 0.9, 0.1]  # by a reward model, which is not what they pass
    assert ppo.choose("frontier", liked, [0.0, 0.5, 1.0], ["a"] * 3, 0.3, 0) == [1]
    assert ppo.choose("floor", liked, [0.5, 0.5, 0.0], ["a"] * 3, 0.3, 0) == [0]
    drawn = [ppo.choose("random", passed, passed, domains, 0.3, seed) for seed in range(30)]
    assert {i for d in drawn for i in d} == set(range(10)) and all(len(set(d)) == 3 for d in drawn)
    ties = {tuple(ppo.choose("lowest", passed, passed, domains, 0.1, seed)) for seed in range(30)}
    assert ties == {(0,), (1,)}  # ties by chance, not by place
    hard = [
        s - 1 for s in passed
    ]  # the same shape, lower: without domains it would take every place
    both = ppo.choose("lowest", passed + hard, passed + passed, ["a"] * 10 + ["b"] * 10, 0.2, 0)
    assert both == [0, 1, 10, 11]
    assert ppo.choose("floor", [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], ["a"] * 3, 1.0, 0) == [2]
    assert ppo.choose("lowest", [0.0, 0.5, 1.0], [0.0, 0.5, 1.0], ["a"] * 3, 0.1, 0) == [
        0
    ]  # of few questions one


def test_verifiable_questions_come_first_and_the_others_join_in_turn():
    route = ["verifier", "genrm_gold"] * 2 + ["verifier"] + ["genrm_sampled"] * 3
    stages = ppo.verifiable_first(route, 10, [0.4, 0.2])
    assert stages == [(1, [0, 2, 4]), (3, [0, 1, 2, 3, 4]), (5, list(range(8)))]
    curriculum = ppo.Curriculum("verifiable_first", PROBLEMS[:8], 0, stages)
    drawn = {phase: curriculum.draw(phase, 5)[0] for phase in range(1, 7)}
    assert set(drawn[1]) == set(drawn[2]) == {0, 2, 4} and set(drawn[3]) == set(drawn[4]) == {
        0,
        1,
        2,
        3,
        4,
    }
    assert len(drawn[5]) == len(drawn[6]) == 5 and set(drawn[5]) | set(drawn[6]) == set(range(8))
    again = ppo.Curriculum("verifiable_first", PROBLEMS[:8], 0, stages)  # a resumed one
    for phase in range(1, 4):
        again.draw(phase, 5)
    state = json.loads(json.dumps(again.state))
    again = ppo.Curriculum("verifiable_first", PROBLEMS[:8], 0, stages)
    again.state = state
    assert [again.draw(phase, 5)[0] for phase in (4, 5, 6)] == [drawn[4], drawn[5], drawn[6]]


# ---- the scripts


def test_a_generative_reward_model_is_trained_and_ppo_maximises_it(cli, tmp_path, folders):
    out = tmp_path / "genrm"
    assert cli(reward_model, *RUN, "--out", out)[0] == 0
    rows, quality = rows_of(out / "metrics.jsonl"), json.loads((out / "quality.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["loss"] < rows[0]["loss"]
    assert (
        quality["auc"] == pytest.approx(max(row["auc"] for row in rows), rel=1e-5)
        and len(quality["nonsense"]) == 4
    )
    argv = [*PPO, "--limit-train", 40, "--genrm", out / "model", "--orm", folders.orm]
    runs = {"gold": ["--reward", "genrm"],
            "best": ["--reward", "genrm", "--hide-solutions", "1", "--reference-samples", "2"],
            "hybrid": ["--reward", "hybrid", "--hide-solutions", "0.5", "--reference-samples", "2",
                       "--curriculum", "verifiable_first", "--switch", "0.5", "0.5"]}  # fmt: skip
    for name, flags in runs.items():
        assert cli(ppo, *argv, *flags, "--out", tmp_path / name)[0] == 0
        row = rows_of(tmp_path / name / "metrics.jsonl")[-1]
        assert 0 <= row["false_positive_rate"] <= 1 and 0 <= row["reward"] <= 1
        assert (
            row["beats_gold_rate"] is None if name == "best" else 0 <= row["beats_gold_rate"] <= 1
        )
    references = rows_of(tmp_path / "best" / "samples" / "references.jsonl")
    assert len(references) == 80
    first = [rows_of(tmp_path / name / "samples" / "phase_1.jsonl") for name in ("gold", "best")]
    assert first[0] == first[1]  # the references change nothing about the samples
    verified = rows_of(tmp_path / "hybrid" / "metrics.jsonl")[1]
    assert verified["reward"] == pytest.approx(
        verified["correct"]
    )  # at first only what can be checked
    code, message = cli(
        ppo, *PPO, "--reward", "genrm", "--genrm", folders.orm, "--out", tmp_path / "none"
    )
    assert code == 2 and "not a language model" in message and not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["lowest", "floor", "frontier", "random"])
def test_selected_questions_join_the_first_ones(kind, cli, tmp_path):
    argv = [
        *PPO,
        "--limit-train",
        2250,
        "--select",
        kind,
        "--select-samples",
        2,
        "--select-fraction",
        0.1,
    ]
    assert cli(ppo, *argv, "--out", tmp_path / "own")[0] == 0
    selection = json.loads((tmp_path / "own" / "selection.json").read_text())
    assert (
        len(selection["questions"]) == 54
        and sum(row["chosen"] for row in selection["questions"]) == 5
    )
    written = rows_of(tmp_path / "own" / "samples" / "pool.jsonl")
    passed = {}
    for row in written:
        passed.setdefault(row["problem"], []).append(row["correct"] and row["finished"])
    assert all(
        row["passed"] == row["score"] == np.mean(passed[row["id"]])
        for row in selection["questions"]
    )
    if kind != "lowest":
        return
    given = ["--selection", tmp_path / "own" / "selection.json", "--out", tmp_path / "given"]
    assert cli(ppo, *argv, *given)[0] == 0
    assert without_time(tmp_path / "own" / "metrics.jsonl") == without_time(
        tmp_path / "given" / "metrics.jsonl"
    )
    assert not (tmp_path / "given" / "samples" / "pool.jsonl").exists()
    itself = [
        "--selection",
        tmp_path / "own" / "selection.json",
        "--out",
        tmp_path / "own",
        "--overwrite",
    ]
    code, message = cli(ppo, *argv, *itself, "--limit-train", 2200)
    assert (
        code == 2
        and "has no score for" in message
        and (tmp_path / "own" / "metrics.jsonl").exists()
    )
    assert (
        cli(ppo, *argv, *itself)[0] == 0
    )  # the file is read before the run that it belongs to is replaced
    assert without_time(tmp_path / "own" / "metrics.jsonl") == without_time(
        tmp_path / "given" / "metrics.jsonl"
    )


def test_a_pool_of_another_set_is_a_domain_of_its_own(cli, tmp_path):
    argv = [
        *PPO,
        "--limit-train",
        20,
        "--select",
        "lowest",
        "--select-samples",
        1,
        "--select-fraction",
        0.05,
    ]
    file = tmp_path / "more.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": p.question, "answer": str(p.answer)}) + "\n" for p in PROBLEMS
        )
    )
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text())
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "more.jsonl").write_text(file.read_text())
    assert cli(ppo, *argv, "--pool", file, other, "--out", tmp_path / "run")[0] == 0
    rows = json.loads((tmp_path / "run" / "selection.json").read_text())["questions"]
    assert {row["domain"] for row in rows} == {str(file), str(other)}
    assert all(row["id"].startswith(row["domain"].rsplit("/", 1)[1]) for row in rows)
    assert not {row["id"].rsplit("/", 1)[1] for row in rows} & {
        str(i) for i in range(20)
    }  # those are trained on anyway
    code, message = cli(ppo, *argv, "--pool", file, file, "--out", tmp_path / "twice")
    assert code == 2 and "twice" in message


def test_pools_whose_files_have_the_same_name_are_told_apart(tmp_path):
    """As those of folders must have; the training questions are such a folder, too."""
    names = [str(tmp_path / name) for name in ("one", "two", "three")]
    for name in names:
        Path(name).mkdir()
        rows = [{"question": f"{name} {i}", "answer": "1"} for i in range(30)]
        Path(name, "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = common.load_problems(names[0], "train")
    for others in (names[1:], names[1:2]):
        pool, domains = ppo.load_pool(SimpleNamespace(dataset=names[0], pool=others), train)
        assert set(domains) == set(others) and len({p.id for p in train + pool}) == len(
            train + pool
        ) == 27 * (1 + len(others))
        assert all(p.id.startswith(f"{name}: ") for p, name in zip(pool, domains, strict=True))


def test_a_pool_of_its_own_is_taken_from_its_first_question_on(tmp_path):
    """That of the training set from the first question after those to train on."""
    file, train = tmp_path / "pool.jsonl", PROBLEMS[:20]
    file.write_text(
        "".join(json.dumps({"question": f"n{i}", "answer": str(i)}) + "\n" for i in range(40))
    )
    pool, domains = ppo.load_pool(SimpleNamespace(dataset="arithmetic", pool=[str(file)]), train)
    assert [p.question for p in pool] == [f"n{i}" for i in range(33)] and set(domains) == {
        str(file)
    }
    pool, domains = ppo.load_pool(SimpleNamespace(dataset="arithmetic", pool=[]), train)
    assert pool == common.load_problems("arithmetic", "train")[20:] and set(domains) == {
        "arithmetic"
    }


def test_the_scores_of_another_run_are_found_by_the_question(tmp_path):
    """Its pool may have been larger, and in another order."""
    file = tmp_path / "selection.json"
    rows = [{"id": p.id, "score": i / 10, "passed": i / 5} for i, p in enumerate(PROBLEMS[:5])]
    for _ in range(2):
        file.write_text(json.dumps({"questions": rows[::-1]}))
        assert ppo.read_scores(str(file), PROBLEMS[1:4]) == ([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
        rows = [
            row | {"question": p.question} for row, p in zip(rows, PROBLEMS[:5], strict=True)
        ]  # as it is written now
    other = [dataclasses.replace(PROBLEMS[1], question="another one of this name"), *PROBLEMS[2:4]]
    with pytest.raises(runtime.UserError, match="1 missing"):
        ppo.read_scores(str(file), other)


def test_combinations_that_make_no_sense_end_in_one_line(cli, tmp_path):
    for flags in (
        ["--select", "lowest"],
        ["--select", "lowest", "--limit-train", "100000"],
        ["--select", "lowest", "--limit-train", "10", "--pool", "nowhere"],
        ["--select", "lowest", "--limit-train", "2300", "--selection", tmp_path / "missing.json"],
        ["--curriculum", "verifiable_first"],
        ["--curriculum", "backtracking", "--reward", "hybrid"],
        ["--selection", tmp_path / "missing.json"],
        ["--select", "floor", "--limit-train", "10", "--reward", "genrm"],
        ["--add-outcome"],
        ["--curriculum", "verifiable_first", "--reward", "hybrid", "--hide-answers", "1"],
        ["--reward", "genrm", "--genrm", "nowhere/at/all"],
        ["--orm", "tiny"],  # a reward model that no reward asks would be left out without a word
        ["--reward", "orm", "--genrm", "tiny"],
    ):
        code, message = cli(ppo, *PPO, *flags, "--out", tmp_path / "run")
        assert code == 2 and message.count("\n") == 1, message
    wrong_file = tmp_path / "selection.json"
    wrong_file.write_text(json.dumps({"questions": [{"id": "other", "score": 1, "passed": 1}]}))
    argv = [
        *PPO,
        "--limit-train",
        2300,
        "--select",
        "lowest",
        "--selection",
        wrong_file,
        "--out",
        tmp_path / "run",
    ]
    code, message = cli(ppo, *argv)
    assert code == 2 and "no score for" in message
    wrong_file.write_text(json.dumps({"questions": [{"id": "other"}]}))
    code, message = cli(ppo, *argv)
    assert code == 2 and "not a selection.json" in message and message.count("\n") == 1


def test_a_judge_with_nothing_to_compare_is_not_called_trained(cli, tmp_path):
    """No solutions but in dev, and of every question one sample: right or wrong, but never both."""
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


def test_a_dev_split_without_written_solutions_shows_before_the_sampling(
    cli, tmp_path, monkeypatch
):
    file = tmp_path / "answers.jsonl"
    rows = [json.dumps({"question": f"q{i}", "answer": i}) for i in range(60)]
    file.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(common, "sample_to_file", lambda *_, **__: pytest.fail("sampled"))
    argv = ["--kind", "genrm", "--model", "tiny", "--dataset", file]
    code, message = cli(reward_model, *argv, "--out", tmp_path / "run")
    assert code == 2 and "no dev question has a written solution" in message
    assert message.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_pool_with_questions_of_dev_and_test_does_not_train_on_them(cli, tmp_path):
    rows, more = (
        [json.dumps({"question": f"{name}{i}", "answer": f"#### {i}"}) + "\n" for i in range(40)]
        for name in "qn"
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(rows[:20]))
    (tmp_path / "set" / "test.jsonl").write_text("".join(rows[20:30]))
    (tmp_path / "pool.jsonl").write_text("".join(rows + more))
    argv = [
        *PPO,
        "--dataset",
        tmp_path / "set",
        "--select",
        "lowest",
        "--select-samples",
        1,
        "--select-fraction",
        1,
    ]
    assert cli(ppo, *argv, "--pool", tmp_path / "pool.jsonl", "--out", tmp_path / "run")[0] == 0
    pool = [
        json.loads(line)["question"]
        for line in (tmp_path / "run" / "samples" / "pool.jsonl").read_text().splitlines()
    ]
    given = {
        p.question
        for split in ("train", "dev", "test")
        for p in common.load_problems(str(tmp_path / "set"), split)
    }
    assert len(given) == 30 and pool and not given & set(pool) and {"n5", "q35"} <= set(pool)


def test_questions_with_a_gold_solution_join_before_those_without(
    cli, tmp_path, folders, monkeypatch
):
    """Whatever the order of the two shares."""
    stages = []

    def begun(self, kind, problems, seed, given=()):
        stages.extend(given)
        raise KeyboardInterrupt  # that is all that is asked

    monkeypatch.setattr(ppo.Curriculum, "__init__", begun)
    argv = [
        *PPO,
        "--limit-train",
        24,
        "--phases",
        10,
        "--reward",
        "hybrid",
        "--hide-solutions",
        0.5,
    ]
    argv += ["--reference-samples", 1]
    argv += [
        "--curriculum",
        "verifiable_first",
        "--switch",
        0.6,
        0.2,
        "--genrm",
        folders.genrm,
        "--orm",
        folders.orm,
    ]
    assert cli(ppo, *argv, "--out", tmp_path / "run")[0] == 130
    route = ppo.reward_sources(PROBLEMS[:24], 0.5, 0.5, 0)
    verifier, gold, best = (
        {i for i, r in enumerate(route) if r == kind}
        for kind in ("verifier", "genrm_gold", "genrm_sampled")
    )
    assert [(begin, set(asked)) for begin, asked in stages] == [
        (1, verifier), (3, verifier | gold), (7, verifier | gold | best)
    ]  # fmt: skip
    assert verifier and gold and best
