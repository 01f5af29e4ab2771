"""Generate the embedded task: word problems in the form of GSM8K.

A story is a plan of steps. Each kind of step has an operation and a few sentences.
"""

import functools
import random

# Fewest and most steps of a problem.
STEPS = {"arithmetic": (1, 4), "arithmetic-hard": (4, 6)}
# The ids of problems start with these names.
NAMES = {"arithmetic": "arithmetic4", "arithmetic-hard": "arithmetic6"}
# The last 256 training problems are the dev split.
N_TRAIN, N_TEST = 2560, 1000
# The number of training problems with a written solution.
N_WRITTEN = 24

OPERATIONS = {
    "groups": "*",
    "gain": "+",
    "loss": "-",
    "times": "*",
    "half": "/",
    "fewer": "-",
    "more": "+",
    "total": "+",
}
# {a}, {c}: persons. {x}, {y}: things. {v}: the first value. {b}: the operand.
# {w}: the person that the question asks about.
SENTENCES = {
    "start": ["{a} has {v} {x}.", "{a} owns {v} {x}.", "There are {v} {x} in the room of {a}."],
    "groups": [
        "{a} has {v} bags with {b} {x} each.",
        "{a} fills {v} boxes. Each box holds {b} {x}.",
    ],
    "gain": ["{a} buys {b} more {x}.", "Then {a} finds {b} {x}.", "A friend gives {a} {b} {x}."],
    "loss": ["{a} gives away {b} {x}.", "Then {a} loses {b} {x}.", "{a} sells {b} of the {x}."],
    "times": ["Soon {a} has {b} times as many {x}.", "Then the number of {x} grows {b} fold."],
    "half": ["{a} uses half of the {x}.", "Then half of the {x} are lost."],
    "fewer": ["{c} has {b} fewer {x} than {a}.", "{c} owns {b} {x} less than {a}."],
    "more": ["{c} has {b} more {x} than {a}.", "{c} owns all that {a} has and {b} {x} on top."],
    "unused": [
        "{a} also has {b} {y}.",
        "{a} is {b} years old.",
        "{a} lives {b} miles away.",
        "This took {b} days.",
    ],
    "total": [
        "How many {x} do {a} and {c} have together?",
        "How many {x} are that for {a} and {c} in total?",
    ],
    "ask": ["How many {x} does {w} have now?", "How many {x} has {w} got in the end?"],
}
PEOPLE = "Ann Ben Carl Dora Eva Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul Rita Sam Tina Vera".split()
THINGS = "apples books cards coins cups eggs hats keys marbles nuts pens plums shells stamps stones toys".split()


def solve_story(
    plan: list[tuple[str, int]], operations: dict[str, str] = OPERATIONS
) -> list[tuple[str, int]] | None:
    """Compute the steps [("14+6", 20), ...] of a plan [("start", 14), ("gain", 6), ...].

    `operations` defines how each kind of step is read. A kind without an operation is skipped.
    Returns None if a value is no integer in 1..49. The numbers stay small because a tiny model is
    worst at two-digit sums, and sums are not the point of the task.
    """
    value, other, steps = plan[0][1], 0, []
    for kind, operand in plan[1:]:
        if kind in ("fewer", "more"):
            # "total" adds the value of the first person.
            other = value
        op = operations.get(kind)
        if op is None:
            continue
        operand = other if kind == "total" else operand
        if op == "/" and value % operand:
            return None
        result = {
            "+": value + operand,
            "-": value - operand,
            "*": value * operand,
            "/": value // operand,
        }[op]
        if not 1 <= result <= 49:
            return None
        steps.append((f"{value}{op}{operand}", result))
        value = result
    return steps or None


def tell_story(rng: random.Random, n_steps: int) -> tuple[str, list[tuple[str, int]]]:
    """Write a random word problem with `n_steps` steps. Returns the question and its plan."""
    ending = rng.choice([[], [], ["compare"], ["compare", "total"]][: 3 if n_steps == 1 else 4])
    kinds = [rng.choice(["gain", "loss", "times", "half"]) for _ in range(n_steps - len(ending))]
    if kinds and rng.random() < 0.3:
        kinds[0] = "groups"
    kinds += [rng.choice(["fewer", "more"]) if kind == "compare" else kind for kind in ending]
    grouped, compared = "groups" in kinds, len(ending) > 0
    operands = {"groups": range(2, 8), "times": range(2, 4), "half": [2], "total": [0]}
    # Sample numbers until every intermediate value is a small positive integer.
    for _ in range(100):
        plan = [("start", rng.randrange(2, 8 if grouped else 21))]
        plan += [(kind, rng.choice(operands.get(kind, range(2, 10)))) for kind in kinds]
        if solve_story(plan):
            break
    else:
        # Some kinds of steps do not go together, for example "times" six times.
        return tell_story(rng, n_steps)
    # Sometimes add a number that does not matter.
    if rng.random() < 0.3:
        plan.insert(
            rng.randrange(2 if grouped else 1, len(plan) + 1 - len(ending)),
            ("unused", rng.randrange(2, 10)),
        )
    (a, c), (x, y) = rng.sample(PEOPLE, 2), rng.sample(THINGS, 2)
    words = {"a": a, "c": c, "x": x, "y": y, "v": plan[0][1], "w": c if compared else a}
    # "3 bags with 4 apples each" contains the first value as well.
    told = plan[1:] if grouped else plan
    told = told if "total" in kinds else [*told, ("ask", 0)]
    return " ".join(
        rng.choice(SENTENCES[kind]).format(b=operand, **words) for kind, operand in told
    ), plan


def write_solution(steps: list[tuple[str, int]]) -> str:
    """Write one line per step in the form of GSM8K: "14+6=<<14+6=20>>20\n#### 20"."""
    lines = [f"{left}=<<{left}={value}>>{value}" for left, value in steps]
    return "\n".join([*lines, f"#### {steps[-1][1]}"])


@functools.cache
def generate(dataset: str) -> list[tuple[str, str]]:
    """Generate the (question, solution) pairs of a dataset, training problems first.

    They are the same in every run.
    """
    rng, solutions = random.Random(20240307), {}
    while len(solutions) < N_TRAIN + N_TEST:
        question, plan = tell_story(rng, rng.randint(*STEPS[dataset]))
        if question not in solutions:
            solutions[question] = write_solution(solve_story(plan))
    return list(solutions.items())


def rows(dataset: str, part: str) -> list[dict]:
    """Return the id, question, written solution and reference solution of every problem.

    part: "train" or "test". The first problems have a written solution, all have a reference.
    """
    found = []
    for i, (question, text) in enumerate(generate(dataset)):
        row = {"id": f"{NAMES[dataset]}-{i}", "question": question}
        found.append(row | {"solution": text if i < N_WRITTEN else None, "reference": text})
    return found[N_TRAIN:] if part == "test" else found[:N_TRAIN]
