"""Check return-conditioned RL: labels, mixture, targets, and sampling with forced labels."""

import copy
import json

import numpy as np
import pytest
import torch
from test_generation import ARCHITECTURES, random_policy
from test_scripts import cli, rows_of, without_time  # noqa: F401

import common
import engine
import evaluate
import expert_iteration
import ppo
import rcrl
import runtime
import sft

PROBLEMS = common.load_problems("arithmetic", "train", 24)
RUN = ["--model", "tiny", "--limit-train", "24", "--limit-eval", "12", "--samples", "4",
       "--completions", "2", "--epochs", "2", "--batch-size", "8", "--max-new-tokens", "60",
       "--gen-batch-size", "32", "--ratio", "1"]  # fmt: skip
THREE = next(p for p in PROBLEMS if p.reference.count("\n") == 3)


def sample_of(problem, text, number=0, finished=True) -> common.Sample:
    return common.Sample(problem, number, text, finished)


@pytest.fixture(scope="module")
def labelled() -> common.Policy:
    """Return the embedded model with two new tokens."""
    policy = common.Policy("tiny", "cpu")
    torch.manual_seed(0)
    rcrl.teach_labels(policy, "step")
    return policy


# ---- labels and mixture


def test_a_line_is_good_if_at_least_half_of_its_completions_are_correct():
    sample = sample_of(THREE, THREE.reference)
    starts = list(rcrl.prefixes_of([sample, sample]))
    assert [text for _, text in starts] == [
        "".join(THREE.reference.splitlines(keepends=True)[:i]) for i in (1, 2, 3)
    ]
    q = dict(zip(starts, (0.5, 0.375, 1.0), strict=True))
    row = rcrl.label_solution(sample, q, "step")
    # The last line has the outcome.
    assert [line["label"] for line in row["lines"]] == ["good", "bad", "good", "good"]
    assert "".join(line["text"] for line in row["lines"]) == THREE.reference
    wrong = sample_of(THREE, THREE.reference.replace("####", "#### 1"))
    assert [x["label"] for x in rcrl.label_solution(wrong, q, "step")["lines"]] == [
        "good",
        "bad",
        "good",
        "bad",
    ]
    for s, label in ((sample, "good"), (wrong, "bad")):
        assert {line["label"] for line in rcrl.label_solution(s, {}, "outcome")["lines"]} == {label}


@pytest.mark.parametrize("rule, monotone, correct, expected", [
    ("mean", False, True, "bad good bad good"), ("mean", False, False, "bad good bad bad"),
    ("any", False, True, "bad good good good"), ("any", False, False, "bad good good bad"),
    ("mean", True, True, "good good good good"), ("mean", True, False, "good good bad bad"),
    ("any", True, True, "good good good good"), ("any", True, False, "good good good bad"),
])  # fmt: skip
def test_each_rule_gives_the_expected_labels(rule, monotone, correct, expected):
    """The lines have Q = 0, 0.5 and 0.125, and the last line has the outcome."""
    text = THREE.reference if correct else THREE.reference.replace("####", "#### 1")
    sample = sample_of(THREE, text)
    q = dict(zip(rcrl.prefixes_of([sample]), (0.0, 0.5, 0.125), strict=True))
    lines = rcrl.label_solution(sample, q, "step", rule, monotone)["lines"]
    assert [line["label"] for line in lines] == expected.split()
    assert [line["q"] for line in lines] == [0.0, 0.5, 0.125, float(correct)], "Q does not change"


def test_every_prefix_has_its_own_uniforms():
    """With shared uniforms, the completions of two prefixes would not be independent."""
    problems = list(rcrl.prefixes_of([sample_of(THREE, THREE.reference)]).values())
    assert len({p.id for p in problems}) == 3 and {p.answer for p in problems} == {THREE.answer}


@pytest.mark.parametrize("n_right, n_wrong, ratio, size, expected", [
    (100, 50, 1, None, (50, 50)), (100, 50, 10, None, (100, 10)), (100, 50, 100, None, (100, 1)),
    (20, 50, 1, None, (20, 20)), (100, 0, 1, None, (100, 0)), (10, 50, 100, None, (10, 0)),
    (10, 50, 0.5, None, (10, 20)), (1, 20, 0.01, None, (1, 20)), (199, 50, 100, None, (199, 1)),
    (109, 50, 10, None, (109, 10)), (100, 50, 1, 60, (30, 30)), (100, 50, 10, 55, (50, 5)),
    (100, 50, 100, 50, (50, 0)), (9, 48, 0.1, 5, (1, 4)), (9, 48, 1, 1, (1, 0)),
])  # fmt: skip
def test_the_mixture_has_the_ratio_and_the_largest_possible_size(
    n_right, n_wrong, ratio, size, expected
):
    right, wrong = [("r", i) for i in range(n_right)], [("w", i) for i in range(n_wrong)]
    mixed = rcrl.mix(right, wrong, ratio, size, 0)
    assert (sum(k == "r" for k, _ in mixed), sum(k == "w" for k, _ in mixed)) == expected
    assert len(set(mixed)) == len(mixed)


