"""Check the equation-only solutions of GSM8K: `results/gsm8k/equations.py`."""

import importlib.util
import json

import pytest
from conftest import ROOT

import common

spec = importlib.util.spec_from_file_location("equations", ROOT / "results/gsm8k/equations.py")
equations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(equations)

ANSWERS = {
    "fits": "Ann has 6/2=<<6/2=3>>3 left.\nTogether 3+4 = <<3+4=7>>7 pens.\n#### 7",
    "large": "That is 3*500=$<<3*500=1500>>1,500.\n#### 1,500",
    "no annotations": "She keeps seven.\n#### 7",
    "other value": "First 6/2=<<6/2=3>>3, and 4 more.\n#### 7",
}


def rows(path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    return {row["question"]: row["answer"] for row in lines}


def test_a_solution_is_replaced_by_its_annotations(tmp_path, capsys):
    entries = [{"question": name, "answer": text} for name, text in ANSWERS.items()]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    out = tmp_path / "out"
    equations.main(["--dataset", str(tmp_path), "--out", str(out)])
    expected = {
        "fits": "6/2=<<6/2=3>>3\n3+4=<<3+4=7>>7\n#### 7",
        "large": "3*500=<<3*500=1500>>1500\n#### 1500",
    }
    assert rows(out / "train.jsonl") == expected
    answers = {"no annotations": "#### 7", "other value": "#### 7"}
    assert rows(out / "test.jsonl") == expected | answers
    printed = capsys.readouterr().out
    assert "2 without fitting annotations left out" in printed
    assert "2 without fitting annotations kept with the answer line alone" in printed


def test_the_answers_of_gsm8k_do_not_change(data_folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(data_folder)
    equations.main(["--out", str(tmp_path)])
    assert len(rows(tmp_path / "test.jsonl")) == 1319
    splits = {"train": ("train", "dev"), "test": ("test",)}
    for name, parts in splits.items():
        problems = [p for part in parts for p in common.load_problems("gsm8k", part)]
        answers = {p.question: p.answer for p in problems}
        for question, answer in rows(tmp_path / f"{name}.jsonl").items():
            assert common.extract_answer(answer) == answers[question]
