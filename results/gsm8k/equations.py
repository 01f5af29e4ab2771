r"""Write GSM8K with equation-only solutions: the annotations <<a+b=c>> of a solution, one a line, and its answer line.

    "He has 6/2=<<6/2=3>>3 left.\n#### 3"  ->  "6/2=<<6/2=3>>3\n#### 3"

A training problem is left out if its solution has no annotations, or if the last value is not the answer. A test problem
is never left out; without annotations that fit it keeps its answer line alone. docs/gsm8k.md says how to use the folder:

    python results/gsm8k/equations.py --out runs/equations
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import runtime  # noqa: E402


def equations(problem: common.Problem) -> str | None:
    """Return the equation-only solution, or None if the annotations do not end in the answer."""
    found = re.findall(r"<<([^<>=\n]+)=([^<>=\n]+)>>", problem.reference or "")
    if not found or common.extract_answer(f"{common.MARKER} {found[-1][1]}") != problem.answer:
        return None
    lines = [f"{left}=<<{left}={value}>>{value}" for left, value in found]
    return "\n".join([*lines, f"{common.MARKER} {problem.answer}"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="gsm8k", help="gsm8k, or a folder like it (default: gsm8k)")  # fmt: skip
    parser.add_argument("--out", default="runs/equations", help="folder (default: runs/equations)")
    args = parser.parse_args(argv)
    splits = {"train": ("train", "dev"), "test": ("test",)}
    for name, parts in splits.items():
        problems = [p for part in parts for p in common.load_problems(args.dataset, part)]
        rows = [(p, equations(p)) for p in problems]
        n_unfit = sum(text is None for _, text in rows)
        if name == "test":
            rows = [(p, text or f"{common.MARKER} {p.answer}") for p, text in rows]
        rows = [{"question": p.question, "answer": text} for p, text in rows if text]
        path = Path(args.out) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
        about = "left out" if name == "train" else "kept with the answer line alone"
        print(f"{path}: {len(rows)} problems; {n_unfit} without fitting annotations {about}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except runtime.UserError as error:
        sys.exit(f"error: {error}")
