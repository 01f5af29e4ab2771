"""What the scripts share: problems, answers, the policy, generation and training.

    problems -> prompt ids -> generate -> samples -> answer check -> token sequences -> loss

To fork a script, copy it with this file, runtime.py and tiny/. Copy engine/ for faster sampling.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

import runtime
from runtime import UserError, first_line, gather, require, warn
from tiny import arithmetic

try:
    import engine
except ImportError:  # a fork without the folder
    engine = None

transformers.utils.logging.disable_progress_bar()


# ---- 1. Problems ---------------------------------------------------------------------------------

MARKER = "####"  # begins the answer line of a solution
HUB = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ("ChilleD/SVAMP",)}
DATASETS = [*arithmetic.STEPS, *HUB]
# Fields of a row that are no part of its question.
IGNORED = {"id", "type", "equation", "question_concat", "code", "source"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word problem. Its `id` is unique within the dataset and seeds its samples."""

    id: str
    question: str
    answer: Fraction
    solution: str | None = None  # written solution with its line "#### answer", if there is one
    reference: str | None = None  # for rewards and metrics only; equals `solution` if there is one


def load_problems(dataset: str, split: str, limit: int | None = None) -> list[Problem]:
    """Load the first `limit` problems of a split: "train", "dev", "test" or "all" (of a file).

    The last tenth of a single file is its test split. dev is the last 256 training problems, or a
    tenth if there are few. Raises UserError, with file and line, for malformed data.
    """
    part = "test" if split == "test" else "train"
    path = Path(dataset)
    is_file = dataset not in DATASETS and path.is_file()
    problems = _read_split(dataset, part)
    require(split != "all" or is_file, f"--split all: {dataset} has splits; name one of them")
    # The test questions of a folder may repeat its training questions.
    if part == "test" and any((path / f"train.{end}").is_file() for end in ("jsonl", "json")):
        _warn_of_repeats(dataset, "test", _read_split(dataset, "train"), problems)
    # Hold out the last problems.
    for name in [] if split == "all" else ["test"] * is_file + ["dev"] * (split != "test"):
        is_large = name == "dev" and len(problems) >= 2560
        n = 256 if is_large else max(1, len(problems) // 10)
        rest, last = problems[:-n], problems[-n:]
        _warn_of_repeats(dataset, name, rest, last)
        problems = last if name == split else rest
    require(problems, f"--dataset {dataset}: too few problems, its {split} split is empty")
    return problems[:limit]


def _warn_of_repeats(dataset: str, name: str, train: list[Problem], held_out: list[Problem]):
    n_known = len({p.question for p in train} & {p.question for p in held_out})
    if n_known:
        warn(f"--dataset {dataset}: {n_known} questions of {name} are training questions too")


def _read_split(dataset: str, part: str) -> list[Problem]:
    """Return the problems of "train" or "test", in their order. A single file has one part."""
    if dataset in arithmetic.STEPS:
        rows = arithmetic.rows(dataset, part)
        return [Problem(answer=extract_answer(row["reference"]), **row) for row in rows]
    rows = _read_rows(dataset, part)
    problems = [_read_problem(*row) for row in rows]
    long = [row[1] for row, p in zip(rows, problems, strict=True) if p.answer.denominator > 10**9]
    if long:
        warn(f"{long[0]}: no solution will match an answer with so many decimals; round it")
    return problems


def _read_rows(dataset: str, part: str) -> list[tuple[str, str, object]]:
    """Return the id, the position for errors, and the content of every row of a dataset."""
    if dataset in HUB:
        from datasets import load_dataset  # takes a second, and the embedded task does not need it

        try:
            rows, name = load_dataset(*HUB[dataset], split=part), f"{dataset}/{part}"
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"--dataset {dataset}: could not be loaded ({reason})") from None
        return [(f"{name}/{i}", f"{name} row {i}", row) for i, row in enumerate(rows)]
    path = Path(dataset)
    require(path.exists(), f"--dataset {dataset}: no such file, folder or name (see --help)")
    if path.is_dir():
        files = filter(Path.is_file, [path / f"{part}.jsonl", path / f"{part}.json"])
        path = next(files, None)
        require(path, f"--dataset {dataset}: the folder has no {part}.jsonl")
    rows = runtime.read_rows(path)
    return [(f"{path.name}/{i}", where, row) for i, (where, row) in enumerate(rows)]


