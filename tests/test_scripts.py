"""Run the scripts as a user does: end to end, killed and resumed, with bad input."""

import argparse
import errno
import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import evaluate
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

SFT = "--epochs 2 --batch-size 4 --limit-eval 16 --max-new-tokens 80 --gen-batch-size 16".split()
EI = "--model tiny --limit-train 96 --samples 2 --epochs 2 --limit-eval 16 --pass-k 2"
EI = f"{EI} --max-new-tokens 80 --gen-batch-size 96".split()


def run_cli(script, *argv, monkeypatch, capsys) -> tuple[int, str]:
    """Run `python script.py argv...` in this process. Return exit code and standard error.

    The device is the CPU unless argv names one. Only a CPU repeats a run bit by bit.
    """
    argv = [*map(str, argv)]
    argv += [] if "--device" in argv else ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *argv])
    handler = signal.getsignal(signal.SIGINT)
    # A new process warns again.
    runtime.warn.cache_clear()
    try:
        runtime.run_main(script.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.signal(signal.SIGINT, handler)
    return code, capsys.readouterr().err


@pytest.fixture
def cli(monkeypatch, capsys):
    return lambda script, *argv: run_cli(script, *argv, monkeypatch=monkeypatch, capsys=capsys)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(path: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds")}
        for row in rows_of(path)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_sft_expert_iteration_and_evaluation_work_end_to_end(cli, tmp_path):
    """SFT raises dev accuracy, expert iteration runs two rounds from it, and evaluation agrees.

    SFT trains on the 24 written solutions. It gains at least 15 points over the base model. The
    report of the evaluation agrees with the samples that it writes.
    """
    sft_out, ei_out, report_file = (
        tmp_path / "sft",
        tmp_path / "ei",
        tmp_path / "eval" / "report.json",
    )
    assert cli(sft, "--out", sft_out, "--limit-eval", 64, "--samples", 2)[0] == 0
    rows = rows_of(sft_out / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4] and rows[-1]["step"] == 12
    assert max(row["maj@1"] for row in rows[1:]) > rows[0]["maj@1"] + 0.15
    assert rows[-1]["loss"] < rows[1]["loss"] and 0 <= rows[-1]["pass@1"] <= rows[-1]["pass@2"] <= 1
    assert len(rows_of(sft_out / "samples" / "dev_4.jsonl")) == 64

    argv = [*EI, "--model", sft_out / "model", "--out", ei_out]
    assert cli(expert_iteration, *argv)[0] == 0
    start, *rounds = rows_of(ei_out / "metrics.jsonl")
    assert start["round"] == 0 and start["maj@1"] > 0
    assert rounds[0]["samples"] == 192 and rounds[0]["kept"] + 24 == rounds[0]["train_size"]
    written = rows_of(ei_out / "samples" / "round_1.jsonl")
    assert len(written) == 192 and rounds[0]["correct"] == pytest.approx(
        sum(r["correct"] for r in written) / 192, rel=1e-5
    )
    for key in (
        "solved",
        "follows_reference",
        "maj@1",
        "pass@2",
        "seconds_sampling",
        "seconds_training",
    ):
        assert key in rounds[0]

    argv = [
        "--model",
        ei_out / "model",
        "--samples",
        6,
        "--limit-eval",
        40,
        "--out",
        report_file,
        "--gen-batch-size",
        64,
    ]
    assert cli(evaluate, *argv)[0] == 0
    report = json.loads(report_file.read_text())
    samples = rows_of(tmp_path / "eval" / "report.samples.jsonl")
    assert len(samples) == 240 and report["n_problems"] == 40 and report["dataset"] == "arithmetic"
    assert report["pass@1"]["value"] == pytest.approx(sum(s["correct"] for s in samples) / 240)
    assert (
        report["pass@1"]["value"]
        <= report["pass@2"]["value"]
        <= report["pass@4"]["value"]
        <= report["pass@6"]["value"]
    )
    for key in ("maj@1", "maj@6", "distinct@6", "no_answer", "truncated"):
        low, high = report[key]["ci95"]
        assert low <= report[key]["value"] <= high
    code, message = cli(evaluate, *argv)
    assert code == 2 and "is there already" in message and "--resume" in message
    lenient = [
        *argv[:-4],
        "--lenient",
        "--max-new-tokens",
        60,
        "--out",
        tmp_path / "eval" / "lenient.json",
    ]
    # The files of samples agree with the report.
    assert cli(evaluate, *lenient)[0] == 0
    read = rows_of(tmp_path / "eval" / "lenient.greedy.jsonl")
    said = json.loads((tmp_path / "eval" / "lenient.json").read_text())["no_answer@1"]["value"]
    assert said == pytest.approx(sum(row["answer"] is None for row in read) / 40)
    assert any(row["answer"] is not None and "####" not in row["text"] for row in read)
    assert cli(evaluate, *argv, "--resume")[0] == 0
    assert json.loads(report_file.read_text()) == report | {"seconds": None}


def test_only_sft_data_adds_written_solutions_to_expert_iteration(cli, tmp_path):
    argv = [*EI, *"--rounds 1 --epochs 1 --pass-k 0 --limit-train 24 --limit-eval 2".split()]
    sizes = {}
    for name, flags in {
        "base": [],
        "with": ["--sft-data"],
        "continue": ["--continue"],
        "few": ["--few-shot"],
    }.items():
        assert cli(expert_iteration, *argv, *flags, "--out", tmp_path / name)[0] == 0
        row = rows_of(tmp_path / name / "metrics.jsonl")[1]
        sizes[name] = row["train_size"] - row["kept"]
    assert sizes == {"base": 0, "with": 24, "continue": 0, "few": 0}


def test_sft_refuses_problems_without_written_solutions(cli, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"q{i}", "answer": str(i)}) + "\n" for i in range(20))
    )
    code, message = cli(sft, "--dataset", file, "--out", tmp_path / "run")
    assert code == 2 and "no written solutions" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


