r"""Outcome reward model (ORM): how likely is the final answer to be right, judged from the solution so far.

Objective, for question q, solution s = s_1 ... s_T (the last token is the end-of-text token) and label y, 1 if its final
answer is right and 0 if not:

    minimise   - sum_(q, s, y)  w(q, s) / T  sum_t [ y log P(q, s_<=t) + (1 - y) log(1 - P(q, s_<=t)) ]

(a batch is divided by the sum of its own w, so the balance is exact for large batches, and nearly so at the default of 32)

"Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et al. 2024), its ORM, which follows
"Training Verifiers to Solve Math Word Problems" (Cobbe et al. 2021). P is the policy's network with a scalar head.

    1. sample K solutions per training question from a student policy (or read samples that were written before), and
       16 per dev question, from the same policy
    2. label them by the answer check; w: within a question right and wrong weigh the same
    3. train the policy's weights and a scalar head, binary cross-entropy on every solution token
    4. after every epoch: how good it is on the dev questions, none of which it trained on; the best becomes model/

The last token's P is the score of a solution: `evaluate.py --orm` picks the best of n by it, `ppo.py --reward orm`
maximises it, `expert_iteration.py --orm` filters by it.

Where this differs from the paper: it does not say how the classes are balanced. Here a question with both right and
wrong samples gives half of its weight to each, so that the model has to tell solutions apart and not only questions.
A question whose samples are all right or all wrong keeps its weight.

--kind genrm trains a generative reward model instead, of "Exploring Data Scaling Trends and Effects in RLHF" (Shen et al.
2025): a language model that reads the question, a candidate and a reference and says which is better. Of the same samples
it learns P(candidate is better) = 0 for a wrong one beside the gold solution, 0.5 for a right one beside it, and 1 for a
right one beside a wrong one, each in a random order; its score is the mean over both orders. `ppo.py --reward genrm`
maximises it. Beside gold solutions three kinds of candidates that no policy samples (the question repeated, another
question's solution, an unfinished one) are added as wrong: without them an empty text scored nearly as high as a right one.

CPU, after `python sft.py` (README.md has the measured numbers):
    python reward_model.py
    python reward_model.py --kind genrm
One GPU:
    python reward_model.py --model runs/gsm8k/sft/model --dataset gsm8k --samples 96 --epochs 2 --lr 1e-5 --batch-size 128 \
        --max-new-tokens 512 --out runs/gsm8k/orm
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForTokenClassification
from transformers.utils import logging as transformers_logging

import common

GENRM_DEFAULTS = {"out": "runs/genrm", "lr": 5e-4, "epochs": 3, "batch_size": 8}


def parse_args(argv: list[str]):
    parser = common.common_parser(
        __doc__, model="runs/sft/model", out="runs/reward_model", samples=16, temperature=0.7, lr=1e-3, epochs=5,
        batch_size=32, limit_train=None, checkpoint_every=300,
    )  # fmt: skip
    add = parser.add_argument
    add("--kind", choices=["orm", "genrm"], default="orm", help="outcome reward model, or generative: a language model that "
        "compares a solution with a reference (then --out runs/genrm --lr 5e-4 --epochs 3 --batch-size 8)")  # fmt: skip
    add(
        "--base",
        help="weights that the reward model starts from (default: those of --model, the student)",
    )
    add("--pairs", type=common.number(int, 1), default=4, help="genrm: at most so many comparisons of each of the three "
        "kinds per question")  # fmt: skip
    add("--train-samples", nargs="+", default=[], metavar="FILE",
        help="samples of the training questions that another script wrote, instead of sampling anew")  # fmt: skip
    add("--eval-samples", type=common.number(int, 2), default=16, help="samples per dev question")
    if parser.parse_args(argv).kind == "genrm":
        parser.set_defaults(**GENRM_DEFAULTS)
    args = parser.parse_args(argv)
    parser.only_with("--kind genrm", args.kind == "genrm", args, "pairs")
    if args.temperature == 0:
        parser.error(
            "--temperature 0: all samples of a question are the same, and right or wrong together"
        )
    return args


# ---- the models ------------------------------------------------------------------------------------------------------


class RewardModel(common.Policy):
    """An outcome reward model: P(final answer correct | question, solution so far), after every token.

    The network of a policy with a scalar head: what transformers calls token classification with
    one label. So `AutoModelForTokenClassification.from_pretrained` loads a saved folder. Families
    without such a class are refused. new: start from a language model, with a head of zeros
    (P = 0.5 everywhere).
    """

    def __init__(self, name: str, device="auto", dtype="auto", flag="--orm", new: bool = False):
        self.new = new
        super().__init__(name, device, dtype, flag)

    def load(self, folder: str):
        config = AutoConfig.from_pretrained(folder)
        trained = self.new or common.is_reward_model(config)
        common.require(trained, "this is not a reward model; reward_model.py trains one")
        how = dict(
            dtype=torch.float32, num_labels=1, use_safetensors=True, output_loading_info=True
        )
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # no table of warnings about the new head
        try:
            model, found = AutoModelForTokenClassification.from_pretrained(folder, **how)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            family = config.model_type
            reason = f"transformers has no token classifier for the family {family}"
            raise common.UserError(f"{reason}, so it cannot be a reward model") from None
        finally:
            transformers_logging.set_verbosity(verbosity)
        scalar_heads = [m for m in model.named_children() if getattr(m[1], "out_features", 0) == 1]
        name, self.linear = scalar_heads[0]
        lost = sorted(
            k for k in found["missing_keys"] if not (self.new and k.startswith(f"{name}."))
        )
        missing = f"it has no weights for {', '.join(lost[:1])} ({len(lost)} are missing)"
        common.require(not lost, missing)
        if self.new:
            torch.nn.init.zeros_(self.linear.weight)
            torch.nn.init.zeros_(self.linear.bias)
        return model

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [..., width] to log-odds [..., 1]."""
        return self.linear(hidden)

    def encode(self, sample: common.Sample) -> common.Example:
        """Encode prompt and solution from their text, so any tokenizer may have made the sample.

        A truncated solution gets an end-of-text token as well, unless there is no room for it.
        """
        prompt = self.encode_prompt(common.prompt_text(sample.problem))
        response = self.encode_solution(sample.solution)
        if not sample.finished and len(prompt + response) > self.max_length:
            response = response[:-1]
        return self.check_length((prompt, response))

    def log_odds(self, examples: Sequence[common.Example]) -> torch.Tensor:
        """Return the log-odds after every response token: [response tokens of all examples]."""
        ids = common.right_padded(self, [prompt + response for prompt, response in examples])
        rows, columns = common.response_positions(examples, self.device)
        with self.autocast():
            hidden = self.hidden_states(ids)[rows, columns]  # [response tokens, width]
        return self.head(hidden.float())[:, 0]

    @torch.no_grad()
    def scores(
        self, samples: Sequence[common.Sample], token_budget: int = 1024
    ) -> list[np.ndarray]:
        """Return the probability after every solution token, one array per sample.

        The last one is the score of the sample. Equal texts are run once.
        """
        keys = [(sample.problem.question, sample.text) for sample in samples]
        examples = {key: self.encode(s) for key, s in dict(zip(keys, samples, strict=True)).items()}
        found = score_all(self.log_odds, examples, token_budget, by_token=True)
        return [found[key] for key in keys]

    def grade(self, samples: Sequence[common.Sample], token_budget: int = 1024) -> None:
        """Set the score of every sample: the probability after its last token."""
        for sample, probabilities in zip(samples, self.scores(samples, token_budget), strict=True):
            sample.score = float(probabilities[-1])


