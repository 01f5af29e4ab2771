"""Check the embedded task, the splits, local files and the metrics."""

import json
import random
import re
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

import common
import evaluate
import expert_iteration
import runtime
from tiny import arithmetic

SPLITS = ("train", "dev", "test")


def steps_of(problem) -> list[tuple[str, str]]:
    """Return the steps that the reference solution writes: [("14+6", "20"), ...]."""
    return re.findall(r"^(.+)=<<\1=(.+)>>\2$", problem.reference, re.MULTILINE)


@pytest.mark.parametrize("dataset, steps", [("arithmetic", (1, 4)), ("arithmetic-hard", (4, 6))])
def test_the_embedded_task_has_fixed_sizes_and_distinct_questions(dataset, steps):
    problems = {split: common.load_problems(dataset, split) for split in SPLITS}
    assert {split: len(p) for split, p in problems.items()} == {
        "train": 2304,
        "dev": 256,
        "test": 1000,
    }
    everything = [p for split in SPLITS for p in problems[split]]
    assert len({p.question for p in everything}) == len({p.id for p in everything}) == 3560
    assert (
        sum(p.solution is not None for p in everything)
        == sum(p.solution is not None for p in problems["train"])
        == 24
    )
    assert {len(steps_of(p)) for p in everything} == set(range(steps[0], steps[1] + 1))


def test_the_reference_steps_of_the_embedded_task_compute_the_answer():
    """Python evaluates the steps here, apart from the code that generated them."""
    problems = common.load_problems("arithmetic", "train")
    for p in problems + common.load_problems("arithmetic", "test"):
        steps = [left for left, _ in steps_of(p)]
        # The steps are our own: digits and one operator.
        values = [Fraction(eval(step.replace("/", "*1/"))) for step in steps]
        assert values == [int(written) for _, written in steps_of(p)]
        assert values[-1] == p.answer and all(v.denominator == 1 and 1 <= v <= 49 for v in values)
        for value, following in zip(values, steps[1:], strict=False):
            assert following.startswith(str(value))
        assert p.reference.count("\n") == len(steps)
        assert common.extract_answer(p.reference) == p.answer
        assert common.equations(p.reference) == tuple(steps)
        assert p.solution in (None, p.reference)


def test_the_embedded_task_is_the_same_on_every_machine():
    """If the generator changes, every recorded number changes. Then repeat the runs of results/."""
    first = common.load_problems("arithmetic", "train")[0]
    assert first.question == (
        "There are 10 keys in the room of Noah. Noah uses half of the keys. "
        "How many keys does Noah have now?"
    )
    assert [int(p.answer) for p in common.load_problems("arithmetic", "test")[:10]] == TEST_ANSWERS


TEST_ANSWERS = [2, 29, 19, 4, 27, 14, 10, 3, 7, 33]


def test_a_misconception_changes_only_the_steps():
    plan = [("start", 14), ("gain", 6), ("unused", 3), ("half", 2), ("fewer", 4), ("total", 0)]
    assert arithmetic.solve_story(plan) == [("14+6", 20), ("20/2", 10), ("10-4", 6), ("6+10", 16)]
    wrong = arithmetic.OPERATIONS | {"fewer": "+", "unused": "+", "half": "-", "total": None}
    assert arithmetic.solve_story(plan, wrong) == [
        ("14+6", 20),
        ("20+3", 23),
        ("23-2", 21),
        ("21+4", 25),
    ]
    assert arithmetic.solve_story([("start", 5), ("half", 2)]) is None
    assert arithmetic.solve_story([("start", 5), ("loss", 5)]) is None


def test_the_tokenizer_returns_every_text_unchanged(tiny):
    rng = random.Random(0)
    texts = [arithmetic.tell_story(rng, 4)[0] for _ in range(20)] + [
        "caf\u00e9  \t\u4e94\U0001f600\n\n x#### $1,234.50",
        common.FEW_SHOT,
    ]
    for text in texts:
        ids = tiny.tokenizer(text).input_ids
        assert tiny.decode(ids) == text
    assert len(tiny.tokenizer(" Ann has 14 apples.\n").input_ids) == 8


