"""The tour prints what the methods computed, and docs/tour.md holds what it printed."""

import contextlib
import io
import json
import re
import signal
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

sys.path.insert(0, str(ROOT / "results"))
import tour  # noqa: E402

SHORT = "--limit-eval 2 --max-new-tokens 80 --device cpu --limit-train 12 --epochs 1".split()
COMMANDS = {
    "sft": (sft, "--lr 1e-3"),
    "expert_iteration": (expert_iteration, "--rounds 1 --pass-k 0"),
    "ppo": (ppo, "--phases 1 --questions 4"),
    "rcrl": (rcrl, "--samples 2 --completions 2 --ratio 1"),
    "reward_model": (reward_model, "--samples 2 --eval-samples 2"),
}
TRAIN = {problem.id: problem for problem in common.load_problems("arithmetic", "train")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a small run of every method."""
    folder = tmp_path_factory.mktemp("runs")
    handler = signal.getsignal(signal.SIGINT)
    # From the base, PPO ends with a model that differs from the reference policy.
    models = {"expert_iteration": "sft", "reward_model": "sft", "rcrl": "expert_iteration"}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, (script, flags) in COMMANDS.items():
            model = str(folder / models[name] / "model") if name in models else "tiny"
            argv = [*SHORT, *flags.split(), "--model", model, "--out", str(folder / name)]
            script.main(argv)
    signal.signal(signal.SIGINT, handler)
    return folder


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def labelled(runs) -> list[dict]:
    """The labelled solutions of a question that has the most of them."""
    rows = rows_of(runs / "rcrl/samples/labelled.jsonl")
    names = [row["problem"] for row in rows]
    return [row for row in rows if row["problem"] == max(names, key=names.count)]


def blocks_of(text: str) -> dict[str, list[str]]:
    """The lines of every block by its title."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return {title.removesuffix(":"): [line[2:] for line in lines] for title, *lines in blocks}


@pytest.fixture(scope="module")
def blocks(runs, labelled) -> dict[str, list[str]]:
    argv = ["--runs", str(runs), "--question", labelled[0]["problem"], "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tour.main([*argv, "--value-questions", "8"])
    return blocks_of(printed.getvalue())


def test_the_greedy_solution_is_that_of_transformers(blocks, runs, labelled):
    tokenizer = AutoTokenizer.from_pretrained(runs / "ppo/model")
    model = AutoModelForCausalLM.from_pretrained(runs / "ppo/model")
    prompt = tokenizer(f"Question: {labelled[0]['question']}\nAnswer:\n", return_tensors="pt")
    (ids,) = model.generate(**prompt, do_sample=False, max_new_tokens=80)
    text = tokenizer.decode(ids[prompt.input_ids.shape[1] :], skip_special_tokens=True)
    (found,) = [lines for title, lines in blocks.items() if title.startswith("ppo, greedy")]
    assert found == text.splitlines()


def test_expert_iteration_keeps_the_correct_finished_samples(blocks, runs, labelled):
    rows = rows_of(runs / "expert_iteration/samples/round_1.jsonl")
    rows = [row for row in rows if row["problem"] == labelled[0]["problem"]]
    assert len(rows) == 4
    for row in rows:
        kept = "kept" if row["correct"] and row["finished"] else "dropped"
        start = f"sample {row['sample']} of sft, {kept}: "
        assert any(title.startswith(start) for title in blocks), start


def test_the_last_probability_is_the_score_of_the_reward_model(blocks, runs, labelled):
    problem = TRAIN[labelled[0]["problem"]]
    orm = reward_model.RewardModel(str(runs / "reward_model/model"), "cpu")
    found = {t: lines for t, lines in blocks.items() if t.startswith("P(correct)")}
    assert found
    for lines in found.values():
        text = "\n".join(line.split("  ")[1] for line in lines)
        sample = common.Sample(problem, 0, text, finished=True)
        orm.grade([sample])
        assert float(lines[-1].split()[0]) == pytest.approx(sample.score, abs=6e-4)


def test_advantages_follow_from_rewards_penalties_and_values(blocks):
    """With lambda 1 an advantage is what comes from the line on, less the value before it."""
    found = {t: lines for t, lines in blocks.items() if re.match(r"sample \d+ of ppo", t)}
    assert found
    for title, (header, *lines) in found.items():
        assert header.split() == tour.COLUMNS
        table = torch.tensor([[float(number) for number in line.split()[:5]] for line in lines])
        reward, penalty, value, advantage, _ = table.T
        assert reward.tolist() == [0.0] * (len(lines) - 1) + [float(title.endswith(" correct"))]
        later = (reward + penalty).flip(0).cumsum(0).flip(0)
        assert torch.allclose(advantage, later - value, atol=0.005)


def test_penalties_are_those_of_the_models(blocks, runs, labelled):
    (title, *_) = (title for title in blocks if re.match(r"sample \d+ of ppo", title))
    header, *lines = blocks[title]
    text = "\n".join(line[5 * 11 + 2 :] for line in lines)
    tokenizer = AutoTokenizer.from_pretrained(runs / "sft/model")
    prompt = tokenizer(f"Question: {labelled[0]['question']}\nAnswer:\n").input_ids
    response = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])
    ids = torch.cat([torch.tensor(prompt), response])[None]
    totals = []
    for name in ("ppo", "sft"):
        model = AutoModelForCausalLM.from_pretrained(runs / name / "model")
        logprobs = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        totals.append(logprobs.gather(1, response[:, None]).sum().item())
    printed = sum(float(line.split()[1]) for line in lines)
    assert printed == pytest.approx(-0.05 * (totals[0] - totals[1]), abs=0.003)
    assert abs(printed) > 0.003


def test_labels_are_those_of_the_run(blocks, labelled):
    for i, row in enumerate(labelled, 1):
        title = f"solution {i} of rcrl, {'correct' if row['correct'] else 'incorrect'}"
        marks = {"good": "[GOOD]", "bad": "[BAD] "}
        lines = [f"{x['q']:.3f}  {marks[x['label']]} {x['text'].strip()}" for x in row["lines"]]
        assert blocks[title] == lines


def test_a_missing_run_or_question_is_an_error_of_one_line(runs, tmp_path):
    for argv in (["--runs", str(tmp_path)], ["--runs", str(runs), "--question", "nonsense"]):
        with pytest.raises(runtime.UserError, match="missing|ids are like"):
            tour.main(argv)


def test_the_page_holds_every_block_that_the_script_printed():
    printed = (ROOT / "results/tour.txt").read_text(encoding="utf-8").strip().split("\n\n")
    page = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    fenced = re.findall(r"```\n(.*?)\n```", page, re.S)
    on_page = "\n\n".join(text for text in fenced if not text.startswith("python "))
    assert sorted(on_page.split("\n\n")) == sorted(b for b in printed if not b.startswith("|"))
    assert all(block in page for block in printed)