def test_equal_solutions_count_once_and_truncated_ones_never():
    right = sample_of(THREE, THREE.reference)
    same = sample_of(THREE, THREE.reference + " ", 1)
    cut = sample_of(THREE, "1+1=<<1+1=2>>2\n", 2, finished=False)
    wrong = sample_of(THREE, "1+1=<<1+1=2>>2\n#### 2", 3)
    assert rcrl.usable([right, same, cut, wrong], deduplicate=True) == [right, wrong]
    assert rcrl.usable([right, same, cut, wrong], deduplicate=False) == [right, same, wrong]


# ---- training data and samples


@pytest.mark.parametrize("by", ["step", "outcome"])
def test_lines_are_targets_and_labels_are_not(by):
    policy = common.Policy("tiny", "cpu")
    rcrl.teach_labels(policy, by)
    lines = [{"label": "good", "text": "1+1=<<1+1=2>>2\n"}, {"label": "bad", "text": "#### 2"}]
    (prompt, response), targets = rcrl.encode(policy, THREE, lines)
    ids = {name: policy.tokenizer.convert_tokens_to_ids(text) for name, text in rcrl.LABELS.items()}
    assert response[0] == ids["good"] and response[-1] == policy.tokenizer.eos_token_id
    assert [i for i, flag in zip(response, targets, strict=True) if not flag] == (
        [ids["good"], ids["bad"]] if by == "step" else [ids["good"]]
    )
    # Labels are not part of the text.
    assert policy.decode(response) == "1+1=<<1+1=2>>2\n#### 2"
    assert prompt == policy.encode_prompt(common.prompt_text(THREE))


def test_new_labels_are_as_far_apart_as_other_tokens(labelled):
    """transformers puts new rows at the mean of the others. They would be hard to tell apart."""
    *_, good, bad = rows = labelled.model.get_input_embeddings().weight.detach()
    assert labelled.tokenizer.convert_ids_to_tokens([len(rows) - 2, len(rows) - 1]) == list(
        rcrl.LABELS.values()
    )
    typical = torch.pdist(rows[:-2]).median()
    assert typical / 2 < (good - bad).norm() < typical * 2
    base = common.Policy("tiny", "cpu").model.get_input_embeddings().weight
    assert torch.equal(rows[:-2], base), "the other tokens keep their rows"


def test_the_control_learns_the_solutions_without_labels(labelled, tmp_path):
    """This includes a base model that has labels already."""
    labelled.save(tmp_path)
    lines = [{"label": "good", "text": "1+1=<<1+1=2>>2\n"}, {"label": "bad", "text": "#### 2"}]
    for base in ("tiny", str(tmp_path)):
        policy = common.Policy(base, "cpu")
        policy.condition("none")
        (_, response), targets = rcrl.encode(policy, THREE, lines)
        assert response == [
            *policy.encode_prefix("1+1=<<1+1=2>>2\n#### 2"),
            policy.tokenizer.eos_token_id,
        ] and all(targets)
        policy.save(tmp_path / "saved")
        assert common.Policy(str(tmp_path / "saved"), "cpu").label is None


def test_the_loss_leaves_the_labels_out(labelled):
    """The loss of a batch is the mean over its targets."""
    lines = [{"label": "bad", "text": "1+1=<<1+1=2>>2\n"}, {"label": "good", "text": "#### 2"}]
    example, targets = rcrl.encode(labelled, THREE, lines)
    with torch.no_grad():
        logprobs = common.response_logprobs(labelled, [example])
    optimizer = torch.optim.SGD(labelled.model.parameters(), lr=0.0)
    loss, _ = rcrl.train_step(labelled, optimizer, [example], [targets], 10_000)
    assert loss == pytest.approx(-logprobs[torch.tensor(targets)].mean().item(), abs=1e-5)
    assert abs(loss + logprobs.mean().item()) > 1e-2