def test_the_few_shot_examples_end_with_an_answer_line():
    first, second = common.FEW_SHOT.removesuffix("\n\n").split("\n\n")
    assert [common.extract_answer(text.partition("Answer:\n")[2]) for text in (first, second)] == [
        19,
        30,
    ]
    assert common.prompt_text(common.Problem("p", "2+2?", 4), few_shot=True) == (
        common.FEW_SHOT + "Question: 2+2?\nAnswer:\n"
    )


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_problems_load_from_local_files_and_folders(tmp_path):
    rows = [
        {"question": f"q{i}", "answer": f"1+{i}=<<1+{i}={1 + i}>>{1 + i}\n#### {1 + i}"}
        for i in range(20)
    ]
    file = write_lines(tmp_path / "one.jsonl", rows)
    sizes = {split: len(common.load_problems(file, split)) for split in (*SPLITS, "all")}
    assert sizes == {"train": 17, "dev": 1, "test": 2, "all": 20}
    ids = [p.id for split in SPLITS for p in common.load_problems(file, split)]
    assert len(set(ids)) == 20
    fourth = common.load_problems(file, "train")[3]
    assert common.equations(fourth.solution) == ("1+3",) and fourth.reference == fourth.solution
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows[:12])
    write_lines(folder / "test.jsonl", [{"question": f"t{i}", "answer": str(i)} for i in range(5)])
    assert {split: len(common.load_problems(str(folder), split)) for split in SPLITS} == {
        "train": 11,
        "dev": 1,
        "test": 5,
    }
    assert common.load_problems(str(folder), "test")[2].solution is None
    svamp = tmp_path / "SVAMP.json"
    svamp.write_text(
        json.dumps(
            [{"Body": "Two pens", "Question": "How many?", "Answer": 2.0, "Equation": "2"}] * 10
        )
    )
    assert common.load_problems(str(svamp), "train", 1)[0].question == "Two pens. How many?"
    assert common.load_problems(str(svamp), "train", 1)[0].answer == 2


def test_splits_follow_the_order_of_the_file_and_a_limit_takes_the_first_problems(tmp_path):
    """The limit is applied after the split. So it does not change dev and test.

    If a folder has both kinds of files, the .jsonl files are read.
    """
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(40)]
    for dataset in (write_lines(tmp_path / "one.jsonl", rows), "arithmetic"):
        for split in (*SPLITS, "all")[: 4 if dataset != "arithmetic" else 3]:
            whole = common.load_problems(dataset, split)
            assert all(common.load_problems(dataset, split, n) == whole[:n] for n in (1, 2, 3))
    asked = [
        [int(p.answer) for p in common.load_problems(str(tmp_path / "one.jsonl"), split)]
        for split in SPLITS
    ]
    assert asked == [list(range(33)), [33, 34, 35], [36, 37, 38, 39]]
    for part in ("train", "test"):
        (tmp_path / f"{part}.json").write_text(json.dumps(rows[:10]))
    assert [len(common.load_problems(str(tmp_path), split)) for split in SPLITS] == [9, 1, 10]
    write_lines(tmp_path / "test.jsonl", rows[:7])
    assert len(common.load_problems(str(tmp_path), "test")) == 7


def test_a_question_in_train_and_in_another_split_gives_one_warning(tmp_path, capsys):
    """A local file may have a question twice, and dev selects the model."""
    # q0 to q3, the questions of the test split, are also training questions.
    rows = [{"question": f"q{i % 36}", "answer": str(i)} for i in range(40)]
    file = write_lines(tmp_path / "one.jsonl", rows)
    for split in (*SPLITS, *SPLITS):
        common.load_problems(file, split)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{file}: 4 questions of test are training questions" in said
    file = write_lines(tmp_path / "two.jsonl", rows[:36][::-1] + rows[:33:-1])
    common.load_problems(file, "train")
    assert "questions of test" in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    common.load_problems(str(tmp_path), "dev")
    assert "4 questions of dev" in capsys.readouterr().err
    write_lines(tmp_path / "test.jsonl", [*rows[5:8], {"question": "new", "answer": "1"}])
    common.load_problems(str(tmp_path), "test")
    assert "3 questions of test" in capsys.readouterr().err