BAD = {
    "unknown flag": (["--learning-rate", "1"], "unrecognized"),
    "abbreviated flag": (["--epoch", "1"], "unrecognized"),
    "no seed": (["--seed", "one"], "whole number"),
    "huge": (["--gen-batch-size", "1" + "0" * 400], "whole number"),
    "huge seed": (["--seed", "1" + "0" * 20], "whole number"),
    "negative": (["--temperature", "-1"], "at least 0"),
    "zero": (["--gen-batch-size", "0"], "at least 1"),
    "not whole": (["--max-new-tokens", "1.5"], "whole number"),
    "NaN": (["--temperature", "nan"], "number"),
    "dtype": (["--dtype", "int8"], "invalid choice"),
    "dataset": (["--dataset", "gsm9k"], "no such file"),
    "dataset folder": (["--dataset", "EMPTY"], "no train.jsonl"),
    "model folder": (["--model", "runs/none/model"], "no such folder"),
    # This name is not looked for on the hub.
    "model name": (["--model", "runs/none"], "no such folder"),
    "run folder": (["--model", "RUN"], "did you mean"),
    "a flag that deletes": (["--overwrite"], "unrecognized"),
    "empty model folder": (["--model", "EMPTY"], "no config.json"),
    "too long": (["--dataset", "LONG"], "tokens long; the model has 1024 positions"),
    "device": (["--device", "toaster"], "cannot be used"),
    "infinite": (["--temperature", "inf"], "number"),
    "broken JSON": (["--dataset", "BROKEN"], "broken.jsonl line 3: broken JSON"),
    "no number": (["--dataset", "WORDS"], "words.jsonl line 2: the answer 'many' is no number"),
    "not text": (["--dataset", "BYTES"], "bytes.jsonl: not UTF-8"),
    "no problem": (["--dataset", "OTHER"], 'other.jsonl line 1: needs "question" and "answer"'),
}
FILES = {
    "BROKEN": b'{"question": "a", "answer": "1"}\n\n{"question": "b", "answer": \n',
    "WORDS": b'{"question": "a", "answer": "1"}\n{"question": "b", "answer": "many"}\n',
    "BYTES": b"\xff\xfe\x00\x01",
    "OTHER": b'{"prompt": "a"}\n',
    "LONG": b"".join(
        b'{"question": "%d%s", "answer": "#### 1"}\n' % (i, b"?" * 1100) for i in range(9)
    ),
}


