"""Describe the errors of best-scored samples: `python results/slips.py RUN.samples.jsonl ...`.

A false calculation is a line whose <<expression=result>> does not hold or is not complete. Other
incorrect samples calculate correctly, but they do not answer the question. For each file the script
prints four numbers:

1. The number of problems with an incorrect best-scored sample.
2. How many of these samples contain a false calculation.
3. How many of them score at most 0.03 above the best correct sample.
4. The fraction of incorrect samples that contain a false calculation.
"""

import ast
import json
import operator
import re
import sys

ANNOTATION = re.compile(r"<<([-+*/().\d\s]+)=(-?[\d.]+)>>")
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(node: ast.expr) -> float:
    """Evaluate an expression. Raise an error if it has more than numbers and + - * /."""
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp):
        return -value_of(node.operand)
    return float(node.value)


def is_false(text: str) -> bool:
    """Return whether a solution contains a false calculation."""
    for line in text.split("\n"):
        found = ANNOTATION.search(line)
        if "<<" in line and not found:
            return True
        try:
            if found:
                value = value_of(ast.parse(found[1].strip(), mode="eval").body)
                if abs(value - float(found[2])) > 1e-6:
                    return True
        except (SyntaxError, ZeroDivisionError, KeyError, ValueError, AttributeError):
            return True
    return False


def describe(path: str) -> str:
    problems: dict[str, list[dict]] = {}
    with open(path) as file:
        for sample in map(json.loads, file):
            problems.setdefault(sample["problem"], []).append(sample)
    # (Incorrect best-scored sample, best score of a correct sample).
    misled = []
    for group in problems.values():
        best = max(group, key=lambda sample: sample["score"])
        score = max([sample["score"] for sample in group if sample["correct"]], default=-1.0)
        if not best["correct"]:
            misled.append((best, score))
    slips = sum(is_false(best["text"]) for best, _ in misled)
    close = sum(best["score"] - score <= 0.03 for best, score in misled)
    incorrect = [s for group in problems.values() for s in group if not s["correct"]]
    share = sum(is_false(sample["text"]) for sample in incorrect) / len(incorrect)
    counts = f"best-scored wrong {len(misled)}, false calculation {slips}, close {close}"
    return f"{path}: {counts}; of all wrong samples {share:.2f}"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(describe(path))