@pytest.mark.parametrize(
    "end, joined", [("", "."), (".", "."), ("?", "?"), (",", ","), (" . ", " .")]
)
def test_the_two_parts_of_an_svamp_question_are_joined_by_one_mark(end, joined, tmp_path):
    file = tmp_path / "SVAMP.json"
    file.write_text(
        json.dumps([{"Body": f"Two pens{end}", "Question": " How many? ", "Answer": 2.0}] * 3)
    )
    assert common.load_problems(str(file), "all", 1)[0].question == f"Two pens{joined} How many?"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question": "a", "answer": "1"}\n{"question": "b", "ans', "line 2: broken JSON"),
        ('{"question": "a", "answer": "1"}\n{"question": "b", "answer": "many"}\n'
         '{"question": "c", "answer": "1"}', "line 2: the answer 'many' is no number"),
        ('{"question": "a", "answer": "1"}\n[1]\n{"question": "c", "answer": "1"}',
         "line 2: not a JSON object"),
        ('{"question": "a", "answer": "1"}\n{"q": 1}\n{"question": "c", "answer": "1"}',
         'line 2: needs "question"'),
        ('{"question": "a", "answer": "1"}', "too few problems"),
        ("", "too few problems"),
        ('{"question": "a", "answer": [5]}\n' * 3, 'line 1: needs "question"'),
        ('{"question": null, "answer": "1"}', 'line 1: needs "question"'),
        ('{"question": "", "answer": "1"}', 'line 1: needs "question"'),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}", "line 1: broken JSON"),
        ("[" * 100_000, "line 1: broken JSON"),
        ('{"question": "a", "answer": "3 pens and 4.\\nSo it is 7"}\n' * 3,
         "line 1: the answer has several lines, and none"),
        ('{"question": "a", "answer": "#### 1. Pens\\n3+4=7\\n#### 7"}\n' * 3,
         "line 1: the lines with #### do not agree"),
        ("\xff\xfe".encode("latin-1"), "not UTF-8"),
        *((f'{{"question": "a", "answer": "{answer}"}}', f"the answer '{answer}' is no number")
          for answer in ("$1.5 million", "5k", "3 dozen", "1e16")),
        *((f'{{"question": "a", "answer": {answer}}}', "line 1") for answer in ("1e99", "NaN", "true")),
        ('{"question": "a", "context": "A farmer has 12 sheep.", "answer": "1"}',
         'line 1: the field "context" may belong to the question'),
        ('{"question": "a", "options": ["1", "2"], "answer": "1"}', 'the field "options" may belong'),
        ('{"question": "a", "context": "' + "\u732b" * 16 + '", "answer": "1"}', 'the field "context"'),
        ('{"question": "a", "answer": 1E9999999999999999999}', "line 1: broken JSON"),
        ('{"question": "a", "solution": "3 - 2 = 1", "answer": "1"}', 'the field "solution" may'),
        ('{"question": "a", "Question": "b", "answer": "1"}', "differ only in upper case"),
    ],
)  # fmt: skip
def test_the_error_names_a_malformed_file_and_its_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(runtime.UserError, match="bad.jsonl") as error:
        common.load_problems(str(path), "train")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("body", "question", "answer"), ("Body", "Question", "Answer"),
                                   ("BODY", "question", "Answer")])  # fmt: skip
def test_a_story_is_part_of_its_question_in_upper_and_lower_case(names, tmp_path):
    story, asked = "A farmer has 12 sheep and buys 5 more.", "How many sheep does the farmer have?"
    row = dict(zip(names, (story, asked, "17 (sheep)"), strict=True))
    file = write_lines(tmp_path / "p.jsonl", [row])
    (problem,) = common.load_problems(file, "all")
    assert problem.question == f"{story} {asked}" and problem.answer == 17


def test_fields_that_are_not_part_of_a_question_are_ignored(tmp_path):
    """SVAMP and GSM-Hard have some of these fields. A single word is no story."""
    more = {"ID": "chal-1", "Type": "Common Division", "Equation": "( 8.0 / 2.0 )", "level": "easy"}
    more |= {"question_concat": "Eight pens. How many?", "code": "def solution(): return 4", "n": 3}
    more |= {"context": "", "passage": None}
    row = {"Body": "Eight pens.", "Question": "How many?", "Answer": "4.0"} | more
    file = write_lines(tmp_path / "p.jsonl", [row])
    assert common.load_problems(file, "all")[0].question == "Eight pens. How many?"


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
@pytest.mark.parametrize(
    "written, value",
    [("0.00001", "1/100000"), ("1e16", 10**16), ("1.5e3", 1500), ("-2.50", "-5/2"),
     ("1e-05", "1/100000"), ("12345678901234567890", 12345678901234567890), ("2E0", 2)],
)  # fmt: skip
def test_a_json_number_is_read_exactly(written, value, name, tmp_path):
    row = f'{{"question": "a", "answer": {written}}}'
    (tmp_path / name).write_text(row if name == "p.jsonl" else f"[{row}]")
    (problem,) = common.load_problems(str(tmp_path / name), "all")
    assert problem.answer == Fraction(value)


