r"""Train a reward model on the samples of a policy: an outcome reward model, or a generative one.

An outcome reward model (ORM) predicts after every token how likely the final answer is to be
correct. It is the policy's network with a scalar head. Objective, for question q, solution
s = s_1 ... s_T and P_t = P(final answer correct | q, s_<=t):

    minimise   - sum_(q, s, y)  w(q, s) / T  sum_t [ y log P_t + (1 - y) log(1 - P_t) ]

The label y is 1 if the final answer is correct and 0 if not. The last token s_T is the end-of-text
token. A batch is divided by the sum of its own weights w. So the balance of the classes is exact
for large batches, and nearly exact for the default of 32.

This is the ORM of "Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla
et al. 2024). It follows "Training Verifiers to Solve Math Word Problems" (Cobbe et al. 2021).

    0. Load the problems, the student policy and the weights that the reward model starts from.
    1. Sample K solutions per training question from the student, or read samples from files.
       Sample 16 per dev question from the same student.
    2. Label the samples by the answer check. Within a question both classes weigh the same.
    3. Train all weights by binary cross-entropy on every solution token.
    4. After every epoch, measure the quality on the dev questions, which are never trained on. The
       epoch with the best AUC becomes model/.

The score of a solution is P_T. `evaluate.py --orm` picks the best of n by it, `ppo.py --reward orm`
maximises it, and `expert_iteration.py --orm` filters by it.

How this departs from the paper: the paper does not say how the classes are balanced. Here a
question with correct and incorrect samples gives half of its weight to each class. So the model
has to tell solutions apart and not only questions. A question with one class keeps its weight.

--kind genrm trains a generative reward model (GenRM) instead. It follows "Exploring Data Scaling
Trends and Effects in RLHF" (Shen et al. 2025). It is a language model that reads the question, a
candidate and a reference, and names the better one. P(candidate is better) is trained to be 0 for
an incorrect sample next to the gold solution, 0.5 for a correct sample next to it, and 1 for a
correct sample next to an incorrect one. Pairs are shown in random order. The score is the mean over
both orders, and `ppo.py --reward genrm` maximises it. Three kinds of candidates that no policy
samples are added as incorrect: the question, another question's solution, and an unfinished one.
Without them an empty text scored nearly as high as a correct solution.

CPU, after `python sft.py`: 6 minutes on two cores, and 22 to 24 minutes on one core for genrm:
    python reward_model.py
    python reward_model.py --kind genrm
One GPU:
    python reward_model.py --model runs/gsm8k/sft/model --dataset gsm8k --samples 96 --epochs 2 \
        --lr 1e-5 --batch-size 128 --max-new-tokens 512 --out runs/gsm8k/orm
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import common


def parse_args(argv: list[str]):
    defaults = dict(model="runs/sft/model", out="runs/reward_model", samples=16, temperature=0.7)
    defaults |= dict(lr=1e-3, epochs=5, batch_size=32, limit_train=None, checkpoint_every=300)
    parser = common.common_parser(__doc__, **defaults)
    add = parser.add_argument
    kinds = "orm: outcome reward model; genrm: generative reward model, which compares solutions"
    changed = "defaults: --out runs/genrm --lr 5e-4 --epochs 3 --batch-size 8"
    add("--kind", choices=["orm", "genrm"], default="orm", help=f"{kinds} ({changed})")
    add("--base", help="weights that the reward model starts from (default: those of --model)")
    limit = "genrm: most comparisons per question of each of the three kinds"
    add("--pairs", type=common.number(int, 1), default=4, help=limit)
    files = "samples of the training questions from another script, instead of new ones"
    add("--train-samples", nargs="+", default=[], metavar="FILE", help=files)
    add("--eval-samples", type=common.number(int, 2), default=16, help="samples per dev question")
    if parser.parse_args(argv).kind == "genrm":
        parser.set_defaults(out="runs/genrm", lr=5e-4, epochs=3, batch_size=8)
    args = parser.parse_args(argv)
    parser.only_with("--kind genrm", args.kind == "genrm", args, "pairs")
    if args.temperature == 0:
        parser.error("--temperature 0: all samples of a question are the same")
    return args


# ---- The models ----------------------------------------------------------------------------------


class RewardModel(common.Policy):
    """An outcome reward model (ORM): P(correct | question, solution so far), after every token.

    It is the network of a policy with a scalar head. transformers calls this token classification
    with one label, so `AutoModelForTokenClassification.from_pretrained` loads a saved folder.
    Families without this class are refused. new: start from a language model with a head of zeros,
    so that P = 0.5 everywhere.
    """

    def __init__(self, name: str, device="auto", dtype="auto", flag="--orm", new: bool = False):
        self.new = new
        super().__init__(name, device, dtype, flag)

    def load(self, folder: str):
        config = transformers.AutoConfig.from_pretrained(folder)
        trained = self.new or common.is_reward_model(config)
        common.require(trained, "this is not a reward model; reward_model.py trains one")
        known = type(config) in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
        reason = f"transformers has no token classifier for the family {config.model_type}"
        common.require(known, f"{reason}, so it cannot be a reward model")
        how = dict(dtype=torch.float32, num_labels=1, use_safetensors=True)
        verbosity = transformers.logging.get_verbosity()
        # Print no table of warnings about the new head.
        transformers.logging.set_verbosity_error()
        try:
            auto = transformers.AutoModelForTokenClassification
            model, found = auto.from_pretrained(folder, output_loading_info=True, **how)
        finally:
            transformers.logging.set_verbosity(verbosity)
        heads = [m for m in model.named_children() if getattr(m[1], "out_features", 0) == 1]
        name, self.linear = heads[0]
        missing = sorted(found["missing_keys"])
        if self.new:
            missing = [key for key in missing if not key.startswith(f"{name}.")]
            torch.nn.init.zeros_(self.linear.weight)
            torch.nn.init.zeros_(self.linear.bias)
        first = missing[0] if missing else ""
        common.require(not missing, f"it has no weights for {first} ({len(missing)} are missing)")
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
    def scores(self, samples: list[common.Sample], token_budget: int = 1024) -> list[np.ndarray]:
        """Return the probability after every solution token, one array per sample.

        The last one is the score of the sample. Equal texts are run once.
        """
        keys = [(sample.problem.question, sample.text) for sample in samples]
        examples = {key: self.encode(s) for key, s in dict(zip(keys, samples, strict=True)).items()}
        found = score_all(self.log_odds, examples, token_budget, by_token=True)
        return [found[key] for key in keys]

    def grade(self, samples: list[common.Sample], token_budget: int = 1024) -> None:
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
    """A generative reward model (GenRM, Shen et al. 2025): it names the better of two solutions.

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
        a, b = (self.encode_prompt(f"Better answer:\n{verdict}") for verdict in self.VERDICTS)
        distinct, reason = a[:-1] == b[:-1] and a[-1] != b[-1], "has no tokens for the verdicts"
        common.require(distinct, f"{flag} {name}: its tokenizer {reason} A and B")
        self.verdict_ids = [a[-1], b[-1]]

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

    def scores(self, samples: list[common.Sample], references: dict, token_budget: int = 1024):
        """Return the score of every sample, as a list. references: a solution by problem id."""
        comparisons = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
        # Rounded, so that a solution next to itself scores exactly 0.5.
        return self.verdicts(comparisons, token_budget).mean(1).round(6).tolist()

    def grade(self, samples: list[common.Sample], token_budget: int = 1024) -> None:
        """Set the score of every sample, next to the reference of its problem.

        Raises UserError if a problem has no reference.
        """
        references = {sample.problem.id: sample.problem.reference for sample in samples}
        n, missing = len(references), sum(not text for text in references.values())
        reason = f"{missing} of {n} questions have no reference solution to compare samples with"
        common.require(not missing, reason)
        scores = self.scores(samples, references, token_budget)
        for sample, score in zip(samples, scores, strict=True):
            sample.score = score


