"""What the scripts share: problems, answer checking, the policy, generation, log-probabilities, the run folder.

In the order in which data flows through a script:

    problems ── prompt ids ──> generate ──> samples ── answer check ──> token sequences ──> loss ──> policy

Nothing here knows which algorithm calls it. To fork a script, copy it together with this file.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import heapq
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import typing
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils import logging as transformers_logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch for GPUs
    triton = None

transformers_logging.disable_progress_bar()


class UserError(Exception):
    """Something the user can mend. `run_main` prints it as one line and exits with code 2."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the memory of the device is used up: PyTorch and CUDA say it in several ways."""
    said = ("t allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def warn(text: str, each: bool = False) -> None:
    """On standard error. Of several processes the first one speaks for all, unless `each` has something of its own to say."""
    if each or process_rank() == 0:
        tqdm.write(f"warning: {text}", file=sys.stderr)


warn_once = functools.lru_cache(warn)


# ---------------------------------------------------------------------------------------------------------------------
# 0. Several processes: `torchrun --nproc-per-node N script.py ...`
#
# Every process runs the same script on the same data. Of whatever is long (problems to sample, sequences to train on or to
# score) each takes its share, and gets the results of all; the first one alone writes and prints. Without torchrun there is
# one process, and nothing here does anything.
# ---------------------------------------------------------------------------------------------------------------------


def process_rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join the process group, if torchrun started several processes. All but the first print only errors."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "LOCAL_RANK" not in os.environ:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))  # a share of the samples may take hours
    if sys.platform == "linux":  # if torchrun is killed, go with it: or a second run would write to the same folder
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False  # so that tqdm draws no bars


def gather(part: list) -> list:
    """The lists of all processes, one after the other."""
    parts: list = [None] * process_count()
    if len(parts) == 1:
        return part
    dist.all_gather_object(parts, part)
    return [entry for part in parts for entry in part]


def on_first(action: Callable):
    """Run `action`, which reads or writes files, in the first process alone; all get what it returns or its UserError."""
    if process_count() == 1:
        return action()
    said = [None, None]
    if process_rank() == 0:
        try:
            said = [action(), None]
        except (UserError, OSError) as error:
            said = [None, str(error)]
    dist.broadcast_object_list(said, 0)
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Problems
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem. `id` is unique within its dataset and keys the random numbers of its samples."""

    id: str
    question: str
    answer: Fraction
    solution: str | None = None  # a written solution that ends in "#### answer"; None where only the answer is known
    reference: str | None = None  # the same, or one that only metrics, rewards and reward models may see, no policy

    @functools.cached_property
    def steps(self) -> tuple[str, ...] | None:
        """The reference's arithmetic operations."""
        return None if self.reference is None else equations(self.reference)


# The embedded task: a story is a plan of steps; each kind of step has an operation and sentences that say it.
# {a}, {c}: persons, {x}, {y}: things, {v}: the first value, {b}: the operand, {w}: whom the question asks about.
OPERATIONS = {
    "groups": "*", "gain": "+", "loss": "-", "times": "*", "half": "/", "fewer": "-", "more": "+", "total": "+",
}  # fmt: skip
SENTENCES = {
    "start": ["{a} has {v} {x}.", "{a} owns {v} {x}.", "There are {v} {x} in the room of {a}."],
    "groups": ["{a} has {v} bags with {b} {x} each.", "{a} fills {v} boxes. Each box holds {b} {x}."],
    "gain": ["{a} buys {b} more {x}.", "Then {a} finds {b} {x}.", "A friend gives {a} {b} {x}."],
    "loss": ["{a} gives away {b} {x}.", "Then {a} loses {b} {x}.", "{a} sells {b} of the {x}."],
    "times": ["Soon {a} has {b} times as many {x}.", "Then the number of {x} grows {b} fold."],
    "half": ["{a} uses half of the {x}.", "Then half of the {x} are lost."],
    "fewer": ["{c} has {b} fewer {x} than {a}.", "{c} owns {b} {x} less than {a}."],
    "more": ["{c} has {b} more {x} than {a}.", "{c} owns all that {a} has and {b} {x} on top."],
    "unused": ["{a} also has {b} {y}.", "{a} is {b} years old.", "{a} lives {b} miles away.", "This took {b} days."],
    "total": ["How many {x} do {a} and {c} have together?", "How many {x} are that for {a} and {c} in total?"],
    "ask": ["How many {x} does {w} have now?", "How many {x} has {w} got in the end?"],
}
PEOPLE = "Ann Ben Carl Dora Eva Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul Rita Sam Tina Vera".split()
THINGS = "apples books cards coins cups eggs hats keys marbles nuts pens plums shells stamps stones toys".split()


def solve_story(plan: list[tuple[str, int]], operations: dict[str, str] = OPERATIONS) -> list[tuple[str, int]] | None:
    """The steps [("14+6", 20), ...] of a plan [("start", 14), ("gain", 6), ...] under a reading of each kind of step
    (a kind without an operation is skipped). None where a value is no integer in 1..49: the numbers stay small,
    because two-digit sums are what a tiny model is worst at, and they are not the point of the task."""
    value, other, steps = plan[0][1], 0, []
    for kind, operand in plan[1:]:
        if kind in ("fewer", "more"):
            other = value  # what the first person has, for a total of both
        op = operations.get(kind)
        if op is None:
            continue
        operand = other if kind == "total" else operand
        if op == "/" and value % operand:
            return None
        result = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[op]
        if not 1 <= result <= 49:
            return None
        steps.append((f"{value}{op}{operand}", result))
        value = result
    return steps or None


def tell_story(rng: random.Random, n_steps: int) -> tuple[str, list[tuple[str, int]]]:
    """A random word problem with `n_steps` steps: the question and its plan."""
    ending = rng.choice([[], [], ["compare"], ["compare", "total"]][: 3 if n_steps == 1 else 4])
    kinds = [rng.choice(["gain", "loss", "times", "half"]) for _ in range(n_steps - len(ending))]
    if kinds and rng.random() < 0.3:
        kinds[0] = "groups"
    kinds += [rng.choice(["fewer", "more"]) if kind == "compare" else kind for kind in ending]
    grouped, compared = "groups" in kinds, len(ending) > 0
    operands = {"groups": range(2, 8), "times": range(2, 4), "half": [2], "total": [0]}
    for _ in range(100):  # draw numbers until every value on the way is a small positive integer
        plan = [("start", rng.randrange(2, 8 if grouped else 21))]
        plan += [(kind, rng.choice(operands.get(kind, range(2, 10)))) for kind in kinds]
        if solve_story(plan):
            break
    else:
        return tell_story(rng, n_steps)  # these kinds of steps do not go together, "times" six times over for one
    if rng.random() < 0.3:  # a number that does not matter
        plan.insert(rng.randrange(2 if grouped else 1, len(plan) + 1 - len(ending)), ("unused", rng.randrange(2, 10)))
    (a, c), (x, y) = rng.sample(PEOPLE, 2), rng.sample(THINGS, 2)
    words = {"a": a, "c": c, "x": x, "y": y, "v": plan[0][1], "w": c if compared else a}
    told = plan[1:] if grouped else plan  # "3 bags with 4 apples each" says the first value too
    told = told if "total" in kinds else [*told, ("ask", 0)]
    return " ".join(rng.choice(SENTENCES[kind]).format(b=operand, **words) for kind, operand in told), plan


def write_solution(steps: list[tuple[str, int]]) -> str:
    """One line a step with the calculator annotation of GSM8K, then the answer: "14+6=<<14+6=20>>20\n#### 20"."""
    return "\n".join([f"{left}=<<{left}={value}>>{value}" for left, value in steps] + [f"{MARKER} {steps[-1][1]}"])


@functools.lru_cache  # every split is a slice of the same
def arithmetic_problems(min_steps: int = 1, max_steps: int = 4) -> tuple[Problem, ...]:
    """The embedded task: 2,560 problems for train and dev, then 1,000 for test, the same in every run. Only the first 24
    carry a written solution (written solutions are dear, answers are cheap); all have a reference."""
    rng, seen, problems = random.Random(20240307), set(), []
    while len(problems) < 3560:
        question, plan = tell_story(rng, rng.randint(min_steps, max_steps))
        if question in seen:
            continue
        seen.add(question)
        steps, number = solve_story(plan), len(problems)
        name, text = f"arithmetic{max_steps}-{number}", write_solution(steps)
        problems.append(Problem(name, question, Fraction(steps[-1][1]), text if number < 24 else None, text))
    return tuple(problems)


HUB = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ("ChilleD/SVAMP",)}
STEPS = {"arithmetic": (1, 4), "arithmetic-hard": (4, 6)}  # of a problem, at least and at most