def test_a_json_file_of_the_datasets_library_is_read_line_by_line(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(20)]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_json(tmp_path / "train.json")
    assert [int(p.answer) for p in common.load_problems(str(tmp_path), "train")] == [*range(18)]


def test_an_answer_that_no_sample_can_match_gives_one_warning(tmp_path, capsys):
    rows = ['{"question": "a", "answer": 0.3}', '{"question": "b", "answer": 0.30000000000000004}']
    (tmp_path / "p.jsonl").write_text("\n".join([*rows, rows[1]]))
    for split in ("all", "all", "train"):
        common.load_problems(str(tmp_path / "p.jsonl"), split)
    told = capsys.readouterr().err
    assert told.count("so many decimals") == 1 and "p.jsonl line 2" in told


def test_half_a_character_does_not_reach_the_tokenizer(tiny, tmp_path):
    row = '{"question": "a \\ud83d pen", "answer": "\\ud83d 2+2=4\\n#### 4"}\n'
    (tmp_path / "p.jsonl").write_text(row * 3)
    problem = common.load_problems(str(tmp_path / "p.jsonl"), "train")[0]
    assert problem.question == "a ? pen" and problem.answer == 4
    assert tiny.encode_solution(problem.solution)


@pytest.mark.parametrize(
    "content, message",
    [("5", "not a list"), ("null", "not a list"), ('{"a": []}', "line 1: needs")],
)
def test_a_json_file_without_a_list_is_refused(tmp_path, content, message):
    (tmp_path / "SVAMP.json").write_text(content)
    with pytest.raises(runtime.UserError, match=message):
        common.load_problems(str(tmp_path / "SVAMP.json"), "train")


def test_a_question_with_half_a_character_can_be_tokenized(tmp_path, tiny):
    rows = [{"question": "half a pair \ud800", "answer": "1"}] * 3
    (tmp_path / "p.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    problems = common.load_problems(str(tmp_path / "p.jsonl"), "all")
    assert len(common.generate(tiny, problems[:1], max_new_tokens=2)) == 1


def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_sample():
    """Compare with an enumeration of all subsets, for every n up to 7."""
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * correct + [False] * (n - correct), k))
                assert common.pass_at_k(n, correct, k) == pytest.approx(
                    sum(map(any, subsets)) / len(subsets)
                )
    assert common.pass_at_k(96, 1, 96) == 1.0 and 0 < common.pass_at_k(10**6, 1, 1) < 2e-6


def test_majority_vote_counts_equal_numbers_together_and_the_first_answer_wins_ties():
    a, b = Fraction(18), Fraction(7)
    assert common.vote([b, a, None, a]) == a
    assert common.vote([b, a, a, b]) == b
    assert common.vote([None, None, b]) == b
    assert common.vote([None]) is None and common.vote([]) is None
    assert common.vote([a, b, a, None], [0.2, 0.9, 0.3, 5.0]) == b
    assert common.vote([a, b], [0.5, 0.5]) == a
    answers = [common.extract_answer(f"#### {t}") for t in ("7", "7", "18", "18.0", "$18")]
    assert common.vote(answers) == a


def make_sample(problem, number, text, finished=True):
    return common.Sample(problem, number, text, finished)


def test_metrics_of_known_samples_equal_a_calculation_by_hand():
    p, q = common.Problem("p", "?", Fraction(4)), common.Problem("q", "?", Fraction(9))
    right, other, wrong = "2+2=<<2+2=4>>4\n#### 4", "2*2=<<2*2=4>>4\n#### 4.0", "#### 5"
    samples = [make_sample(p, i, t) for i, t in enumerate([right, wrong, other, right])]
    samples += [make_sample(q, i, t) for i, t in enumerate(["no", "#### 9", "#### 8", "cut"])]
    greedy = [make_sample(p, 0, right), make_sample(q, 0, wrong)]
    values = evaluate.metrics_per_problem(greedy, samples, rerank=False)
    assert values["maj@1"] == [1, 0] and values["maj@4"] == [1, 1]
    assert (
        values["pass@1"] == [0.75, 0.25]
        and values["pass@2"] == [1.0, 0.5]
        and values["pass@4"] == [1, 1]
    )
    assert values["distinct@4"] == [2, 1] and values["no_answer"] == [0, 0.5]