# ---- The data ------------------------------------------------------------------------------------


def balanced_weights(labels: list[bool]) -> list[float]:
    """Return the weights of one question's samples. If there are both classes, each gets half.

    The sum is the number of samples: [True, False, False, False] -> [2, 2/3, 2/3, 2/3].
    """
    n, n_correct = len(labels), sum(labels)
    if n_correct in (0, n):
        return [1.0] * n
    return [n / (2 * (n_correct if label else n - n_correct)) for label in labels]


def training_data(samples: list[common.Sample]) -> tuple[list[common.Sample], list[float]]:
    """Return the distinct solutions of every question, and their weights.

    Equal solutions become one with the sum of their weights, because a policy repeats itself. The
    loss stays the same. Of two equal texts one may be truncated and incorrect.
    """
    merged: dict[tuple, list] = {}
    for group in common.by_problem(samples):
        weights = balanced_weights([sample.correct for sample in group])
        for sample, weight in zip(group, weights, strict=True):
            key = sample.problem.id, sample.solution, sample.correct
            merged.setdefault(key, [sample, 0.0])[1] += weight
    return [sample for sample, _ in merged.values()], [weight for _, weight in merged.values()]


def comparisons(samples: list[common.Sample], n_pairs: int, seed: int) -> tuple[list, list[float]]:
    """Return the data of a GenRM: (problem, A, B), and the target for P(A is better).

    A question gives at most `n_pairs` pairs of each kind: incorrect and gold (target 0), correct
    and gold (0.5), correct and incorrect (1). Its artificial candidates are paired with gold as
    well (0). Half of all pairs are swapped and have 1 minus the target.
    """
    rng = np.random.default_rng([seed, 2])
    data, targets, previous_gold = [], [], ""
    for group in common.by_problem(samples):
        problem, gold = group[0].problem, group[0].problem.reference
        correct, incorrect = (shuffled_solutions(group, kind, rng) for kind in (True, False))
        pairs = []
        if gold:
            artificial = artificial_candidates(problem, previous_gold, rng)
            pairs += [(text, gold, 0.0) for text in incorrect[:n_pairs]]
            pairs += [(text, gold, 0.5) for text in correct[:n_pairs]]
            pairs += [(text, gold, 0.0) for text in artificial]
            previous_gold = gold
        # Each pair occurs once. After `turn` pairs, shift the incorrect ones by one.
        turn = math.lcm(len(correct), len(incorrect))
        for i in range(min(n_pairs, len(correct) * len(incorrect))):
            shifted = (i + i // turn) % len(incorrect)
            pairs.append((correct[i % len(correct)], incorrect[shifted], 1.0))
        for a, b, target in pairs:
            swapped = rng.random() < 0.5
            data.append((problem, b, a) if swapped else (problem, a, b))
            targets.append(1 - target if swapped else target)
    return data, targets


def shuffled_solutions(group: list[common.Sample], correct: bool, rng) -> list[str]:
    texts = list(dict.fromkeys(s.solution for s in group if s.correct == correct))
    return [texts[i] for i in rng.permutation(len(texts))]


def artificial_candidates(problem: common.Problem, previous_gold: str, rng) -> list[str]:
    """Return incorrect texts that a policy finds only when it is optimised against a GenRM.

    They are the question, the gold solution of another question, and the beginning of this one's,
    which has 1 to 4 characters as often as 10 to 40, or none.
    """
    texts = [text for text in (problem.question, previous_gold) if text]
    texts = [text for text in texts if common.extract_answer(text) != problem.answer]
    longest = max(1, problem.reference.find(common.MARKER))
    return [*texts, problem.reference[: int(longest ** rng.random() - 0.5)]]


# ---- The quality on questions that were not trained on -------------------------------------------


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return P(a correct sample scores above an incorrect one), where ties count half.

    The area under the ROC curve (Mann and Whitney 1947), or None if there is only one class.
    """
    _, index, count = np.unique(scores, return_inverse=True, return_counts=True)
    # Ranks begin at 1. Equal scores have the mean of their ranks.
    ranks = (count.cumsum() - (count - 1) / 2)[index]
    n_correct = int(np.sum(labels))
    pairs = n_correct * (len(labels) - n_correct)
    return float((ranks[labels].sum() - n_correct * (n_correct + 1) / 2) / pairs) if pairs else None


def auc_within(samples: list[common.Sample], scores: np.ndarray, labels: np.ndarray):
    """Return the mean AUC within a question, or None. Reranking needs this one."""
    ids = np.array([sample.problem.id for sample in samples])
    groups = [ids == i for i in dict.fromkeys(ids.tolist())]
    values = [auc(scores[group], labels[group]) for group in groups]
    return common.mean(value for value in values if value is not None)


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict]:
    """Return size, mean score and fraction correct of every bin of scores that is not empty."""
    indices, table = np.minimum((scores * bins).astype(int), bins - 1), []
    for b in np.unique(indices).tolist():
        inside = indices == b
        score, correct = float(scores[inside].mean()), float(labels[inside].mean())
        row = {"from": b / bins, "n": int(inside.sum()), "score": score, "correct": correct}
        table.append(row)
    return table


def calibration_error(table: list[dict]) -> float:
    """Return |score - fraction correct| of a bin, averaged over samples (Naeini et al. 2015)."""
    gaps = sum(row["n"] * abs(row["score"] - row["correct"]) for row in table)
    return gaps / sum(row["n"] for row in table)


def best_of_n(samples: list[common.Sample], scores: list[float]) -> list[dict]:
    """Return, for n = 1, 2, 4 ..., how often the choice among n samples is correct.

    orm: choose the best score. majority: choose the most frequent answer. oracle: choose a correct
    one. Each is a mean over the disjoint blocks of n samples. All questions have equally many.
    """
    size, table = len(common.by_problem(samples)[0]), []
    for n in common.powers_of_two(size):
        solved = {"orm": [], "majority": [], "oracle": []}
        for start in range(0, len(samples), size):
            for first in range(start, start + size - n + 1, n):
                block = samples[first : first + n]
                best = block[np.argmax(scores[first : first + n])]
                vote = common.vote([sample.answer for sample in block])
                solved["orm"].append(best.correct)
                solved["majority"].append(vote == best.problem.answer)
                solved["oracle"].append(any(sample.correct for sample in block))
        table.append({"n": n} | {key: common.mean(values) for key, values in solved.items()})
    return table


def quality(samples: list[common.Sample], probabilities: list[np.ndarray]) -> dict:
    """Return how good an ORM is. README.md explains the keys.

    probabilities: P after every token, one array per sample.
    """
    labels = np.array([sample.correct for sample in samples])
    scores = np.array([p[-1] for p in probabilities], np.float64)
    table, by_position = reliability(scores, labels), []
    # Position 0 is after the first token, 1 after the last one.
    for position in (0.0, 0.25, 0.5, 0.75, 1.0):
        early = np.array([p[max(0, math.ceil(position * len(p)) - 1)] for p in probabilities])
        accuracy = common.mean((early >= 0.5) == labels)
        by_position.append({"position": position, "accuracy": accuracy, "auc": auc(early, labels)})
    return {
        "base_rate": float(labels.mean()),
        "accuracy": common.mean((scores >= 0.5) == labels),
        "auc": auc(scores, labels),
        "auc_within": auc_within(samples, scores, labels),
        "calibration_error": calibration_error(table),
        "by_position": by_position,
        "reliability": table,
        "best_of_n": best_of_n(samples, scores.tolist()),
    }


def with_references(samples: list[common.Sample]) -> tuple[list[common.Sample], dict[str, str]]:
    """Return the samples to measure a GenRM on, and a reference by problem id.

    The reference is the gold solution, or else the first correct sample. That sample is not scored
    next to itself. A question without one is left out. Raises UserError if no sample is left.
    """
    kept, references = [], {}
    for group in common.by_problem(samples):
        problem = group[0].problem
        correct = [sample.solution for sample in group if sample.correct]
        if problem.reference or correct:
            reference = references[problem.id] = problem.reference or correct[0]
            kept += [s for s in group if problem.reference or s.solution != reference]
    common.require(kept, "no dev question has a gold solution or a correct sample to compare with")
    return kept, references


NONSENSE = {"empty": "", "colon": ":", "thinking": "Thought process:", "question": "{question}"}


def genrm_quality(samples: list[common.Sample], genrm: GenerativeRewardModel, token_budget: int):
    """Return how good a GenRM is, as a dictionary. README.md explains the keys."""
    samples, references = with_references(samples)
    candidates = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
    verdicts = genrm.verdicts(candidates, token_budget)  # [samples, 2]
    scores, bias = verdicts.mean(1).round(6), verdicts[:, 0] - verdicts[:, 1]
    labels = np.array([sample.correct for sample in samples])
    nonsense, problems = [], {s.problem.id: s.problem for s in samples}.values()
    for name, text in NONSENSE.items():
        candidates = [(p, text.format(question=p.question), references[p.id]) for p in problems]
        found = genrm.verdicts(candidates, token_budget).mean(1)
        row = {"candidate": name, "score": common.mean(found), "highest": float(found.max())}
        nonsense.append(row)
    return {
        "base_rate": float(labels.mean()),
        "auc": auc(scores, labels),
        "auc_within": auc_within(samples, scores, labels),
        "score_if_correct": common.mean(scores[labels]),
        "score_if_incorrect": common.mean(scores[~labels]),
        "false_positive_rate": common.mean(scores[~labels] >= 0.5),
        "beats_gold_rate": common.mean(scores > 0.5),
        "order_bias": common.mean(bias),
        "order_gap": common.mean(np.abs(bias)),
        "nonsense_worst": max(row["score"] for row in nonsense),
        "nonsense": nonsense,
    }


# ---- The training --------------------------------------------------------------------------------


def train_step(
    reward_model: RewardModel | GenerativeRewardModel, optimizer, batch: list, token_budget: int
) -> tuple[float, float]:
    """Make one optimizer step on the binary cross-entropy of a batch.

    batch: (example, label, weight). The loss is the weighted mean over the solutions of the mean
    over their tokens. Returns it in nats per token, and the norm of the gradient before clipping.
    """
    total_weight, loss = sum(weight for _, _, weight in batch), 0.0
    for indices in common.micro_batches([len(p) + len(r) for (p, r), _, _ in batch], token_budget):
        examples, labels, weights = zip(*(batch[i] for i in indices), strict=True)
        log_odds = reward_model.log_odds(examples)  # [response tokens]
        lengths = torch.tensor([len(response) for _, response in examples])
        y = torch.tensor(labels).repeat_interleave(lengths)
        w = (torch.tensor(weights) / lengths).repeat_interleave(lengths) / total_weight
        y, w = y.to(log_odds), w.to(log_odds)
        micro_loss = F.binary_cross_entropy_with_logits(log_odds, y, w, reduction="sum")
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = list(reward_model.model.parameters())
    (loss,) = common.sum_gradients(parameters, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    common.require_finite(loss, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # 0. Load the problems, the student and the weights that the reward model starts from.
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    given = [s for file in args.train_samples for s in common.read_samples(Path(file), train)]
    args.base = args.base or args.model
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    generative = args.kind == "genrm"
    kind = GenerativeRewardModel if generative else RewardModel
    reward_model = kind(args.base, args.device, args.dtype, flag="--base", new=True)
    # Fail now rather than after the sampling. The student is deleted before the training.
    common.check_memory(reward_model.model)
    student = common.Policy(args.model, args.device, args.dtype)
    common.encode_prompts(student, dev if given else train + dev)
    run.begin()

    # 1. Sample from the student. After a restart, read the samples that are on disk.
    how = dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    how |= dict(batch_size=args.gen_batch_size, run=run)
    how_train = dict(samples=args.samples, seed=[args.seed, 0], progress="train questions")
    how_dev = dict(samples=args.eval_samples, seed=[args.seed, 1], progress="dev questions")
    train_file, dev_file = run.out / "samples" / "train.jsonl", run.out / "samples" / "dev.jsonl"
    samples = given or common.sample_to_file(student, train, train_file, **how_train, **how)
    dev_samples = common.sample_to_file(student, dev, dev_file, **how_dev, **how)
    del student

    # 2. Label the samples and weigh them.
    if generative:
        pairs, labels = comparisons(samples, args.pairs, args.seed)
        examples, weights = [reward_model.encode(*pair) for pair in pairs], [1.0] * len(pairs)
    else:
        solutions, weights = training_data(samples)
        examples = [reward_model.encode(sample) for sample in solutions]
        labels = [float(sample.correct) for sample in solutions]
    data = list(zip(examples, labels, weights, strict=True))
    groups = common.by_problem(samples)
    informative = common.mean(len({sample.correct for sample in group}) == 2 for group in groups)
    about_data = {"train_size": len(data), "informative": informative}
    about_data["sampled_no_answer"] = common.mean(sample.answer is None for sample in samples)
    about_data["sampled_truncated"] = common.mean(not sample.finished for sample in samples)
    correct = common.mean(sample.correct for sample in samples)
    print(f"{len(samples)} samples, {correct:.1%} correct; {len(data)} examples to train on")
    common.require(0 < correct < 1, "all samples are correct, or all incorrect: nothing to learn")
    common.require(data, "no question has a pair of solutions to compare; raise --samples")
    if generative:
        # Fail now rather than after an epoch if no dev sample has a reference.
        with_references(dev_samples)

    # 3. Train. The order of the data depends on the seed and the epoch alone, as in sft.py.
    optimizer = common.adam_w(reward_model.model.parameters(), args.lr)
    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    progress = {"step": 0, "tokens": 0, "best": -1.0, "losses": []}
    if run.state:
        progress = run.state["progress"]
        reward_model.model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        # Free it, because it is as large as the model and its optimizer.
        run.state = None
    bar = tqdm(desc="training", initial=progress["step"], total=n_steps, disable=None)
    for epoch in range(progress["step"] // steps_per_epoch, args.epochs):
        order = common.shuffled(len(data), args.seed, epoch)
        # After a restart, skip the steps of this epoch that were made.
        skipped = progress["step"] - epoch * steps_per_epoch
        for first in range(skipped * args.batch_size, len(data), args.batch_size):
            # A checkpoint holds the state before a step.
            state = dict(model=reward_model.model.state_dict(), optimizer=optimizer.state_dict())
            run.checkpoint(progress=progress, **state)
            batch = [data[i] for i in order[first : first + args.batch_size]]
            lr = common.cosine_lr(progress["step"], n_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            loss, grad_norm = train_step(reward_model, optimizer, batch, args.token_budget)
            progress["losses"].append(loss)
            progress["tokens"] += sum(len(response) for (_, response), _, _ in batch)
            progress["step"] += 1
            bar.update()

        # 4. Measure the quality on dev. The epoch with the best AUC becomes model/.
        if generative:
            report = genrm_quality(dev_samples, reward_model, args.token_budget)
        else:
            report = quality(dev_samples, reward_model.scores(dev_samples, args.token_budget))
        metrics = {key: value for key, value in report.items() if not isinstance(value, list)}
        for row in report.get("best_of_n", [])[-1:]:
            n = row["n"]
            metrics |= {f"rerank@{n}": row["orm"], f"maj@{n}": row["majority"]}
            metrics |= {f"pass@{n}": row["oracle"]}
        counts = dict(step=progress["step"], samples=0 if given else len(samples))
        counts |= dict(tokens=progress["tokens"], epoch=epoch + 1)
        loss = float(np.mean(progress["losses"]))
        run.log(**counts, loss=loss, grad_norm=grad_norm, lr=lr, **about_data, **metrics)
        progress["losses"] = []
        # Without an AUC no epoch is known to be the best. Then keep the last one.
        if report["auc"] is None or report["auc"] > progress["best"]:
            progress["best"] = report["auc"]
            common.write_json(run.out / "quality.json", report | {"epoch": epoch + 1})
            reward_model.save(run.out / "model")
    bar.close()
    run.finish()
    if progress["best"] is None:
        common.warn("all dev samples are of one class, so there is no AUC: kept the last epoch")
    else:
        print(f"best AUC on dev {progress['best']:.3f}")
    print(f"model in {run.out / 'model'}, details in {run.out / 'quality.json'}")


if __name__ == "__main__":
    common.run_main(main)