def load_problems(dataset: str, split: str, limit: int | None = None) -> list[Problem]:
    """The problems of a split: "train", "dev" (the last 256 of the training problems, or the last tenth of fewer than
    2,560; never trained on), "test", or "all" (of a single file).

    dataset: "arithmetic" (built in, 1 to 4 steps), "arithmetic-hard" (4 to 6 steps), "gsm8k", "svamp", a .jsonl file
    with "question" and "answer" (as in GSM8K, or only a number), SVAMP.json, or a folder with train and test files.
    A single file is divided: its last tenth is the test split. limit: only the first so many.
    Raises UserError for what is missing or malformed, with file and line."""
    part = "test" if split == "test" else "train"
    path = Path(dataset)
    if dataset in STEPS:
        problems = list(arithmetic_problems(*STEPS[dataset]))
        problems = problems[2560:] if part == "test" else problems[:2560]
    elif dataset in HUB:
        problems = _hub_problems(dataset, part)
    elif path.is_dir():
        files = [path / f"{part}{suffix}" for suffix in (".jsonl", ".json") if (path / f"{part}{suffix}").is_file()]
        if not files:
            raise UserError(f"--dataset {dataset}: the folder has no {part}.jsonl")
        problems = _file_problems(files[0])
    elif path.is_file():
        problems = _file_problems(path)
        if split == "all":
            return problems[:limit]
        if len(problems) < 3:
            raise UserError(f"{path}: {len(problems)} problems; at least 3 are needed for train, dev and test")
        problems = _divide(dataset, problems, max(1, len(problems) // 10), "test")[split == "test"]
    else:
        raise UserError(f"--dataset {dataset}: no such file or folder, and not one of {', '.join([*STEPS, *HUB])}")
    if split == "all":
        raise UserError(f"--split all is for a single file, and {dataset} has splits of its own")
    if part == "train":
        n_dev = 256 if len(problems) >= 2560 else max(1, len(problems) // 10)
        problems = _divide(dataset, problems, n_dev, "dev")[split == "dev"]
    if not problems:
        raise UserError(f"--dataset {dataset}: its {split} split is empty")
    return problems[:limit]


def _divide(dataset: str, problems: list[Problem], n: int, name: str) -> tuple[list[Problem], list[Problem]]:
    """All but the last `n` problems, and these, which are the split `name`."""
    rest, last = problems[:-n], problems[-n:]
    if repeated := {p.question for p in rest} & {p.question for p in last}:
        warn_once(
            f"--dataset {dataset}: {len(repeated)} of the questions of {name} are among the training questions, too"
        )
    return rest, last


def _hub_problems(dataset: str, part: str) -> list[Problem]:
    from datasets import load_dataset  # imported here because it takes a second, and the embedded task needs none of it

    try:
        rows = load_dataset(*HUB[dataset], split=part)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--dataset {dataset}: could not be loaded ({reason})") from None
    return [_read_problem(row, f"{dataset}/{part}/{i}", f"{dataset} {part} row {i}") for i, row in enumerate(rows)]


def _file_problems(path: Path) -> list[Problem]:
    """.json: a list of problems; anything else: one problem a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if path.suffix == ".json":
        rows = _parse_json(text, str(path))
        if not isinstance(rows, list):
            raise UserError(f"{path}: not a list of problems")
        rows = [(f"{path} entry {i}", row) for i, row in enumerate(rows, 1)]
    else:
        rows = json_lines(text, path)
    return [_read_problem(row, f"{path.name}/{i}", place) for i, (place, row) in enumerate(rows)]


def json_lines(text: str, path: Path) -> list[tuple[str, object]]:
    """What every line holds that is not blank, each with its place ("train.jsonl line 3") for error messages."""
    places = [(f"{path} line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, _parse_json(line, place)) for place, line in places]


def _parse_json(text: str, place: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of thousands of digits or brackets
        raise UserError(f"{place}: broken JSON ({error})") from None


def _read_problem(row: dict, name: str, place: str) -> Problem:
    """GSM8K ("question", "answer" with the solution) or SVAMP ("Body", "Question", "Answer")."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object")
    # a lone half of a surrogate pair breaks tokenizers
    row = {key: v.encode(errors="replace").decode() if isinstance(v, str) else v for key, v in row.items()}
    for key in row.keys() & {"question", "Question", "Body"}:
        if not isinstance(row[key], str) or not row[key].strip(" \t\r\n?"):
            raise UserError(f"{place}: {key!r} is not a text")
    if "Body" in row and "Question" in row:
        body = row["Body"].strip()
        question = f"{body if body.endswith(('.', '?', '!', ',')) else body + '.'} {row['Question'].strip()}"
        written = str(row.get("Answer")).strip()
    elif "question" in row and isinstance(row.get("answer"), str | int | float):
        question, written = row["question"].strip(), str(row["answer"]).strip()
    else:
        raise UserError(f'{place}: needs "question" and "answer" (GSM8K) or "Body", "Question" and "Answer" (SVAMP)')
    solution = written if MARKER in written else None
    answer = extract_answer(written if solution else f"{MARKER} {written}")
    if solution is None and "\n" in written:
        raise UserError(f"{place}: the answer has several lines and none that begins with {MARKER}")
    if len({extract_answer(line) for line in written.splitlines() if MARKER in line}) > 1:
        raise UserError(f"{place}: the answer has several lines with {MARKER}, which do not say the same")
    if answer is None:
        raise UserError(f"{place}: the answer {written[-40:]!r} is no number")
    return Problem(name, question, answer, solution, solution)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Answers
# ---------------------------------------------------------------------------------------------------------------------

MARKER = "####"
_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_RUN = re.compile(r"[0-9.,/]+")  # one character class: cannot backtrack
_TOUCHING = re.compile(r"[0-9][^0-9.,/][0-9]")  # "1 001", "2^2", "1e1": not two numbers, and not clear which one
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015"  # "\u20135" may be minus five or a five after a dash
_OPENING = "$\u20ac\u00a3\u00a5*([{\\ \u00a0"  # may stand between a sign and its number
_COMMAND = re.compile(r"\\[a-z]{1,16}$")  # of LaTeX, which may, too: "-\boxed{5}"
_SIGNS = ("-", "\u2212", "+", *_DASHES)


def first_solution(text: str) -> str:
    """The text up to the first end of its solution: the end of the answer line, or the next question that a prompted
    model makes up. "6/2=3\n#### 3\n\nQuestion: ..." -> "6/2=3\n#### 3"."""
    text = ("\n" + text).partition("\nQuestion:")[0][1:]
    marker = text.find(MARKER)
    if marker >= 0:
        text = text[: (text + "\n").index("\n", marker)]
    return text


def extract_answer(text: str, lenient: bool = False) -> Fraction | None:
    """The number after the first "####" of a solution, or None if there is none or it is not clear which.

    Read are "#### 18", "####18", "#### $1,234.50", "#### -$3/4", "#### **18** apples.", "#### 50%"; two different
    numbers, "18/", "1,8" or "1.2.3" are no answer, nor is a number of more than 64 characters. Any string gets an answer
    or None in time linear in its length. lenient: without an answer line, or where it has no digits and so is a heading,
    the last number of the text (for prompted models that never learned the format; never mixed with the strict reading
    silently)."""
    line = first_solution(text).partition(MARKER)[2]
    if lenient and not any(c.isdigit() for c in line):
        found = [number for number in _numbers(first_solution(text.replace(MARKER, ""))) if number is not None]
        return found[-1] if found else None
    found = set() if _TOUCHING.search(line) else set(_numbers(line))
    return found.pop() if len(found) == 1 else None


def is_correct(text: str, answer: Fraction) -> bool:
    """Whether the answer of a solution is exactly `answer`."""
    return extract_answer(text) == answer


def _numbers(line: str) -> Iterable[Fraction | None]:
    """Every number of a line; None for digits that do not form a clear number."""
    if not line.isascii() and any(c.isnumeric() and not c.isascii() for c in line):
        yield None  # digits of other scripts, superscripts, "½": not guessed at
    for run in _RUN.finditer(line):
        digits, start, end = run.group(), run.start(), run.end()
        if line[end : end + 1].isalpha() and digits.endswith("/"):
            digits = digits[:-1]  # "18/hour"
        digits = digits.rstrip(".,")
        if not digits or digits == "/":  # "18 / 3": a fraction with spaces is not worth guessing at
            if digits == "/" and any(c.isdigit() for c in line[max(0, start - 2) : end + 2]):
                yield None
            continue
        before = line[max(0, start - 64) : start]
        prefix = _COMMAND.sub("", before.rstrip(_OPENING)).rstrip(_OPENING)
        if prefix.endswith(_SIGNS):
            apart = any(c.isspace() for c in before[len(prefix) :])  # "- 5": a sign, a dash or a difference
            twice = prefix[:-1].rstrip(_OPENING).endswith(_SIGNS)
            if apart or twice or prefix[-2:-1].isalnum() or prefix[-1] in _DASHES:
                yield None
                continue
        elif not prefix and start > 64:
            yield None  # too far from whatever stands before it
            continue
        value = _parse_number(digits)
        yield -value if value is not None and prefix.endswith(("-", "\u2212")) else value


@functools.lru_cache(1024)
def _parse_number(digits: str) -> Fraction | None:
    if len(digits) > 64:  # bounds the arithmetic, whatever the model writes
        return None
    above, slash, below = digits.partition("/")
    if not _NUMBER.fullmatch(above) or (slash and not (below.isdigit() and above.isdigit() and int(below))):
        return None
    return Fraction(above.replace(",", "")) / (int(below) if slash else 1)


def equations(text: str) -> tuple[str, ...]:
    """The sequence of arithmetic operations of a solution, the key under which two solutions are the same:
    "14+6=<<14+6=20>>20\n#### 20" -> ("14+6",). Without calculator annotations, what stands before each "="."""
    text = first_solution(text)
    found = [expression.translate(_PLAIN) for expression in re.findall(r"<<([^<>=]*)=", text)]
    if not found:
        sides = text.split("=")[:-1]
        found = [side[len(side.rstrip("0123456789.,+-*/x\u00d7\u00f7()$% ")) :] for side in sides]
        found = [expression.translate(_PLAIN).lstrip("*.") for expression in found]  # what ended the words before
    found = [re.sub(r"(?<![\d.])\.(?=\d)", "0.", expression) for expression in found]  # .5 is 0.5
    return tuple(e for e in found if any(c in "+-*/" for c in e[1:]) and any(c.isdigit() for c in e))


_PLAIN = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-", " ": "", "$": "", ",": ""})


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k samples is right) from n samples of which `correct` are:
    1 - C(n - correct, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def vote(answers: Sequence[Fraction | None], weights: Sequence[float] | None = None) -> Fraction | None:
    """The answer with the most votes, or with the largest sum of weights; of equal ones the first to appear. Those that
    are None do not vote; None where nothing was answered."""
    votes: dict[Fraction, float] = {}  # keeps the order of insertion
    for answer, weight in zip(answers, [1] * len(answers) if weights is None else weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + weight
    return max(votes, key=votes.get) if votes else None


@dataclasses.dataclass
class Sample:
    """One sampled solution. `finished`: ended by itself (end-of-text token or complete answer line), not cut. `grade` sets
    `answer` and `correct`, which may be true of one that was cut later."""

    problem: Problem
    number: int  # which sample of its problem, from 0
    text: str
    finished: bool
    # Filled by `generate`, empty when read from a file: the ids (int32), with the end-of-text token if that ended the
    # sample, and the log-probability (float32) of each under the distribution that it was sampled from.
    tokens: np.ndarray | tuple = ()
    logprobs: np.ndarray | tuple = ()
    prompt: Sequence[int] = ()  # the ids that it was sampled from; those of `prefix` are at their end
    prefix: str = ""  # the beginning of `text` that was given, not sampled
    score: float | None = None  # a reward model's, where one was asked

    def __post_init__(self):
        self.grade()

    def grade(self, lenient: bool = False) -> None:
        """Read the answer and check it. A sample that was cut within its answer line has none: "#### 1" of "#### 18"; and
        lenient reading, where there is no such line, leaves a number out within which the sample may have been cut."""
        cut = not self.finished and "\n" not in self.text.partition(MARKER)[2]
        if cut and MARKER in self.text:
            self.answer = None
        else:
            self.answer = extract_answer(self.text if self.finished else self.text.rstrip("0123456789.,/"), lenient)
        self.correct = self.answer == self.problem.answer

    @property
    def solution(self) -> str:
        """The text up to the end of its solution."""
        return first_solution(self.text).strip()

    def to_json(self) -> str:
        row = {"problem": self.problem.id, "sample": self.number, "correct": self.correct, "finished": self.finished}
        row |= {"answer": None if self.answer is None else str(self.answer), "reference": str(self.problem.answer)}
        row |= {} if self.score is None else {"score": round(self.score, 6)}
        return json.dumps(row | {"question": self.problem.question, "text": self.text}, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The policy and the reward model
# ---------------------------------------------------------------------------------------------------------------------

Example = tuple[list[int], list[int]]  # prompt ids, response ids

# Two worked examples for a pretrained model that never saw the format; the paper prompts with two as well.
FEW_SHOT = f"""\
Question: A baker fills 6 trays with 8 rolls each. In the morning 29 rolls are sold. How many rolls are left?
Answer:
The baker makes 6*8=<<6*8=48>>48 rolls.
After the morning 48-29=<<48-29=19>>19 rolls are left.
{MARKER} 19

Question: Lena saves 15 dollars a week for 4 weeks and then spends half of the money. How many dollars does she still have?
Answer:
Lena saves 15*4=<<15*4=60>>60 dollars.
She still has 60/2=<<60/2=30>>30 dollars.
{MARKER} 30

"""


def prompt_text(problem: Problem, few_shot: bool = False) -> str:
    """ "Question: ...\nAnswer:\n"; the solution follows on its own line. few_shot: two worked examples before it."""
    return f"{FEW_SHOT if few_shot else ''}Question: {problem.question}\nAnswer:\n"


class Policy:
    """A Hugging Face causal language model and its tokenizer.

    Weights are float32 whatever the checkpoint holds: bfloat16 is hundreds of times slower on many CPUs, and at a
    learning rate of 1e-6 an update of a bfloat16 weight rounds to nothing. On a GPU the arithmetic is bfloat16 under
    autocast. The model stays in evaluation mode, in training too: dropout would make the log-probabilities of
    sampling and training differ.

    eos_ids: the tokens that end a sample; vocabulary: how many logits there are; max_length: positions. Of a model of
    rcrl.py, labels: the words that it knows; label: the ids of the one that is forced now, none otherwise.

    Raises UserError if `name` is neither a folder nor a loadable hub name."""

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", flag: str = "--model"):
        self.device = torch_device(device)
        autocast = dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=autocast)
        if self.device.type == "cuda":  # beside bfloat16, TensorFloat32 for what stays in float32: above all the head
            torch.set_float32_matmul_precision("high" if autocast else "highest")
        self.fuses_attention = self.records_steps = True  # on a GPU; until it fails once
        # rows of `generate` that fit into memory, within `in_float32` (True) or not; known once more did not
        self.most_rows: dict[bool, int] = {}
        folder = model_folder(name, flag)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = self._load(folder).to(self.device).eval()
            if self.device.type == "cuda":
                fuse_norms(self.model)
            ids = torch.tensor([[0, 1], [0, 2]], device=self.device)
            with torch.no_grad(), self.in_float32():
                logits = self.model(ids, use_cache=False).logits
                if not (logits[0, 0] - logits[1, 0]).abs().max() < 1e-3:
                    raise UserError("not a causal language model, what it says of a token depends on later ones")
                # `response_logprobs` makes the logits itself, a few at a time
                if not (logits - self.head(self.hidden_states(ids))).abs().max() < 1e-3:
                    raise UserError(
                        "its logits are no linear head on its hidden states, nor that as Granite, Cohere or Gemma 2 scale or cap it"
                    )
            if self.tokenizer.eos_token_id is None:
                raise UserError("its tokenizer has no end-of-text token")
        except UserError as error:
            raise UserError(f"{flag} {name}: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            missing = "" if Path(folder).is_dir() else "no such folder, and as a name of the hub it "
            raise UserError(f"{flag} {name}: {missing}could not be loaded ({reason})") from None
        self.labels = getattr(self.model.config, "return_labels", None)
        self.condition("good" if self.labels else "none")
        config = self.model.config.get_text_config()
        self.max_length = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.eos_ids, self.vocabulary = [self.tokenizer.eos_token_id], self.model.get_input_embeddings().weight.shape[0]
        if self.tokenizer.eos_token_id >= self.vocabulary:
            raise UserError(f"{flag} {name}: its tokenizer's end-of-text token is beyond the model's vocabulary")
        if self.model.can_generate():
            self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
            stops = self.model.generation_config.eos_token_id
            stops = stops if isinstance(stops, list) else [stops]
            self.eos_ids = sorted({*self.eos_ids, *(s for s in stops if s is not None and s < self.vocabulary)})
            # the saved folder stops where we stop, and carries no sampling settings of others (top-k 50, ...)
            pad = self.tokenizer.pad_token_id
            self.model.generation_config = GenerationConfig(
                eos_token_id=self.eos_ids,
                bos_token_id=self.tokenizer.bos_token_id,
                pad_token_id=self.eos_ids[0] if pad is None else pad,
            )

    @contextlib.contextmanager
    def in_float32(self):
        """Arithmetic in float32, whatever --dtype says."""
        autocast, self.autocast = self.autocast, contextlib.nullcontext
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            self.autocast = autocast
            torch.set_float32_matmul_precision(precision)

    def condition(self, on: str = "good") -> None:
        """For a model of rcrl.py: from now on `generate` puts the label [GOOD] or [BAD] before every line of a solution, or
        before the first line only, as the model was trained; "good" when it is loaded. "none": no labels from now on, and
        none in the folder that `save` writes: for scripts that train it further without them."""
        config, self.label, self.label_every_line = self.model.config, [], False
        if on == "none":
            config.__dict__.pop("return_labels", None)
        elif self.labels is None:
            raise UserError("this model was not trained with return labels (rcrl.py): there is nothing to condition on")
        else:
            config.return_labels = self.labels
            self.label, self.label_every_line = self.encode_prefix(self.labels[on]), self.labels["by"] == "step"

    def _load(self, folder: str):
        if is_reward_model(folder):
            raise UserError("this is a reward model, not a language model")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        if model._supports_attention_backend and model._supports_sdpa:  # others keep their own
            model.set_attn_implementation("paged_attention")
        return model

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, length], padded on the right if at all -> final hidden states [batch, length, width].
        With causal attention the padding comes after everything that is read, so no mask is needed."""
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., width] -> logits [..., vocabulary], in float32 whatever the rest is computed in: in bfloat16
        those between 16 and 32 are 0.125 apart, which moves the log-probabilities of SmolLM2 more than bfloat16 in all of its
        layers does (0.027 and 0.020 rms)."""
        config = self.model.config.get_text_config()
        with torch.autocast(self.device.type, enabled=False):
            logits = self.model.get_output_embeddings()(hidden.float())
            if divisor := getattr(config, "logits_scaling", None):  # of Granite
                logits = logits / divisor
            if factor := getattr(self.model, "logit_scale", None):  # of Cohere; MPT has a setting of this name, unused
                logits = logits * factor
            if cap := getattr(config, "final_logit_softcapping", None):  # of Gemma 2, 3n, 4, nanochat
                logits = cap * logits.div_(cap).tanh_()
            return logits

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them for a whole text, a begin-of-text token included if it adds one."""
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def encode_prefix(self, text: str) -> list[int]:
        """Token ids of the beginning of a solution."""
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def encode_solution(self, text: str) -> list[int]:
        """Token ids of a finished solution with the end-of-text token, encoded apart from the prompt: sampling and
        training then see the same boundary."""
        return [*self.encode_prefix(text), self.tokenizer.eos_token_id]

    @functools.cached_property
    def ends_line(self) -> np.ndarray:
        """[vocabulary] whether a token holds a line break."""
        return np.array(["\n" in text for text in self.tokenizer.batch_decode([[i] for i in range(self.vocabulary)])])

    def line_ends(self, ids: Sequence[int]) -> list[int]:
        """Where the lines of a solution end: the places of the tokens with a line break, and the last place."""
        return sorted({*np.flatnonzero(self.ends_line[ids]).tolist(), len(ids) - 1})

    @functools.cached_property
    def decode_loop(self) -> Callable:
        """The fastest loop for `generate` (section 4) that works with this model, found by trying: `decode`, with the fused
        attention or without; `decode_plainly` with the model's own cache, or with none."""
        reason = self._differs(decode)
        if reason and self.device.type in FUSED_DEVICES:
            unfused, self.fuses_attention = reason, False
            if not (reason := self._differs(decode)):
                warn(f"sampling is slower than it could be, because the fused attention does not work here ({unfused})")
        if not reason:
            return decode
        warn(f"sampling is slower, because this model does not work with the shared key cache ({reason})")
        if not (reason := self._differs(decode_plainly)):
            return decode_plainly
        warn(f"sampling is slow, because this model has no cache that can be used ({reason})")
        return functools.partial(decode_plainly, cached=False)

    def _differs(self, decode: Callable) -> str | None:
        """Tokens decoded from made-up prompts must have the log-probabilities that the plain forward pass gives -> what is
        wrong if they do not."""
        prompts = [[i % self.vocabulary for i in ids] for ids in (range(10, 22), range(5, 8), range(1))]
        decoded = []
        try:
            with torch.no_grad(), self.in_float32():
                decode(
                    self, prompts, {i: range(2) for i in range(3)}, lambda *_: np.zeros(4, np.float32),
                    lambda i, _, ids, logprobs, finished: decoded.append((prompts[i], ids.tolist(), logprobs)),
                    temperature=0, max_new_tokens=4, rows=3,
                )  # fmt: skip
                again = response_logprobs(self, [(prompt, ids) for prompt, ids, _ in decoded]).cpu()
            said = torch.from_numpy(np.concatenate([logprobs for *_, logprobs in decoded]))
            fits = torch.allclose(again, said, atol=2e-3)
            return None if fits else f"log-probabilities differ by {(again - said).abs().max():.2g}"
        except Exception as error:  # whatever an unusual model raises
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {first_line(error)}"

    def run_once(self, run: Callable[[list[Example]], Iterable], examples: dict, token_budget: int) -> dict:
        """`run` of a batch returns something for each of its examples -> the same keys with what it returned of theirs."""
        return dict(zip(examples, in_batches(run, list(examples.values()), token_budget), strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self.label_every_line:  # where labels are no tokens of their own
            text = text.replace(self.tokenizer.decode(self.label), "")
        return text

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder. It appears complete or not at all."""
        if process_rank() > 0:
            return
        aside, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
        except Exception as error:  # a full disk shows as an error of the safetensors library
            raise UserError(f"{aside}: could not be written ({first_line(error)})") from None
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


class RewardModel(Policy):
    """An outcome reward model: how likely is the final answer to be right, given the question and the solution so far,
    after every token. (A probability, with reward_model.py's weights, under equal odds within a question.)

    The network of a policy with a scalar head in place of the vocabulary's: what transformers calls token
    classification with one label, so that `AutoModelForTokenClassification.from_pretrained` loads a saved folder. Where
    transformers has no such class, as for Gemma 3, the text part of Qwen 3.5, OLMo and Granite, only this one does.
    new: start from the weights of a language model, with a head of zeros (P = 0.5 everywhere)."""

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", flag: str = "--orm", new: bool = False):
        self.new = new
        super().__init__(name, device, dtype, flag)

    def _load(self, folder: str):
        if not self.new and not is_reward_model(folder):
            raise UserError("this is not a reward model; reward_model.py trains one")
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # that a new head is new needs no table of warnings
        how = dict(dtype=torch.float32, num_labels=1, use_safetensors=True, output_loading_info=True)
        try:
            model, found = AutoModelForTokenClassification.from_pretrained(folder, **how)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            model, found = token_classifier(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **how)
        finally:
            transformers_logging.set_verbosity(verbosity)
        name, self.linear = next(m for m in model.named_children() if getattr(m[1], "out_features", None) == 1)
        if lost := sorted(key for key in found["missing_keys"] if not (self.new and key.startswith(f"{name}."))):
            raise UserError(f"it has no weights for {lost[0]} ({len(lost)} are missing)")
        if self.new:
            torch.nn.init.zeros_(self.linear.weight)
            torch.nn.init.zeros_(self.linear.bias)
        return model

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., width] -> log-odds [..., 1]."""
        return self.linear(hidden)

    def encode(self, sample: Sample) -> Example:
        """Prompt and solution with the end-of-text token, which a solution that was cut gets, too. From the text, so it
        does not matter whose tokens the sample was made of."""
        prompt, response = self.encode_prompt(prompt_text(sample.problem)), self.encode_solution(sample.solution)
        # one that was cut at the last position has no room for it
        return prompt, response[: -1 if not sample.finished and len(prompt + response) > self.max_length else None]

    def check_lengths(
        self, problems: Sequence[Problem], max_new_tokens: int, prefixes: Sequence[str] | None = None
    ) -> None:
        """UserError if a question with a sample, or with its prefix and a sample, might not fit into the positions."""
        encode_prompts(self, problems, max_new_tokens, prefixes, what="for the reward model the longest prompt")

    def log_odds(self, examples: Sequence[Example]) -> torch.Tensor:
        """After every response token, that token included: [response tokens of all examples, one after the other]."""
        ids = right_padded(self, [prompt + response for prompt, response in examples])
        rows, columns = response_places(examples, self.device)
        with self.autocast():
            hidden = self.hidden_states(ids)[rows, columns]  # [response tokens, width]
        return self.head(hidden.float())[:, 0]

    @torch.no_grad()
    def scores(self, samples: Sequence[Sample], token_budget: int = 1024) -> list[np.ndarray]:
        """For every sample the probability after each of its solution's tokens; the last one is its score. Equal texts are
        run once, and no more than `token_budget` tokens at a time."""
        keys = [(sample.problem.question, sample.text) for sample in samples]
        examples = {key: self.encode(sample) for key, sample in dict(zip(keys, samples, strict=True)).items()}
        found = self.run_once(lambda batch: by_example(self.log_odds(batch).sigmoid(), batch), examples, token_budget)
        return [found[key] for key in keys]

    def grade(self, samples: Sequence[Sample], token_budget: int = 1024) -> None:
        """Fill in `score` of every sample: the probability after its last token."""
        for sample, probabilities in zip(samples, self.scores(samples, token_budget), strict=True):
            sample.score = float(probabilities[-1])


def token_classifier(config) -> type:
    """What transformers has for most families, made of a family's causal language model: its network with a scalar head
    beside that of the vocabulary, which is kept and not used."""
    with torch.device("meta"):
        language_model = type(AutoModelForCausalLM.from_config(config))

    class Classifier(language_model):
        def __init__(self, config):
            super().__init__(config)
            self.score = torch.nn.Linear(self.get_output_embeddings().weight.shape[1], 1)

        def forward(self, input_ids, **kwargs):
            hidden = self.base_model(input_ids=input_ids, **kwargs).last_hidden_state
            return TokenClassifierOutput(logits=self.score(hidden))

    Classifier.__name__ = re.sub("ForCausalLM|ForConditionalGeneration|LMHeadModel", "", language_model.__name__)
    Classifier.__name__ += "ForTokenClassification"
    Classifier.__module__ = language_model.__module__  # else the weights of some families are not found by their names
    return Classifier


class GenerativeRewardModel(Policy):
    """A generative reward model (GenRM): a language model that reads a question and two solutions, A and B, and answers
    which is better. The score of a candidate beside a reference is the probability that it gives the candidate of the
    two verdicts, averaged over both orders: 0.5 means "as good as the reference" (Shen et al. 2025).

    reward_model.py --kind genrm trains one. A saved folder is an ordinary language model.
    new: start from the weights of any language model."""

    VERDICTS = "A", "B"

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", flag: str = "--genrm", new: bool = False):
        self.new = new
        super().__init__(name, device, dtype, flag)
        self.condition("none")
        self.model.config.compares_solutions = True
        ids = [self.encode_prompt(f"Better answer:\n{verdict}") for verdict in self.VERDICTS]
        if ids[0][:-1] != ids[1][:-1] or ids[0][-1] == ids[1][-1]:
            raise UserError(f"{flag} {name}: its tokenizer has no tokens for the verdicts A and B")
        self.verdict_ids = [ids[0][-1], ids[1][-1]]

    def _load(self, folder: str):
        model = super()._load(folder)
        if not self.new and not getattr(model.config, "compares_solutions", False):
            raise UserError("this is not a generative reward model; reward_model.py --kind genrm trains one")
        return model

    def encode(self, problem: Problem, first: str, second: str) -> Example:
        """The prompt up to the verdict, and as its response the verdict A. A solution ends where it goes on with words of
        the prompt: it could else write its own verdict."""
        a, b = (re.split(r"^(?:Answer [AB]|Better answer):", s, flags=re.M)[0].strip() for s in (first, second))
        text = f"Question: {problem.question}\nAnswer A:\n{a}\nAnswer B:\n{b}\nBetter answer:\n{self.VERDICTS[0]}"
        ids = self.encode_prompt(text)
        return ids[:-1], ids[-1:]

    def check_lengths(self, problems: Iterable[Problem], max_new_tokens: int) -> None:
        """UserError if a question with its reference, gold or sampled, and a sample might not fit into the positions."""
        gold = [(self.encode(p, "", p.reference or "")[0], 1 if p.reference else 2) for p in problems]
        longest = max((len(ids) + n * max_new_tokens for ids, n in gold), default=0)
        check_length(self, longest, f"the longest question with a reference and a sample of {max_new_tokens} tokens")

    def log_odds(self, examples: Sequence[Example]) -> torch.Tensor:
        """Of verdict A over verdict B, for every comparison that `encode` made: [comparisons]."""
        ids = right_padded(self, [prompt for prompt, _ in examples], "the longest question with its two solutions")
        last = torch.tensor([len(prompt) - 1 for prompt, _ in examples], device=self.device)
        with self.autocast():
            hidden = self.hidden_states(ids)[torch.arange(len(examples), device=self.device), last]
        logits = self.head(hidden.float())
        return logits[:, self.verdict_ids[0]] - logits[:, self.verdict_ids[1]]

    @torch.no_grad()
    def verdicts(self, comparisons: Sequence[tuple[Problem, str, str]], token_budget: int = 1024) -> np.ndarray:
        """P(candidate is better) for every (problem, candidate, reference), with the candidate as A and as B:
        [comparisons, 2]. Equal ones are run once, and no more than `token_budget` tokens at a time."""
        orders = [((p, c, r), (p, r, c)) for p, c, r in comparisons]
        distinct = {(p.question, first, second): (p, first, second) for pair in orders for p, first, second in pair}
        examples = {key: self.encode(*ordered) for key, ordered in distinct.items()}
        first_is_better = self.run_once(lambda batch: self.log_odds(batch).sigmoid().tolist(), examples, token_budget)
        both = [[first_is_better[p.question, first, second] for p, first, second in pair] for pair in orders]
        return np.array([[as_a, 1 - as_b] for as_a, as_b in both]).reshape(-1, 2)

    def scores(self, samples: Sequence[Sample], references: dict[str, str], token_budget: int = 1024) -> list[float]:
        """The score of every sample beside its problem's reference, a text by problem id."""
        comparisons = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
        return self.verdicts(comparisons, token_budget).mean(1).round(6).tolist()  # beside itself exactly 0.5


def is_reward_model(folder: str) -> bool:
    """Whether a model folder or hub name holds a reward model."""
    architectures = AutoConfig.from_pretrained(folder).architectures or ()
    return any(name.endswith("ForTokenClassification") for name in architectures)


def model_folder(name: str, flag: str = "--model") -> str:
    """The folder or hub name that a flag means: "tiny" is the model that comes with the repository."""
    path = Path(__file__).parent / "tiny" if name == "tiny" else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = f"; did you mean {path / 'model'}?" if (path / "model" / "config.json").is_file() else ""
            raise UserError(f"{flag} {name}: the folder holds no model (no config.json){hint}")
        return str(path)
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and name != "tiny" and not name.startswith("runs/")
    if not is_hub_name:
        scripts = {
            "runs/sft/model": "sft.py", "runs/expert_iteration/model": "expert_iteration.py",
            "runs/reward_model/model": "reward_model.py", "runs/genrm/model": "reward_model.py --kind genrm",
        }  # fmt: skip
        hint = f"; run `python {scripts[name]}` first" if name in scripts else ""
        raise UserError(f"{flag} {name}: no such folder{hint}")
    return name


def check_base(policy: Policy, base: str) -> None:
    """UserError where tiny, the default of --base, stands beside a --model that cannot have been made from it."""
    if base == "tiny":
        configs = policy.model.config.get_text_config(), AutoConfig.from_pretrained(model_folder(base))
        if len({(c.model_type, c.hidden_size, c.num_hidden_layers) for c in configs}) > 1:
            raise UserError("--base tiny: --model is of another shape; give the pretrained model that it was made from")


def fingerprint(name: str, flag: str = "--model") -> str:
    """Something that changes when the weights in a model folder do; the name itself for a model of the hub."""
    files = sorted(Path(model_folder(name, flag)).glob("*.safetensors"))
    if not files:
        return name
    size, crc = 0, 0
    for path in files:  # to the last byte: adapters, for one, leave the embeddings at the beginning as they are
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return f"{size}-{crc:08x}"


def file_fingerprints(key: str, names: Sequence[str], part: str = "train") -> dict[str, list[str]]:
    """A setting that changes when one of the files does that `names`, the setting `key`, stand for (of a folder its `part`);
    none where they stand for no files, as "arithmetic" and "gsm8k" do."""
    files = [f for n in names for f in (Path(n), Path(n, f"{part}.json"), Path(n, f"{part}.jsonl")) if f.is_file()]
    return {f"{key}_fingerprint": [f"{zlib.crc32(f.read_bytes()):08x}" for f in files]} if files else {}


def torch_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one, of several processes on a machine to each its own. UserError for a device that
    cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            elif int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
                raise UserError(f"--device {name}: several processes need a GPU each; leave it at auto or cuda")
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where CUDA graphs are recorded; refuses a device without a number
            # cuDNN's attention, the first choice on Hopper, is planned anew for every shape, and each of our batches has its own
            torch.backends.cuda.enable_cudnn_sdp(False)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({first_line(error)})") from None
    return device


# ---------------------------------------------------------------------------------------------------------------------
# 4. Generation
# ---------------------------------------------------------------------------------------------------------------------


NOT_FINITE = "the model's probabilities are not finite: its weights are broken"
FUSED_DEVICES = {"cuda"} if triton else set()
GRAPH_DEVICES = {"cuda"}  # where `decode` looks every 16 steps and replays a recorded step


def check_length(policy: Policy, length: int, what: str) -> None:
    if length > policy.max_length:
        raise UserError(f"{what} is {length} tokens long; the model has {policy.max_length} positions")


def encode_prompts(
    policy: Policy, problems: Sequence[Problem], max_new_tokens: int, prefixes: Sequence[str] | None = None,
    few_shot: bool = False, what: str = "the longest prompt",
) -> list[list[int]]:  # fmt: skip
    """The ids of every prompt with its prefix and label. UserError if what is sampled after the longest does not fit into the
    model's positions."""
    prefixes = prefixes or [""] * len(problems)
    prompts = [policy.encode_prompt(prompt_text(problem, few_shot)) for problem in problems]
    prompts = [ids + policy.encode_prefix(prefix) + policy.label for ids, prefix in zip(prompts, prefixes, strict=True)]
    if prompts:
        longest = max(map(len, prompts)) + max_new_tokens
        check_length(policy, longest, f"{what} with --max-new-tokens {max_new_tokens}")
    return prompts


@torch.no_grad()  # not inference_mode, under which autocast would cast the weights anew in every step
def generate(
    policy: Policy, problems: Sequence[Problem], *, samples: int = 1, temperature: float = 1.0,
    max_new_tokens: int = 256, seed: int | Sequence[int] = 0, rows: int = 128, few_shot: bool = False,
    prefixes: Sequence[str] | None = None, progress: str | None = None, stop: Callable[[], bool] = lambda: False,
) -> list[Sample]:  # fmt: skip
    """`samples` solutions of every problem, in the order of the problems, from the full softmax at `temperature`
    (0: greedy).

    A prompt is run once, and its keys and values are shared by its samples. `rows` sequences are decoded at a time; a
    row that has finished is handed to the next sample at once. The random numbers of a sample depend on (seed,
    problem, sample number) alone, so it does not matter how many rows there are or what else is sampled. (A model that the
    shared cache, `PagedCache`, does not fit uses its own, in batches; see `decode_plainly`.) When memory runs out, the number
    of rows is halved, for good and with a warning, and no finished sample is lost.
    few_shot: prompt with two worked examples; a sample then ends when its answer line is complete, because such a model
    goes on to invent the next question. prefixes: for each problem the beginning of a solution to go on from. stop:
    asked before every step; when true, KeyboardInterrupt. Of several processes each samples for every n-th problem, and all
    get all samples. Raises UserError if a prompt does not fit into the model's positions."""
    prefixes = prefixes or [""] * len(problems)
    prompts = encode_prompts(policy, problems, max_new_tokens, prefixes, few_shot)
    done: list[list[Sample | None]] = [[None] * samples for _ in problems]
    mine = range(process_rank(), len(problems), process_count())
    bar = tqdm(total=len(mine) * samples, desc=progress, unit="sample", disable=None if progress else True)

    def draws(i: int, number: int) -> np.ndarray:
        key = [*np.atleast_1d(seed).tolist(), zlib.crc32(problems[i].id.encode()), number]
        return np.random.default_rng(key).random(max_new_tokens, np.float32)

    def deliver(i: int, number: int, ids: np.ndarray, logprobs: np.ndarray, finished: bool) -> None:
        text = prefixes[i] + policy.decode(ids)
        done[i][number] = Sample(problems[i], number, text, finished, ids, logprobs, prompts[i], prefixes[i])
        bar.update()

    def is_complete(ids: np.ndarray) -> bool:
        lines = "\n" + policy.decode(ids).rpartition("\n")[0]
        return MARKER in lines or "\nQuestion:" in lines

    interrupted = False
    while wanted := {i: [k for k, s in enumerate(done[i]) if s is None] for i in mine if None in done[i]}:
        in_float32 = policy.autocast is contextlib.nullcontext
        rows = min(rows, policy.most_rows.get(in_float32, rows), sum(map(len, wanted.values())))
        loop = policy.decode_loop  # found out here: under autocast its comparison would not be in float32
        try:
            with policy.autocast(), packed_weights(policy), casts_kept(policy):  # the last two: end of this section
                loop(
                    policy, prompts, wanted, draws, deliver, temperature=temperature, max_new_tokens=max_new_tokens,
                    rows=rows, is_complete=is_complete if few_shot else None, stop=stop,
                    label=policy.label if policy.label_every_line else (),
                )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            warn(f"out of memory while sampling {rows} rows: going on with {rows // 2} (see --rows)", each=True)
            policy.most_rows[in_float32] = rows // 2
        except KeyboardInterrupt:
            interrupted = True  # the others must hear of it before this one leaves
            break
    bar.close()
    if any(gather([interrupted])):
        raise KeyboardInterrupt
    for i, group in gather([(i, done[i]) for i in mine]):
        done[i] = group
    return [sample for group in done for sample in group]


def decode(
    policy: Policy, prompts: Sequence[list[int]], wanted: dict[int, Sequence[int]],
    draws: Callable[[int, int], np.ndarray], deliver: Callable[[int, int, np.ndarray, np.ndarray, bool], None], *,
    temperature: float, max_new_tokens: int, rows: int, is_complete: Callable[[np.ndarray], bool] | None = None,
    stop: Callable[[], bool] = lambda: False, label: Sequence[int] = (),
) -> None:  # fmt: skip
    """The loop of `generate`, on token ids. wanted: prompt index -> sample numbers; draws(prompt, number): the uniforms
    of a sample; deliver(prompt, number, ids, logprobs, finished) is called with each soon after it has ended. label: ids
    that follow every line break without being sampled (log-probability 0).

    The state of the rows lives on the device and a step touches nothing else. On a CPU the host looks at it after every
    step; on a GPU after every 16th, so that no step waits for the host, and the step is replayed as a CUDA graph, one
    for each of the few sizes that `size_of` leaves. Between two looks the host knows nothing of what is sampled.
    Keys and values of a prompt lie in a slot, those of a row's own tokens in pages: see `PagedCache` and `View`."""
    device, config, base = policy.device, policy.model.config.get_text_config(), policy.model.base_model
    on_gpu = device.type in GRAPH_DEVICES
    stride = 16 if on_gpu else 1
    width = max_new_tokens + stride - 1  # a row may run on until the host looks
    uniforms, tokens, logprobs = (torch.zeros(rows, width, device=device, dtype=t) for t in (torch.float, torch.long, torch.float))  # fmt: skip
    ages, starts, inputs, owed = torch.zeros(4, rows, device=device, dtype=torch.long)  # owed: ids of the label to come
    label_ids = torch.tensor(label, device=device)
    breaks_line = torch.from_numpy(policy.ends_line).to(device) if label else None
    is_eos = np.zeros(policy.vocabulary, bool)
    is_eos[policy.eos_ids] = True
    queue = ((i, number) for i, numbers in wanted.items() for number in numbers)
    upcoming, left = iter(wanted), {i: len(numbers) for i, numbers in wanted.items()}  # to be run; samples to deliver
    work = [None] * rows  # what a row samples: (prompt, number)
    host_ages = np.zeros(rows, np.int64)  # what the host knows of `ages`
    table = np.zeros((rows, (width - 1) // PAGE + 1), np.int64)  # the pages of a row, 0: none
    row_slot, slot_of = np.zeros(rows, np.int64), {}  # where the prompt of a row is; the same by prompt
    graphs, graph_memory = {}, None

    def forget_graphs() -> None:
        """They read tensors that are replaced when the cache grows. All share their memory: only one runs at a time."""
        nonlocal graph_memory
        graphs.clear()
        graph_memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    fused = policy.fuses_attention and device.type in FUSED_DEVICES
    cache = PagedCache(max(1, max(map(len, prompts)) - 1), forget_graphs, fused)
    with_cache = {cache_argument(base): cache, "use_cache": True}

    def size_of(used: Size) -> Size:
        """What to compute so that a graph can be replayed: the smallest recorded size that is nowhere more than twice too
        large. Where there is none: all, half, a quarter ... of the rows, and of the others up to the next of 1, 2, 3, ... 8,
        10, 12, 14, 16, 20, ..."""
        if not on_gpu:
            return used
        if fitting := [size for size in graphs if all(a <= b <= 2 * a for a, b in zip(used, size, strict=True))]:
            return min(fitting, key=sum)
        grains = [1 << max(0, (count - 1).bit_length() - 3) for count in used[1:]]
        rest = [-(-count // grain) * grain for count, grain in zip(used[1:], grains, strict=True)]
        return Size(rows >> int(math.log2(rows / used.rows)), *rest)

    def prefill(count: int) -> None:
        """Run the next `count` prompts, all but their last token, which the decode loop feeds like any other."""
        batch = list(itertools.islice(upcoming, count))
        length = max(1, max(len(prompts[i]) for i in batch) - 1)
        ids = torch.tensor([(prompts[i][:-1] + [0] * length)[:length] for i in batch], device=device)
        where = torch.arange(length, device=device)[None].expand(len(ids), -1)
        cache.recorded = []
        base(
            input_ids=ids, position_ids=where, attention_mask=attention_masks(config, where, length), **with_cache
        )  # fmt: skip
        slot_of.update(zip(batch, cache.keep_prompts(), strict=True))

    def fill(free: list[int]) -> list[int]:
        """Hand rows to the next samples; returns those for which there is no work."""
        taken = []
        for row in free:
            if (job := next(queue, None)) is None:
                break
            if job[0] not in slot_of:
                prefill(max(1, min(64, rows // len(wanted[job[0]]))))
            work[row] = job
            taken.append(row)
        if taken:
            at, jobs = torch.tensor(taken, device=device), [work[row] for row in taken]
            uniforms[at, :max_new_tokens] = torch.from_numpy(np.stack([draws(*job) for job in jobs])).to(device)
            starts[at] = torch.tensor([len(prompts[i]) - 1 for i, _ in jobs], device=device)
            inputs[at] = torch.tensor([prompts[i][-1] for i, _ in jobs], device=device)
            ages[at] = owed[at] = 0
            host_ages[taken] = 0
            row_slot[taken] = [slot_of[i] for i, _ in jobs]
        return free[len(taken) :]

    def step(n: int, view: View) -> None:
        """One token for each of the first n rows. Device only; the shapes depend on n and the view's."""
        cache.begin_step(ages[:n], starts[:n], view)
        where = (starts[:n] + ages[:n]).clamp_(max=policy.max_length - 1)
        hidden = base(
            input_ids=inputs[:n, None], position_ids=where[:, None], **with_cache,
            attention_mask=attention_masks(config, where[:, None] * 0, 1),  # not used, but without one it makes its own
        ).last_hidden_state[:, -1]  # fmt: skip
        age = ages[:n, None]
        picked, said = next_tokens(policy, hidden, uniforms[:n].gather(1, age)[:, 0], temperature)
        if label:
            picked, said, owed[:n] = force_label(picked, said, owed[:n], label_ids, breaks_line)
        tokens[:n].scatter_(1, age, picked[:, None])
        logprobs[:n].scatter_(1, age, said[:, None])
        inputs[:n] = picked
        ages[:n] += 1

    def group_by_prompt(n: int) -> tuple[Size, dict[str, np.ndarray]]:
        """What a step computes that multiplies all prompts and pages with all queries that read them, and in which order."""
        if (new := cache.own.compact(np.unique(table[:n][table[:n] > 0]), 1)) is not None:
            table[:n] = new[table[:n]]
        if (new := cache.prompts.compact(np.array(sorted(slot_of.values())), 0)) is not None:
            row_slot[:n] = new[row_slot[:n]]
            slot_of.update({i: int(new[slot]) for i, slot in slot_of.items()})
        slot, readers = row_slot[:n], np.bincount(row_slot[:n])
        row, nth = table[:n].nonzero()
        page = table[row, nth]
        size = size_of(Size(n, len(readers), int(readers.max()), int(page.max()) + 1))
        cache.prompts.reserve(size.slots)
        cache.own.reserve(size.pages)
        order, reader = slot.argsort(kind="stable"), np.zeros(size.rows, np.int64)
        reader[order] = np.arange(n) - (readers.cumsum() - readers)[slot[order]]  # its rank among those of its slot
        grid = np.zeros((size.slots, size.readers), np.int64)
        grid[slot, reader[:n]] = np.arange(n)
        own_row, own_first = np.zeros(size.pages, np.int64), np.full(size.pages, width)
        own_row[page], own_first[page] = row, nth * PAGE
        return size, {"grid": grid, "reader": reader, "own_row": own_row, "own_first": own_first}

    def make_view(n: int) -> tuple[Size, View]:
        """Give the first n rows the pages that the next steps write to, and say where everything is."""
        need = (host_ages[:n] + stride - 1) // PAGE + 1
        missing = (table[:n] == 0) & (np.arange(table.shape[1]) < need[:, None])
        table[:n][missing] = cache.own.take(int(missing.sum()))
        size, order = (size_of(Size(n, 0, 0, 0)), {}) if cache.fused else group_by_prompt(n)
        slot = np.zeros(size.rows, np.int64)
        slot[:n] = row_slot[:n]
        # while others end the longest row grows on: its pages would ask for one graph after the other
        columns = table.shape[1] if on_gpu else need.max()
        view = View(slot, table[: size.rows, :columns], **order)
        return size, View(*(torch.from_numpy(array).to(device) for array in view))

    def first_step(run: Callable[[], None]) -> Callable[[], None]:
        """Run a step of a new size as it is, which warms up what a graph needs -> what replays it, `run` where nothing can."""
        done = False  # whether the step itself was made, and only recording it failed
        try:
            with waiting_is_an_error(device):
                run()
            done = True
            return record(run, device, graph_memory)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
        if not done:
            run()  # again: until its end it changes nothing that it reads
        warn(f"sampling is slower than it could be, because a step cannot be recorded ({reason})")
        policy.records_steps = False  # nor can steps of other sizes
        return run

    def advance(n: int) -> None:
        """`stride` steps of at least the first n rows."""
        ages[n:] = 0
        size, view = make_view(n)
        run, n_steps = functools.partial(step, size.rows, view), stride
        if size in graphs:
            run, static = graphs[size]
            for t, new in zip(static, view, strict=True):
                t.copy_(new)
        elif on_gpu and policy.records_steps:
            run, n_steps = first_step(run), stride - 1
            if policy.records_steps:
                graphs[size] = run, view
        for _ in range(n_steps):
            run()

    ready = []  # samples that have ended

    def deliver_ready() -> None:
        while ready:
            deliver(*ready.pop(0))

    n = rows - len(fill(list(range(rows))))
    try:
        while n:
            if stop():
                raise KeyboardInterrupt
            # 1. the next token of the first n rows; on a GPU the next 16, and while it computes them, the last samples
            advance(n)
            deliver_ready()
            host_tokens, host_logprobs = tokens[:n].cpu().numpy(), logprobs[:n].cpu().numpy()
            before = host_ages[:n].copy()
            host_ages[:n] += stride
            # 2. which have ended, and after how many tokens
            columns = before[:, None] + np.arange(stride)
            new = np.take_along_axis(host_tokens, columns, 1)
            if not np.isfinite(np.take_along_axis(host_logprobs, columns, 1)).all():
                raise UserError(NOT_FINITE)
            ends = is_eos[new]
            if is_complete:
                for row, column in np.argwhere(policy.ends_line[new] & ~ends):
                    ends[row, column] = is_complete(host_tokens[row, : before[row] + column + 1])
            ends &= columns < max_new_tokens
            ended = ends.any(1)
            length = np.where(ended, before + ends.argmax(1) + 1, max_new_tokens)
            vacant = np.flatnonzero(ended | (host_ages[:n] >= max_new_tokens)).tolist()
            for row in vacant:
                i, number = work[row]
                ids, said = host_tokens[row, : length[row]].astype(np.int32), host_logprobs[row, : length[row]].copy()
                ready.append((i, number, ids, said, bool(ended[row])))
                left[i] -= 1
                cache.own.give_back(table[row][table[row] > 0].tolist())
                table[row] = 0
                if not left[i]:
                    cache.prompts.give_back([slot_of.pop(i)])
            # 3. hand their rows to the next samples; where there is none left, move the last rows into the gaps
            vacant = set(fill(vacant))
            n -= len(vacant)
            gaps, last = [r for r in vacant if r < n], [r for r in range(n, n + len(vacant)) if r not in vacant]
            if gaps:
                for state in (uniforms, tokens, logprobs, ages, starts, inputs, owed, host_ages, table, row_slot):
                    state[gaps] = state[last]
                table[last] = 0
                for gap, row in zip(gaps, last, strict=True):
                    work[gap] = work[row]
    finally:  # also when memory runs out
        deliver_ready()


def decode_plainly(
    policy: Policy, prompts, wanted, draws, deliver, *, temperature: float, max_new_tokens: int, rows: int,
    is_complete=None, stop=lambda: False, label=(), cached: bool = True,
) -> None:  # fmt: skip
    """What `decode` does, with the same arguments, for a model that PagedCache does not fit: with the cache that the model
    makes itself, or with none (`cached` False), running whole sequences again for every token, which is right for any
    causal model, and slow.

    Prompts of about the same length make a batch. It begins with as much of them as the shortest is long, and what is left
    of the others is fed like sampled tokens, so nothing is padded, which a model with states could not take. Rows that have
    finished run on until they are half of the batch, and no others take their place."""
    device, base = policy.device, policy.model.base_model
    argument, label_ids = cache_argument(base), torch.tensor(label, device=device)
    breaks_line = torch.from_numpy(policy.ends_line).to(device) if label else None
    jobs = [(i, number) for i in sorted(wanted, key=lambda i: len(prompts[i])) for number in wanted[i]]
    batches: list[list[tuple[int, int]]] = []
    for job in jobs:  # what is left of a prompt costs a step a token, so it is no more than what is sampled
        first = batches[-1][0] if batches and len(batches[-1]) < rows else None
        if first is None or len(prompts[job[0]]) > len(prompts[first[0]]) + max_new_tokens:
            batches.append([])
        batches[-1].append(job)
    for batch in batches:
        begin = np.array([len(prompts[i]) for i, _ in batch])  # where the sampled tokens begin [rows]
        begin_at, shortest, longest = torch.from_numpy(begin).to(device), begin[0], begin[-1]
        given = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i, _ in batch], device=device)
        uniforms = torch.from_numpy(np.stack([draws(*job) for job in batch])).to(device)
        ids, logprobs = given[:, :shortest], uniforms.new_zeros(len(batch), shortest)  # [rows, length so far]
        owed, running, cache = ids.new_zeros(len(batch)), np.ones(len(batch), bool), None
        while running.any():
            if stop():
                raise KeyboardInterrupt
            # 1. the next token of all rows
            held = {} if cache is None else {argument: cache}
            out = base(input_ids=ids if cache is None else ids[:, -1:], use_cache=cached, **held)
            if cached and (cache := out.get(argument) or out.get("past_key_values")) is None:
                raise NotImplementedError("it returns none")
            place = ids.shape[1]
            age = (place - begin_at).clamp(0, max_new_tokens - 1)
            picked, said = next_tokens(
                policy, out.last_hidden_state[:, -1], uniforms.gather(1, age[:, None])[:, 0], temperature
            )
            if label:
                picked, said, owed = force_label(picked, said, owed, label_ids, breaks_line)
            if place < longest:
                in_prompt = begin_at > place
                picked, owed = torch.where(in_prompt, given[:, place], picked), owed.masked_fill(in_prompt, 0)
            ids, logprobs = torch.cat([ids, picked[:, None]], 1), torch.cat([logprobs, said[:, None]], 1)
            # 2. which have ended
            if not said.isfinite().all():
                raise UserError(NOT_FINITE)
            new, sampling = picked.cpu().numpy(), running & (begin <= place)
            ended = np.isin(new, policy.eos_ids) & sampling
            if is_complete:
                for row in np.flatnonzero(policy.ends_line[new] & sampling & ~ended):
                    ended[row] = is_complete(ids[row, begin[row] :].cpu().numpy())
            for row in np.flatnonzero(ended | sampling & (place + 1 - begin == max_new_tokens)):
                # copies, not views, which keep all rows
                own_ids, own_logprobs = ids[row, begin[row] :].int(), logprobs[row, begin[row] :].clone()
                deliver(*batch[row], own_ids.cpu().numpy(), own_logprobs.cpu().numpy(), bool(ended[row]))
                running[row] = False
            # 3. drop them
            keep = np.flatnonzero(running)
            if 0 < len(keep) <= len(running) / 2 and type(cache) in (DynamicCache, type(None)):  # others may hold more
                index = torch.from_numpy(keep).to(device)
                ids, uniforms, logprobs, owed, begin_at, given = (
                    t[index] for t in (ids, uniforms, logprobs, owed, begin_at, given)
                )
                batch, running, begin = [batch[row] for row in keep], running[keep], begin[keep]
                if cache is not None:
                    cache.reorder_cache(index)


def cache_argument(base: torch.nn.Module) -> str:
    """How a model calls its cache: by the first name in transformers 5.24 and newer, before by the second; Mamba by the
    third."""
    known = inspect.signature(type(base).forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "past_key_values")


# ---- one token -------------------------------------------------------------------------------------------------------


BLOCK = 256  # of the vocabulary


def next_tokens(
    policy: Policy, hidden: torch.Tensor, uniforms: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pick_tokens` after hidden states [rows, width], so few rows at a time that on a CPU their logits stay in its cache."""
    at_once = max(1, (1 << 28 if policy.device.type in GRAPH_DEVICES else 1 << 22) // policy.vocabulary)
    n_parts = -(-len(hidden) // at_once)  # of equal size: one row left over costs a fifth of a whole part
    parts = zip(hidden.chunk(n_parts), uniforms.chunk(n_parts), strict=True)
    picked = [pick_tokens(policy.head(h), u, temperature) for h, u in parts]
    return tuple(torch.cat(t) for t in zip(*picked, strict=True))


def pick_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(logits / temperature) by inverse CDF: one uniform number in [0, 1) a row.

    logits [rows, vocabulary], which may be overwritten, uniforms [rows] -> tokens [rows] and their log-probabilities [rows]
    under that distribution. temperature 0 takes the most likely token and reports its log-probability at temperature 1."""
    logits, size = logits.float(), logits.shape[-1]
    if temperature not in (0, 1):
        logits.div_(temperature)
    weights = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:  # first which block of the vocabulary, then where in the block: no sums over all of it, which are slow
        whole = size // BLOCK
        blocks = weights[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(-1)
        blocks = torch.cat([blocks, weights[:, whole * BLOCK :].sum(-1, keepdim=True)], 1)
        block, rest = invert_cdf(blocks, uniforms[:, None] * blocks.sum(-1, keepdim=True))
        places = block * BLOCK + torch.arange(BLOCK, device=logits.device)
        inside = weights.gather(1, places.clamp(max=size - 1)).masked_fill_(places >= size, 0)
        tokens = block * BLOCK + invert_cdf(inside, rest)[0]
        tokens = tokens.clamp_(max=size - 1)  # NaN: caught later
    tiny = torch.finfo(weights.dtype).tiny
    return tokens[:, 0], weights.gather(-1, tokens).clamp_min_(tiny).log()[:, 0]


def invert_cdf(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of the interval of the cumulated `weights` [rows, intervals] that holds `target` [rows, 1], and how far into
    it. Never an interval of length 0, nor one beyond the last, whatever the rounding."""
    ends = weights.cumsum(-1)
    total = ends[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(ends, target, right=True).clamp_(max=weights.shape[-1] - 1)
    return place, (target - ends.gather(1, place) + weights.gather(1, place)).clamp_min_(0)


def force_label(
    tokens: torch.Tensor, logprobs: torch.Tensor, owed: torch.Tensor, label: torch.Tensor, breaks_line: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The picked tokens [rows] and log-probabilities, but where ids of the `label` [ids] are owed [rows] the next of these,
    and how many are owed from now on: all of them after a token that breaks the line (breaks_line [vocabulary])."""
    due, size = owed > 0, len(label)
    tokens = torch.where(due, label[(size - owed).clamp(max=size - 1)], tokens)
    return tokens, logprobs.masked_fill(due, 0.0), torch.where(due, owed - 1, breaks_line[tokens] * size)


# ---- the cache and the attention -------------------------------------------------------------------------------------


PAGE = 32  # tokens


class Pool:
    """Slots, each for a prompt, or pages, each for so many of a sample's own tokens: what all layers keep of one has the same
    number. Per layer [keys, values]."""

    def __init__(self, on_growth: Callable[[], None]):
        self.layers, self.on_growth = [], on_growth  # [[places, ...], [places, ...]] each, one block of memory
        self.free = []  # a heap: the lowest first, so that those in use lie together

    def __len__(self) -> int:
        return len(self.layers[0][0])

    def reserve(self, size: int) -> None:
        """Make it at least so large."""
        old = len(self)
        if size > old:
            for layer in self.layers:
                for i, t in enumerate(layer):
                    layer[i] = t.new_zeros(size, *t.shape[1:])
                    layer[i][:old] = t
            self.free += range(old, size)  # larger than all others, so it stays a heap
            self.on_growth()

    def take(self, count: int) -> list[int]:
        """The numbers of so many free ones; a pool that has too few grows by a quarter at least."""
        if len(self.free) < count:
            self.reserve(len(self) + max(count, len(self) // 4))
        return [heapq.heappop(self.free) for _ in range(count)]

    def give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            heapq.heappush(self.free, number)

    def compact(self, used: np.ndarray, first: int) -> np.ndarray | None:
        """If a quarter of those up to the highest of `used` is free, as when the last samples are running, move the used
        ones together, from `first` on: a step computes all up to the highest. -> the new numbers by the old, None if nothing
        was moved."""
        if used.max() + 1 <= 1.25 * (len(used) + first) + 4:
            return None
        new, target = np.arange(len(self)), np.arange(first, first + len(used))
        moved, new[used] = used != target, target
        self.free = list(range(first + len(used), len(self)))
        old, target = (torch.from_numpy(t[moved]).to(self.layers[0][0].device) for t in (used, target))
        for layer in self.layers:
            for t in layer:
                t[target] = t[old]
        return new


class PagedCache:
    """Keys and values of the sequences that are being decoded. Stands in for a transformers cache: the model calls
    `update` once a layer and hands what that returns to `paged_attention`.

    Those of a prompt are held once, in a slot, and read by all of its samples. Those of a sample's own tokens lie in
    pages of 32, so that a short sample takes little room however long the longest is, and handing a row to the next
    sample moves nothing. Slots and pages are each one block of memory: for a slice of something longer, a batched
    matrix product makes a copy first."""

    def __init__(self, longest_prompt: int, on_growth: Callable[[], None], fused: bool = False):
        # [slots or pages, key heads, tokens, head_dim] each, but own values [pages, key heads, head_dim, tokens]: for the
        # product of so few rows this order is the faster one
        self.prompts, self.own = Pool(on_growth), Pool(on_growth)
        self.longest_prompt, self.fused = longest_prompt, fused
        self.recorded = None  # while prompts are run: per layer (keys, values)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        if self.recorded is not None:
            self.recorded.append((keys, values))
            return keys, values
        return _CachedLayer(self, layer, keys[:, :, 0]), _CachedLayer(self, layer, values[:, :, 0])

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def keep_prompts(self) -> list[int]:
        """Move the recorded keys and values into slots; their numbers."""
        recorded, self.recorded = self.recorded, None
        if not self.own.layers:  # how many layers there are, of what shape, shows with the first prompts
            for keys, values in recorded:
                device = values.device.type  # under autocast keys come in float32, and attention works in bfloat16
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
                (_, heads, _, width), (_, _, _, value_width) = keys.shape, values.shape
                prompts = (heads, self.longest_prompt, width), (heads, self.longest_prompt, value_width)
                own = (heads, PAGE, width), (heads, value_width, PAGE)
                self.prompts.layers.append([values.new_zeros(0, *shape, dtype=dtype) for shape in prompts])
                self.own.layers.append([values.new_zeros(0, *shape, dtype=dtype) for shape in own])
            self.own.take(1)  # page 0 belongs to no sample: it stands for "none" in a row's table
        slots = self.prompts.take(len(recorded[0][0]))
        for layer, pair in zip(self.prompts.layers, recorded, strict=True):
            for stored, new in zip(layer, pair, strict=True):
                stored[slots, :, : new.shape[2]] = new.to(stored.dtype)
        return slots

    def begin_step(self, ages: torch.Tensor, starts: torch.Tensor, view: "View") -> None:
        """Say what the next forward pass decodes: for each row how many of its own tokens are cached (`ages` [rows]), at
        which position the first of them stands (`starts` [rows]), and where."""
        self.ages, self.starts, self.view, self.biases = ages, starts, view, {}
        if not self.fused:
            self.page, self.place = view.table.gather(1, ages[:, None] // PAGE)[:, 0], ages % PAGE

    def bias(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """0 where the query of a row sees a key and -1e30 where it does not: for prompts [slots, 1, readers, 1, keys] and
        for own tokens [pages, 1, 1, 1, keys]. window: of sliding attention. The same in all layers of a kind."""
        if window not in self.biases:
            view, column = self.view, torch.arange(max(self.longest_prompt, PAGE), device=self.ages.device)
            prompt_length, query = self.starts[view.grid][..., None], (self.starts + self.ages)[view.grid][..., None]
            seen = column[: self.longest_prompt] < prompt_length
            back = (self.ages[view.own_row] - view.own_first)[:, None] - column[:PAGE]  # how far back a key lies
            own_seen = back >= 0
            if window is not None:
                seen &= query - column[: self.longest_prompt] < window
                own_seen &= back < window
            bias = (
                torch.where(seen, 0.0, -1e30)[:, None, :, None],
                torch.where(own_seen, 0.0, -1e30)[:, None, None, None],
            )
            self.biases[window] = bias
        return self.biases[window]


class _CachedLayer(typing.NamedTuple):
    cache: PagedCache
    layer: int
    new: torch.Tensor  # keys or values of this step, which the attention stores [rows, key heads, width]


class Size(typing.NamedTuple):
    """Of a step: so many of each are computed, whether they are used or not."""

    rows: int
    slots: int
    readers: int  # of a slot
    pages: int


EMPTY = np.zeros(0, np.int64)  # a view is made of arrays, of which tensors are made in the end


class View(typing.NamedTuple):
    """Where a step finds what it reads. Unused slots and pages are computed as well, and the results ignored. The fused
    kernel reads only what it needs, and only the first two.

    Rows 0 and 2 sample after the prompt in slot 0, row 1 after that in slot 1; row 0 has 41 tokens of its own, in pages 1
    and 4, the others have fewer than 32, in pages 2 and 3; page 0 stands for none:

        slot  [0, 1, 0]           grid    [[0, 2], [1, 0]]    own_row    [0, 0, 1, 2, 0]
        table [[1, 4], [2, 0],    reader  [0, 0, 1]           own_first  [far, 0, 0, 0, 32]
               [3, 0]]"""

    slot: torch.Tensor  # of a row's prompt [rows]
    table: torch.Tensor  # the pages of a row, 0 for none [rows, pages of a row]
    grid: torch.Tensor = EMPTY  # the rows that read a slot, padded with row 0 [slots, readers]
    reader: torch.Tensor = EMPTY  # where a row stands among those of its slot [rows]
    own_row: torch.Tensor = EMPTY  # whose page it is [pages]
    own_first: torch.Tensor = EMPTY  # which of the row's own tokens is the first of the page [pages]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor):
    """Attention of several queries to the same keys, in a form that can be merged with attention to others.

    query [pages, key heads, queries, heads per key head, head_dim], keys and values [pages, key heads, keys, head_dim]
    -> mean of the values under softmax weights, shaped as query, and the log of the sum of the exponentials of the
    scores [pages, key heads, queries, heads per key head, 1]."""
    scores = (query.flatten(2, 3) @ keys.mT).float().unflatten(2, query.shape[2:4]) + bias
    weights = scores.softmax(-1)
    mean = (weights.flatten(2, 3).to(values.dtype) @ values).unflatten(2, query.shape[2:4])
    return mean, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()  # the largest weight is 1 / sum


def paged_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """The attention function of every model whose attention can be replaced; transformers calls it in each layer. In
    decoding, it stores the new keys and values; a prompt is read once for all the rows that sample from it, and the parts of
    a row, its prompt and its own pages, are merged by the weight that each has in the softmax over all of them. Everything
    else is the usual attention."""
    if not isinstance(key, _CachedLayer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with capped scores or sinks")
    if key.cache.fused:
        return fused_attention(query[:, :, 0], key, value, scaling, sliding_window)[:, None], None
    cache, view, (prompt_bias, own_bias) = key.cache, key.cache.view, key.cache.bias(sliding_window)
    own_keys, own_values = cache.own.layers[key.layer]
    own_keys[cache.page, :, cache.place] = key.new.to(own_keys.dtype)
    own_values[cache.page, :, :, cache.place] = value.new.to(own_values.dtype)
    prompt_keys, prompt_values = (t[: len(view.grid)] for t in cache.prompts.layers[key.layer])
    own_keys, own_values = (t[: len(view.own_row)] for t in cache.own.layers[key.layer])
    rows, heads, _, head_dim = query.shape
    scaled = (query[:, :, 0] * (scaling or head_dim**-0.5)).to(own_keys.dtype).unflatten(1, (own_keys.shape[1], -1))
    mean, weight = attend(take_rows(scaled, view.grid).transpose(1, 2), prompt_keys, prompt_values, prompt_bias)
    mean, weight = (t[view.slot, :, view.reader] for t in (mean, weight))  # [rows, key heads, heads per key head, ...]
    own_mean, own_weight = attend(take_rows(scaled, view.own_row)[:, :, None], own_keys, own_values.mT, own_bias)
    own_mean, own_weight = own_mean[:, :, 0], own_weight[:, :, 0]  # [pages, key heads, heads per key head, ...]
    # what a page holds that its row does not see, as all of page 0 and of pages of no row, has a weight of e^-1e30
    total = torch.cat([weight[:, None], take_rows(own_weight, view.table)], 1).logsumexp(1)
    own = own_mean * (own_weight - take_rows(total, view.own_row)).exp()
    out = mean * (weight - total).exp() + take_rows(own, view.table).sum(1)
    return out.reshape(rows, 1, heads, -1).to(query.dtype), None


if triton:

    @triton.jit
    def _see(query, keys, values, seen, in_key, in_value, largest, total, mean):
        """Softmax over a few keys more, all of it relative to the largest score so far (FlashAttention). query [Q, D]; keys
        and values: where they lie, [D, KEYS] and [KEYS, V]; seen [KEYS]; the state: largest [Q], total [Q], mean [Q, V]."""
        key = tl.load(keys, mask=seen[None, :] & in_key[:, None], other=0.0)
        value = tl.load(values, mask=seen[:, None] & in_value[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(query, key, input_precision="ieee"), -1e30)
        new = tl.maximum(largest, tl.max(scores, 1))
        weights, fade = tl.exp(scores - new[:, None]), tl.exp(largest - new)
        mean = mean * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        return new, total * fade + tl.sum(weights, 1), mean

    @triton.jit(do_not_specialize=["window", "longest", "columns"])
    def _attend_and_store(
        query, new_key, new_value, prompt_keys, prompt_values, own_keys, own_values, slots, table, ages, starts, out,
        scale, window, longest, columns, QUERIES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
        Q: tl.constexpr, D: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr,
    ):  # fmt: skip
        """For one row and key head; tensors as in `PagedCache` and `View`. Q, D and V: QUERIES, WIDTH and VALUE_WIDTH rounded
        up to what a matrix product takes; KEYS: so many at a time, a page."""
        row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        q, d, v, k = tl.arange(0, Q), tl.arange(0, D), tl.arange(0, V), tl.arange(0, KEYS)
        in_key, in_value, at = d < WIDTH, v < VALUE_WIDTH, row * heads + head
        start, age, slot = tl.load(starts + row), tl.load(ages + row), tl.load(slots + row)
        queries = (at * QUERIES + q)[:, None]
        x = tl.load(query + queries * WIDTH + d[None, :], mask=(q < QUERIES)[:, None] & in_key[None, :], other=0.0)
        x = (x.to(tl.float32) * scale).to(own_keys.dtype.element_ty)
        # the row's last token, which the others find in the cache from the next step on
        key = tl.load(new_key + at * WIDTH + d, mask=in_key, other=0.0).to(x.dtype)
        value = tl.load(new_value + at * VALUE_WIDTH + v, mask=in_value, other=0.0).to(x.dtype)
        page = tl.load(table + row * columns + age // KEYS) * heads + head
        tl.store(own_keys + (page * KEYS + age % KEYS) * WIDTH + d, key, mask=in_key)
        tl.store(own_values + (page * VALUE_WIDTH + v) * KEYS + age % KEYS, value, mask=in_value)
        largest = tl.sum(x.to(tl.float32) * key.to(tl.float32)[None, :], 1)
        total = tl.full([Q], 1.0, tl.float32)
        mean = tl.zeros([Q, V], tl.float32) + value.to(tl.float32)[None, :]
        for begin in range(tl.maximum(start + age - window + 1, 0) // KEYS * KEYS, start, KEYS):
            place = (slot * heads + head) * longest + begin + k
            keys, values = place[None, :] * WIDTH + d[:, None], place[:, None] * VALUE_WIDTH + v[None, :]
            seen = (begin + k < start) & (start + age - begin - k < window)
            largest, total, mean = _see(
                x, prompt_keys + keys, prompt_values + values, seen, in_key, in_value, largest, total, mean
            )
        for begin in range(tl.maximum(age - window + 1, 0) // KEYS * KEYS, age, KEYS):
            page = tl.load(table + row * columns + begin // KEYS) * heads + head
            keys = (page * KEYS + k)[None, :] * WIDTH + d[:, None]
            values = (page * VALUE_WIDTH + v)[None, :] * KEYS + k[:, None]
            seen = (begin + k < age) & (age - begin - k < window)
            largest, total, mean = _see(
                x, own_keys + keys, own_values + values, seen, in_key, in_value, largest, total, mean
            )
        shown = (q < QUERIES)[:, None] & in_value[None, :]
        tl.store(out + queries * VALUE_WIDTH + v[None, :], mean / total[:, None], mask=shown)


def fused_attention(
    query: torch.Tensor, key: _CachedLayer, value: _CachedLayer, scaling: float | None, window: int | None
) -> torch.Tensor:
    """What `paged_attention` does in decoding, in one kernel: query [rows, heads, head_dim] -> [rows, heads, value width].
    Every row reads its whole prompt; what many rows read comes from the cache of the GPU."""
    cache, view = key.cache, key.cache.view
    prompts, own = cache.prompts.layers[key.layer], cache.own.layers[key.layer]
    (rows, heads, width), (_, key_heads, longest, value_width) = query.shape, prompts[1].shape
    sizes = heads // key_heads, width, value_width
    out = query.new_empty(rows, heads, value_width, dtype=own[1].dtype)
    _attend_and_store[rows, key_heads](
        query.contiguous(), key.new.contiguous(), value.new.contiguous(), *prompts, *own,
        view.slot, view.table.contiguous(), cache.ages, cache.starts, out, scaling or width**-0.5,
        1 << 30 if window is None else window, longest, view.table.shape[1], *sizes,
        *(max(16, 1 << (size - 1).bit_length()) for size in sizes), PAGE,
        num_warps=2 if max(width, value_width) <= 128 else 4, num_stages=1,
    )  # fmt: skip
    return out


def take_rows(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """table[places]: rows of a table, several times as fast on a CPU as by indexing."""
    return table.index_select(0, places.flatten()).unflatten(0, places.shape)


AttentionInterface.register("paged_attention", paged_attention)
AttentionMaskInterface.register("paged_attention", sdpa_mask)


def attention_masks(config, positions: torch.Tensor, length: int):
    """Which of `length` tokens the queries at `positions` [rows, queries] see: a boolean mask
    [rows, 1, queries, length], or one per kind of layer for a model that mixes full and sliding attention."""
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    full, window = distance >= 0, getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of kind {sorted(kinds)}")
    if window is None or kinds == {"full_attention"}:
        return full
    sliding = full & (distance < window)
    return {"full_attention": full, "sliding_attention": sliding} if len(kinds) > 1 else sliding


# ---- what makes a step cheaper ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def packed_weights(policy: Policy):
    """On a CPU, linear layers with their weights laid out for the kernels of oneDNN. Multiplying a few hundred rows with
    the layout that training needs, the weights are rearranged in every product: 1.2 to 2 times slower for SmolLM2,
    and 5 times at the 4 rows that are left at the end. Costs a second copy of the weights. Without gradients only."""
    usable = policy.device.type == "cpu" and torch.backends.mkldnn.is_available()
    usable = usable and not torch.is_autocast_enabled("cpu")  # whose products are bfloat16
    pack, linear = (getattr(torch.ops.mkldnn, name, None) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    layers = [m for m in policy.model.modules() if type(m) is torch.nn.Linear and m.weight.numel() >= 1 << 15]
    layers = layers if usable and pack and linear else []
    for layer in layers:
        packed = pack(layer.weight.detach())
        layer.forward = lambda x, w=packed, bias=layer.bias: linear(x, w, bias, "none", [], "")
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def casts_kept(policy: Policy):
    """Autocast keeps the bfloat16 copy of a weight only if the weight requires a gradient; those that are frozen beside
    adapters would be cast anew in every step. Without gradients only."""
    frozen = [weight for weight in policy.model.parameters() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def rms_norm(weight: torch.Tensor, eps: float, promotes: bool, x: torch.Tensor) -> torch.Tensor:
    normed = torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return normed.to(torch.promote_types(x.dtype, weight.dtype) if promotes else x.dtype)


@torch.no_grad()
def fuse_norms(model: torch.nn.Module) -> None:
    """Let PyTorch compute root mean square norms in one kernel, where transformers runs six small ones and more in the
    backward pass: the classes named so, as far as they compute just this. That of Gemma, for one, stays as it is."""
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        known = type(module).__name__.endswith("RMSNorm") and getattr(module, "bias", None) is None
        if known and isinstance(eps, float) and isinstance(weight, torch.nn.Parameter):
            x = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device).view(2, *weight.shape)
            try:
                promotes = module(x.bfloat16()).dtype != torch.bfloat16  # what they return differs
                # no lambda: a deep copy of the module must have one with its own weight
                fused = functools.partial(rms_norm, weight, eps, promotes)
                same = torch.allclose(module(x), fused(x), rtol=1e-4, atol=1e-5)
            except (TypeError, RuntimeError):  # of another signature
                continue
            if same:
                module.forward = fused


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device):
    """Whatever makes the host wait for the GPU, and so cannot be part of a graph, raises RuntimeError: better here than in a
    recording, after whose failure older releases of PyTorch cannot free memory any more (its issues 180395, 190348)."""
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode of PyTorch is a prototype
            torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def record(step: Callable[[], None], device: torch.device, graph_memory) -> Callable[[], None]:
    """Something that does what `step` does without Python: a CUDA graph. On a CPU `step` itself."""
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=graph_memory):
            step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # a recording that fails does not come back from its own
        raise (error.__context__ or error) from None  # the end of a failed recording fails, too, and hides why
    return graph.replay


# ---------------------------------------------------------------------------------------------------------------------
# 5. Log-probabilities, batches, one training step
# ---------------------------------------------------------------------------------------------------------------------


def right_padded(
    policy: Policy, sequences: Sequence[list[int]], what: str = "the longest solution with its prompt"
) -> torch.Tensor:
    """Token ids [sequences, longest]. UserError if `what` they are does not fit into the model's positions."""
    width = max(map(len, sequences))
    check_length(policy, width, what)
    return torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences], device=policy.device)


def written_examples(policy: Policy, problems: Iterable[Problem]) -> list[Example]:
    """The prompts and written solutions of those problems that have one. UserError, before anything is sampled or trained, if
    the longest does not fit into the model's positions."""
    written = [p for p in problems if p.solution]
    examples = [(policy.encode_prompt(prompt_text(p)), policy.encode_solution(p.solution)) for p in written]
    longest = max((len(prompt) + len(response) for prompt, response in examples), default=0)
    check_length(policy, longest, "the longest solution with its prompt")
    return examples


def response_places(examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """Row and column of every response token in the right-padded batch: [2, response tokens of all examples]."""
    rows = np.repeat(np.arange(len(examples)), [len(response) for _, response in examples])
    columns = np.concatenate([len(prompt) + np.arange(len(response)) for prompt, response in examples])
    return torch.from_numpy(np.stack([rows, columns])).to(device)


def response_logprobs(policy: Policy, examples: Sequence[Example], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every response token under softmax(logits / temperature): [response tokens of all examples,
    one after the other]. No mask: what is not a response token is never computed. With prompt [p0 p1] and response
    [r0 r1], the hidden state of p1 predicts r0 and that of r0 predicts r1.

    The logits of a few rows at a time are made, used and made again in the backward pass, so that float32 logits of
    shape (batch, length, vocabulary) never exist."""
    ids = right_padded(policy, [prompt + response for prompt, response in examples])
    rows, columns = response_places(examples, policy.device)
    with policy.autocast():
        hidden = policy.hidden_states(ids)[rows, columns - 1]  # [response tokens, width]

        def chunk_logprobs(hidden_chunk, targets):
            logits = policy.head(hidden_chunk) / temperature
            return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

        chunks = zip(hidden.split(2048), ids[rows, columns].split(2048), strict=True)
        return torch.cat([recompute_in_backward(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks])


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of this process's share of the sequences, grouped by length so that no group has more than `budget` tokens
    after padding to its longest (a single sequence longer than that is a group of its own)."""
    rank, n_processes = process_rank(), process_count()
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])[rank::n_processes]:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


_halvings = collections.Counter()  # token budget -> how many times it had to be halved


def within_memory(run: Callable[[list[list[int]]], list], lengths: Sequence[int], token_budget: int) -> list:
    """run(batches), with this process's share of the sequences in batches of at most `token_budget` tokens. When memory
    runs out, it is begun again with half the budget, for good and with a warning."""
    while True:
        budget = token_budget >> _halvings[token_budget]
        try:
            return run(token_batches(lengths, budget))
        except (RuntimeError, MemoryError) as error:
            if budget <= max(lengths) or not is_out_of_memory(error):
                raise
            half = budget // 2
            warn(
                f"out of memory with {budget} tokens per micro-batch: going on with {half} (see --token-budget)",
                each=True,
            )
            _halvings[token_budget] += 1


def in_batches(run: Callable[[list[Example]], Iterable], examples: Sequence[Example], token_budget: int) -> list:
    """run(batch), which returns something for each example of the batch, over all examples, `token_budget` tokens at a
    time -> what it returned, in the order of the examples. Of several processes each runs a share, and all get all."""

    def run_all(batches: list[list[int]]) -> list:
        return [pair for batch in batches for pair in zip(batch, run([examples[i] for i in batch]), strict=True)]

    found = dict(gather(within_memory(run_all, [len(p) + len(r) for p, r in examples], token_budget)))
    return [found[i] for i in range(len(examples))]


def by_example(flat: torch.Tensor, examples: Sequence[Example]) -> list[np.ndarray]:
    """[response tokens of all examples, one after the other] -> an array for each example."""
    return np.split(flat.cpu().numpy(), np.cumsum([len(response) for _, response in examples])[:-1])


def backward_in_parts(
    lengths: Sequence[int], token_budget: int, backward: Callable[[list[int]], list[float]], parameters: Iterable
) -> list[float]:
    """Accumulate the gradient of a batch of sequences in micro-batches of at most `token_budget` tokens.

    backward(indices) adds the gradient of these sequences' part of the loss and returns sums to report, which are added up
    over the micro-batches. The loss must be a sum over sequences, so that the gradient does not depend on how the batch was
    split: over micro-batches, or over processes, each of which takes its share and ends with the gradient of all."""
    parameters = [p for p in parameters if p.requires_grad]

    def backward_all(batches: list[list[int]]) -> list[list[float]]:
        for p in parameters:  # what was added before memory ran out
            p.grad = None
        return [backward(batch) for batch in batches]

    parts = within_memory(backward_all, lengths, token_budget)
    if process_count() > 1:
        # a process without a share has no gradient; what has none anywhere must stay so, or the optimizer would move it
        has_gradient = np.any(gather([[p.grad is not None for p in parameters]]), axis=0)
        parameters = [p for p, has in zip(parameters, has_gradient, strict=True) if has]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    return np.sum(gather(parts), axis=0).tolist()


def cross_entropy_step(
    policy: Policy, optimizer: torch.optim.Optimizer, examples: Sequence[Example], lr: float, token_budget: int,
    targets: Sequence[Sequence[bool]] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """One optimizer step on the mean cross-entropy of the response tokens, or of those that `targets` marks -> (loss in
    nats per token, gradient norm).

    The sum over micro-batches is divided by the tokens of the whole batch, so the gradient does not depend on how the
    batch was split. Raises UserError if the loss or the gradient is not finite."""
    targets = targets or [[True] * len(response) for _, response in examples]
    n_tokens = sum(map(sum, targets))

    def backward(indices: list[int]) -> list[float]:
        mask = torch.tensor([flag for i in indices for flag in targets[i]], device=policy.device)
        loss = -response_logprobs(policy, [examples[i] for i in indices])[mask].sum() / n_tokens
        loss.backward()
        return [loss.item()]

    lengths, weights = [len(p) + len(r) for p, r in examples], list(policy.model.parameters())
    (loss,) = backward_in_parts(lengths, token_budget, backward, weights)
    optimizer.param_groups[0]["lr"] = lr
    return loss, *clipped_step(optimizer, loss)


def clipped_step(optimizer: torch.optim.Optimizer, loss: float) -> list[float]:
    """Update with the accumulated gradients, those of every parameter group clipped to norm 1 -> their norms before. Raises
    UserError, before anything is updated, if the loss or a gradient is not finite."""
    norms = [torch.nn.utils.clip_grad_norm_(group["params"], 1.0).item() for group in optimizer.param_groups]
    if not all(map(math.isfinite, [loss, *norms])):
        raise UserError(f"the loss ({loss}) or its gradient ({norms}) is not finite; try a smaller --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def check_memory(model: torch.nn.Module) -> None:
    """UserError if a model whose weights are on a GPU cannot be trained there: better before hours of sampling than after.
    Beside its 4 bytes a weight has a gradient and the two moments of AdamW, 12 bytes more."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if weights and weights[0].device.type == "cuda":
        needed = 12 * sum(p.numel() for p in weights)
        free = torch.cuda.mem_get_info(weights[0].device)[0]
        free += torch.cuda.memory_reserved(weights[0].device) - torch.cuda.memory_allocated(weights[0].device)
        if needed > free:
            raise UserError(
                f"to train all weights takes {needed / 2**30:.0f} GiB beside them, and the GPU has {free / 2**30:.0f} left"
            )


def adam_w(parameters: Iterable, lr: float) -> torch.optim.AdamW:
    """The optimizer of all scripts, for weights or parameter groups. On a GPU fused: the usual form makes another copy of
    the weights in every step."""
    parameters = list(parameters)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=first.is_cuda or None)


def cosine_lr(step: int, n_steps: int, lr: float) -> float:
    """Learning rate of step 0..n_steps-1: linear warm-up over the first 3 % (at least one step), then a cosine that
    ends at lr / 100 (of one or two steps none is below lr)."""
    warmup = max(1, round(0.03 * n_steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - 1 - warmup)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@functools.lru_cache(1)  # every step of an epoch asks for the same
def shuffled(n: int, *seed: int) -> list[int]:
    """A permutation of range(n) that depends on the seed alone, so that a resumed run needs no generator state."""
    return np.random.default_rng(seed).permutation(n).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# 6. The run folder and the command line
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_aside(path: Path):
    """A file opened for writing that appears under its name only when it is complete and on the disk. Of several processes
    only the first one writes."""
    if process_rank() > 0:
        yield io.BytesIO()
        return
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


_held: dict[Path, int] = {}


def hold(path: Path, shown: Path | None = None) -> None:
    """Keep a folder, or a file for what it stands for, to this process until it ends, however it ends. UserError, which names
    `shown`, if another one has it."""
    if fcntl is None or (place := path.resolve()) in _held:
        return
    _held[place] = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(_held[place], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(_held.pop(place))
        raise UserError(
            f"{shown or path}: another process is writing to it; wait for it, or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        pass


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    with write_aside(path) as file:
        file.write("".join(sample.to_json() + "\n" for sample in samples).encode())


def append(path: Path, lines: str) -> None:
    """Add to a file; of several processes only the first one does."""
    if process_rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)


def write_json(path: Path, value) -> None:
    with write_aside(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """The object in a file that this project wrote; UserError if it is missing or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: missing or broken ({error})") from None


class Run:
    """The folder --out: args.json, metrics.jsonl, samples/, model/ and checkpoint/state.pt (of a finished run without
    the weights).

    A run that was killed at any moment and is started again with --resume goes on from its last checkpoint and ends
    with the same weights and metrics. `self.state` is what that checkpoint holds, None in a fresh run.
    may_grow: a setting that may be larger after --resume, because what was done does not depend on it."""

    def __init__(self, args: argparse.Namespace, may_grow: str | None = None):
        self.may_grow = may_grow
        self.out, self.checkpoint_every = Path(args.out), args.checkpoint_every
        self.state_file = self.out / "checkpoint" / "state.pt"
        self.metrics_file, self.settings_file = self.out / "metrics.jsonl", self.out / "args.json"
        self.interrupted = False
        ignored = ("out", "resume", "overwrite", "device", "checkpoint_every")
        self.settings = {key: value for key, value in vars(args).items() if key not in ignored}
        self.settings["script"] = Path(sys.argv[0]).name
        self.replace, goes_on = on_first(lambda: self._look(args.resume, args.overwrite))
        self.state = self._read_checkpoint() if goes_on else None
        self.kept = self.state["run"] if self.state else {"lines": 0, "seconds": 0.0}

    def _look(self, resume: bool, overwrite: bool) -> tuple[list[str], bool]:
        """What to replace in the folder, and whether to go on from its checkpoint."""
        if self.out.is_dir():
            hold(self.out)
        given = self.settings.get
        models = {key: given(key) for key in ("model", "base", "orm", "genrm") if given(key)}
        files = {key: given(key) for key in ("train_samples", "selection", "dataset", "pool") if given(key)}
        files = {key: [names] if isinstance(names, str) else names for key, names in files.items()}
        # what shows after a change of them that they are not the same any more
        self.settings |= {f"{key}_fingerprint": fingerprint(name, f"--{key}") for key, name in models.items()}
        for key, names in files.items():
            self.settings |= file_fingerprints(key, names)
        folders = ("checkpoint", "samples", "model", "model.old")
        logged = self.metrics_file.exists() and self.metrics_file.stat().st_size
        occupied = [name for name in folders if any((self.out / name).glob("*"))] + ["metrics.jsonl"] * bool(logged)
        if not occupied:
            return [], False
        if resume:
            self._check_settings()
            return [], self.state_file.exists()
        if not overwrite:
            raise UserError(
                f"{self.out} already holds a run: add --resume to continue it, --overwrite to replace it, "
                "or choose another --out"
            )
        replaced = occupied + [n for n in ("quality.json", "selection.json") if (self.out / n).exists()]
        files.pop("selection", None)  # it is read before anything is deleted, the others again by a resumed run
        self._check_inputs([*models.values(), *itertools.chain(*files.values())], replaced)
        return replaced, False

    def _check_settings(self) -> None:
        """UserError if the run that is resumed was started with other settings."""
        before = read_json(self.settings_file)
        both = self.settings.keys() | before.keys()
        same = {"token_budget", "rows"}  # which fit the machine, and change nothing but rounding
        if self.may_grow and self.settings[self.may_grow] >= before.get(self.may_grow, math.inf):
            same.add(self.may_grow)
        changed = sorted(k for k in both - same if before.get(k) != self.settings.get(k))
        if changed:
            raise UserError(f"--resume: {self.out} was started with other settings ({', '.join(changed)})")

    def _check_inputs(self, names: list[str], replaced: list[str]) -> None:
        """UserError if one of these models and files lies in what --overwrite would replace."""
        lost = {(self.out / name).resolve() for name in replaced}
        for name in names:
            if lost & {path := Path(name).resolve(), *path.parents}:
                raise UserError(f"--overwrite would delete {name}, which this run reads; choose another --out")

    def _read_checkpoint(self) -> dict:
        try:
            return torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{self.state_file}: not a checkpoint of this program ({first_line(error)})") from None

    def begin(self) -> None:
        """Make the folder ready. Called when everything the run needs has been loaded: until then nothing is touched."""
        on_first(self._prepare)
        self.lines, self.saved = self.kept["lines"], time.monotonic()
        self.started = self.saved - self.kept["seconds"]
        signal.signal(signal.SIGINT, self._interrupt)

    def _prepare(self) -> None:
        for path in [self.out / name for name in self.replace]:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        for name in ("checkpoint", "samples"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        hold(self.out)
        write_json(self.settings_file, self.settings)
        if (self.out / "model.old").exists() and not (self.out / "model").exists():  # killed between two renames
            (self.out / "model.old").rename(self.out / "model")
        lines = self.metrics_file.read_text().splitlines(keepends=True) if self.metrics_file.exists() else []
        with write_aside(self.metrics_file) as file:  # what was logged after the checkpoint will be logged again
            file.write("".join(lines[: self.kept["lines"]]).encode())

    def _interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nstopping once everything is saved; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def clock(self) -> float:
        """Seconds of this run so far, interruptions left out."""
        return time.monotonic() - self.started

    def log(self, **metrics) -> None:
        """Append one object to metrics.jsonl and show it."""
        row = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in metrics.items()}
        row = {"step": row.pop("step"), "seconds": round(self.clock(), 1)} | row
        append(self.metrics_file, json.dumps(row) + "\n")
        self.lines += 1
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        tqdm.write("  ".join(f"{key} {value}" for key, value in shown.items()))

    def checkpoint(self, now: bool = False, **state) -> None:
        """Save `state` if `now`, or if --checkpoint-every seconds have passed, or if Ctrl-C was pressed; then stop."""
        self.interrupted = any(gather([self.interrupted]))
        due = now or self.interrupted or time.monotonic() - self.saved >= self.checkpoint_every
        if due and process_rank() == 0:
            state["run"] = {"lines": self.lines, "seconds": self.clock()}
            with write_aside(self.state_file) as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # of its zip writer, which hides that the disk is full
                    reason = first_line(error.__context__ or error)
                    raise UserError(f"{self.state_file}: could not be written ({reason})") from None
            self.saved = time.monotonic()
        if self.interrupted:
            gather([None])  # nobody leaves before the first process has saved
            raise KeyboardInterrupt

    def finish(self, **state) -> None:
        """Mark the run as complete: of the checkpoint only `state` is needed any longer."""
        self.checkpoint(now=True, finished=True, **state)

    @property
    def is_finished(self) -> bool:
        return bool(self.state and self.state.get("finished"))


def sample_to_file(
    policy: Policy, problems: Sequence[Problem], path: Path, run: Run | None = None,
    prefixes: Sequence[str] | None = None, **how,
) -> list[Sample]:  # fmt: skip
    """`generate`, written to `path` as JSON lines a group of problems at a time. Groups that are complete in the file
    are read back instead of sampled again, so that an interrupted round loses one group at most; with as many rows and
    processes the groups are the same after a restart, and so are, to the last bit, the samples. `how`: the arguments of
    `generate`, `samples` and `rows` among them. Token ids and log-probabilities are not kept: a round of K = 96 would fill
    gigabytes. The clock of `run` counts what went into the samples that are read back."""
    per_problem = how["samples"]
    rows = how["rows"] * process_count()
    group = max(1, 32 * rows // per_problem)  # long enough that the emptying of the rows at its end is rare
    prefixes = prefixes or [""] * len(problems)
    encode_prompts(policy, problems, how["max_new_tokens"], prefixes, how.get("few_shot", False))  # do all fit?
    samples = on_first(lambda: read_samples(path, problems, per_problem, prefixes) if path.exists() else [])
    if len(samples) < len(problems) * per_problem:
        samples = samples[: len(samples) - len(samples) % (group * per_problem)]
        write_samples(path, samples)
    clock_file = run.out / "checkpoint" / f"{path.stem}.json" if run else None
    if samples and run and clock_file.exists():
        run.started = min(run.started, time.monotonic() - read_json(clock_file)["seconds"])
    for first in range(len(samples) // per_problem, len(problems), group):
        label = f"{how['progress']}, problem {first} of {len(problems)}"
        new = generate(
            policy, problems[first : first + group], prefixes=prefixes[first : first + group],
            stop=lambda: bool(run and run.interrupted), **how | {"progress": label},
        )  # fmt: skip
        append(path, "".join(sample.to_json() + "\n" for sample in new))
        if run:
            write_json(clock_file, {"seconds": run.clock()})
        for sample in new:
            sample.tokens, sample.logprobs = (), ()
        samples += new
    return samples


def read_samples(
    path: Path, problems: Sequence[Problem], per_problem: int, prefixes: Sequence[str] | None = None
) -> list[Sample]:
    """The samples of a file that `sample_to_file` began: those before the first line that is broken or out of order."""
    samples, prefixes = [], prefixes or [""] * len(problems)
    wanted = itertools.product(zip(problems, prefixes, strict=True), range(per_problem))
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for ((problem, prefix), number), line in zip(wanted, lines, strict=False):
        try:
            row = json.loads(line)
            found = row["problem"], row["sample"], row["question"], row["reference"], row["text"][: len(prefix)]
            if found != (problem.id, number, problem.question, str(problem.answer), prefix):
                break
            samples.append(Sample(problem, number, row["text"], row["finished"]))
        except (ValueError, KeyError, TypeError):
            break
    return samples


def load_samples(path: Path, problems: Sequence[Problem]) -> list[Sample]:
    """All samples of a file that any script wrote, ordered as the problems are. Raises UserError, with the line, for what
    is broken or belongs to none of the problems."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of samples")
    known, samples = {p.id: (i, p) for i, p in enumerate(problems)}, []
    for line, row in json_lines(path.read_text(encoding="utf-8", errors="replace"), path):
        try:
            place, problem = known[row["problem"]]
            fits = row["question"] == problem.question
            sample = Sample(problem, int(row["sample"]), str(row["text"]), bool(row["finished"]))
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{line}: not a sample of one of the {len(problems)} problems of this run")
        samples.append((place, sample))
    if not samples:
        raise UserError(f"{path}: holds no samples")
    return [sample for _, sample in sorted(samples, key=lambda pair: (pair[0], pair[1].number))]


def by_problem(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples in the order of `generate`, one list a problem."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem.id, []).append(sample)
    return list(groups.values())


def mean_pass_at_k(samples: Sequence[Sample]) -> dict[str, float]:
    """pass@1, pass@2, pass@4 ... up to the number of samples a problem has, averaged over the problems."""
    counts = [(len(group), sum(sample.correct for sample in group)) for group in by_problem(samples)]
    return {f"pass@{k}": float(np.mean([pass_at_k(n, c, k) for n, c in counts])) for k in powers_of_two(counts[0][0])}


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... up to and including n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def mean(values: Iterable[float]) -> float | None:
    """The mean, of yes and no the share of yes; None where there are no values."""
    values = list(values)
    return float(np.mean(values)) if values else None


def dev_metrics(
    policy: Policy, problems: Sequence[Problem], args: argparse.Namespace, samples: int, file: Path,
    few_shot: bool = False,
) -> dict:  # fmt: skip
    """Model selection: maj@1 on the dev problems, and pass@k from `samples` samples at --temperature if there are any.
    The greedy solutions are written to `file` for reading."""
    how = dict(max_new_tokens=args.max_new_tokens, rows=args.rows, seed=args.seed, few_shot=few_shot)
    greedy = generate(policy, problems, temperature=0, progress="dev", **how)
    write_samples(file, greedy)
    metrics = {
        "maj@1": mean(s.correct for s in greedy),
        "unreadable": mean(s.answer is None for s in greedy),
        "cut": mean(not s.finished for s in greedy),
    }
    if samples:
        drawn = generate(policy, problems, samples=samples, temperature=args.temperature, progress="dev pass@k", **how)
        metrics |= mean_pass_at_k(drawn)
    return metrics


class OneLineParser(argparse.ArgumentParser):
    """Help with defaults; a wrong flag or value ends in one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, *argv):
        args = super().parse_args(*argv)
        if args.overwrite and args.resume:
            self.error("--resume goes on with what --overwrite replaces; give one of them")
        on_gpu = torch.cuda.is_available() if args.device == "auto" else args.device.startswith("cuda")
        args.rows = args.rows or (1024 if on_gpu else 256)
        # on a CPU small micro-batches: they pad less, and stay in its cache
        args.token_budget = args.token_budget or (32768 if on_gpu else 1024)
        return args

    def only_with(self, condition: str, holds: bool, args: argparse.Namespace, *flags: str) -> None:
        """An error if one of these flags, which do nothing unless the condition holds, is not at its default; but a run that
        was begun with it goes on."""
        for flag in flags:
            if not holds and not args.resume and getattr(args, flag) != self.get_default(flag):
                self.error(f"--{flag.replace('_', '-')} does nothing without {condition}")

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or float within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (kind is int and value >= 2**63):
            span = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {span}")
        return value

    return parse


def common_parser(doc: str, **defaults) -> OneLineParser:
    """The flags that mean the same in every script; those without a default in `defaults` are left out."""
    flags = {
        "model": dict(help="folder or hub name of the model; tiny: the one that comes with this repository"),
        "dataset": dict(help="arithmetic, arithmetic-hard, gsm8k, svamp, or a file or folder of problems"),
        "out": dict(help="where to write"),
        "seed": dict(type=number(int, 0, 2**32), help="seed of the sampling and of the order of the data"),
        "device": dict(help="auto, cpu, cuda, cuda:1, ..."),
        "dtype": dict(choices=["auto", "float32", "bfloat16"],
                      help="of the arithmetic (weights are float32); auto: bfloat16 on a GPU"),
        "max_new_tokens": dict(type=number(int, 1), help="length limit of a solution, in tokens (GSM8K: 256 to 512); labels "
                               "of rcrl.py count"),
        "temperature": dict(type=number(float, 0), help="sampling temperature; 0: greedy"),
        "samples": dict(type=number(int, 1), help="samples per problem, K (paper: 96; PPO: 4)"),
        "rows": dict(type=number(int, 1), help="sequences decoded at the same time; bounded by memory (default: 256 on a CPU, "
                     "1024 on a GPU)"),
        "lr": dict(type=number(float, 0), help="peak learning rate (paper: 2e-5, falling to 1/100 along a cosine; PPO: 1e-6)"),
        "epochs": dict(type=number(int, 1), help="passes over the training data; in PPO over the samples of a phase (paper: 4)"),
        "batch_size": dict(type=number(int, 1), help="solutions per optimizer step (paper: 128; PPO: 256)"),
        "token_budget": dict(type=number(int, 1), help="tokens per micro-batch, padding included; bounded by memory (default: "
                             "1024 on a CPU, 32768 on a GPU)"),
        "limit_train": dict(type=number(int, 1), help="use only the first so many training problems (SFT: of those with a solution)"),
        "limit_eval": dict(type=number(int, 1), help="use only the first so many dev or test problems"),
        "checkpoint_every": dict(type=number(float, 0), help="seconds between checkpoints"),
        "resume": dict(action="store_true", help="go on with the run in --out from its last checkpoint"),
        "overwrite": dict(action="store_true", help="replace what is in --out"),
    }  # fmt: skip
    everywhere = {
        "dataset": "arithmetic", "seed": 0, "device": "auto", "dtype": "auto", "max_new_tokens": 128, "rows": None,
        "token_budget": None, "limit_eval": None, "resume": False, "overwrite": False,
    }  # fmt: skip
    parser = OneLineParser(description=doc)
    for name, default in (everywhere | defaults).items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, **flags[name])
    return parser


def run_main(main) -> None:
    """Run `main(sys.argv[1:])`; what the user can mend ends in one line and exit code 2, Ctrl-C in code 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is written
    try:
        start_processes()
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        rank = process_rank()
        print(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory, also with the smallest batches ({first_line(error)})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if process_rank() == 0:
            print("stopped; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