def test_the_interval_of_a_paired_difference_equals_a_calculation_by_hand():
    """10 problems are better, 4 are worse, and 86 are the same.

    Agresti and Min add half a problem to each of the four cases:
    6/102 +- 1.96 sqrt(15 - 36/102) / 102.
    """
    values, others = [1] * 10 + [0] * 4 + [1] * 86, [0] * 10 + [1] * 4 + [1] * 86
    test = evaluate.paired_test(values, others)
    assert test["difference"] == pytest.approx(0.06) and test["ci95"] == pytest.approx(
        [-0.01472, 0.13236], abs=1e-5
    )
    turned = evaluate.paired_test(others, values)
    assert (
        turned["ci95"] == pytest.approx([-0.13236, 0.01472], abs=1e-5) and turned["p"] == test["p"]
    )


def test_confidence_intervals_contain_the_truth_95_percent_of_the_time():
    """With 2,000 repetitions the fraction is within 0.95 +- 0.02 with probability 0.9999."""
    rng = np.random.default_rng(0)
    for draw, truth in ((lambda: rng.random(200) < 0.9, 0.9), (lambda: rng.beta(2, 3, 200), 0.4)):
        intervals = [evaluate.confidence_interval([float(v) for v in draw()]) for _ in range(2000)]
        assert 0.93 < np.mean([low <= truth <= high for low, high in intervals]) < 0.975
    # pass@8 of 16 samples, where nearly every problem is easy.
    for n, hard in ((256, 0.03), (1000, 0.01)):
        truth, held = hard * (1 - (1 - 0.1) ** 8) + 1 - hard, []
        for _ in range(1000):
            right = rng.binomial(16, np.where(rng.random(n) < hard, 0.1, 1.0))
            low, high = evaluate.confidence_interval(
                [common.pass_at_k(16, int(c), 8) for c in right]
            )
            held.append(low <= truth <= high)
        assert 0.93 < np.mean(held), np.mean(held)
    low, high = evaluate.confidence_interval([0.5] * 8)
    assert low < 0.5 < high
    low, high = evaluate.confidence_interval([1.0] * 50)
    assert 0.9 < low < 0.95 and high == pytest.approx(1.0)
    assert evaluate.confidence_interval([1.0] * 9 + [0.9])[1] == 1.0
    assert evaluate.confidence_interval([3.0, 3.5, 4.0], 4)[1] == 4.0
    assert evaluate.confidence_interval([0.5]) == [0.0, 1.0]


def test_deduplication_keeps_correct_finished_and_distinct_samples():
    p = common.Problem("p", "?", Fraction(4))
    right, same, other = (
        "2+2=<<2+2=4>>4\n#### 4",
        "2+2=<<2+2=4>>4 pens\n#### 4",
        "2*2=<<2*2=4>>4\n#### 4",
    )
    texts = [right, same, other, "#### 5", right + "\n\nQuestion: next?"]
    kept = {}
    new = expert_iteration.keep_accepted(
        [make_sample(p, i, t) for i, t in enumerate(texts)], kept, None, True
    )
    assert [s.number for s in new] == [0, 2]
    assert kept == {"p": {("2+2",): right, ("2*2",): other}}
    assert (
        expert_iteration.keep_accepted(
            [make_sample(p, 0, right), make_sample(p, 1, "8-4=<<8-4=4>>4\n#### 4", False)],
            kept,
            None,
            True,
        )
        == []
    )
    run_on = expert_iteration.keep_accepted(
        [make_sample(p, 5, "1+3=<<1+3=4>>4\n#### 4\n\nQuestion: next?")], kept, None, True
    )
    assert len(run_on) == 1 and kept["p"][("1+3",)] == "1+3=<<1+3=4>>4\n#### 4"


def test_without_deduplication_a_solution_counts_as_often_as_it_is_sampled():
    """This holds over two rounds and next to a written solution.

    Incorrect and truncated samples are never kept.
    """
    p = common.Problem("p", "?", Fraction(4))
    right, other = "2+2=<<2+2=4>>4\n#### 4", "2*2=<<2*2=4>>4\n#### 4"
    kept = {"p": {("2+2",): right}}
    for texts in ([right, right, other], [right, "#### 5"]):
        samples = [make_sample(p, i, t) for i, t in enumerate(texts)] + [
            make_sample(p, 9, other, False)
        ]
        new = expert_iteration.keep_accepted(samples, kept)
        assert [s.text for s in new] == [t for t in texts if t != "#### 5"]
    assert sorted(kept["p"].values()) == [other] + [right] * 4