def _read_problem(name: str, where: str, row: dict) -> Problem:
    """Read a row of GSM8K ("question", "answer") or SVAMP ("Body", "Question", "Answer")."""
    require(isinstance(row, dict), f"{where}: not a JSON object")
    fields = {key.lower(): value for key, value in row.items()}
    require(len(fields) == len(row), f"{where}: two fields differ only in upper case")
    keys = ["body", "question"] if fields.get("body") else ["question"]
    texts, answer = [fields.get(key) for key in keys], fields.get("answer")
    fits = all(isinstance(text, str) and text.strip() for text in texts)
    needed = '"question" and "answer" (GSM8K) or "Body", "Question" and "Answer" (SVAMP)'
    require(fits and isinstance(answer, str | int), f"{where}: needs {needed}")
    for key, value in fields.items():
        is_text = isinstance(value, list | dict) or " " in str(value) or len(str(value)) > 15
        known = key in (*keys, "answer", *IGNORED) or not (value and is_text)
        require(known, f'{where}: the field "{key}" may belong to the question; join or remove it')
    # A lone half of a surrogate pair breaks tokenizers.
    values = (str(value).strip() for value in (*texts, answer))
    *texts, answer = (value.encode(errors="replace").decode() for value in values)
    if len(texts) > 1 and not texts[0].endswith((".", "?", "!", ",")):
        texts[0] += "."
    marked = [line for line in answer.splitlines() if MARKER in line]
    one_line = "\n" not in answer
    require(marked or one_line, f"{where}: the answer has several lines, and none holds {MARKER}")
    agree = len({extract_answer(line) for line in marked}) < 2
    require(agree, f"{where}: the lines with {MARKER} do not agree")
    value = extract_answer(answer if marked else f"{MARKER} {answer}")
    require(value is not None, f"{where}: the answer {answer[-40:]!r} is no number")
    solution = answer if marked else None
    return Problem(name, " ".join(texts), value, solution, solution)


# ---- 2. Answers ----------------------------------------------------------------------------------

# Signs with spaces between, then digits. All patterns here run in linear time.
_SIGNED = re.compile(r"((?:[-+\u2212\u2010-\u2015]\s*){0,2})([0-9.,/]+)")
_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?|[0-9]+/0*[1-9][0-9]*")
# Currency signs, brackets, stars and LaTeX commands may stand before a number or after its sign.
_DECORATION = re.compile(r"(?<![0-9.,/])(?:\\[a-z]{1,16}|[$\u20ac\u00a3\u00a5*(\[{\\])+")
# "1 001", "2^2", "3 * 3", "18 / 2", "- / 5": it is not clear which number is meant.
_UNCLEAR = re.compile(
    r"[0-9](?:[^0-9.,/][0-9]|[^0-9.,]/|[ {]*[*^+x\u00d7][ {]*[0-9])"
    r"|(?<![0-9])/[^a-zA-Z]?[0-9]|frac[0-9]|sqrt|(?i:minus|negative) ?[0-9]"
    r"|[$\u20ac\u00a3\u00a5] ?[0-9.,]+ ?[mb]\b|[0-9] and (?:a|one|two|three)\b"
)
# "1.5 million" and "5k" are not 1.5 and 5.
_MULTIPLIER = re.compile(
    r"[ *)}-]*(?i:hundred|thousand|million|billion|trillion|dozen|gross|lakh|lacs?|crore)"
    r"| ?(?:[kKMB]|(?i:bn|mn|mln|mil|mio))\b"
)
_fraction = functools.lru_cache(1024)(Fraction)
_PLAIN = str.maketrans("x\u00d7\u00f7\u2212", "**/-", " $,")


def first_solution(text: str) -> str:
    """Return the text up to the end of its answer line, or up to a line "Question: ..."."""
    text = ("\n" + text).partition("\nQuestion:")[0][1:]
    before, marker, after = text.partition(MARKER)
    return before + marker + after.partition("\n")[0]


def extract_answer(text: str, lenient: bool = False) -> Fraction | None:
    """Read the number after the first "####" of a solution, exactly, in linear time.

    "####18", "#### $1,234.50", "#### -$3/4" and "#### **18** apples." are read. Two different
    numbers, "18/", "1,8", "1.2.3" and more than 64 characters give None. lenient: if the answer
    line has no digits, return the last number of the text (for prompted models).
    """
    line = first_solution(text).partition(MARKER)[2]
    if lenient and not any(c.isdigit() for c in line):
        return ([None] + list(_numbers(first_solution(text.replace(MARKER, "")))))[-1]
    numbers = {None} if _UNCLEAR.search(line) else set(_numbers(line))
    return numbers.pop() if len(numbers) == 1 else None