def score_all(log_odds: Callable, examples: dict, token_budget: int, by_token: bool) -> dict:
    """Return the probabilities of all examples by key. Several processes share the examples."""
    keys, values = list(examples), list(examples.values())
    found = []
    for indices in common.micro_batches([len(p) + len(r) for p, r in values], token_budget):
        batch = [values[i] for i in indices]
        probabilities = log_odds(batch).sigmoid()
        split = common.by_example(probabilities, batch) if by_token else probabilities.tolist()
        found += zip(indices, split, strict=True)
    return {keys[i]: value for i, value in common.gather(found)}


class GenerativeRewardModel(common.Policy):
    """A generative reward model (GenRM, Shen et al. 2025): it says which of two solutions is better.

    The score of a candidate next to a reference is the probability of the verdict for the
    candidate, averaged over both orders. 0.5 means "as good as the reference". A saved folder is
    an ordinary language model. new: start from the weights of any language model.
    """

    VERDICTS = "A", "B"

    def __init__(self, name: str, device="auto", dtype="auto", flag="--genrm", new: bool = False):
        self.new = new
        super().__init__(name, device, dtype, flag)
        self.condition("none")
        self.model.config.compares_solutions = True
        ids = [self.encode_prompt(f"Better answer:\n{verdict}") for verdict in self.VERDICTS]
        distinct = ids[0][:-1] == ids[1][:-1] and ids[0][-1] != ids[1][-1]
        advice = "its tokenizer has no tokens for the verdicts A and B"
        common.require(distinct, f"{flag} {name}: {advice}")
        self.verdict_ids = [ids[0][-1], ids[1][-1]]

    def load(self, folder: str):
        model = super().load(folder)
        trained = self.new or getattr(model.config, "compares_solutions", False)
        advice = "reward_model.py --kind genrm trains one"
        common.require(trained, f"this is not a generative reward model; {advice}")
        return model

    def encode(self, problem: common.Problem, first: str, second: str) -> common.Example:
        """Encode the prompt up to the verdict, and the verdict A as its response.

        A solution ends where it repeats words of the prompt. Otherwise it could write its own
        verdict.
        """
        own_words = re.compile(r"^(?:Answer [AB]|Better answer):", re.M)
        a, b = (own_words.split(solution)[0].strip() for solution in (first, second))
        text = f"Question: {problem.question}\nAnswer A:\n{a}\nAnswer B:\n{b}\nBetter answer:\n"
        ids = self.encode_prompt(text + self.VERDICTS[0])
        return self.check_length((ids[:-1], ids[-1:]))

    def log_odds(self, examples: Sequence[common.Example]) -> torch.Tensor:
        """Return the log-odds of verdict A against verdict B: [comparisons]."""
        ids = common.right_padded(self, [prompt for prompt, _ in examples])
        last = torch.tensor([len(prompt) - 1 for prompt, _ in examples], device=self.device)
        with self.autocast():
            hidden = self.hidden_states(ids)[torch.arange(len(examples), device=self.device), last]
        logits = self.head(hidden.float())
        return logits[:, self.verdict_ids[0]] - logits[:, self.verdict_ids[1]]

    @torch.no_grad()
    def verdicts(self, comparisons: Sequence[tuple], token_budget: int = 1024) -> np.ndarray:
        """Return P(candidate is better), with the candidate as A and as B: [comparisons, 2].

        comparisons: (problem, candidate, reference). Equal ones are run once.
        """
        orders = [((p, c, r), (p, r, c)) for p, c, r in comparisons]
        ordered = {(p.question, a, b): (p, a, b) for pair in orders for p, a, b in pair}
        examples = {key: self.encode(*comparison) for key, comparison in ordered.items()}
        first_is_better = score_all(self.log_odds, examples, token_budget, by_token=False)
        both = [[first_is_better[p.question, a, b] for p, a, b in pair] for pair in orders]
        return np.array([[as_a, 1 - as_b] for as_a, as_b in both]).reshape(-1, 2)

    def scores(
        self, samples: Sequence[common.Sample], references: dict[str, str], token_budget: int = 1024
    ) -> list[float]:
        """Return the score of every sample. references: a solution by problem id."""
        comparisons = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
        # Rounded, so that a solution next to itself scores exactly 0.5.
        return self.verdicts(comparisons, token_budget).mean(1).round(6).tolist()


