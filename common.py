"""What the scripts share, in the order in which data flows through them.

    problems -> prompt ids -> generate -> samples -> answer check -> token sequences -> loss

To fork a script, copy it together with this file and tiny/. Copy engine/ for faster sampling.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.pytorch_utils import Conv1D

try:
    import engine
except ImportError:  # a fork without the folder
    engine = None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

transformers.utils.logging.disable_progress_bar()


class UserError(Exception):
    """A mistake of the user. `run_main` prints it as one line and exits with code 2."""


def require(condition, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the device ran out. PyTorch and CUDA report it in many ways."""
    messages = ("t allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(message in str(error) for message in messages)


@functools.cache
def warn(text: str, all_ranks: bool = False) -> None:
    """Print a warning to standard error, once. Only rank 0 prints, unless `all_ranks` is set."""
    if all_ranks or process_rank() == 0:
        tqdm.write(f"warning: {text}", file=sys.stderr)


# ---- 0. Several processes: `torchrun --nproc-per-node N script.py ...` ---------------------------
# Every process runs the same script on the same data. Each takes its share of the problems to
# sample and of the sequences to train on. Only rank 0 writes and prints.


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join the process group if torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "LOCAL_RANK" not in os.environ:
        return
    # If torchrun is killed, end as well. Otherwise a second run would write to the same folder.
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Processes may wait hours for the slowest one.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False  # no progress bars


def gather(part: list) -> list:
    """Return the lists of all processes, joined."""
    parts = [part] * process_count()
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    return list(itertools.chain(*parts))


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in at least one process."""
    total = torch.tensor(float(flag))
    if process_count() > 1:
        dist.all_reduce(total)
    return total.item() > 0


def on_first(action: Callable):
    """Run `action`, which uses files, on rank 0. All processes get its result or its error."""
    if process_count() == 1:
        return action()
    outcome = [None, None]
    if process_rank() == 0:
        try:
            outcome = [action(), None]
        except (UserError, OSError) as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome, 0)
    require(outcome[1] is None, outcome[1])
    return outcome[0]


# ---- 1. Problems ---------------------------------------------------------------------------------

MARKER = "####"  # begins the answer line of a solution
HUB = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ("ChilleD/SVAMP",)}
GENERATED = "arithmetic", "arithmetic-hard"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem. Its `id` is unique within the dataset and seeds its samples."""

    id: str
    question: str
    answer: Fraction
    solution: str | None = None  # written solution that ends in "#### answer", if there is one
    reference: str | None = None  # for rewards and metrics only; equals `solution` if there is one


def load_problems(dataset: str, split: str, limit: int | None = None) -> list[Problem]:
    """Load the first `limit` problems of a split: "train", "dev", "test" or "all".

    dataset: see --dataset. A folder has train and test files. The last tenth of a single file is
    its test split, and "all" is the whole file. dev is the last 256 training problems. With fewer
    than 2,560 it is their last tenth. Raises UserError, with file and line, for malformed data.
    """
    part, path = "test" if split == "test" else "train", Path(dataset)
    if dataset in GENERATED:
        problems = _generated_problems(dataset, part)
    elif dataset in HUB:
        problems = _hub_problems(dataset, part)
    elif path.is_dir():
        files = [file for file in (path / f"{part}.jsonl", path / f"{part}.json") if file.is_file()]
        require(files, f"--dataset {dataset}: the folder has no {part}.jsonl")
        problems = _file_problems(files[0])
    else:
        known = ", ".join([*GENERATED, *HUB])
        require(path.is_file(), f"--dataset {dataset}: no such file or folder, and none of {known}")
        problems = _file_problems(path)
        if split == "all":
            require(problems, f"--dataset {dataset}: the file holds no problems")
            return problems[:limit]
        require(len(problems) >= 3, f"{path}: {len(problems)} problems; train, dev and test need 3")
        problems = _divide(dataset, problems, max(1, len(problems) // 10), "test")[split == "test"]
    require(split != "all", f"--split all is for a single file, and {dataset} has splits")
    if part == "train":
        n_dev = 256 if len(problems) >= 2560 else max(1, len(problems) // 10)
        problems = _divide(dataset, problems, n_dev, "dev")[split == "dev"]
    require(problems, f"--dataset {dataset}: its {split} split is empty")
    return problems[:limit]


def _generated_problems(dataset: str, part: str) -> list[Problem]:
    """Generate the embedded task. All problems have a reference, the first ones a solution."""
    from tiny import arithmetic

    problems = []
    for i, (question, text) in enumerate(arithmetic.generate(dataset)):
        name, solution = arithmetic.NAMES[dataset], text if i < arithmetic.N_WRITTEN else None
        problems.append(Problem(f"{name}-{i}", question, extract_answer(text), solution, text))
    return problems[arithmetic.N_TRAIN :] if part == "test" else problems[: arithmetic.N_TRAIN]


def _divide(dataset: str, problems: list[Problem], n: int, name: str) -> tuple[list, list]:
    """Split off the last `n` problems. Warn if they repeat questions of the others."""
    rest, last = problems[:-n], problems[-n:]
    repeated = len({p.question for p in rest} & {p.question for p in last})
    if repeated:
        warn(f"--dataset {dataset}: {repeated} questions of {name} are training questions as well")
    return rest, last


def _hub_problems(dataset: str, part: str) -> list[Problem]:
    from datasets import load_dataset  # takes a second, and the embedded task does not need it

    try:
        rows = load_dataset(*HUB[dataset], split=part)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--dataset {dataset}: could not be loaded ({reason})") from None
    name = f"{dataset} {part} row"
    return [_read_problem(r, f"{dataset}/{part}/{i}", f"{name} {i}") for i, r in enumerate(rows)]


def _file_problems(path: Path) -> list[Problem]:
    """Read a list of problems (.json), or one problem a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".json":
        rows = _parse_json(text, str(path))
        require(isinstance(rows, list), f"{path}: not a list of problems")
        rows = [(f"{path} entry {i}", row) for i, row in enumerate(rows, 1)]
    else:
        rows = json_lines(text, path)
    return [_read_problem(row, f"{path.name}/{i}", where) for i, (where, row) in enumerate(rows)]


def json_lines(text: str, path: Path) -> list[tuple[str, object]]:
    """Parse every line that is not blank. Each value comes with "file line n" for errors."""
    lines = [(f"{path} line {i}", line) for i, line in enumerate(text.split("\n"), 1)]
    return [(where, _parse_json(line, where)) for where, line in lines if line.strip()]


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from None


def _read_problem(row: dict, name: str, where: str) -> Problem:
    """Read a row of GSM8K ("question", "answer") or SVAMP ("Body", "Question", "Answer")."""
    require(isinstance(row, dict), f"{where}: not a JSON object")
    is_svamp = "Body" in row and "Question" in row
    keys = ("Body", "Question", "Answer") if is_svamp else ("question", "answer")
    fields = '"question" and "answer" (GSM8K) or "Body", "Question" and "Answer" (SVAMP)'
    fits = all(isinstance(row.get(key), str | int | float) for key in keys)
    require(fits, f"{where}: needs {fields}")
    # A lone half of a surrogate pair breaks tokenizers.
    *texts, written = (str(row[key]).strip().encode(errors="replace").decode() for key in keys)
    for key, text in zip(keys, texts, strict=False):
        is_text = isinstance(row[key], str) and text.strip(" \t\r\n?")
        require(is_text, f"{where}: {key!r} is not a text")
    if is_svamp and not texts[0].endswith((".", "?", "!", ",")):
        texts[0] += "."
    solution = written if MARKER in written else None
    several = solution is None and "\n" in written
    require(not several, f"{where}: the answer has several lines, and none begins with {MARKER}")
    answers = {extract_answer(line) for line in written.splitlines() if MARKER in line}
    require(len(answers) < 2, f"{where}: the lines with {MARKER} do not agree")
    answer = extract_answer(written if solution else f"{MARKER} {written}")
    require(answer is not None, f"{where}: the answer {written[-40:]!r} is no number")
    return Problem(name, " ".join(texts), answer, solution, solution)


# ---- 2. Answers ----------------------------------------------------------------------------------

# Signs with spaces between, then digits. All patterns here run in linear time.
_SIGNED = re.compile(r"((?:[-+\u2212\u2010-\u2015]\s*){0,2})([0-9.,/]+)")
_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?|[0-9]+/0*[1-9][0-9]*")
# Currency signs, brackets, stars and LaTeX commands may stand before a number or after its sign.
_DECORATION = re.compile(r"(?<![0-9.,/])(?:\\[a-z]{1,16}|[$\u20ac\u00a3\u00a5*(\[{\\])+")
# "1 001", "2^2", "18 / 2", "- / 5": it is not clear which number is meant.
_UNCLEAR = re.compile(r"[0-9](?:[^0-9.,/][0-9]|[^0-9.,]/)|(?<![0-9])/[^a-zA-Z]?[0-9]|frac[0-9]")


_fraction = functools.lru_cache(1024)(Fraction)


def first_solution(text: str) -> str:
    """Return the text up to the end of its answer line, or up to a next "Question:".

    A prompted model may go on: "6/2=3\\n#### 3\\n\\nQuestion: ..." gives "6/2=3\\n#### 3".
    """
    text = ("\n" + text).partition("\nQuestion:")[0][1:]
    before, marker, after = text.partition(MARKER)
    return before + marker + after.partition("\n")[0]


def extract_answer(text: str, lenient: bool = False) -> Fraction | None:
    """Read the number after the first "####" of a solution, exactly, in linear time.

    "#### 18", "####18", "#### $1,234.50", "#### -$3/4" and "#### **18** apples." are read. Two
    different numbers, "18/", "1,8", "1.2.3" and more than 64 characters give None. lenient: if the
    answer line has no digits, return the last number of the text (for prompted models).
    """
    line = first_solution(text).partition(MARKER)[2]
    if lenient and not any(c.isdigit() for c in line):
        numbers = _numbers(first_solution(text.replace(MARKER, "")))
        return next((x for x in reversed([*numbers]) if x is not None), None)
    numbers = {None} if _UNCLEAR.search(line) else set(_numbers(line))
    return numbers.pop() if len(numbers) == 1 else None


def _numbers(line: str) -> Iterator[Fraction | None]:
    """Yield every number of a line, and None for digits that are not clearly one number."""
    if any(c.isnumeric() for c in line if not c.isascii()):
        yield None  # digits of other scripts, superscripts, fractions such as "\u00bd"
    line = _DECORATION.sub("", line)
    for match in _SIGNED.finditer(line):
        signs, digits = match.groups()
        before = line[max(0, match.start() - 1) : match.start()]
        after = line[match.end() : match.end() + 1]
        digits = digits.removesuffix("/") if after.isalpha() else digits  # "18/hour"
        digits = digits.rstrip(".,")
        if not any(c.isdigit() for c in digits):
            continue
        # "- 5" and "18-20" may be differences. A long dash may not be a minus.
        unclear = len(signs) > 1 or (signs and (before.isalnum() or signs not in "+-\u2212"))
        if unclear or len(digits) > 64 or not _NUMBER.fullmatch(digits):
            yield None
        else:
            value = _fraction(digits.replace(",", ""))
            yield -value if signs in ("-", "\u2212") else value


_PLAIN = str.maketrans("x\u00d7\u00f7\u2212", "**/-", " $,")


def equations(text: str) -> tuple[str, ...]:
    """Return the arithmetic operations of a solution: "14+6=<<14+6=20>>20" -> ("14+6",).

    Solutions with the same operations count as the same. Without calculator annotations, take the
    expression before each "=".
    """
    text = first_solution(text)
    found = [left.translate(_PLAIN) for left in re.findall(r"<<([^<>=]*)=", text)]
    if not found:
        sides = text.split("=")[:-1]
        found = [side[len(side.rstrip("0123456789.,+-*/x\u00d7\u00f7()$% ")) :] for side in sides]
        # A leading "." or "x" belongs to the words before.
        found = [left.translate(_PLAIN).lstrip("*.") for left in found]
    found = [re.sub(r"(?<![\d.])\.(?=\d)", "0.", left) for left in found]  # ".5" is "0.5"
    return tuple(e for e in found if any(c in "+-*/" for c in e[1:]) and any(map(str.isdigit, e)))


def computed_values(text: str) -> list[Fraction]:
    """Return the results of the calculator annotations: "14+6=<<14+6=20>>20" -> [20]."""
    results = re.findall(r"<<[^<>]*=([^<>=]*)>>", text)
    values = [extract_answer(f"{MARKER} {result}") for result in results]
    return [value for value in values if value is not None]


@dataclasses.dataclass
class Sample:
    """A sampled solution, its `answer` (None if there is none) and whether that is `correct`.

    It is `finished` if it ended by itself, and truncated otherwise. `tokens`, `logprobs` and
    `prompt` are filled by `generate` and empty in samples that were read from a file.
    """

    problem: Problem
    number: int  # of the sample of its problem, from 0
    text: str
    finished: bool
    tokens: np.ndarray | tuple = ()  # [length] int32, with the end-of-text token if sampled
    logprobs: np.ndarray | tuple = ()  # [length] float32, under the sampling distribution
    prompt: Sequence[int] = ()  # token ids, those of `prefix` included
    prefix: str = ""  # the part of `text` that was given instead of sampled
    score: float | None = None  # of a reward model

    def __post_init__(self):
        self.grade()

    def grade(self, lenient: bool = False) -> None:
        """Read the answer and check it.

        Truncation may have cut digits of the last number, so that number does not count.
        """
        text, answer_line = self.text, self.text.partition(MARKER)[2]
        if not self.finished:
            within_answer = MARKER in text and "\n" not in answer_line
            text = "" if within_answer else text.rstrip("0123456789.,/")
        self.answer = extract_answer(text, lenient)
        self.correct = self.answer == self.problem.answer

    @property
    def passed(self) -> bool:
        """Return whether the sample earns a reward: a truncated one does not."""
        return self.correct and self.finished

    @property
    def solution(self) -> str:
        """Return the text up to the end of its solution."""
        return first_solution(self.text).strip()

    def to_json(self) -> str:
        answer = None if self.answer is None else str(self.answer)
        row = {"problem": self.problem.id, "sample": self.number, "correct": self.correct}
        row |= {"finished": self.finished, "answer": answer, "reference": str(self.problem.answer)}
        row |= {} if self.score is None else {"score": round(self.score, 6)}
        row |= {"question": self.problem.question, "text": self.text}
        return json.dumps(row, ensure_ascii=False)


def by_problem(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Group samples by problem, in their order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem.id, []).append(sample)
    return list(groups.values())


def vote(answers: Sequence[Fraction | None], weights: Sequence[float] | None = None):
    """Return the answer with the most votes or the largest sum of weights, or None without votes.

    None does not vote. Of equal answers the first to appear wins.
    """
    votes: dict[Fraction, float] = {}
    weights = [1] * len(answers) if weights is None else weights
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + weight
    return max(votes, key=votes.get) if votes else None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate P(at least one of k samples is correct) from n samples, without bias.

    1 - C(n - correct, k) / C(n, k) (Chen et al. 2021, equation 1).
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_pass_at_k(samples: Sequence[Sample]) -> dict[str, float]:
    """Average pass@1, pass@2, pass@4 ... over the problems."""
    counts = [(len(group), sum(s.correct for s in group)) for group in by_problem(samples)]
    ks = powers_of_two(counts[0][0])
    return {f"pass@{k}": mean(pass_at_k(n, correct, k) for n, correct in counts) for k in ks}


def powers_of_two(n: int) -> list[int]:
    """Return 1, 2, 4 ... up to and including n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, for booleans the fraction that is true, or None if there are no values."""
    values = list(values)
    return float(np.mean(values)) if values else None


# ---- 3. The policy -------------------------------------------------------------------------------

Example = tuple[list[int], list[int]]  # prompt ids, response ids

# Two worked examples for a pretrained model that never saw the format. The paper uses two as well.
FEW_SHOT = f"""\
Question: A baker fills 6 trays with 8 rolls each. In the morning 29 rolls are sold. \
How many rolls are left?
Answer:
The baker makes 6*8=<<6*8=48>>48 rolls.
After the morning 48-29=<<48-29=19>>19 rolls are left.
{MARKER} 19

Question: Lena saves 15 dollars a week for 4 weeks and then spends half of the money. \
How many dollars does she still have?
Answer:
Lena saves 15*4=<<15*4=60>>60 dollars.
She still has 60/2=<<60/2=30>>30 dollars.
{MARKER} 30

"""


def prompt_text(problem: Problem, few_shot: bool = False) -> str:
    """Return "Question: ...\\nAnswer:\\n", after two worked examples if `few_shot` is set."""
    return f"{FEW_SHOT if few_shot else ''}Question: {problem.question}\nAnswer:\n"


class Policy:
    """A Hugging Face causal language model and its tokenizer.

    Weights are float32: an update at a learning rate of 1e-6 rounds to nothing in bfloat16. On a
    GPU the arithmetic is bfloat16 under autocast. Dropout stays off, because with it the
    log-probabilities of sampling and training would differ.

    eos_ids: the tokens that end a sample. vocabulary: the number of logits. max_length: the
    longest sequence that the model accepts.
    A model of rcrl.py has `labels`; `label` is the token that is forced now, or None.
    Raises UserError if `name` is neither a folder nor a loadable hub name.
    """

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", flag: str = "--model"):
        self.device, self.max_batch_size = torch_device(device), 1 << 30
        self.set_dtype("float32")
        folder = model_folder(name, flag)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = self.load(folder).to(self.device).eval()
            if engine and self.device.type == "cuda":
                engine.fuse_norms(self.model)
            self.check()
        except UserError as error:
            raise UserError(f"{flag} {name}: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            where = "" if Path(folder).is_dir() else "no such folder, and as a name of the hub it "
            raise UserError(f"{flag} {name}: {where}could not be loaded ({reason})") from None
        on_gpu = self.device.type == "cuda"
        self.set_dtype("bfloat16" if dtype == "auto" and on_gpu else dtype)
        self.labels = getattr(self.model.config, "return_labels", None)
        self.condition("good" if self.labels else "none")

    def load(self, folder: str):
        config = AutoConfig.from_pretrained(folder)
        require(not is_reward_model(config), "this is a reward model, not a language model")
        how = dict(dtype=torch.float32, use_safetensors=True)
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        if engine and engine.supports(config):
            model.set_attn_implementation("paged_attention")
        return model

    @torch.no_grad()
    def check(self) -> None:
        """Check that `hidden_states` and `head` give the model's logits. Set sizes and eos_ids."""
        ids = torch.tensor([[0, 1], [0, 2]], device=self.device)
        logits = self.model(ids, use_cache=False).logits
        causal = (logits[0, 0] - logits[1, 0]).abs().max() < 1e-3
        require(causal, "not a causal language model: a token's logits depend on later tokens")
        linear = (logits - self.head(self.hidden_states(ids))).abs().max() < 1e-3
        require(linear, "its logits are scaled or capped in a way that is not known here")
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        require(eos is not None, "its tokenizer has no end-of-text token")
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        require(eos < self.vocabulary, "its end-of-text token is beyond the model's vocabulary")
        self.max_length = max_positions(self.model)
        self.eos_ids = [eos]
        if self.model.can_generate():
            self.vocabulary = logits.shape[-1]
            stops = self.model.generation_config.eos_token_id
            stops = {*(stops if isinstance(stops, list) else [stops]), eos} - {None}
            self.eos_ids = sorted(stop for stop in stops if stop < self.vocabulary)
            # A saved model keeps these tokens and drops the sampling settings that it came with.
            self.model.generation_config = transformers.GenerationConfig(
                eos_token_id=self.eos_ids,
                bos_token_id=self.tokenizer.bos_token_id,
                pad_token_id=eos if pad is None else pad,
            )

    def set_dtype(self, dtype: str) -> None:
        """Compute in "float32" or "bfloat16" from now on."""
        self.bfloat16 = dtype == "bfloat16"
        # With bfloat16, TensorFloat32 is enough for the head, which stays in float32.
        torch.set_float32_matmul_precision("high" if self.bfloat16 else "highest")

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def condition(self, on: str) -> None:
        """Force the label "good" or "bad" from now on, or no label ("none").

        The label of a model of rcrl.py stands before every line, or before the first line only, as
        in its training. With "none" the saved folder has no labels either.
        """
        config, self.label, self.label_every_line = self.model.config, None, False
        config.__dict__.pop("return_labels", None)
        if on != "none":
            require(self.labels, "this model was not trained with return labels (rcrl.py)")
            config.return_labels = self.labels
            (self.label,) = self.encode_prefix(self.labels[on])
            self.label_every_line = self.labels["by"] == "step"

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [batch, length], padded on the right, to [batch, length, width]."""
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [..., width] to logits [..., vocabulary], always in float32.

        In bfloat16 logits between 16 and 32 are 0.125 apart. That moves the log-probabilities of
        SmolLM2 more than bfloat16 in all of its layers does (0.027 and 0.020 rms).
        """
        config = self.model.config.get_text_config()
        with torch.autocast(self.device.type, enabled=False):
            logits = self.model.get_output_embeddings()(hidden.float())
            logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
            logits = logits * (getattr(self.model, "logit_scale", None) or 1)  # Cohere
            cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2, nanochat
            return cap * torch.tanh(logits / cap) if cap else logits

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a whole text, with a begin-of-text token if the tokenizer adds one."""
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def encode_prefix(self, text: str) -> list[int]:
        """Encode a part of a solution, separately from its prompt and without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def encode_solution(self, text: str) -> list[int]:
        """Encode a finished solution, with its end-of-text token."""
        return [*self.encode_prefix(text), self.tokenizer.eos_token_id]

    def encode_example(self, problem: Problem, solution: str) -> Example:
        """Encode a solution to train on. Raises UserError if it is too long for the model."""
        prompt = self.encode_prompt(prompt_text(problem))
        return self.check_length((prompt, self.encode_solution(solution)))

    def check_length(self, example: Example) -> Example:
        n, room = sum(map(len, example)), f"the model has {self.max_length} positions"
        require(n <= self.max_length, f"a solution with its prompt is {n} tokens long; {room}")
        return example

    def decode(self, ids: Sequence[int]) -> str:
        how = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(ids, **how)

    @functools.cached_property
    def breaks_line(self) -> np.ndarray:
        """[vocabulary] whether a token holds a line break."""
        tokens = self.tokenizer.batch_decode([[i] for i in range(self.vocabulary)])
        return np.array(["\n" in token for token in tokens])

    def line_ends(self, ids: Sequence[int]) -> list[int]:
        """Return the index of every token that ends a line, the last token included."""
        return sorted({*np.flatnonzero(self.breaks_line[ids]).tolist(), len(ids) - 1})

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Return whether an answer line, or the line "Question: ...", has ended."""
        lines = "\n" + self.decode(ids).rpartition("\n")[0]
        return MARKER in lines or "\nQuestion:" in lines

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder. It appears complete or not at all."""
        if process_rank() > 0:
            return
        new, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
        shutil.rmtree(new, ignore_errors=True)
        try:
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
        except Exception as error:  # a full disk shows as an error of the safetensors library
            raise UserError(f"{new}: could not be written ({first_line(error)})") from None
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the layers of a decoder. Raises UserError if it has no plain stack of layers."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    found = next((stack for stack in stacks if len(stack) == depth), None)
    require(found is not None, f"a {type(model).__name__} has no plain stack of layers")
    return found


class Lora(torch.nn.Module):
    """Low-rank adapters on every linear map of the layers: W x + B A x (Hu et al. 2021).

    B is 0 at first. The adapters are hooks, so the names and the checkpoint of the model stay.
    Experts whose weights are one tensor get no adapters, and routers get none.
    """

    def __init__(self, policy: Policy, rank: int):
        super().__init__()
        policy.model.requires_grad_(False)
        self.policy, self.is_on = [policy], True
        modules = decoder_layers(policy.model).modules()
        self.targets = [m for m in modules if type(m) in (torch.nn.Linear, Conv1D)]
        require(self.targets, "--lora-rank: this model has no plain linear layers for adapters")
        self.down, self.up = torch.nn.ParameterList(), torch.nn.ParameterList()
        for i, module in enumerate(self.targets):
            # The Conv1D of GPT-2 keeps its weight as [in, out].
            transposed, weight = isinstance(module, Conv1D), module.weight
            n_out, n_in = weight.T.shape if transposed else weight.shape
            down = torch.randn(rank, n_in, device=weight.device) / n_in**0.5
            self.down.append(torch.nn.Parameter(down))
            self.up.append(torch.nn.Parameter(torch.zeros(n_out, rank, device=weight.device)))
            module.register_forward_hook(functools.partial(self._add, i))

    def _add(self, i: int, module, inputs, output: torch.Tensor) -> torch.Tensor:
        # Sums in bfloat16 would round most of a small change off. With the adapters off the output
        # is float32 as well, so the KL is 0 at first even in bfloat16.
        if not self.is_on:
            return output.float()
        change = F.linear(F.linear(inputs[0], self.down[i]), self.up[i])
        return output.float() + change.float()

    @contextlib.contextmanager
    def off(self):
        """Switch to the initial model."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    @contextlib.contextmanager
    def merged(self):
        """Add the adapters to the weights and compute in float32, as the model is saved.

        bfloat16 would round: the neighbours of 0.1 are 0.0005 away. The old weights are on the CPU.
        """
        (policy,) = self.policy
        dtype = "bfloat16" if policy.bfloat16 else "float32"
        kept = [module.weight.data.to("cpu", copy=True) for module in self.targets]
        policy.set_dtype("float32")
        try:
            for module, down, up in zip(self.targets, self.down, self.up, strict=True):
                change = up.data @ down.data
                module.weight.data += change.T if isinstance(module, Conv1D) else change
            with self.off():
                yield
        finally:
            for module, weight in zip(self.targets, kept, strict=True):
                module.weight.data.copy_(weight)
            policy.set_dtype(dtype)


def is_reward_model(config) -> bool:
    return any(name.endswith("ForTokenClassification") for name in config.architectures or ())


def max_positions(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def model_folder(name: str, flag: str = "--model") -> str:
    """Return the folder or hub name of a model. "tiny" is the model in this repository."""
    path = Path(__file__).parent / "tiny" if name == "tiny" else Path(name).expanduser()
    if path.is_dir():
        inner = path / "model"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        is_model = (path / "config.json").is_file()
        require(is_model, f"{flag} {name}: the folder holds no model (no config.json){hint}")
        return str(path)
    default = re.fullmatch(r"runs/(sft|expert_iteration|reward_model|genrm)/model", name)
    hint = f"; run `python {default[1]}.py` first" if default else ""
    hint = hint.replace("genrm.py", "reward_model.py --kind genrm")
    on_hub = re.fullmatch(r"(?!tiny$|runs/)\w[\w.-]*(/[\w.-]+)?", name)
    require(on_hub, f"{flag} {name}: no such folder{hint}")
    return name


def check_base(policy: Policy, base: Policy, name: str) -> None:
    """If --base is the default tiny, raise UserError unless --model has the same shape."""
    one, other = (each.model.config.get_text_config() for each in (policy, base))
    keys = "model_type", "hidden_size", "num_hidden_layers"
    same_shape = all(getattr(one, key) == getattr(other, key) for key in keys)
    advice = "give the pretrained model that it was made of"
    require(name != "tiny" or same_shape, f"--base tiny: --model is of another shape; {advice}")


def fingerprint(name: str, flag: str = "--model") -> str:
    """Return a checksum of the weights in a model folder, or the name of a hub model."""
    files, size, crc = sorted(Path(model_folder(name, flag)).glob("*.safetensors")), 0, 0
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return f"{size}-{crc:08x}" if files else name


def torch_device(name: str) -> torch.device:
    """Return the device of a flag. "auto" is the GPU of this process if there is one."""
    try:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(automatic if name == "auto" else name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        elif device.type == "cuda":
            alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1
            require(alone, f"--device {name}: several processes need a GPU each; leave it at auto")
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
            # cuDNN's attention is slow here: it plans again for every new shape.
            torch.backends.cuda.enable_cudnn_sdp(False)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({first_line(error)})") from None
    return device


# ---- 4. Generation -------------------------------------------------------------------------------
# generate -> engine.generate_tokens or decode_plainly -> pick_tokens -> sample_softmax


@torch.no_grad()  # not inference_mode: under it autocast would cast the weights in every step
def generate(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int | Sequence[int] = 0,
    batch_size: int = 128,
    few_shot: bool = False,
    prefixes: Sequence[str] | None = None,
    progress: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Sample `samples` solutions per problem, from the full softmax at `temperature` (0: greedy).

    Random numbers depend on (seed, problem, sample number) alone, so the batch size does not
    matter. A sample that reaches `max_new_tokens` or the model's last position is truncated. If
    memory runs out, the batch size is halved. Several processes share the problems.

    few_shot: two worked examples in the prompt; a sample ends after its answer line. prefixes: for
    every problem the beginning of a solution. stop: raise KeyboardInterrupt when it returns true.
    Raises UserError if a prompt is too long for the model.
    """
    prefixes = prefixes or [""] * len(problems)
    prompts = encode_prompts(policy, problems, few_shot, prefixes)
    request = dict(
        prompts=prompts,
        limits=[min(max_new_tokens, policy.max_length - len(ids)) for ids in prompts],
        seeds=[[*np.atleast_1d(seed).tolist(), zlib.crc32(p.id.encode())] for p in problems],
        pick=functools.partial(pick_tokens, policy, temperature),
        eos_ids=policy.eos_ids,
        breaks_line=policy.breaks_line,
        label=policy.label if policy.label_every_line else None,
        is_complete=policy.is_complete if few_shot else None,
        stop=stop,
    )
    done: list[list[Sample | None]] = [[None] * samples for _ in problems]
    mine = range(process_rank(), len(problems), process_count())
    bar = tqdm(total=len(mine) * samples, desc=progress, disable=None if progress else True)
    decode, interrupted = decode_plainly, False
    if policy.model.config._attn_implementation == "paged_attention":
        decode = engine.generate_tokens
    else:
        warn("sampling uses the plain loop (slower): no engine/, or it does not know the model")
    while left := {i: [k for k, s in enumerate(done[i]) if not s] for i in mine if None in done[i]}:
        size = min(batch_size, policy.max_batch_size, sum(map(len, left.values())))
        try:
            with policy.autocast():
                outputs = decode(policy.model, size, pending=left, **request)
                for i, k, ids, logprobs, finished in outputs:
                    text, given = prefixes[i] + policy.decode(ids), (prompts[i], prefixes[i])
                    done[i][k] = Sample(problems[i], k, text, finished, ids, logprobs, *given)
                    bar.update()
        except FloatingPointError as error:
            raise UserError(f"{error}: its weights are broken") from None
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            policy.max_batch_size = size // 2
            advice = f"going on with {size // 2} (see --gen-batch-size)"
            warn(f"out of memory while sampling {size} sequences: {advice}", all_ranks=True)
        except KeyboardInterrupt:
            interrupted = True  # tell the other processes first
            break
    bar.close()
    if any_process(interrupted):
        raise KeyboardInterrupt
    groups = dict(gather([(i, done[i]) for i in mine]))
    return [sample for i in range(len(problems)) for sample in groups[i]]


def sampling(args: argparse.Namespace) -> dict:
    """Return the settings of `generate` that are flags of every script."""
    settings = dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    return settings | dict(batch_size=args.gen_batch_size)


def encode_prompts(
    policy: Policy, problems, few_shot: bool = False, prefixes: Sequence[str] | None = None
) -> list[list[int]]:
    """Encode prompt, prefix and label of every problem. Raises UserError if one leaves no room."""
    prompts = [policy.encode_prompt(prompt_text(problem, few_shot)) for problem in problems]
    for ids, prefix in zip(prompts, prefixes or [""] * len(prompts), strict=True):
        ids += policy.encode_prefix(prefix) + [policy.label] * (policy.label is not None)
    longest, n = max(map(len, prompts), default=0), policy.max_length
    require(
        longest < n, f"the longest prompt is {longest} tokens long; the model has {n} positions"
    )
    return prompts


def pick_tokens(policy: Policy, temperature: float, hidden: torch.Tensor, uniforms: torch.Tensor):
    """Sample after each hidden state [rows, width]: tokens [rows], log-probabilities [rows].

    Works on so few rows at a time that on a CPU their logits stay in its cache.
    """
    at_once = max(1, (1 << 28 if policy.device.type == "cuda" else 1 << 22) // policy.vocabulary)
    n_parts = -(-len(hidden) // at_once)
    parts = zip(hidden.chunk(n_parts), uniforms.chunk(n_parts), strict=True)
    picked = [sample_softmax(policy.head(h), u, temperature) for h, u in parts]
    return tuple(torch.cat(tensors) for tensors in zip(*picked, strict=True))


def sample_softmax(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float):
    """Sample from softmax(logits / temperature) by inverting its cumulative distribution.

    logits [rows, vocabulary], uniforms [rows] in [0, 1) -> tokens [rows] and their
    log-probabilities [rows]. Temperature 0 takes the most likely token and returns its
    log-probability at temperature 1. A token of probability 0 is never sampled.
    """
    weights = (logits.float() / (temperature or 1)).softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        ends = weights.cumsum(-1)
        total = ends[:, -1:]
        # Rounding must not lead beyond the last token that has a probability.
        below_total = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(uniforms[:, None] * total, below_total)
        # The clamp is for NaN, which the decoding loop refuses.
        tokens = torch.searchsorted(ends, target, right=True).clamp_(max=logits.shape[-1] - 1)
    tiny = torch.finfo(weights.dtype).tiny
    return tokens[:, 0], weights.gather(-1, tokens).clamp_min_(tiny).log()[:, 0]


def decode_plainly(model, batch_size: int, *, prompts, pending, **request) -> Iterator[tuple]:
    """Yield (prompt index, sample number, ids, logprobs, finished), one batch after another.

    Prompts of about the same length share a batch. A model with recurrent state takes no padding,
    so its batches hold prompts of exactly the same length.
    """
    jobs = [(i, k) for i in sorted(pending, key=lambda i: len(prompts[i])) for k in pending[i]]
    groups = itertools.groupby(jobs, lambda job: model._is_stateful and len(prompts[job[0]]))
    for group in [list(group) for _, group in groups]:
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            yield from decode_batch(model, batch, prompts=prompts, **request)


def decode_batch(
    model, jobs, *, prompts, limits, seeds, pick, eos_ids, breaks_line, label, is_complete, stop
) -> Iterator[tuple]:
    """Yield the samples of one batch in the order in which they end. jobs: (prompt, number)."""
    base, device = model.base_model, next(model.parameters()).device
    known = inspect.signature(type(base).forward).parameters
    cache_names = [name for name in ("cache", "past_key_values", "cache_params") if name in known]
    require(cache_names, "this model has no cache of keys and values, so it cannot be sampled here")
    cache = DynamicCache(config=model.config)

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        how = {cache_names[0]: cache, "use_cache": True}
        if not mask.all():
            how["attention_mask"] = mask
        if "position_ids" in known:
            positions = (mask.cumsum(1) - 1).clamp(0, max_positions(model) - 1)
            how["position_ids"] = positions[:, -ids.shape[1] :]
        return base(input_ids=ids, **how).last_hidden_state[:, -1]

    # 1. Run each prompt once, padded on the left. Repeat its cache for its samples.
    unique = list(dict.fromkeys(i for i, _ in jobs))
    width = max(len(prompts[i]) for i in unique)
    padding = [width - len(prompts[i]) for i in unique]
    ids = [[0] * n + prompts[i] for n, i in zip(padding, unique, strict=True)]
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device)
    hidden = forward(torch.tensor(ids, device=device), mask)  # [prompts, width of the model]
    rows = torch.tensor([unique.index(i) for i, _ in jobs], device=device)
    cache.reorder_cache(rows)
    hidden, mask = hidden[rows], mask[rows]
    previous = torch.tensor([prompts[i][-1] for i, _ in jobs], device=device)
    limit = np.array([limits[i] for i, _ in jobs])
    line_break = torch.from_numpy(breaks_line).to(device)
    random = [np.random.default_rng([*seeds[i], k]).random(max(limit), np.float32) for i, k in jobs]
    uniforms = torch.from_numpy(np.stack(random)).to(device)  # [samples, longest]
    tokens, logprobs = torch.zeros_like(uniforms, dtype=torch.int32), torch.zeros_like(uniforms)
    running = np.ones(len(jobs), bool)
    for age in range(max(limit)):
        if stop():
            raise KeyboardInterrupt
        # 2. Sample the next token of all sequences. After a line break the label follows.
        picked, logprob = pick(hidden, uniforms[:, age])
        if label is not None:
            forced = line_break[previous]
            picked, logprob = picked.masked_fill(forced, label), logprob.masked_fill(forced, 0.0)
        tokens[:, age], logprobs[:, age], previous = picked, logprob, picked
        if not logprob.isfinite().all():
            raise FloatingPointError("the model's probabilities are not finite")
        # 3. Yield what has ended.
        new = picked.cpu().numpy()
        ended = np.isin(new, eos_ids) & running
        for row in np.flatnonzero(breaks_line[new] & running & ~ended) if is_complete else ():
            ended[row] = is_complete(tokens[row, : age + 1].cpu().numpy())
        for row in np.flatnonzero(ended | running & (age + 1 >= limit)):
            sampled = (state[row, : age + 1].cpu().numpy().copy() for state in (tokens, logprobs))
            yield *jobs[row], *sampled, bool(ended[row])
            running[row] = False
        # 4. Drop ended sequences when they are half of the batch.
        keep = np.flatnonzero(running)
        if not len(keep):
            return
        if len(keep) <= len(running) / 2:
            rows = torch.from_numpy(keep).to(device)
            cache.reorder_cache(rows)
            states = uniforms, tokens, logprobs, previous, mask
            uniforms, tokens, logprobs, previous, mask = (state[rows] for state in states)
            jobs, limit, running = [jobs[row] for row in keep], limit[keep], running[keep]
        mask = F.pad(mask, (0, 1), value=1)
        hidden = forward(previous[:, None], mask)


# ---- 5. Training ---------------------------------------------------------------------------------

LOGITS_AT_ONCE = 1 << 24  # above this many, compute them again in the backward pass


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yield this process's share of the sequences, as lists of indices.

    Sequences of similar length share a micro-batch, which has at most `token_budget` tokens with
    its padding. A longer sequence is a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order = order[process_rank() :: process_count()]
    while order:
        size = max(1, token_budget // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def right_padded(policy: Policy, sequences: Sequence[list[int]]) -> torch.Tensor:
    """Stack token ids to [sequences, longest]."""
    width = max(map(len, sequences))
    padded = [ids + [0] * (width - len(ids)) for ids in sequences]
    return torch.tensor(padded, device=policy.device)


def response_positions(examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """Return row and column of every response token in the padded batch: [2, response tokens]."""
    rows = np.repeat(np.arange(len(examples)), [len(response) for _, response in examples])
    columns = [len(prompt) + np.arange(len(response)) for prompt, response in examples]
    return torch.from_numpy(np.stack([rows, np.concatenate(columns)])).to(device)


def response_logprobs(policy: Policy, examples: Sequence[Example], temperature: float = 1.0):
    """Return log softmax(logits / temperature) of every response token: [response tokens].

    With prompt [p0 p1] and response [r0 r1], the hidden state of p1 predicts r0 and that of r0
    predicts r1. Large logits are made 2,048 rows at a time and again in the backward pass, so
    float32 logits of shape (batch, length, vocabulary) never exist.
    """
    ids = right_padded(policy, [prompt + response for prompt, response in examples])
    rows, columns = response_positions(examples, policy.device)

    def logprobs(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = policy.head(hidden) / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    with policy.autocast():
        hidden, targets = policy.hidden_states(ids)[rows, columns - 1], ids[rows, columns]
        if len(hidden) * policy.vocabulary <= LOGITS_AT_ONCE:
            return logprobs(hidden, targets)
        chunks = zip(hidden.split(2048), targets.split(2048), strict=True)
        parts = [recompute_in_backward(logprobs, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts)


def by_example(flat: torch.Tensor, examples: Sequence[Example]) -> list[np.ndarray]:
    """Split [response tokens] into one array per example."""
    ends = np.cumsum([len(response) for _, response in examples])
    return np.split(flat.cpu().numpy(), ends[:-1])


def sum_gradients(parameters: Iterable[torch.nn.Parameter], *sums: float) -> list[float]:
    """Add up the gradients of all processes, and the numbers in `sums`, as one flat tensor.

    If no process has a gradient for a parameter, it stays None. With zeros the moments of AdamW
    would still move the parameter.
    """
    if process_count() == 1:
        return list(sums)
    parameters = [p for p in parameters if p.requires_grad]
    has_gradient = [float(p.grad is not None) for p in parameters]
    numbers = torch.tensor([*map(float, sums), *has_gradient])
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    flat.append(numbers.to(flat[0].device))
    total = torch.cat(flat)
    dist.all_reduce(total)
    *gradients, numbers = total.split([len(part) for part in flat])
    sums, has_gradient = numbers[: len(sums)].tolist(), numbers[len(sums) :].tolist()
    for p, gradient, has in zip(parameters, gradients, has_gradient, strict=True):
        p.grad = gradient.view_as(p) if has else None
    return sums


def require_finite(*values: float) -> None:
    """Raise UserError, before the weights change, if a loss or gradient norm is not finite."""
    finite = all(map(math.isfinite, values))
    require(finite, f"loss or gradient norm is not finite {values}; try a smaller --lr")


def check_memory(model: torch.nn.Module) -> None:
    """Raise UserError if a GPU has no room for gradients and AdamW moments: 12 bytes a weight."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if (device := weights[0].device).type == "cuda":
        needed, free = 12 * sum(p.numel() for p in weights), torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        sizes = f"takes {needed / 2**30:.0f} GiB more, and the GPU has {free / 2**30:.0f} left"
        require(needed <= free, f"to train all weights {sizes}")


def adam_w(parameters: Iterable, lr: float) -> torch.optim.AdamW:
    """Return the optimizer of all scripts. On a GPU it is fused: no copy of the weights."""
    parameters = list(parameters)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    how = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=first.is_cuda or None)
    return torch.optim.AdamW(parameters, lr=lr, **how)


def cosine_lr(step: int, n_steps: int, lr: float) -> float:
    """Return the learning rate of a step: 3 % linear warm-up, then a cosine down to lr / 100."""
    warmup = max(1, round(0.03 * n_steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - 1 - warmup)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@functools.lru_cache(1)  # the curricula of PPO ask for the same order question by question
def shuffled(n: int, *seed: int) -> list[int]:
    """Return a permutation of range(n) that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(n).tolist()


# ---- 6. The run folder ---------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a temporary file and rename it to `path` when it is complete. Only rank 0 writes."""
    if process_rank() > 0:
        yield io.BytesIO()
        return
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


_locks: dict[Path, int] = {}


def lock(path: Path, shown: Path | None = None) -> None:
    """Lock a folder or file until this process ends. Raises UserError if another one has it."""
    if fcntl is None or (key := path.resolve()) in _locks:
        return
    _locks[key] = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(_locks[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(_locks.pop(key))
        advice = "another process is writing to it; wait for it, or choose another --out"
        raise UserError(f"{shown or path}: {advice}") from None
    except OSError:  # a file system without locks
        pass


def append(path: Path, lines: str) -> None:
    """Add lines to a file. Only rank 0 writes."""
    if process_rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read an object that this project wrote. Raises UserError if it is missing or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: missing or broken ({error})") from None


class Run:
    """The folder --out: args.json, metrics.jsonl, samples/, model/ and checkpoint/state.pt.

    A run that was killed and is started again with --resume goes on from its last checkpoint and
    ends with the same weights and metrics. `state` holds that checkpoint, or None. may_grow: the
    name of a setting that --resume may increase.
    """

    def __init__(self, args: argparse.Namespace, may_grow: str | None = None):
        self.out, self.checkpoint_every = Path(args.out), args.checkpoint_every
        self.state_file = self.out / "checkpoint" / "state.pt"
        self.metrics_file, self.settings_file = self.out / "metrics.jsonl", self.out / "args.json"
        ignored = ("out", "resume", "device", "checkpoint_every")
        self.settings = {key: value for key, value in vars(args).items() if key not in ignored}
        self.settings["script"] = Path(sys.argv[0]).name
        goes_on = on_first(lambda: self._look(args, may_grow))
        self.state, self.interrupted = self._read_checkpoint() if goes_on else None, False
        self.kept = self.state["run"] if self.state else {"lines": 0, "seconds": 0.0}
        self.is_finished = bool(self.state and self.state.get("finished"))

    def _look(self, args: argparse.Namespace, may_grow: str | None) -> bool:
        """Return whether to go on from the checkpoint in the folder."""
        if self.out.is_dir():
            lock(self.out)
        for key in ("model", "base", "orm", "genrm"):
            if name := self.settings.get(key):
                self.settings[f"{key}_fingerprint"] = fingerprint(name, f"--{key}")
        folders = ("checkpoint", "samples", "model", "model.old")
        found = [name for name in folders if any((self.out / name).glob("*"))]
        if self.metrics_file.exists() and self.metrics_file.stat().st_size:
            found.append("metrics.jsonl")
        if found and args.resume:
            self._check_settings(may_grow)
            return self.state_file.exists()
        advice = "add --resume to continue it, delete it, or choose another --out"
        require(not found, f"{self.out} already holds a run: {advice}")
        return False

    def _check_settings(self, may_grow: str | None) -> None:
        """Raise UserError if the run was started with other settings."""
        before, now = read_json(self.settings_file), self.settings
        changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        changed -= {"token_budget", "gen_batch_size"}  # they only change rounding
        old = before.get(may_grow)
        if isinstance(old, int) and now[may_grow] >= old:
            changed -= {may_grow}
        names = ", ".join(sorted(changed))
        require(not changed, f"--resume: {self.out} was started with other settings ({names})")

    def _read_checkpoint(self) -> dict:
        try:
            return torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = f"not a checkpoint of this program ({first_line(error)})"
            raise UserError(f"{self.state_file}: {reason}") from None

    def begin(self) -> None:
        """Prepare the folder. Nothing in it is touched before the inputs have been loaded."""
        on_first(self._prepare)
        self.lines, self.saved = self.kept["lines"], time.monotonic()
        self.started = self.saved - self.kept["seconds"]
        signal.signal(signal.SIGINT, self._interrupt)

    def _prepare(self) -> None:
        for name in ("checkpoint", "samples"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        lock(self.out)
        write_json(self.settings_file, self.settings)
        old, new = self.out / "model.old", self.out / "model"
        if old.exists() and not new.exists():  # killed between two renames
            old.rename(new)
        self.metrics_file.touch()
        lines = self.metrics_file.read_text().splitlines(keepends=True)[: self.kept["lines"]]
        with atomic_write(self.metrics_file) as file:  # later lines will be logged again
            file.write("".join(lines).encode())

    def _interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        message = "\nstopping once everything is saved; press Ctrl-C again to stop at once"
        print(message, file=sys.stderr, flush=True)

    def clock(self) -> float:
        """Return the seconds of this run, interruptions left out."""
        return time.monotonic() - self.started

    def log(self, **metrics) -> None:
        """Append one object to metrics.jsonl and print it."""
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        row = {"step": row.pop("step"), "seconds": round(self.clock(), 1)} | row
        append(self.metrics_file, json.dumps(row) + "\n")
        self.lines += 1
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        tqdm.write("  ".join(f"{key} {value}" for key, value in shown.items()))

    def checkpoint(self, now: bool = False, **state) -> None:
        """Save `state` if it is time, if `now` is set, or after Ctrl-C. After Ctrl-C stop."""
        self.interrupted = any_process(self.interrupted)
        is_time = time.monotonic() - self.saved >= self.checkpoint_every
        if (now or self.interrupted or is_time) and process_rank() == 0:
            state["run"] = {"lines": self.lines, "seconds": self.clock()}
            with atomic_write(self.state_file) as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # its zip writer hides that the disk is full
                    reason = first_line(error.__context__ or error)
                    raise UserError(f"{self.state_file}: could not be written ({reason})") from None
            self.saved = time.monotonic()
        if self.interrupted:
            any_process(True)  # wait until rank 0 has saved
            raise KeyboardInterrupt

    def finish(self, **state) -> None:
        """Mark the run as complete. Its checkpoint keeps only `state`."""
        self.checkpoint(now=True, finished=True, **state)


def sample_to_file(policy: Policy, problems, path: Path, run: Run | None = None, **how):
    """Call `generate` for a group of problems at a time and append the samples to a file.

    Groups that are complete in the file are read back, so an interruption loses one group at most.
    With the same batch size the samples are identical, bit for bit. Token ids are not kept: a
    round with K = 96 would fill gigabytes. The clock of `run` counts what was read back.
    """
    n, prefixes = how["samples"], how.pop("prefixes", None) or [""] * len(problems)
    # Large groups, because the batch runs half empty at the end of each.
    size = max(1, 32 * how["batch_size"] * process_count() // n)
    exists = on_first(path.exists)
    samples = on_first(lambda: read_samples(path, problems, n, prefixes)) if exists else []
    if len(samples) < len(problems) * n:
        samples = samples[: len(samples) - len(samples) % (size * n)]
        write_samples(path, samples)
    clock_file = run and run.out / "checkpoint" / f"{path.stem}.json"
    if samples and run and clock_file.exists():
        run.started = min(run.started, time.monotonic() - read_json(clock_file)["seconds"])
    progress, stop = how.pop("progress"), lambda: bool(run and run.interrupted)
    for first in range(len(samples) // n, len(problems), size):
        group = slice(first, first + size)
        how["progress"] = f"{progress}, problem {first} of {len(problems)}"
        new = generate(policy, problems[group], prefixes=prefixes[group], stop=stop, **how)
        append(path, "".join(sample.to_json() + "\n" for sample in new))
        if run:
            write_json(clock_file, {"seconds": run.clock()})
        for sample in new:
            sample.tokens, sample.logprobs = (), ()
        samples += new
    return samples


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    with atomic_write(path) as file:
        file.write("".join(sample.to_json() + "\n" for sample in samples).encode())


def read_samples(path: Path, problems=None, n: int | None = None, prefixes=None) -> list[Sample]:
    """Read a file of samples, in the order of the problems.

    Without `problems`, take the problems from the file. Without `n`, raise UserError if a line is
    broken or belongs to none of the problems. With `n` samples per problem, stop at the first line
    that is broken or out of order.
    """
    require(path.is_file(), f"{path}: no such file of samples")
    index, samples = {p.id: i for i, p in enumerate(problems or ())}, []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if problems is None:
                i = index.setdefault(row["problem"], len(index))
                problem = Problem(row["problem"], row["question"], Fraction(row["reference"]))
            else:
                i = index[row["problem"]]
                problem = problems[i]
            k, score = int(row["sample"]), row.get("score")
            fits = row["question"] == problem.question and isinstance(row["text"], str)
            fits &= row["reference"] == str(problem.answer) or n is None
            text = row["text"].encode(errors="replace").decode()  # no half of a surrogate pair
            sample = Sample(problem, k, text, bool(row["finished"]))
            sample.score = None if score is None or n else float(score)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            fits = False
        if n and not (fits and i * n + k == len(samples) and k < n):
            break
        of = "" if problems is None else f" of one of the {len(problems)} problems of this run"
        require(fits, f"{path} line {line_number}: not a sample{of}")
        if n and prefixes and not sample.text.startswith(prefixes[i]):
            break
        samples.append((i, k, sample))
    require(samples or n, f"{path}: holds no samples")
    return [sample for _, _, sample in sorted(samples, key=lambda entry: entry[:2])]


def dev_metrics(
    policy: Policy, problems, args: argparse.Namespace, samples: int, file: Path, few_shot=False
) -> dict:
    """Measure maj@1 (greedy accuracy), and pass@k if `samples` > 0. Write the greedy samples."""
    how = dict(max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size)
    how |= dict(seed=args.seed, few_shot=few_shot)
    greedy = generate(policy, problems, temperature=0, progress="dev", **how)
    write_samples(file, greedy)
    metrics = {"maj@1": mean(s.correct for s in greedy)}
    metrics["no_answer"] = mean(s.answer is None for s in greedy)
    metrics["truncated"] = mean(not s.finished for s in greedy)
    if samples:
        how |= dict(samples=samples, temperature=args.temperature, progress="dev pass@k")
        metrics |= mean_pass_at_k(generate(policy, problems, **how))
    return metrics


# ---- 7. The command line -------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A parser that shows defaults. A wrong flag or value ends in one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, *argv):
        args = super().parse_args(*argv)
        automatic = args.device == "auto" and torch.cuda.is_available()
        on_gpu = automatic or args.device.startswith("cuda")
        args.gen_batch_size = args.gen_batch_size or (1024 if on_gpu else 256)
        # On a CPU small micro-batches pad less and stay in its cache.
        args.token_budget = args.token_budget or (32768 if on_gpu else 1024)
        return args

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of flags with this title. Add it if it is new."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def only_with(self, condition: str, holds: bool, args, *flags: str) -> None:
        """Refuse a flag that does nothing unless the condition holds. Not checked with --resume."""
        for flag in flags:
            if not holds and not args.resume and getattr(args, flag) != self.get_default(flag):
                self.error(f"--{flag.replace('_', '-')} does nothing without {condition}")

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf):
    """Return an argparse type: an int or float within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and value < (2**63 if kind is int else math.inf):
            return value
        span = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        article = "a whole" if kind is int else "a"
        raise argparse.ArgumentTypeError(f"{text!r} is not {article} number {span}")

    return parse


WHOLE, NOT_NEGATIVE = number(int, 1), number(float, 0)
FLAGS = {
    "model": dict(help="folder or hub name of the model; tiny: the one in this repository"),
    "dataset": dict(help=f"{', '.join([*GENERATED, *HUB])}, or a file or folder of problems"),
    "out": dict(help="folder of the run"),
    "seed": dict(type=number(int, 0, 2**32), help="seed of the sampling and of the data order"),
    "device": dict(help="auto, cpu, cuda, cuda:1, ..."),
    "dtype": dict(
        choices=["auto", "float32", "bfloat16"], help="arithmetic; auto: bfloat16 on GPU"
    ),
    "max_new_tokens": dict(type=WHOLE, help="most tokens of a solution (GSM8K: 256 to 512)"),
    "temperature": dict(type=NOT_NEGATIVE, help="sampling temperature; 0: greedy"),
    "samples": dict(type=WHOLE, help="samples per problem, K (paper: 96; PPO: 4)"),
    "gen_batch_size": dict(type=WHOLE, help="batch slots in sampling (default: 256; GPU: 1024)"),
    "lr": dict(type=NOT_NEGATIVE, help="peak learning rate (paper: 2e-5; PPO: 1e-6)"),
    "epochs": dict(type=WHOLE, help="passes over the data, in PPO over a phase (paper: 4)"),
    "batch_size": dict(type=WHOLE, help="solutions per optimizer step (paper: 128; PPO: 256)"),
    "token_budget": dict(type=WHOLE, help="tokens per micro-batch (default: 1024; GPU: 32768)"),
    "limit_train": dict(type=WHOLE, help="use only the first so many training problems"),
    "limit_eval": dict(type=WHOLE, help="use only the first so many dev or test problems"),
    "checkpoint_every": dict(type=NOT_NEGATIVE, help="seconds between checkpoints"),
    "resume": dict(action="store_true", help="go on with the run in --out"),
}
EVERYWHERE = dict(dataset="arithmetic", seed=0, device="auto", dtype="auto", max_new_tokens=128)
EVERYWHERE |= dict(gen_batch_size=None, token_budget=None, limit_eval=None, resume=False)


def common_parser(doc: str, **defaults) -> OneLineParser:
    """Return a parser with the flags of EVERYWHERE and those that have a default here."""
    parser = OneLineParser(description=doc)
    for name, default in (EVERYWHERE | defaults).items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, **FLAGS[name])
    return parser


def run_main(main: Callable) -> None:
    """Run `main(sys.argv[1:])`. A UserError becomes one line and exit code 2, Ctrl-C code 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is written
    try:
        start_processes()
        main(sys.argv[1:])
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (UserError, OSError)):
            if not is_out_of_memory(error):
                raise
            error = f"out of memory; lower --token-budget ({first_line(error)})"
        rank = process_rank()
        print(f"error in process {rank}: {error}" if rank else f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if process_rank() == 0:
            print("stopped; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