def _numbers(line: str) -> Iterator[Fraction | None]:
    """Yield every number of a line, and None for digits that are not clearly one number."""
    if any(c.isnumeric() for c in line if not c.isascii()):
        yield None  # digits of other scripts, superscripts, fractions such as "\u00bd"
    line = re.sub(r"(?<=[^\W\d_])\.(?=[0-9])", " ", line)  # the dot of "Rs.350"
    line = _DECORATION.sub("", line)
    for match in _SIGNED.finditer(line):
        signs, digits = match.groups()
        before = line[max(0, match.start() - 1) : match.start()]
        after = line[match.end() : match.end() + 1]
        digits = digits.removesuffix("/") if after.isalpha() else digits  # "18/hour"
        multiplied = not digits.endswith((".", ",")) and _MULTIPLIER.match(line, match.end())
        digits = digits.rstrip(".,")
        if not any(c.isdigit() for c in digits):
            continue
        # "- 5" and "18-20" may be differences. A long dash may not be a minus.
        unclear = len(signs) > 1 or (signs and (before.isalnum() or signs not in "+-\u2212"))
        if unclear or multiplied or len(digits) > 64 or not _NUMBER.fullmatch(digits):
            yield None
        else:
            value = _fraction(digits.replace(",", ""))
            yield -value if signs in ("-", "\u2212") else value