@pytest.mark.parametrize(
    "script", [sft, expert_iteration, evaluate, ppo, reward_model, rcrl], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_one_line_error_and_changes_no_file(cli, script, name, tmp_path):
    """The exit code is 2, standard error has one line, and the folder keeps its files."""
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for word, content in FILES.items():
        (tmp_path / f"{word.lower()}.jsonl").write_bytes(content)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    words = {"EMPTY": str(empty), "RUN": str(tmp_path / "run")} | {
        word: str(tmp_path / f"{word.lower()}.jsonl") for word in FILES
    }
    argv = [words.get(a, a) for a in BAD[name][0]]
    message_part = BAD[name][1].replace("train", "test") if script is evaluate else BAD[name][1]
    where = out / "report.json" if script is evaluate else out
    base = [] if script is evaluate or "--model" in argv else ["--model", "tiny"]
    if script is evaluate and "--model" not in argv:
        base = ["--model", "tiny"]
    code, message = cli(script, *base, "--out", where, *argv)
    assert code == 2 and message_part in message
    assert message.count("\n") == 1 and message.startswith("error: "), message
    assert (out / "notes.txt").read_text() == "mine"


def test_a_finished_run_is_not_replaced_and_not_mixed_with_other_settings(cli, nano, tmp_path):
    argv = [*SFT, "--model", nano, "--out", tmp_path / "run", "--max-new-tokens", "8"]
    assert cli(sft, *argv)[0] == 0
    before = contents(tmp_path / "run")
    code, message = cli(sft, *argv)
    assert code == 2 and "already holds a run" in message and "--resume" in message
    code, message = cli(sft, *argv, "--lr", "1e-3", "--resume")
    assert code == 2 and "other settings (lr)" in message
    assert contents(tmp_path / "run") == before
    # A smaller machine may need smaller batches.
    assert cli(sft, *argv, "--token-budget", "64", "--gen-batch-size", "4", "--resume")[0] == 0
    assert cli(sft, *argv, "--resume")[0] == 0
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("script", [ppo, evaluate], ids=lambda m: m.__name__)
def test_without_resume_an_existing_run_is_refused(script, cli, tmp_path):
    """The refusal comes before a model is loaded, with other settings as well. No file changes."""
    if script is ppo:
        argv, name = [*short_run(ppo), "--out", tmp_path / "run"], "already holds a run"
    else:
        argv = ["--model", "tiny", "--limit-eval", 2, "--samples", 2, "--max-new-tokens", 20]
        argv, name = [*argv, "--out", tmp_path / "report.json"], "is there already"
    assert cli(script, *argv)[0] == 0
    before = contents(tmp_path)
    for flags in ([], ["--seed", 1], ["--dataset", "arithmetic-hard"]):
        code, message = cli(script, *argv, *flags)
        assert code == 2 and name in message and message.count("\n") == 1
        assert contents(tmp_path) == before
    for flags in (["--seed", 1], ["--dataset", "arithmetic-hard"]):
        code, message = cli(script, *argv, *flags, "--resume")
        assert code == 2 and "other settings" in message and message.count("\n") == 1
        assert contents(tmp_path) == before


def test_a_folder_is_refused_while_another_process_writes_to_it(cli, nano, tmp_path):
    """Otherwise two processes would log the same phases and write the same files."""
    fcntl = pytest.importorskip("fcntl")
    argv = [*SFT, "--model", nano, "--out", tmp_path, "--max-new-tokens", "8"]
    other = os.open(tmp_path, os.O_RDONLY)
    # The lock belongs to the open file. So this process is refused like any other.
    fcntl.flock(other, fcntl.LOCK_EX)
    code, message = cli(sft, *argv)
    assert code == 2 and "another process" in message and not list(tmp_path.iterdir())
    os.close(other)
    assert cli(sft, *argv)[0] == 0
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_second_evaluation_does_not_write_to_the_files_of_the_first(
    cli, nano, tmp_path, monkeypatch
):
    """Otherwise both would add their samples to one file. Another name in the folder is free."""
    fcntl = pytest.importorskip("fcntl")
    argv = ["--model", nano, "--limit-eval", 2, "--samples", 2, "--max-new-tokens", 4]
    lock = tmp_path / "a.json.lock"
    lock.touch()
    with open(lock) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, message = cli(evaluate, *argv, "--out", tmp_path / "a.json")
        assert (
            code == 2
            and f"{tmp_path / 'a.json'}: another process" in message
            and contents(tmp_path) == {"a.json.lock": b""}
        )
        assert cli(evaluate, *argv, "--out", tmp_path / "b.json")[0] == 0
    # Another evaluation starts and ends while the model is loaded.
    with monkeypatch.context() as patch:
        load = common.Policy
        patch.setattr(
            common,
            "Policy",
            lambda *args: ((tmp_path / "a.samples.jsonl").write_text("theirs"), load(*args))[1],
        )
        code, message = cli(evaluate, *argv, "--out", tmp_path / "a.json")
        assert code == 2 and "is there already" in message
        assert (tmp_path / "a.samples.jsonl").read_text() == "theirs"
    (tmp_path / "a.samples.jsonl").unlink()
    assert cli(evaluate, *argv, "--out", tmp_path / "a.json")[0] == 0
    assert not list(tmp_path.glob("*.lock"))


def short_run(script) -> list[str]:
    """Return flags that make a training script end within seconds. All of its steps run."""
    few = {expert_iteration: "--rounds 1", ppo: "--phases 1 --questions 4", rcrl: "--completions 2"}
    argv = "--model tiny --limit-train 8 --limit-eval 4 --epochs 1 --max-new-tokens 60".split()
    argv += [] if script is sft else ["--samples", "4"]
    return argv + (few | {reward_model: "--eval-samples 2", sft: ""})[script].split()


@pytest.mark.parametrize(
    "script", [sft, expert_iteration, ppo, reward_model, rcrl], ids=lambda m: m.__name__
)
def test_no_script_trains_or_chooses_on_the_test_split(script, cli, tmp_path, monkeypatch):
    """Trap: choosing the checkpoint on the test set."""
    asked, load = [], common.load_problems

    def spied(dataset, split, limit=None):
        asked.append(split)
        return load(dataset, split, limit)

    monkeypatch.setattr(common, "load_problems", spied)
    assert cli(script, *short_run(script), "--out", tmp_path / "run")[0] == 0
    assert set(asked) == {"train", "dev"}


@pytest.mark.parametrize(
    "script, flags, expected",
    [(script, [], 1024) for script in (sft, expert_iteration, ppo, reward_model, rcrl)]
    + [(sft, ["--token-budget", "300"], 300)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_micro_batches_are_small_on_a_cpu_unless_a_flag_sets_their_size(
    script, flags, expected, cli, tmp_path, monkeypatch
):
    budgets, split = set(), common.micro_batches

    def spied(lengths, budget):
        budgets.add(budget)
        return split(lengths, budget)

    monkeypatch.setattr(common, "micro_batches", spied)
    assert cli(script, *short_run(script), *flags, "--out", tmp_path / "run")[0] == 0
    assert budgets == {expected}


@pytest.mark.parametrize(
    "device, there, batch_size, budget",
    [
        ("auto", False, 256, 1024),
        ("auto", True, 1024, 32768),
        ("cpu", True, 256, 1024),
        ("cuda:1", True, 1024, 32768),
    ],
)
def test_batches_are_larger_on_a_gpu(device, there, batch_size, budget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    args = sft.parse_args(["--device", device])
    assert (args.gen_batch_size, args.token_budget) == (batch_size, budget)
    args = sft.parse_args(["--device", device, "--gen-batch-size", "7"])
    assert (args.gen_batch_size, args.token_budget) == (7, budget)


def test_sft_saves_the_model_of_the_epoch_with_the_best_dev_accuracy(
    cli, nano, tmp_path, monkeypatch
):
    measured, states = iter([0.1, 0.5, 0.3, 0.5]), []

    def measuring(policy, problems, *args):
        states.append({name: weight.clone() for name, weight in policy.model.state_dict().items()})
        return {"maj@1": next(measured), "no_answer": 0.0}

    monkeypatch.setattr(common, "dev_metrics", measuring)
    assert cli(sft, "--model", nano, "--epochs", 3, "--out", tmp_path / "run")[0] == 0
    saved = common.Policy(str(tmp_path / "run" / "model"), "cpu").model.state_dict()
    same = [all(torch.equal(saved[name], state[name]) for name in saved) for state in states]
    assert same == [False, True, False, False]


@pytest.mark.parametrize("more", ["", "--max-per-question 1"])
def test_expert_iteration_resumes_in_the_round_in_which_it_was_stopped(
    more, cli, tmp_path, monkeypatch
):
    """It is stopped in the second of two rounds. Each round has two steps.

    The solutions that round 1 accepted are read back.
    """
    flags = "--limit-train 24 --limit-eval 4 --pass-k 0 --epochs 2 --batch-size 1000 --rounds 2"
    flags = f"{flags} {more}"
    argv = [*EI, *flags.split()]
    assert cli(expert_iteration, *argv, "--out", tmp_path / "whole")[0] == 0
    broken = [*argv, "--checkpoint-every", "0", "--out", tmp_path / "broken"]
    train, calls = expert_iteration.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(expert_iteration, "train_step", interrupted)
    assert cli(expert_iteration, *broken)[0] == 130
    monkeypatch.setattr(expert_iteration, "train_step", train)
    assert cli(expert_iteration, *broken, "--resume")[0] == 0
    assert without_time(tmp_path / "broken" / "metrics.jsonl") == without_time(
        tmp_path / "whole" / "metrics.jsonl"
    )
    for name in ("model/model.safetensors", "samples/round_2.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("first", [0.2, 0.9])
def test_expert_iteration_warns_if_no_round_was_better_than_its_start(
    first, cli, tmp_path, monkeypatch
):
    measured = iter([0.9, first, 0.1])
    monkeypatch.setattr(common, "dev_metrics", lambda *_, **__: {"maj@1": next(measured)})
    code, message = cli(
        expert_iteration, *EI, "--limit-train", "24", "--epochs", "1", "--out", tmp_path / "run"
    )
    assert code == 0 and "no round was better than what it started from" in message
    code, message = cli(expert_iteration, *EI, "--temperature", "0", "--out", tmp_path / "greedy")
    assert code == 2 and "--samples 1" in message
    code, message = cli(
        expert_iteration, *EI, "--temperature", "0", "--samples", "1", "--out", tmp_path / "greedy"
    )
    assert code == 2 and "--pass-k 0" in message


def test_expert_iteration_refuses_long_solutions_and_recognises_the_base_by_its_path(
    cli, tmp_path, monkeypatch
):
    rows = [
        {"question": f"q{i}", "answer": "1+1=<<1+1=2>>2\n" * (200 if i == 3 else 1) + "#### 2"}
        for i in range(20)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(common, "generate", lambda *_, **__: pytest.fail("sampled"))
    argv = [*EI, "--dataset", tmp_path / "p.jsonl", "--limit-train", "9", "--out", tmp_path / "run"]
    code, message = cli(expert_iteration, *argv, "--sft-data")
    assert (
        code == 2 and "a solution with its prompt is" in message and not (tmp_path / "run").exists()
    )
    # tiny is the base model, and its data has no written solutions.
    with pytest.raises(pytest.fail.Exception, match="sampled"):
        cli(expert_iteration, *argv, "--model", ROOT / "tiny", "--base", "tiny")


def written_commands() -> list[tuple[str, str, list[str]]]:
    """Return page, script and arguments of every command on the pages and in the docstrings."""
    names = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = {path.name: path.read_text() for path in names}
    pages |= {
        f"{m.__name__}.py": m.__doc__
        for m in (sft, expert_iteration, evaluate, ppo, reward_model, rcrl)
    }
    found = []
    for page, text in pages.items():
        variables = re.findall(r'\b([A-Z])=(?:"([^"]*)"|([^\s;"]+);)', text)
        for script, arguments in re.findall(
            r"python (\w+)\.py([^`&#|\n]*)", text.replace("\\\n", " ")
        ):
            for name, quoted, plain in variables:
                arguments = arguments.replace(f"${name}", quoted or plain)
            found.append((page, script, arguments.replace("...", "").split()))
    return found


def test_every_command_in_the_pages_and_docstrings_parses(capsys):
    scripts, commands = (
        {m.__name__: m for m in (sft, expert_iteration, evaluate, ppo, reward_model, rcrl)},
        written_commands(),
    )
    assert len(commands) > 30 and {script for _, script, _ in commands} == scripts.keys()
    for page, script, argv in commands:
        try:
            scripts[script].parse_args(argv)
        except SystemExit:
            pytest.fail(f"{page}: {script}.py {' '.join(argv)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("script", [expert_iteration, rcrl], ids=lambda m: m.__name__)
def test_another_model_needs_its_own_base(script, cli, nano, tmp_path):
    """Without --base the user would get a trained tiny instead of a trained --model."""
    code, message = cli(script, *short_run(script), "--model", nano, "--out", tmp_path / "run")
    assert (
        code == 2
        and "--base" in message
        and message.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_flags_without_an_effect_are_refused(cli, tmp_path):
    for script, flags in (
        (expert_iteration, ["--orm-threshold", "0.9"]),
        (rcrl, ["--labels", "outcome", "--label-rule", "any"]),
        (ppo, ["--kl-coef", "0.1", "--references", "x.jsonl"]),
        (ppo, ["--reward", "orm", "--switch", "0.5"]),
    ):
        code, message = cli(script, "--model", "tiny", *flags, "--out", tmp_path / "run")
        assert (
            code == 2
            and flags[-2] in message
            and message.count("\n") == 1
            and not (tmp_path / "run").exists()
        )


def test_if_every_sample_was_truncated_the_error_names_max_new_tokens(cli, tmp_path):
    code, message = cli(expert_iteration, *EI, "--max-new-tokens", 1, "--out", tmp_path / "run")
    assert code == 2 and "--max-new-tokens" in message


@pytest.mark.parametrize(
    "script", [sft, expert_iteration, evaluate, ppo, reward_model, rcrl], ids=lambda m: m.__name__
)
def test_no_flag_reads_false_as_true(script, monkeypatch):
    """Trap: bool("false") is True."""
    types, add = [], argparse._ActionsContainer.add_argument

    def spied(parser, *names, **options):
        types.append(options.get("type"))
        return add(parser, *names, **options)

    # This also records the flags of groups.
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", spied)
    script.parse_args([])
    assert len(types) > 15 and bool not in types


def test_more_than_one_greedy_sample_is_refused(cli, tmp_path):
    for script, flags in (
        (evaluate, []),
        (reward_model, []),
        (rcrl, []),
        (ppo, []),
        (sft, ["--samples", "2"]),
    ):
        code, message = cli(script, "--temperature", "0", *flags, "--out", tmp_path / "run")
        assert code == 2 and (
            "--temperature 0: all samples" in message or "greedy samples" in message
        ), message


def test_a_folder_with_only_args_and_metrics_is_not_changed(cli, nano, tmp_path):
    """Recorded results have only args.json and metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "args.json").write_text("{}")
    before = contents(tmp_path)
    code, message = cli(sft, *SFT, "--model", nano, "--out", tmp_path)
    assert code == 2 and "already holds a run" in message and contents(tmp_path) == before


def test_resuming_with_a_bad_model_keeps_the_run(cli, nano, tmp_path):
    argv = [*SFT, "--model", nano, "--out", tmp_path / "run", "--max-new-tokens", "8"]
    assert cli(sft, *argv)[0] == 0
    before = contents(tmp_path / "run")
    assert cli(sft, *argv, "--model", tmp_path, "--resume")[0] == 2
    assert contents(tmp_path / "run") == before


def test_samples_of_another_question_or_model_are_not_reused(cli, nano, tmp_path):
    """An evaluation samples changed questions again. It does not resume with another model."""
    file, out = tmp_path / "p.jsonl", tmp_path / "report.json"
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(4)]
    argv = [
        "--model",
        tmp_path / "m",
        "--dataset",
        file,
        "--split",
        "all",
        "--out",
        out,
        "--samples",
        2,
        "--max-new-tokens",
        4,
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common.Policy(nano).save(tmp_path / "m")
    assert cli(evaluate, *argv)[0] == 0
    before = contents(tmp_path)
    assert cli(evaluate, *argv, "--resume")[0] == 0
    after = contents(tmp_path)
    reports = [json.loads(files.pop("report.json")) for files in (before, after)]
    assert after == before and reports[1] == reports[0] | {"seconds": None}
    for i, change in (
        (2, {"question": "changed"}),
        (1, {"answer": "77"}),
        (0, {"question": "first"}),
    ):
        rows[i] |= change
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert cli(evaluate, *argv, "--resume")[0] == 0
        for kind in ("greedy", "samples"):
            written = rows_of(tmp_path / f"report.{kind}.jsonl")
            asked = [
                (row["question"], row["answer"]) for row in rows for _ in range(len(written) // 4)
            ]
            assert [(row["question"], row["reference"]) for row in written] == asked
            assert all(row["correct"] == (row["answer"] == row["reference"]) for row in written)
    policy = common.Policy(nano)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.add_(1.0)
    policy.save(tmp_path / "m")
    code, message = cli(evaluate, *argv, "--resume")
    assert code == 2 and "other settings" in message


def test_a_reward_model_scores_existing_samples_without_sampling_again(
    cli, nano, tmp_path, monkeypatch
):
    orms, out = [tmp_path / "orm_0", tmp_path / "orm_1"], tmp_path / "report.json"
    for i, folder in enumerate(orms):
        orm = reward_model.RewardModel(nano, "cpu", new=True)
        torch.manual_seed(i)
        torch.nn.init.normal_(orm.linear.weight)
        orm.save(folder)
    argv = ["--model", nano, "--limit-eval", 4, "--samples", 3, "--max-new-tokens", 8, "--out", out]
    assert cli(evaluate, *argv)[0] == 0
    first, texts = (
        json.loads(out.read_text()),
        [row["text"] for row in rows_of(tmp_path / "report.samples.jsonl")],
    )
    monkeypatch.setattr(common, "generate", lambda *_, **__: pytest.fail("sampled again"))
    scores = []
    # The scores of the second reward model replace the scores of the first.
    for orm in orms:
        assert cli(evaluate, *argv, "--orm", orm, "--resume")[0] == 0
        report, rows = json.loads(out.read_text()), rows_of(tmp_path / "report.samples.jsonl")
        assert "rerank@3" in report and all(
            report[key] == first[key] for key in first if "@" in key
        )
        assert [row["text"] for row in rows] == texts
        scores.append([row["score"] for row in rows])
    assert scores[0] != scores[1]
    # The report would name no reward model and lose the scores.
    code, message = cli(evaluate, *argv, "--resume")
    assert code == 2 and "other settings" in message


@pytest.mark.parametrize("name", ["args.json", "checkpoint/state.pt"])
def test_a_damaged_run_folder_gives_an_error_that_names_the_file(cli, nano, tmp_path, name):
    argv = [*SFT, "--model", nano, "--out", tmp_path, "--max-new-tokens", "8"]
    assert cli(sft, *argv)[0] == 0
    (tmp_path / name).write_bytes(b"\x00garbage")
    code, message = cli(sft, *argv, "--resume")
    assert code == 2 and name in message and message.count("\n") == 1


def test_a_path_that_cannot_be_written_gives_a_one_line_error(cli, nano, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, message = cli(sft, *SFT, "--model", nano, "--out", tmp_path / "file")
    assert code == 2 and "file" in message and message.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_after_a_full_disk_the_last_checkpoint_and_the_model_can_be_loaded(
    cli, nano, tmp_path, monkeypatch
):
    out, save, calls = tmp_path / "run", torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) > 8:
            file.write(b"half a checkpo")
            raise OSError(errno.ENOSPC, "No space left on device", str(out))
        save(state, file)

    argv = [*SFT, "--model", nano, "--out", out, "--max-new-tokens", "8", "--checkpoint-every", "0"]
    monkeypatch.setattr(torch, "save", full)
    code, message = cli(sft, *argv)
    assert code == 2 and "No space left" in message and message.count("\n") == 1
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["progress"]["step"] == 8
    assert common.Policy(str(out / "model"))
    monkeypatch.setattr(torch, "save", save)
    assert cli(sft, *argv, "--resume")[0] == 0
    assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == [0, 6, 12]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(cli, nano, tmp_path):
    argv = [
        *SFT,
        "--model",
        nano,
        "--out",
        tmp_path,
        "--max-new-tokens",
        "8",
        "--lr",
        "1e18",
        "--checkpoint-every",
        "0",
    ]
    code, message = cli(sft, *argv)
    assert code == 2 and "not finite" in message and message.count("\n") == 1
    assert (
        torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["progress"]["step"] >= 1
    )


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                stat = os.stat(os.path.join(root, name))
                found.append((name, stat.st_size, stat.st_mtime_ns))
            except FileNotFoundError:
                pass
    return sorted(found)


def resumed(script: str, out: Path) -> list:
    """Return the flags that start or resume a run of KILLED."""
    where = [out / "report.json"] if script == "evaluate" else [out, "--checkpoint-every", "0"]
    # Only a CPU resumes a run bit by bit.
    return [*KILLED[script][0], "--device", "cpu", "--resume", "--out", *where]


def run_script(path: Path, argv: list, output: Path) -> None:
    """Run `python script.py argv... >output 2>&1` in the folder of the output."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(output.parent)
    run_in_process(path, argv)


def run_in_process(path: Path, argv: list) -> None:
    sys.argv = [str(path), *map(str, argv)]
    runpy.run_path(str(path), run_name="__main__")


# The fork server imports the slow packages once. This saves four seconds per process.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])


def start(script: str, out: Path) -> multiprocessing.Process:
    """Run a script in a process of its own. It prints to output.txt next to its folder."""
    process = FORKS.Process(
        target=run_script,
        args=(ROOT / f"{script}.py", resumed(script, out), out.parent / "output.txt"),
    )
    process.start()
    return process


def stop_after_changes(
    process: multiprocessing.Process, out: Path, changes: int, how: int, delay: float
) -> bool:
    """Send a signal after the run folder has changed `changes` times. Wait for the end.

    Returns False if the run ended before the signal.
    """
    last = snapshot(out)
    while process.is_alive():
        now = snapshot(out)
        if now != last:
            last, changes = now, changes - 1
            if changes <= 0:
                time.sleep(delay)
                try:
                    os.kill(process.pid, how)
                # The run ended before the signal.
                except ProcessLookupError:
                    return False
                process.join()
                return process.exitcode != 0
        time.sleep(0.002)
    return False


TINY = "--model tiny --limit-eval 8 --max-new-tokens 60 --gen-batch-size 24"
# Script -> (flags, number of SIGKILLs). A script with two SIGKILLs also gets one Ctrl-C.
KILLED = {
    "sft": (SFT, 2),
    "expert_iteration": (f"{TINY} --limit-train 24 --samples 2 --epochs 1 --pass-k 2", 2),
    "ppo": (f"{TINY} --limit-train 40 --questions 8 --samples 2 --phases 6 --eval-every 3", 2),
    "rcrl": (
        f"{TINY} --limit-train 24 --samples 3 --completions 2 --epochs 4 --batch-size 8",
        1,
    ),
    "reward_model": (
        f"{TINY} --limit-train 16 --samples 4 --eval-samples 4 --epochs 2 --batch-size 8",
        1,
    ),
    "evaluate": (f"{TINY} --limit-eval 24 --samples 3 --gen-batch-size 4", 1),
}
KILLED = {
    script: (flags if script == "sft" else flags.split(), kills)
    for script, (flags, kills) in KILLED.items()
}
# A longer mode: this number of additional SIGKILLs and Ctrl-Cs, at other moments.
MORE_KILLS = int(os.environ.get("MORE_KILLS", 0))


@pytest.mark.parametrize("script", KILLED)
def test_a_killed_run_resumes_to_the_same_weights_and_metrics(script, cli, tmp_path):
    """SIGKILL and Ctrl-C at random moments, then --resume, change no bit.

    The moments are seeded. Together with test_processes.py there are at least ten kills.
    """
    whole, broken, rng = tmp_path / "whole", tmp_path / "broken", random.Random(1 + MORE_KILLS)
    whole.mkdir()
    broken.mkdir()
    module, wanted = importlib.import_module(script), KILLED[script][1]
    assert cli(module, *resumed(script, whole))[0] == 0
    todo = (
        [signal.SIGKILL] * wanted
        + [signal.SIGINT] * (wanted > 1)
        + [signal.SIGKILL, signal.SIGINT] * MORE_KILLS
    )
    done = []
    for how in todo:
        process = start(script, broken)
        # evaluate.py changes its folder seven times. The loop may miss some of these changes.
        changes = rng.randrange(3, 6) if script == "evaluate" else rng.randrange(4, 9)
        if not stop_after_changes(process, broken, changes, how, rng.random() * 0.1):
            # The run ended before the signal. The assertion below limits this case.
            break
        done.append(how)
        if how == signal.SIGINT:
            assert process.exitcode == 130 and "--resume" in (tmp_path / "output.txt").read_text()
    assert MORE_KILLS or done == todo, f"ended after {len(done)} of {len(todo)} signals"
    if MORE_KILLS:
        counts = f"{done.count(signal.SIGKILL)} kills, {done.count(signal.SIGINT)} Ctrl-Cs"
        print(f"{script}: {counts}", file=sys.__stdout__, flush=True)
    assert cli(module, *resumed(script, broken))[0] == 0
    if script == "evaluate":
        reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, broken)]
        # An interrupted evaluation does not know its seconds.
        assert reports[0].pop("seconds") > 0 and reports[1].pop("seconds") is None
        assert reports[0] == reports[1]
        names = ["report.greedy.jsonl", "report.samples.jsonl"]
    else:
        assert without_time(whole / "metrics.jsonl") == without_time(broken / "metrics.jsonl")
        names = [
            "model/model.safetensors",
            *(str(p.relative_to(whole)) for p in whole.glob("samples/*")),
        ]
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert not list(broken.rglob("*.part"))


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that makes a file system of `size` bytes, or changes its size."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def resize(size: int) -> Path:
        options = f"remount,size={size}" if mounted else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")
        mounted.append(size)
        return folder

    yield resize
    if mounted:
        # Lazy: a file may still be open.
        subprocess.run(["umount", "-l", folder], check=True)


ROUND = f"{TINY} --limit-train 24 --samples 2 --epochs 1 --rounds 1".split()


@pytest.mark.parametrize(
    "script, argv, size",
    [
        (sft, [*SFT, "--limit-eval", "4"], 13_000_000),
        (expert_iteration, [*ROUND, "--epochs", "2"], 13_000_000),
        (ppo, KILLED["ppo"][0], 16_000_000),
        (rcrl, KILLED["rcrl"][0], 13_000_000),
        (reward_model, KILLED["reward_model"][0], 13_000_000),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_resumes_after_a_real_disk_was_full(script, argv, size, cli, small_disk):
    """The disk has room for one checkpoint and the model. A second checkpoint does not fit."""
    out = small_disk(size) / "run"
    argv = ["--model", "tiny", *argv, "--out", out, "--checkpoint-every", "0"]
    code, message = cli(script, *argv)
    lines = [line for line in message.splitlines() if line.startswith("error: ")]
    assert (
        code == 2
        and len(lines) == 1
        and ("No space left" in lines[0] or "could not be written" in lines[0])
    ), message
    saved = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert saved["progress"]
    if (out / "model").exists():
        load = reward_model.RewardModel if script is reward_model else common.Policy
        load(str(out / "model"))
    small_disk(200_000_000)
    assert cli(script, *argv, "--resume")[0] == 0
    assert (out / "model" / "model.safetensors").exists() and not list(out.rglob("*.part"))
