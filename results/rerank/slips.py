"""What the samples that the reward model scores best get wrong: `python results/rerank/slips.py RUN.samples.jsonl ...`.

A false calculation is a line whose <<expression=result>> does not hold or is not complete; the other wrong samples
calculate right what was not asked. Printed for each file: how many problems' best-scored sample is wrong, how many of these
hold a false calculation, how many score at most 0.03 above the best right sample, and the share of false calculations
among all wrong samples."""

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
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp):
        return -value_of(node.operand)
    return float(node.value)


def is_false(text: str) -> bool:
    for line in text.split("\n"):
        found = ANNOTATION.search(line)
        if "<<" in line and not found:
            return True
        try:
            if (
                found
                and abs(value_of(ast.parse(found[1].strip(), mode="eval").body) - float(found[2]))
                > 1e-6
            ):
                return True
        except (SyntaxError, ZeroDivisionError, KeyError, ValueError):
            return True
    return False


for path in sys.argv[1:]:
    problems: dict[str, list[dict]] = {}
    with open(path) as file:
        for sample in map(json.loads, file):
            problems.setdefault(sample["problem"], []).append(sample)
    best = [(max(group, key=lambda s: s["score"]), group) for group in problems.values()]
    misled = [
        (top, max([s["score"] for s in group if s["correct"]], default=-1.0))
        for top, group in best
        if not top["correct"]
    ]
    wrong = [sample for group in problems.values() for sample in group if not sample["correct"]]
    slips = sum(is_false(top["text"]) for top, _ in misled)
    close = sum(top["score"] - right <= 0.03 for top, right in misled)
    among = sum(is_false(sample["text"]) for sample in wrong) / len(wrong)
    print(
        f"{path}: best-scored wrong {len(misled)}, false calculation {slips}, close {close}; of all wrong samples {among:.2f}"
    )