def equations(text: str) -> tuple[str, ...]:
    """Return the arithmetic operations of a solution: "14+6=<<14+6=20>>20" -> ("14+6",)."""
    text = first_solution(text)
    found = [left.translate(_PLAIN) for left in re.findall(r"<<([^<>=]*)=", text)]
    # Without calculator annotations, take the expression before each "=".
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

    It is `finished` if it ended by itself, and truncated otherwise. Samples that were read from a
    file have no `tokens`, `logprobs` and `prompt`.
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
        """Read the answer and check it. A last number that truncation may have cut is ignored."""
        text = self.text
        if not self.finished:
            _, marker, answer_line = text.partition(MARKER)
            within_answer = marker and "\n" not in answer_line
            text = "" if within_answer else text.rstrip("0123456789.,/")
        self.answer = extract_answer(text, lenient)
        self.correct = self.answer == self.problem.answer

    @property
    def passed(self) -> bool:
        """Return whether the sample earns a reward: a truncated one does not."""
        return self.correct and self.finished

    @property
    def solution(self) -> str:
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
    """Return the answer with the largest sum of weights, or the first of several. None abstains."""
    votes: dict[Fraction, float] = {}
    for answer, weight in zip(answers, weights or [1] * len(answers), strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + weight
    return max(votes, key=votes.get) if votes else None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate P(one of k samples is correct) without bias (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


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
FEW_SHOT = (runtime.TINY / "few_shot.txt").read_text()


def prompt_text(problem: Problem, few_shot: bool = False) -> str:
    return f"{FEW_SHOT if few_shot else ''}Question: {problem.question}\nAnswer:\n"


class Policy:
    """A Hugging Face causal language model and its tokenizer.

    Weights are float32: an update at a learning rate of 1e-6 rounds to nothing in bfloat16. On a
    GPU the arithmetic is bfloat16. Dropout stays off, because with it the log-probabilities of
    sampling and training would differ. `label`: the token that is forced at the beginning, or None.
    `lora`: the adapters, or None. `linear`: a scalar head, which adapters leave alone.
    """

    lora = linear = trained = None

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", flag: str = "--model"):
        self.device, self.max_batch_size = runtime.torch_device(device), 1 << 30
        self.set_dtype("float32")
        folder = runtime.model_folder(name, flag)
        try:
            self.tokenizer = runtime.load_tokenizer(folder)
            self.model = self.load(folder).to(self.device).eval()
            if engine and self.device.type == "cuda":
                engine.fuse_norms(self.model)
            self.check()
        except Exception as error:
            reason = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(f"{flag} {name}: {reason}{first_line(error)}") from None
        best = "bfloat16" if self.device.type == "cuda" else "float32"
        self.set_dtype(best if dtype == "auto" else dtype)
        self.labels = getattr(self.model.config, "return_labels", None)
        self.condition("good" if self.labels else "none")

    def load(self, folder: str):
        config = runtime.load_config(folder)
        require(not runtime.is_reward_model(config), "this is a reward model, not a language model")
        model = runtime.load_weights(transformers.AutoModelForCausalLM, folder)
        if engine and engine.supports(config):
            model.set_attn_implementation("paged_attention")
        return model

    @torch.no_grad()
    def check(self) -> None:
        """Check that `hidden_states` and `head` give the model's logits. Set sizes and eos_ids."""
        ids = torch.tensor([[0, 1], [0, 2]], device=self.device)
        logits = self.model(ids, use_cache=False).logits
        causal = (logits[0, 0] - logits[1, 0]).abs().max() < 1e-3
        require(causal, "not a causal language model, or its weights are broken")
        linear = (logits - self.head(self.hidden_states(ids))).abs().max() < 1e-3
        require(linear, "its logits are scaled or capped in a way that is not known here")
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        config = self.model.config.get_text_config()
        self.max_length = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.check_tokenizer()
        if self.model.can_generate():
            eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
            # A saved model keeps these tokens and drops the sampling settings that it came with.
            ids = dict(bos_token_id=self.tokenizer.bos_token_id, eos_token_id=self.eos_ids)
            ids["pad_token_id"] = eos if pad is None else pad
            self.model.generation_config = transformers.GenerationConfig(**ids)

    def check_tokenizer(self) -> None:
        """Check that the tokenizer fits the model and can write solutions. Set eos_ids."""
        eos, added = self.tokenizer.eos_token_id, self.tokenizer.added_tokens_decoder
        known = eos is not None and eos < self.vocabulary
        require(known, "its tokenizer has no end-of-text token that the model knows")
        special = {i for i, token in added.items() if token.special}
        tokens = self.tokenizer.get_vocab().items()
        unknown = [token for token, i in tokens if i >= self.vocabulary and i not in special]
        n, first = len(unknown), unknown[:1]
        require(not n, f"the model does not know {n} tokens of its tokenizer, for example {first}")
        # A model may name more tokens to stop at. An ordinary one would end solutions early.
        config = getattr(self.model, "generation_config", None)
        stops = getattr(config, "eos_token_id", None)
        stops = {eos, *(stops if isinstance(stops, list) else [stops])}
        self.eos_ids = sorted(i for i in stops if i == eos or i in special and i < self.vocabulary)
        self.hidden_ids = {*self.eos_ids}
        self.check_solution("12+30-4=38\n5*6/7.9=38\n#### 38")

    def check_solution(self, text: str) -> None:
        """Raise UserError if the tokenizer does not give answer, operations and lines back."""
        ids = self.encode_prefix(text)
        again = self.decode(ids)
        wanted, found = ((extract_answer(t), equations(t), t.count("\n")) for t in (text, again))
        known = not self.hidden_ids.intersection(ids) and max(ids, default=0) < self.vocabulary
        message = f"its tokenizer makes {again[-80:]!r} of the solution {text[-80:]!r}"
        require(known and found == wanted, message)

    def set_dtype(self, dtype: str) -> None:
        """Compute in "float32" or "bfloat16" from now on."""
        self.bfloat16 = dtype == "bfloat16"
        # With bfloat16, TensorFloat32 is enough for the head, which stays in float32.
        torch.set_float32_matmul_precision("high" if self.bfloat16 else "highest")

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def condition(self, on: str) -> None:
        """Force the label "good" or "bad" from now on, or "none". A saved folder remembers it."""
        config, self.label, self.label_every_line = self.model.config, None, False
        config.__dict__.pop("return_labels", None)
        if on != "none":
            require(self.labels, "this model was not trained with return labels (rcrl.py)")
            config.return_labels = self.labels
            (self.label,) = self.encode_prefix(self.labels[on])
            self.hidden_ids.update(*(self.encode_prefix(self.labels[k]) for k in ("good", "bad")))
            self.label_every_line = self.labels["by"] == "step"

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [batch, length], padded on the right, to [batch, length, width]."""
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [..., width] to logits [..., vocabulary], always in float32."""
        # In bfloat16 logits between 16 and 32 are 0.125 apart.
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
        """Decode token ids without end-of-text tokens and return labels."""
        shown = [int(i) for i in ids if i not in self.hidden_ids]
        return self.tokenizer.decode(shown, clean_up_tokenization_spaces=False)

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

    def layers(self) -> torch.nn.ModuleList:
        """Return the layers of the decoder. Raises UserError if it has no plain stack of them."""
        depth = self.model.config.get_text_config().num_hidden_layers
        stacks = (m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        found = next((stack for stack in stacks if len(stack) == depth), None)
        name = type(self.model).__name__
        require(found is not None, f"a {name} has no plain stack of layers")
        return found

    def prepare_training(self, args, device=None, critic: torch.nn.Module | None = None) -> None:
        """Set `trained`, the module to train: the model, or adapters if --lora-rank asks for them.

        Raises UserError if the device, or `device`, has no room to train it and the critic.
        """
        if self.trained:
            return
        rank = args.lora_rank
        if rank is None:  # the default of PPO
            rank = 128 * (self.model.num_parameters() > 10**7)
        if rank or args.recompute:
            import adapters  # not part of every fork

            torch.manual_seed(args.seed)
            if rank:
                self.lora = adapters.Lora(self, rank, args.frozen_dtype)
            if args.recompute:
                adapters.recompute(self)
        self.trained = self.lora or self.model
        check_memory(training_memory(self, args, critic), device or self.device)

    def merged(self):
        """Return a context in which the weights contain the adapters, if there are any."""
        return self.lora.merged() if self.lora else contextlib.nullcontext()

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder. It appears complete or not at all."""
        if runtime.process_rank() > 0:
            return
        new = folder.with_name(folder.name + ".part")
        runtime.remove(new)
        merged = {"state_dict": self.lora.merged_weights()} if self.lora else {}
        try:
            self.model.save_pretrained(new, **merged)
            self.tokenizer.save_pretrained(new)
        except Exception as error:  # a full disk shows as an error of the safetensors library
            raise UserError(f"{new}: could not be written ({first_line(error)})") from None
        runtime.replace_folder(folder, new)


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
) -> list[Sample]:
    """Sample `samples` solutions per problem, from the full softmax at `temperature` (0: greedy).

    Random numbers depend on (seed, problem, sample number) alone, so the batch size does not
    matter. A sample that reaches `max_new_tokens` or the model's last position is truncated. If
    memory runs out, the batch size is halved. With `few_shot` a sample ends after its answer line.
    prefixes: how each solution begins.
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
    )
    decode = decode_plainly
    if policy.model.config._attn_implementation == "paged_attention":
        decode = engine.generate_tokens
    else:
        warn("sampling uses the plain loop (slower): no engine/, or it does not know the model")
    mine = range(runtime.process_rank(), len(problems), runtime.process_count())
    done, pending = {}, {i: list(range(samples)) for i in mine}
    bar = tqdm(total=len(mine) * samples, desc=progress, disable=None if progress else True)
    while pending:
        size = min(batch_size, policy.max_batch_size, sum(map(len, pending.values())))
        try:
            with policy.autocast(), policy.merged():
                outputs = decode(policy.model, size, pending=pending, **request)
                for i, k, ids, logprobs, finished in outputs:
                    text, given = prefixes[i] + policy.decode(ids), (prompts[i], prefixes[i])
                    done[i, k] = Sample(problems[i], k, text, finished, ids, logprobs, *given)
                    bar.update()
        except FloatingPointError as error:
            raise UserError(f"{error}: its weights are broken") from None
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not runtime.is_out_of_memory(error):
                raise
            policy.max_batch_size = size // 2
            advice = f"going on with {size // 2} (see --gen-batch-size)"
            warn(f"out of memory while sampling {size} sequences: {advice}")
        left = {i: [k for k in numbers if (i, k) not in done] for i, numbers in pending.items()}
        pending = {i: numbers for i, numbers in left.items() if numbers}
    bar.close()
    done = dict(gather(list(done.items())))
    return [done[i, k] for i in range(len(problems)) for k in range(samples)]


def sampling(args) -> dict:
    """Return the settings of `generate` that are flags of every script."""
    settings = dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    return settings | dict(batch_size=args.gen_batch_size, samples=args.samples)


def encode_prompts(policy: Policy, problems, few_shot=False, prefixes=None) -> list[list[int]]:
    """Encode prompt, prefix and label of every problem. Raises UserError if one leaves no room."""
    prompts = [policy.encode_prompt(prompt_text(problem, few_shot)) for problem in problems]
    for ids, prefix in zip(prompts, prefixes or [""] * len(prompts), strict=True):
        ids += policy.encode_prefix(prefix) + [policy.label] * (policy.label is not None)
    n, room = max(map(len, prompts), default=0), f"the model has {policy.max_length} positions"
    require(n < policy.max_length, f"the longest prompt is {n} tokens long; {room}")
    known = all(max(ids) < policy.vocabulary for ids in prompts)
    require(known, "a question holds a token of the tokenizer that the model does not know")
    for problem in problems if prefixes is None else ():  # a script calls this before it samples
        policy.check_solution(problem.solution or "")
    return prompts


def pick_tokens(policy: Policy, temperature: float, hidden: torch.Tensor, uniforms: torch.Tensor):
    """Sample after each hidden state [rows, width]: tokens [rows], log-probabilities [rows]."""
    # So few rows at a time that on a CPU their logits stay in its cache.
    at_once = max(1, (1 << 28 if policy.device.type == "cuda" else 1 << 22) // policy.vocabulary)
    n_parts = -(-len(hidden) // at_once)
    parts = zip(hidden.chunk(n_parts), uniforms.chunk(n_parts), strict=True)
    picked = [sample_softmax(policy.head(h), u, temperature) for h, u in parts]
    return tuple(torch.cat(tensors) for tensors in zip(*picked, strict=True))


def sample_softmax(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float):
    """Sample from softmax(logits / temperature) by inverting its cumulative distribution.

    logits [rows, vocabulary], uniforms [rows] in [0, 1) -> tokens and their log-probabilities, both
    [rows]. Temperature 0 takes the most likely token, with its log-probability at temperature 1.
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
    """Yield (prompt index, sample number, ids, logprobs, finished), one batch after another."""
    # Prompts of about the same length share a batch. A model with recurrent state takes no padding,
    # so its batches hold prompts of exactly the same length.
    jobs = [(i, k) for i in sorted(pending, key=lambda i: len(prompts[i])) for k in pending[i]]
    groups = itertools.groupby(jobs, lambda job: model._is_stateful and len(prompts[job[0]]))
    for group in [list(group) for _, group in groups]:
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            yield from decode_batch(model, batch, prompts=prompts, **request)


def decode_batch(
    model, jobs, *, prompts, limits, seeds, pick, eos_ids, breaks_line, label, is_complete
) -> Iterator[tuple]:
    """Yield the samples of one batch in the order in which they end. jobs: (prompt, number)."""
    base, device = model.base_model, next(model.parameters()).device
    known = inspect.signature(type(base).forward).parameters
    names = [name for name in ("cache", "past_key_values", "cache_params") if name in known]
    require(names, "this model has no cache of keys and values, so it cannot be sampled here")
    cache = transformers.DynamicCache(config=model.config)
    last_position = max(len(prompts[i]) + limits[i] for i, _ in jobs) - 1

    def forward(ids, mask: torch.Tensor) -> torch.Tensor:
        how = {names[0]: cache, "use_cache": True}
        if not mask.all():
            how["attention_mask"] = mask
        if "position_ids" in known:
            # Ended sequences run on until they are dropped.
            positions = (mask.cumsum(1) - 1).clamp(0, last_position)
            how["position_ids"] = positions[:, mask.shape[1] - len(ids[0]) :]
        return base(input_ids=torch.tensor(ids, device=device), **how).last_hidden_state[:, -1]

    # 1. Run each prompt once, padded on the left. Repeat its cache for its samples.
    unique = list(dict.fromkeys(i for i, _ in jobs))
    width = max(len(prompts[i]) for i in unique)
    ids = [[0] * (width - len(prompts[i])) + prompts[i] for i in unique]
    mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in unique]
    mask = torch.tensor(mask, device=device)
    hidden = forward(ids, mask)  # [prompts, width of the model]
    rows = torch.tensor([unique.index(i) for i, _ in jobs], device=device)
    cache.reorder_cache(rows)
    hidden, mask = hidden[rows], mask[rows]
    # The state of every sequence, on the host.
    previous = np.array([prompts[i][-1] for i, _ in jobs])
    limit = np.array([limits[i] for i, _ in jobs])
    random = [np.random.default_rng([*seeds[i], k]).random(max(limit), np.float32) for i, k in jobs]
    uniforms = np.stack(random)  # [samples, longest]
    tokens, logprobs = np.zeros(uniforms.shape, np.int32), np.zeros_like(uniforms)
    running = np.ones(len(jobs), bool)
    for age in range(max(limit)):
        # 2. Sample the next token of all sequences. After a line break the label follows.
        sampled = pick(hidden, torch.from_numpy(uniforms[:, age]).to(device))
        next_tokens, logprob = (tensor.cpu().numpy() for tensor in sampled)
        if label is not None:
            forced = breaks_line[previous]
            next_tokens[forced], logprob[forced] = label, 0.0
        tokens[:, age], logprobs[:, age], previous = next_tokens, logprob, next_tokens
        if not np.isfinite(logprob).all():
            raise FloatingPointError("the model's probabilities are not finite")
        # 3. Yield what has ended.
        ended, at_limit = np.isin(next_tokens, eos_ids), age + 1 >= limit
        breaks = breaks_line[next_tokens] if is_complete else ended
        for row in np.flatnonzero(running & (ended | at_limit | breaks)):
            finished = bool(ended[row] or breaks[row] and is_complete(tokens[row, : age + 1]))
            if finished or at_limit[row]:
                running[row] = False
                sample = tokens[row, : age + 1].copy(), logprobs[row, : age + 1].copy()
                yield *jobs[row], *sample, finished
        # 4. Drop ended sequences when they are half of the batch.
        keep = np.flatnonzero(running)
        if not len(keep):
            return
        if len(keep) <= len(running) / 2:
            rows = torch.from_numpy(keep).to(device)
            cache.reorder_cache(rows)
            mask, jobs = mask[rows], [jobs[row] for row in keep]
            states = previous, limit, uniforms, tokens, logprobs, running
            previous, limit, uniforms, tokens, logprobs, running = (s[keep] for s in states)
        mask = F.pad(mask, (0, 1), value=1)
        hidden = forward(previous[:, None], mask)


# ---- 5. Training ---------------------------------------------------------------------------------

LOGITS_AT_ONCE = 1 << 24  # above this many, compute them again in the backward pass


def training_memory(policy: Policy, args, critic: torch.nn.Module | None = None) -> dict[str, int]:
    """Return the bytes of a training step of a prepared policy and a critic, by part.

    Per token and layer it keeps 6 w + 4 q + 4 m numbers, where w is the width of the model, q of
    all heads and m of the MLP. The numbers of q and m have the dtype of the arithmetic. The model
    may be on the device meta.
    """
    config, tokens = policy.model.config.get_text_config(), args.token_budget
    width, depth, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    middle = getattr(config, "intermediate_size", None) or 4 * width
    per_layer = 24 * width + (8 if policy.bfloat16 else 16) * (heads * head_dim + middle)
    kept = 4 * width * depth + per_layer if args.recompute else per_layer * depth
    kept += per_layer * len(getattr(critic, "layers", ()))  # the critic runs no layer again
    trained = [p for p in policy.trained.parameters() if p.requires_grad]
    trained += critic.parameters() if critic else []
    weights = {id(p): p for p in (*policy.model.parameters(), *trained)}.values()
    size = sum(p.numel() for p in trained)
    vocabulary = 1 if policy.linear else policy.vocabulary
    rows = tokens if tokens * vocabulary <= LOGITS_AT_ONCE else min(tokens, 2048)
    return {
        "weights": sum(p.numel() * p.element_size() for p in weights),
        "gradients": 4 * size,
        "moments": 8 * size,
        "activations": kept * tokens,
        "logits": 3 * 4 * rows * vocabulary,
    }


def check_memory(parts: dict[str, int], device: torch.device) -> None:
    """Raise UserError if a GPU that holds the weights has no room for the rest."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        parts = {name: size / 2**30 for name, size in parts.items() if name != "weights"}
        needed, free = sum(parts.values()), free / 2**30
        sizes = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
        advice = "try --lora-rank, --recompute or a smaller --token-budget"
        message = f"training takes {needed:.1f} GiB more ({sizes}), and {free:.1f} are free"
        require(needed <= free, f"{message}; {advice}")


def check_base(policy: Policy, base: Policy | None, args) -> None:
    """Prepare the base for training. Raise UserError if it does not fit the policy or the GPU."""
    base = base or Policy(args.base, "cpu", flag="--base")
    base.bfloat16 = policy.bfloat16
    configs = (each.model.config.get_text_config() for each in (policy, base))
    one, other = ((c.model_type, c.hidden_size, c.num_hidden_layers) for c in configs)
    advice = "--model is of another shape; give the pretrained model that it was made of"
    require(args.base != "tiny" or one == other, f"--base tiny: {advice}")
    base.prepare_training(args, policy.device)


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yield this process's share of the sequences, as lists of indices within the budget."""
    # Sequences of similar length share a micro-batch. A sequence beyond the budget has its own.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order = order[runtime.process_rank() :: runtime.process_count()]
    while order:
        size = max(1, token_budget // lengths[order[0]])
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

    The hidden state of a token predicts the next token. Large logits are made 2,048 rows at a time,
    and again in the backward pass.
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


def require_finite(*values: float) -> None:
    """Raise UserError, before the weights change, if a loss or gradient norm is not finite."""
    message = f"loss or gradient norm is not finite {(*map(float, values),)}; try a smaller --lr"
    require(all(map(math.isfinite, values)), message)


def adam_w(parameters: Iterable, lr: float) -> torch.optim.AdamW:
    """Return the optimizer of all scripts. On a GPU it is fused: no copy of the weights."""
    parameters = list(parameters)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    how = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=first.is_cuda or None)
    return torch.optim.AdamW(parameters, lr=lr, **how)


def cosine_lr(step: int, n_steps: int, lr: float, warmup: float = 0.03) -> float:
    """Rise linearly in the fraction `warmup` of the steps, then fall as a cosine to lr / 100."""
    warmup = max(1, round(warmup * n_steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - 1 - warmup)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@functools.lru_cache(1)  # the curricula of PPO ask for the same order question by question
def shuffled(n: int, *seed: int) -> list[int]:
    """Return a permutation of range(n) that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(n).tolist()


# ---- 6. Files of samples -------------------------------------------------------------------------


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    with runtime.atomic_write(path) as file:
        file.write("".join(sample.to_json() + "\n" for sample in samples).encode())


def parse_sample(line: str, problems: dict[str, Problem] | None) -> Sample | None:
    """Read a line that `write_samples` wrote. Return None if it belongs to none of the problems.

    Without `problems` the problem is made of the line, and has no solution.
    """
    try:
        row = json.loads(line)
        keys = "problem", "question", "text"
        name, question, text = (row[key].encode(errors="replace").decode() for key in keys)
        problem = Problem(name, question, extract_answer(f"{MARKER} {row['reference']}"))
        fits = problem.answer is not None and question.strip()
        if problems is not None:
            own = problems[name]
            fits = (problem.question, problem.answer) == (own.question, own.answer)
            problem = own
        sample = Sample(problem, int(row["sample"]), text, bool(row["finished"]))
        if row.get("score") is not None:
            sample.score = float(row["score"])
            fits = fits and math.isfinite(sample.score)
        return sample if fits else None
    except Exception:  # the line may hold anything
        return None


def read_samples(path: Path, problems: Sequence[Problem] | None = None) -> list[Sample]:
    """Read a file of samples, sorted by problem. Raises UserError if a line is bad.

    Without `problems` they come from the file.
    """
    require(path.is_file(), f"{path}: no such file of samples")
    samples, by_id = [], problems and {problem.id: problem for problem in problems}
    known = f" of one of the {len(problems)} problems of this run" if problems else ""
    for number, line in enumerate(path.read_text("utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            sample = parse_sample(line, by_id)
            require(sample, f"{path} line {number}: not a sample{known}")
            samples.append(sample)
    require(samples, f"{path}: holds no samples")
    order = {name: i for i, name in enumerate(by_id or (s.problem.id for s in samples))}
    n_questions = len({(s.problem.id, s.problem.question) for s in samples})
    require(by_id or n_questions == len(order), f"{path}: different questions have the same id")
    return sorted(samples, key=lambda sample: (order[sample.problem.id], sample.number))


def sample_to_file(policy: Policy, problems, path: Path, run=None, **how):
    """Call `generate` for a group of problems at a time and append the samples to a file.

    Groups that are complete in the file are read back. So an interruption loses one group at most,
    and with the same batch size the samples are identical, bit for bit.
    """
    n, prefixes = how["samples"], how.pop("prefixes", None) or [""] * len(problems)
    # Large groups, because the batch runs half empty at the end of each.
    size = max(1, 32 * how["batch_size"] * runtime.process_count() // n)

    def read_back() -> list[Sample]:
        lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
        samples = []
        for i, line in enumerate(lines[: len(problems) * n]):
            problem, prefix = problems[i // n], prefixes[i // n]
            sample = parse_sample(line, {problem.id: problem})
            if not (sample and sample.number == i % n and sample.text.startswith(prefix)):
                break
            samples.append(sample)
        if len(samples) < len(problems) * n:
            samples = samples[: len(samples) - len(samples) % (size * n)]
            write_samples(path, samples)
        return samples

    samples = runtime.on_first(read_back)
    progress = how.pop("progress")
    for first in range(len(samples) // n, len(problems), size):
        group = slice(first, first + size)
        how["progress"] = f"{progress}, problem {first} of {len(problems)}"
        new = generate(policy, problems[group], prefixes=prefixes[group], **how)
        runtime.append(path, "".join(sample.to_json() + "\n" for sample in new))
        for sample in new:
            sample.tokens, sample.logprobs = (), ()
        samples += new
        if run and runtime.any_process(run.interrupted):
            raise KeyboardInterrupt
    return samples


def dev_metrics(policy: Policy, problems, args, number: int, samples=0, few_shot=False) -> dict:
    """Measure maj@1 (greedy accuracy), and pass@k if `samples` > 0.

    The greedy samples are written to samples/dev_NUMBER.jsonl.
    """
    how = sampling(args) | dict(seed=args.seed, few_shot=few_shot)
    one = how | dict(samples=1, temperature=0, progress="dev")
    with policy.lora.exact() if policy.lora else contextlib.nullcontext():
        greedy = generate(policy, problems, **one)
    write_samples(Path(args.out) / "samples" / f"dev_{number}.jsonl", greedy)
    metrics = {"maj@1": mean(s.correct for s in greedy)}
    metrics["no_answer"] = mean(s.answer is None for s in greedy)
    metrics["truncated"] = mean(not s.finished for s in greedy)
    if samples:
        how |= dict(samples=samples, progress="dev pass@k")
        groups = by_problem(generate(policy, problems, **how))
        counts = [sum(s.correct for s in group) for group in groups]
        for k in powers_of_two(samples):
            metrics[f"pass@{k}"] = mean(pass_at_k(samples, count, k) for count in counts)
    return metrics