def check_labels(policy, samples, label: int) -> int:
    """Check that every line starts with the label. Return the number of labels after a line break.

    The log-probability of a label is 0. The other log-probabilities equal the training pass.
    """
    seen = 0
    for sample in samples:
        ids = sample.tokens.tolist()
        after_break = [
            i + 1 for i, t in enumerate(ids) if policy.breaks_line[t] and i + 1 < len(ids)
        ]
        # The label of the first line.
        assert sample.prompt[-1] == label
        for i in after_break:
            assert ids[i] == label and not sample.logprobs[i]
        free = [i for i in range(len(ids)) if i not in after_break]
        again = common.response_logprobs(policy, [(list(sample.prompt), ids)]).detach()
        np.testing.assert_allclose(sample.logprobs[free], again[free], atol=2e-4)
        seen += len(after_break)
    return seen


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("on", ["good", "bad"])
def test_every_sampled_line_starts_with_the_forced_label(labelled, batch_size, on):
    labelled.condition(on)
    samples = common.generate(
        labelled, PROBLEMS[:4], samples=4, max_new_tokens=60, batch_size=batch_size, seed=3
    )
    assert check_labels(labelled, samples, labelled.label) > 8
    assert not any("[" in sample.text for sample in samples)
    labelled.condition("none")
    plain = common.generate(
        labelled, PROBLEMS[:4], samples=1, max_new_tokens=40, batch_size=4, seed=3
    )
    assert labelled.label is None and all(
        list(s.prompt) == labelled.encode_prompt(common.prompt_text(s.problem)) for s in plain
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_labels_are_forced_on_every_decoding_path(name, tmp_path_factory, monkeypatch):
    """The samples do not depend on the batch size, the stride of a GPU, or the plain loop."""
    # Other tests use the same policy.
    policy = copy.copy(random_policy(name, tmp_path_factory))
    broken = np.zeros(policy.vocabulary, bool)
    # A random model hardly ever samples a line break. So every third token counts as one.
    broken[::3] = True
    policy.__dict__["breaks_line"] = broken
    policy.label, policy.label_every_line = 5, True
    # With many end tokens, sequences end at any time.
    policy.eos_ids = list(range(1, policy.vocabulary, 30))
    how = dict(samples=3, max_new_tokens=24, seed=1)
    found = []
    paths = [(2, set(), True), (9, set(), True), (9, {"cpu"}, True), (4, set(), False)]
    for batch_size, devices, fast in paths:
        monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", devices)
        policy.model.set_attn_implementation("paged_attention" if fast else "sdpa")
        try:
            samples = common.generate(policy, PROBLEMS[:3], batch_size=batch_size, **how)
        finally:
            policy.model.set_attn_implementation("paged_attention")
        found.append([sample.tokens.tolist() for sample in samples])
    assert found[0] == found[1] == found[2] == found[3]
    labels = 0
    for sample in samples:
        ids = sample.tokens.tolist()
        assert sample.prompt[-1] == policy.label
        for token, following, logprob in zip(ids, ids[1:], sample.logprobs[1:], strict=False):
            if broken[token]:
                assert following == policy.label and logprob == 0
                labels += 1
    assert labels > 20


def test_a_model_that_cannot_add_tokens_is_refused(nano, monkeypatch):
    policy = common.Policy(nano, "cpu")

    def refuse(*_, **__):
        raise NotImplementedError("tied in a way of its own")

    monkeypatch.setattr(policy.model, "resize_token_embeddings", refuse)
    words = "--base: this model takes no new tokens for labels .tied in a way of its own"
    with pytest.raises(runtime.UserError, match=words):
        rcrl.teach_labels(policy, "step")


# ---- the script


def test_rcrl_labels_trains_and_evaluates_under_each_condition(cli, tmp_path):
    out = tmp_path / "rcrl"
    assert cli(rcrl, *RUN, "--out", out)[0] == 0
    rows = rows_of(out / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    labelled = rows_of(out / "samples" / "labelled.jsonl")
    assert len(labelled) == rows[0]["train_size"] == rows[0]["n_correct"] + rows[0]["n_incorrect"]
    assert rows[0]["n_correct"] == rows[0]["n_incorrect"] > 0
    assert all(
        line["q"] in (0, 0.5, 1) and line["label"] in rcrl.LABELS
        for row in labelled
        for line in row["lines"]
    )
    assert all(row["lines"][-1]["q"] == row["correct"] for row in labelled)
    completions = rows_of(out / "samples" / "completions.jsonl")
    assert len(completions) == 2 * rows[0]["prefixes"]

    argv = [
        "--model",
        out / "model",
        "--samples",
        "2",
        "--limit-eval",
        "10",
        "--max-new-tokens",
        "60",
    ]
    texts = {}
    for name in ("default", "good", "bad", "none"):
        flags = [] if name == "default" else ["--condition", name]
        assert cli(evaluate, *argv, *flags, "--out", tmp_path / f"{name}.json")[0] == 0
        texts[name] = [row["text"] for row in rows_of(tmp_path / f"{name}.samples.jsonl")]
    assert texts["default"] == texts["good"] and len({tuple(t) for t in texts.values()}) > 1
    code, message = cli(
        evaluate, "--model", "tiny", "--condition", "good", "--out", tmp_path / "x.json"
    )
    assert (
        code == 2
        and "not trained with return labels" in message
        and not (tmp_path / "x.json").exists()
    )

    # A model loses its labels when another script trains it.
    short = [
        "--epochs",
        "1",
        "--limit-eval",
        "4",
        "--max-new-tokens",
        "20",
        "--out",
        tmp_path / "sft",
    ]
    assert cli(sft, "--model", out / "model", *short)[0] == 0
    assert "return_labels" not in json.loads(
        (tmp_path / "sft" / "model" / "config.json").read_text()
    )
    short = [
        *short[:-1],
        tmp_path / "ei",
        "--limit-train",
        "24",
        "--rounds",
        "1",
        "--continue",
        "--pass-k",
        "0",
    ]
    # Its labels are only in the samples of round 1.
    assert cli(expert_iteration, "--model", out / "model", *short)[0] == 0
    assert "return_labels" not in json.loads(
        (tmp_path / "ei" / "model" / "config.json").read_text()
    )

    argv = [
        *RUN,
        "--out",
        tmp_path / "outcome",
        "--labels",
        "outcome",
        "--train-samples",
        out / "samples" / "train.jsonl",
    ]
    assert cli(rcrl, *argv)[0] == 0
    rows = rows_of(tmp_path / "outcome" / "samples" / "labelled.jsonl")
    assert all(
        {line["label"] for line in row["lines"]} == {"good" if row["correct"] else "bad"}
        for row in rows
    )
    config = json.loads((tmp_path / "outcome" / "model" / "config.json").read_text())
    assert config["return_labels"]["by"] == "outcome"

    # A model with labels is refused as --model and as --base.
    # Its completions would not continue the labels.
    for flag in ("--model", "--base"):
        code, message = cli(rcrl, *RUN, flag, out / "model", "--out", tmp_path / "again")
        assert (
            code == 2
            and "trained without labels" in message
            and not (tmp_path / "again" / "samples").exists()
        )


def test_completions_of_other_prefixes_are_not_read_back(tmp_path):
    """Prefixes are numbered. If the samples change, a number can belong to another prefix."""
    policy, how = (
        common.Policy("tiny", "cpu"),
        {"samples": 2, "batch_size": 8, "max_new_tokens": 30, "progress": None},
    )
    file = tmp_path / "completions.jsonl"
    for prefix in ("1+1=<<1+1=2>>2\n", "2+2=<<2+2=4>>4\n"):
        samples = common.sample_to_file(policy, PROBLEMS[:2], file, prefixes=[prefix] * 2, **how)
        assert all(sample.text.startswith(prefix) for sample in samples)
        assert (
            all(row["text"].startswith(prefix) for row in rows_of(file)) and len(rows_of(file)) == 4
        )


def test_a_run_labels_its_lines_by_the_rules_of_its_flags(cli, tmp_path):
    """Two runs have the same Q. The labels of the second run follow from it."""
    assert cli(rcrl, *RUN, "--out", tmp_path / "first")[0] == 0
    flags = ["--label-rule", "any", "--monotone", "--out", tmp_path / "second"]
    assert cli(rcrl, *RUN, *flags)[0] == 0
    rows, again = (
        rows_of(tmp_path / name / "samples" / "labelled.jsonl") for name in ("first", "second")
    )
    changed = 0
    for row, other in zip(rows, again, strict=True):
        q = [line["q"] for line in row["lines"]]
        assert q == [line["q"] for line in other["lines"]]
        labels = [["bad", "good"][any(q[i:])] for i in range(len(q))]
        assert labels == [line["label"] for line in other["lines"]]
        changed += labels != [line["label"] for line in row["lines"]]
    assert changed


@pytest.mark.parametrize(
    "correct, finished, advice", [(False, True, "--samples"), (True, False, "--max-new-tokens")]
)
def test_if_no_sample_can_be_used_the_error_names_a_flag(cli, tmp_path, correct, finished, advice):
    problem = common.load_problems("arithmetic", "train", 1)[0]
    text = f"#### {problem.answer if correct else 'none'}"
    (tmp_path / "samples.jsonl").write_text(
        common.Sample(problem, 0, text, finished).to_json() + "\n"
    )
    argv = ["--train-samples", tmp_path / "samples.jsonl", "--out", tmp_path / "run"]
    code, message = cli(rcrl, *RUN, *argv)
    assert (
        code == 2
        and advice in message
        and not (tmp_path / "run" / "samples" / "labelled.jsonl").exists()
    )


def test_a_resumed_run_equals_an_uninterrupted_one(cli, tmp_path, monkeypatch):
    """The run is killed while it writes its completions, and at a checkpoint."""

    class Killed(Exception):
        pass

    assert cli(rcrl, *RUN, "--device", "cpu", "--out", tmp_path / "whole")[0] == 0
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
    generate, save, calls = common.generate, torch.save, []

    def dying_generate(*args, **how):
        if how.get("prefixes", [""])[0]:
            raise Killed
        return generate(*args, **how)

    def dying_save(state, file):
        save(state, file)
        calls.append(1)
        if len(calls) == 3:
            raise Killed

    monkeypatch.setattr(common, "generate", dying_generate)
    with pytest.raises(Killed):
        cli(rcrl, *argv)
    monkeypatch.setattr(common, "generate", generate)
    monkeypatch.setattr(torch, "save", dying_save)
    with pytest.raises(Killed):
        cli(rcrl, *argv)
    monkeypatch.setattr(torch, "save", save)
    assert cli(rcrl, *argv)[0] == 0
    assert without_time(tmp_path / "whole" / "metrics.jsonl") == without_time(
        tmp_path / "broken" / "metrics.jsonl"
    )
    names = ["model/model.safetensors", "samples/labelled.jsonl", "samples/completions.jsonl"]
    assert all(
        (tmp_path / "whole" / n).read_bytes() == (tmp_path / "broken" / n).read_bytes()
        for n in names
    )


def test_a_truncated_completion_counts_as_incorrect(tiny, tmp_path, monkeypatch):
    """This holds even if its answer line is complete and correct."""
    starts = rcrl.prefixes_of([sample_of(THREE, THREE.reference)])

    def drawn(policy, problems, *_, samples, **__):
        return [
            sample_of(p, THREE.reference + "\n", i, finished=i > 0)
            for p in problems
            for i in range(samples)
        ]

    monkeypatch.setattr(common, "sample_to_file", drawn)
    assert all(sample.correct for sample in drawn(tiny, [THREE], samples=4))
    q = rcrl.estimate_q(tiny, starts, tmp_path / "q.jsonl", None, samples=4)
    assert q == dict.fromkeys(starts, 0.75)


def test_ppo_trains_a_model_with_labels_without_its_labels(cli, labelled, tmp_path):
    labelled.condition("good")
    labelled.save(tmp_path / "labelled")
    argv = [
        "--model",
        tmp_path / "labelled",
        "--questions",
        2,
        "--samples",
        2,
        "--phases",
        1,
        "--max-new-tokens",
        20,
    ]
    assert cli(ppo, *argv, "--limit-eval", 2, "--out", tmp_path / "run")[0] == 0
    before, after = (
        common.Policy(str(tmp_path / name), "cpu") for name in ("labelled", "run/model")
    )
    assert before.label is not None and after.label is None


def test_a_solution_that_is_too_long_with_labels_is_left_out(cli, tmp_path, capsys):  # noqa: F811
    """The solution filled the last position when it was sampled. Its labels make it longer."""
    policy = common.Policy("tiny", "cpu")
    policy.model.config.max_position_embeddings = 50
    policy.save(tmp_path / "short")
    problems = [p for p in common.load_problems("arithmetic", "train") if len(p.question) < 90][:60]
    rows = [json.dumps({"question": p.question, "answer": p.reference}) for p in problems]
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    argv = ["--model", tmp_path / "short", "--base", tmp_path / "short", "--samples", 8]
    argv += ["--dataset", tmp_path / "short.jsonl", "--limit-eval", 1, "--epochs", 1]
    argv += ["--max-new-tokens", 60, "--out", tmp_path / "run", "--completions", 2]
    runtime.warn.cache_clear()
    code, message = cli(rcrl, *argv)
    assert code == 0, message
    row = rows_of(tmp_path / "run" / "metrics.jsonl")[-1]
    n_long = row["n_correct"] + row["n_incorrect"] - row["train_size"]
    assert n_long > 0 and f"{n_long} of" in message + capsys.readouterr().err