# ---- the data --------------------------------------------------------------------------------------------------------


def balanced_weights(labels: list[bool]) -> list[float]:
    """The weights of one question's samples, whose sum is their number: half of it for each class, if there are both.
    [right, wrong, wrong, wrong] -> [2, 2/3, 2/3, 2/3]."""
    n, n_right = len(labels), sum(labels)
    return [n / (2 * (n_right if y else n - n_right)) if 0 < n_right < n else 1.0 for y in labels]


def training_data(samples: list[common.Sample]) -> tuple[list[common.Sample], list[float]]:
    """The distinct solutions of every question and their weights, those of equal ones added up: a sharp policy repeats
    itself a lot, and their weights add up to the same."""
    distinct: dict[tuple, list] = {}
    for group in common.by_problem(samples):
        for sample, weight in zip(group, balanced_weights([s.correct for s in group]), strict=True):
            # of two equal texts one may be cut, and wrong
            key = sample.problem.id, sample.solution, sample.correct
            entry = distinct.setdefault(key, [sample, 0.0])
            entry[1] += weight
    return [sample for sample, _ in distinct.values()], [weight for _, weight in distinct.values()]


def comparisons(
    samples: list[common.Sample], n_pairs: int, seed: int
) -> tuple[list[tuple], list[float]]:
    """What a generative reward model learns from: (problem, A, B) and P(A is better). At most `n_pairs` of a kind and
    question: wrong and gold 0, right and gold 0.5, right and wrong 1; or the other way round with 1 less that. One of each
    kind that no policy samples, but one that is optimised against the model finds, all 0: the question instead of a
    solution, the gold solution of another question, and the beginning of this one's, of any length and often a short one."""
    asked, targets, rng, previous = [], [], np.random.default_rng([seed, 2]), ""
    for group in common.by_problem(samples):
        problem, reference = group[0].problem, group[0].problem.reference
        right, wrong = (
            list(dict.fromkeys(s.solution for s in group if s.correct == kind))
            for kind in (True, False)
        )
        right, wrong = ([texts[i] for i in rng.permutation(len(texts))] for texts in (right, wrong))
        pairs = [(w, reference, 0.0) for w in wrong[:n_pairs] if reference]
        pairs += [(r, reference, 0.5) for r in right[:n_pairs] if reference]
        if reference:
            end = max(1, reference.find(common.MARKER))
            beginning = reference[
                : int(end ** rng.random() - 0.5)
            ]  # as often 1 to 4 characters as 10 to 40, or none
            others = [
                t
                for t in (problem.question, previous)
                if t and common.extract_answer(t) != problem.answer
            ]
            pairs += [(text, reference, 0.0) for text in (*others, beginning)]
            previous = reference
        n_mixed, turn = min(n_pairs, len(right) * len(wrong)), math.lcm(len(right), len(wrong))
        pairs += [
            (right[i % len(right)], wrong[(i + i // turn) % len(wrong)], 1.0)
            for i in range(n_mixed)
        ]  # each pair once
        for candidate, other, target in pairs:
            turned = rng.random() < 0.5
            asked.append((problem, other, candidate) if turned else (problem, candidate, other))
            targets.append(1 - target if turned else target)
    return asked, targets


# ---- the formulas ----------------------------------------------------------------------------------------------------


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """P(a right one scores above a wrong one), ties counted half: the area under the ROC curve (Mann and Whitney 1947).
    None where there is only one class."""
    values, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]  # the mean rank of equal scores, from 1
    n_right = int(np.sum(labels))
    pairs = n_right * (len(labels) - n_right)
    return float((rank[labels].sum() - n_right * (n_right + 1) / 2) / pairs) if pairs else None


def auc_within(
    samples: list[common.Sample], scores: np.ndarray, labels: np.ndarray
) -> float | None:
    """The AUC over the pairs of one question, mean over the questions that have both kinds: what reranking needs."""
    groups = np.split(
        np.arange(len(samples)), np.cumsum([len(g) for g in common.by_problem(samples)])[:-1]
    )
    return common.mean([auc(scores[g], labels[g]) for g in groups if 0 < labels[g].sum() < len(g)])


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict]:
    """Bins of equal width over the scores: how many fall in, their mean score, and the share that is right."""
    where = np.minimum((scores * bins).astype(int), bins - 1)
    return [
        {"from": b / bins, "n": int(inside.sum()), "score": float(scores[inside].mean()), "correct": float(labels[inside].mean())}
        for b in range(bins) if (inside := where == b).any()
    ]  # fmt: skip


def calibration_error(table: list[dict]) -> float:
    """Expected calibration error (Naeini et al. 2015): |mean score - share right| of a bin, averaged over the samples."""
    return sum(row["n"] * abs(row["score"] - row["correct"]) for row in table) / sum(
        row["n"] for row in table
    )


def best_of_n(samples: list[common.Sample], scores: list[float]) -> list[dict]:
    """For n = 1, 2, 4 ...: the share of questions solved by the best-scored of n samples, by their majority, and by any
    of them (the oracle). Averaged over the disjoint groups of n that a question's samples make."""
    place, rows = itertools.count(), []
    numbered = [
        [(sample, scores[next(place)]) for sample in group] for group in common.by_problem(samples)
    ]
    for n in common.powers_of_two(len(numbered[0])):
        blocks = [group[i : i + n] for group in numbered for i in range(0, len(group) - n + 1, n)]
        rows.append({
            "n": n,
            "orm": common.mean(max(block, key=lambda pair: pair[1])[0].correct for block in blocks),
            "majority": common.mean(
                common.vote([s.answer for s, _ in block]) == block[0][0].problem.answer for block in blocks
            ),
            "oracle": common.mean(any(s.correct for s, _ in block) for block in blocks),
        })  # fmt: skip
    return rows


def quality(samples: list[common.Sample], probabilities: list[np.ndarray]) -> dict:
    """What the ORM is worth on the samples of questions that it was not trained on; see README.md for the keys."""
    labels = np.array([sample.correct for sample in samples])
    scores = np.array([p[-1] for p in probabilities], np.float64)
    table = reliability(scores, labels)
    at = {
        place: np.array([p[max(0, math.ceil(place * len(p)) - 1)] for p in probabilities])
        for place in (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: after the first token
    }
    return {
        "base_rate": float(labels.mean()),
        "accuracy": common.mean((scores >= 0.5) == labels),
        "auc": auc(scores, labels),
        "auc_within": auc_within(samples, scores, labels),
        "calibration_error": calibration_error(table),
        "by_position": [
            {
                "position": place,
                "accuracy": common.mean((p >= 0.5) == labels),
                "auc": auc(p, labels),
            }
            for place, p in at.items()
        ],
        "reliability": table,
        "best_of_n": best_of_n(samples, scores.tolist()),
    }


NONSENSE = {
    "empty": "",
    "colon": ":",
    "thinking": "Thought process:",
    "question": None,
}  # None: the question repeated


def comparable(samples: list[common.Sample]) -> tuple[list[common.Sample], dict[str, str]]:
    """The samples that a generative reward model is tried on, and the reference of each question by its id: the gold solution
    or, where there is none, the question's first right sample; that text is not scored beside itself, and a question without
    a right sample is left out. UserError if nothing is left."""
    references = {
        group[0].problem.id: group[0].problem.reference for group in common.by_problem(samples)
    }
    for sample in samples:
        if references[sample.problem.id] is None and sample.correct:
            references[sample.problem.id] = sample.solution
    samples = [
        sample
        for sample in samples
        if (reference := references[sample.problem.id])
        and (sample.problem.reference or sample.solution != reference)
    ]
    if not samples:
        raise common.UserError(
            "no dev question has a gold solution or a right sample to compare with"
        )
    return samples, references


def genrm_quality(
    samples: list[common.Sample], genrm: GenerativeRewardModel, token_budget: int
) -> dict:
    """What a generative reward model is worth on the samples of questions that it was not trained on."""
    samples, references = comparable(samples)
    problems = {sample.problem.id: sample.problem for sample in samples}
    candidates = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
    asked = genrm.verdicts(candidates, token_budget)
    scores, labels = asked.mean(1).round(6), np.array([sample.correct for sample in samples])
    nonsense = {
        name: genrm.verdicts(
            [(p, p.question if text is None else text, references[i]) for i, p in problems.items()],
            token_budget,
        ).mean(1)
        for name, text in NONSENSE.items()
    }
    mean = common.mean
    return {
        "base_rate": float(labels.mean()),
        "auc": auc(scores, labels),
        "auc_within": auc_within(samples, scores, labels),
        "score_if_correct": mean(scores[labels]),
        "score_if_incorrect": mean(scores[~labels]),
        "false_positive_rate": mean(scores[~labels] >= 0.5),
        "beats_gold_rate": mean(scores > 0.5),
        "order_bias": mean(asked[:, 0] - asked[:, 1]),
        "order_gap": mean(np.abs(asked[:, 0] - asked[:, 1])),
        "nonsense_worst": max(mean(s) for s in nonsense.values()),
        "nonsense": [
            {"candidate": n, "score": mean(s), "highest": float(s.max())}
            for n, s in nonsense.items()
        ],
    }


def train_step(
    orm: RewardModel | GenerativeRewardModel,
    optimizer: torch.optim.Optimizer,
    batch: list,
    token_budget: int,
) -> tuple[float, float]:
    """Make one optimizer step on the binary cross-entropy of a batch.

    batch: (example, label, weight). The loss is the weighted mean over the solutions of the mean
    over their tokens. Returns it in nats per token, and the norm of the gradient before clipping.
    """
    total_weight, loss = sum(weight for _, _, weight in batch), 0.0
    for indices in common.micro_batches([len(p) + len(r) for (p, r), _, _ in batch], token_budget):
        examples, labels, weights = zip(*(batch[i] for i in indices), strict=True)
        lengths = torch.tensor([len(response) for _, response in examples])
        y = torch.tensor(labels).repeat_interleave(lengths).to(orm.device)
        w = (torch.tensor(weights) / lengths).repeat_interleave(lengths) / total_weight
        micro_loss = torch.nn.functional.binary_cross_entropy_with_logits(
            orm.log_odds(examples), y, w.to(orm.device), reduction="sum"
        )
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = list(orm.model.parameters())
    (loss,) = common.sum_gradients(parameters, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    common.require_finite(loss, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # 0. problems
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    written = [
        sample for file in args.train_samples for sample in common.read_samples(Path(file), train)
    ]
    args.base = args.base or args.model
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    generative = args.kind == "genrm"
    kind = GenerativeRewardModel if generative else RewardModel
    orm = kind(args.base, args.device, args.dtype, flag="--base", new=True)
    common.check_memory(orm.model)  # which the student leaves before the training
    student = common.Policy(args.model, args.device, args.dtype)
    common.encode_prompts(student, dev if written else train + dev)
    run.begin()

    # 1. samples of the student (read back where a restart finds them on disk)
    how = dict(
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.gen_batch_size,
    )
    samples = written or common.sample_to_file(
        student, train, run.out / "samples" / "train.jsonl", run, samples=args.samples, seed=[args.seed, 0],
        progress="train questions", **how,
    )  # fmt: skip
    dev_samples = common.sample_to_file(
        student, dev, run.out / "samples" / "dev.jsonl", run, samples=args.eval_samples, seed=[args.seed, 1],
        progress="dev questions", **how,
    )  # fmt: skip
    del student

    # 2. labels and weights
    if generative:
        data, labels = comparisons(samples, args.pairs, args.seed)
        examples, weights = [orm.encode(*asked) for asked in data], [1.0] * len(data)
    else:
        data, weights = training_data(samples)
        examples, labels = (
            [orm.encode(sample) for sample in data],
            [float(sample.correct) for sample in data],
        )
    informative = common.mean(
        0 < sum(s.correct for s in group) < len(group) for group in common.by_problem(samples)
    )
    right = common.mean(sample.correct for sample in samples)
    print(f"{len(samples)} samples, {right:.1%} right; {informative:.1%} of the questions have both kinds; "
          f"{len(data)} {'comparisons' if generative else 'distinct solutions'} to train on")  # fmt: skip
    if right in (0, 1):
        raise common.UserError(
            "the samples are all right or all wrong: there is nothing to tell apart"
        )
    if not examples:
        raise common.UserError(
            "no question has a solution to compare with, or right and wrong samples; raise --samples"
        )

    if generative:
        comparable(dev_samples)  # nothing to compare with must show now, not after an epoch

    # 3. train; as in sft.py, the order of the data depends on the seed and the epoch alone
    optimizer = common.adam_w(orm.model.parameters(), args.lr)
    steps_per_epoch = -(-len(examples) // args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    progress = {"step": 0, "tokens": 0, "best": -1.0, "losses": []}
    if run.state:
        progress = run.state["progress"]
        orm.model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None  # as large as the model and its optimizer

    first = progress["step"]
    for step in tqdm(
        range(first, n_steps), desc="training", initial=first, total=n_steps, disable=None
    ):
        epoch, index = divmod(step, steps_per_epoch)
        order = common.shuffled(len(examples), args.seed, epoch)
        batch = order[index * args.batch_size : (index + 1) * args.batch_size]
        lr = common.cosine_lr(step, n_steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        triples = [(examples[i], labels[i], weights[i]) for i in batch]
        loss, norm = train_step(orm, optimizer, triples, args.token_budget)
        progress["losses"].append(loss)
        progress["tokens"] += sum(len(examples[i][1]) for i in batch)
        progress["step"] = step + 1

        # 4. after every epoch, and the best by dev AUC becomes model/
        if (step + 1) % steps_per_epoch == 0:
            if generative:
                report, ranked = genrm_quality(dev_samples, orm, args.token_budget), {}
            else:
                report = quality(dev_samples, orm.scores(dev_samples, args.token_budget))
                last = report["best_of_n"][-1]
                names = {"orm": "rerank", "majority": "maj", "oracle": "pass"}
                ranked = {f"{names[key]}@{last['n']}": last[key] for key in names}
            run.log(
                step=step + 1, samples=0 if written else len(samples), tokens=progress["tokens"], epoch=epoch + 1,
                loss=float(np.mean(progress["losses"])), grad_norm=norm, lr=lr, train_size=len(data), informative=informative,
                sampled_no_answer=common.mean(s.answer is None for s in samples),
                sampled_truncated=common.mean(not s.finished for s in samples),
                **{key: value for key, value in report.items() if not isinstance(value, list)},
                **ranked,
            )  # fmt: skip
            progress["losses"] = []
            if (
                report["auc"] is None or report["auc"] > progress["best"]
            ):  # None: nothing says that it is not better
                progress["best"] = -1.0 if report["auc"] is None else report["auc"]
                common.write_json(run.out / "quality.json", report | {"epoch": epoch + 1})
                orm.save(run.out / "model")
        run.checkpoint(
            progress=progress, model=orm.model.state_dict(), optimizer=optimizer.state_dict()
        )
    run.finish()
    if progress["best"] < 0:
        common.warn(
            "the dev samples are all right or all wrong, so there is no AUC, and the last epoch was kept"
        )
    best = f"best AUC on dev {progress['best']:.3f}; " if progress["best"] >= 0 else ""
    print(f"{best}model in {run.out / 'model'}, details in {run.out / 'quality.json'}")


if __name__ == "__main__":
    common.run_main(main)
