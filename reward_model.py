r"""Train a reward model on the samples of a policy: an outcome reward model, or a generative one.

An outcome reward model (ORM) is the policy's network with a scalar head. After every token of a
solution s = s_1 ... s_T of question q it predicts P_t = P(final answer correct | q, s_<=t):

    minimise   - sum_(q, s, y)  w(q, s) / T  sum_t [ y log P_t + (1 - y) log(1 - P_t) ]

The label y is 1 if the final answer is correct and 0 if not. The last token s_T is the end-of-text
token, and P_T is the score. A batch is divided by the sum of its own weights w.

This is the ORM of "Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla
et al. 2024). It follows "Training Verifiers to Solve Math Word Problems" (Cobbe et al. 2021).

    0. Load the problems, the student policy and the weights that the reward model starts from.
    1. Sample K solutions per training question from the student, or read samples from files.
       Sample 16 per dev question from the same student.
    2. Label the samples by the answer check. Both classes of a question weigh the same (ours).
    3. Train all weights by binary cross-entropy on every solution token.
    4. After every epoch, measure the quality on dev. The epoch with the best AUC becomes model/.

--kind genrm trains a generative reward model (GenRM) instead. It follows "Exploring Data Scaling
Trends and Effects in RLHF" (Shen et al. 2025). It is a language model that reads the question, a
candidate and a reference, and names the better one. It is trained on P(candidate is better). Next
to the gold solution this is 0 for an incorrect sample and 0.5 for a correct one. For a correct
sample next to an incorrect one it is 1. The score is the mean over both orders of the two.

CPU, after `python sft.py`: 6 minutes on two cores, and 22 to 24 minutes on one core for genrm:
    python reward_model.py
    python reward_model.py --kind genrm
One GPU:
    python reward_model.py --model runs/gsm8k/sft/model --dataset gsm8k --samples 96 --epochs 2 \
        --lr 1e-5 --batch-size 128 --max-new-tokens 512 --out runs/gsm8k/orm
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import common
import runtime


def parse_args(argv: list[str]):
    defaults = dict(model="runs/sft/model", out="runs/reward_model", samples=16, temperature=0.7)
    defaults |= dict(lr=1e-3, epochs=5, batch_size=32, checkpoint_every=300)
    parser = runtime.common_parser(__doc__, **defaults, **runtime.TRAINING)
    add = parser.add_argument
    kinds = "orm: outcome reward model; genrm: generative reward model, with other defaults"
    changed = "--out runs/genrm --lr 5e-4 --epochs 3 --batch-size 8"
    add("--kind", choices=["orm", "genrm"], default="orm", help=f"{kinds} ({changed})")
    add("--base", help="weights that the reward model starts from (default: those of --model)")
    add("--pairs", type=runtime.WHOLE, default=4, help="genrm: most pairs of a kind per question")
    files = "samples of the training questions from another script, instead of new ones"
    add("--train-samples", nargs="+", default=[], metavar="FILE", help=files)
    add("--eval-samples", type=runtime.number(int, 2), default=16, help="samples per dev question")
    if parser.parse_args(argv).kind == "genrm":
        parser.set_defaults(out="runs/genrm", lr=5e-4, epochs=3, batch_size=8)
    args = parser.parse_args(argv)
    parser.only_with("--kind genrm", args.kind == "genrm", args, "pairs")
    if args.temperature == 0:
        parser.error("--temperature 0: all samples of a question are the same")
    return args


class RewardModel(common.Policy):
    """An outcome reward model (ORM): P(correct | question, solution so far), after every token.

    It is the network of a policy with a scalar head. transformers calls this token classification
    with one label, so `AutoModelForTokenClassification.from_pretrained` loads a saved folder.
    new: start from a language model with a head of zeros, so that P = 0.5 everywhere.
    """

    def __init__(self, name: str, device="auto", dtype="auto", flag="--orm", new: bool = False):
        self.new = new
        super().__init__(name, device, dtype, flag)

    def load(self, folder: str):
        config = runtime.load_config(folder)
        trained = self.new or runtime.is_reward_model(config)
        runtime.require(trained, "this is not a reward model; reward_model.py trains one")
        known = type(config) in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
        runtime.require(known, f"there is no token classifier for the family {config.model_type}")
        auto, new = transformers.AutoModelForTokenClassification, ("score.", "classifier.")
        model = runtime.load_weights(auto, folder, new if self.new else (), num_labels=1)
        layers = model.named_children()
        self.linear = next(layer for _, layer in layers if getattr(layer, "out_features", 0) == 1)
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

    def scores(self, samples: list[common.Sample], token_budget: int = 1024) -> list[np.ndarray]:
        """Return P after every solution token, one array per sample. Equal texts are run once."""
        keys = [(sample.problem.question, sample.text) for sample in samples]
        examples = {key: self.encode(s) for key, s in dict(zip(keys, samples, strict=True)).items()}
        found = probabilities(self, examples, token_budget)
        return [found[key] for key in keys]

    def grade(self, samples: list[common.Sample], token_budget: int = 1024) -> None:
        """Set the score of every sample: the probability after its last token."""
        for sample, found in zip(samples, self.scores(samples, token_budget), strict=True):
            sample.score = float(found[-1])


class GenerativeRewardModel(common.Policy):
    """A generative reward model (GenRM, Shen et al. 2025): it names the better of two solutions.

    The score of a candidate is the probability of the verdict for it, averaged over both orders.
    0.5 means "as good as the reference". A saved folder is an ordinary language model. new: start
    from the weights of any language model.
    """

    def __init__(self, name: str, device="auto", dtype="auto", flag="--genrm", new: bool = False):
        super().__init__(name, device, dtype, flag)
        trained = new or getattr(self.model.config, "compares_solutions", False)
        hint = "this is not a generative reward model; reward_model.py --kind genrm trains one"
        runtime.require(trained, f"{flag} {name}: {hint}")
        self.condition("none")
        self.model.config.compares_solutions = True
        self.verdict_ids = [self.encode_prompt(f"Better answer:\n{letter}")[-1] for letter in "AB"]

    def encode(self, problem: common.Problem, first: str, second: str) -> common.Example:
        """Encode the prompt up to the verdict, and the verdict A as its response.

        A solution ends where it repeats words of the prompt, so it cannot write its own verdict.
        """
        own_words = re.compile(r"^(?:Answer [AB]|Better answer):", re.M)
        a, b = (own_words.split(solution)[0].strip() for solution in (first, second))
        text = f"Question: {problem.question}\nAnswer A:\n{a}\nAnswer B:\n{b}\nBetter answer:\nA"
        ids = self.encode_prompt(text)
        return self.check_length((ids[:-1], ids[-1:]))

    def log_odds(self, examples: Sequence[common.Example]) -> torch.Tensor:
        """Return the log-odds of verdict A against verdict B: [comparisons]."""
        ids = common.right_padded(self, [prompt for prompt, _ in examples])
        rows, columns = common.response_positions(examples, self.device)
        with self.autocast():
            hidden = self.hidden_states(ids)[rows, columns - 1]  # [comparisons, width]
        logits = self.head(hidden.float())
        return logits[:, self.verdict_ids[0]] - logits[:, self.verdict_ids[1]]

    def verdicts(self, comparisons: Sequence[tuple], token_budget: int = 1024) -> np.ndarray:
        """Return P(candidate is better), with the candidate as A and as B: [comparisons, 2].

        comparisons: (problem, candidate, reference). Equal ones are run once.
        """
        pairs = [pair for p, c, r in comparisons for pair in ((p, c, r), (p, r, c))]
        examples = {pair: self.encode(*pair) for pair in dict.fromkeys(pairs)}
        found = probabilities(self, examples, token_budget)
        verdicts = np.array([found[pair] for pair in pairs], np.float64).reshape(-1, 2)
        # Of the second order this is P(the reference is better).
        verdicts[:, 1] = 1 - verdicts[:, 1]
        return verdicts

    def scores(self, samples: list[common.Sample], references: dict, token_budget: int = 1024):
        """Return the score of every sample, as a list. references: a solution by problem id."""
        comparisons = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
        # Rounded, so that a solution next to itself scores exactly 0.5.
        return self.verdicts(comparisons, token_budget).mean(1).round(6).tolist()

    def grade(self, samples: list[common.Sample], token_budget: int = 1024) -> None:
        """Set the score of every sample, next to the reference of its problem."""
        references = {sample.problem.id: sample.problem.reference for sample in samples}
        scores = self.scores(samples, references, token_budget)
        for sample, score in zip(samples, scores, strict=True):
            sample.score = score


@torch.no_grad()
def probabilities(model: RewardModel | GenerativeRewardModel, examples: dict, token_budget: int):
    """Return P after every response token, by key. Several processes share the examples."""
    keys, found = list(examples), []
    lengths = [len(prompt) + len(response) for prompt, response in examples.values()]
    for indices in common.micro_batches(lengths, token_budget):
        batch = [examples[keys[i]] for i in indices]
        values = common.by_example(model.log_odds(batch).sigmoid(), batch)
        found += zip(indices, values, strict=True)
    return {keys[i]: value for i, value in runtime.gather(found)}


def balanced_weights(labels: list[bool]) -> list[float]:
    """Return the weights of one question's samples. If there are both classes, each gets half.

    The sum is the number of samples: [True, False, False, False] -> [2, 2/3, 2/3, 2/3].
    """
    n, n_correct = len(labels), sum(labels)
    if n_correct in (0, n):
        return [1.0] * n
    return [n / (2 * (n_correct if label else n - n_correct)) for label in labels]


def training_data(samples: list[common.Sample]) -> list[tuple]:
    """Return ((sample,), label, weight) for the distinct solutions of every question.

    Equal solutions become one with the sum of their weights, because a policy repeats itself. The
    loss stays the same. Of two equal texts one may be truncated and incorrect.
    """
    merged: dict[tuple, list] = {}
    for group in common.by_problem(samples):
        weights = balanced_weights([sample.correct for sample in group])
        for sample, weight in zip(group, weights, strict=True):
            key = sample.problem.id, sample.solution, sample.correct
            merged.setdefault(key, [sample, 0.0])[1] += weight
    return [((sample,), float(sample.correct), weight) for sample, weight in merged.values()]


def comparisons(samples: list[common.Sample], n_pairs: int, seed: int) -> list[tuple]:
    """Return the data of a GenRM: ((problem, A, B), target for P(A is better), weight 1).

    A question gives at most `n_pairs` pairs of each kind. The kinds are incorrect and gold (target
    0), correct and gold (0.5), correct and incorrect (1). Gold is also compared with texts that no
    policy samples (0). Without them a GenRM rates an empty text nearly as high as a solution.
    Half of all pairs are swapped and have 1 minus the target.
    """
    rng = np.random.default_rng([seed, 2])
    data, previous_gold = [], ""
    for group in common.by_problem(samples):
        problem, gold = group[0].problem, group[0].problem.reference
        correct, incorrect = (shuffled_solutions(group, kind, rng) for kind in (True, False))
        pairs = []
        if gold:
            # The question, another question's solution, and the beginning of gold, which has 1 to 4
            # characters as often as 10 to 40.
            others = [text for text in (problem.question, previous_gold) if text]
            others = [text for text in others if common.extract_answer(text) != problem.answer]
            longest = max(1, gold.find(common.MARKER))
            others.append(gold[: int(longest ** rng.random() - 0.5)])
            pairs += [(text, gold, 0.0) for text in incorrect[:n_pairs]]
            pairs += [(text, gold, 0.5) for text in correct[:n_pairs]]
            pairs += [(text, gold, 0.0) for text in others]
            previous_gold = gold
        # Each pair occurs once. After `turn` pairs, shift the incorrect ones by one.
        turn = math.lcm(len(correct), len(incorrect))
        for i in range(min(n_pairs, len(correct) * len(incorrect))):
            shifted = (i + i // turn) % len(incorrect)
            pairs.append((correct[i % len(correct)], incorrect[shifted], 1.0))
        for a, b, target in pairs:
            swapped = rng.random() < 0.5
            ordered = (problem, b, a) if swapped else (problem, a, b)
            data.append((ordered, 1 - target if swapped else target, 1.0))
    return data


def shuffled_solutions(group: list[common.Sample], correct: bool, rng) -> list[str]:
    texts = list(dict.fromkeys(s.solution for s in group if s.correct == correct))
    return [texts[i] for i in rng.permutation(len(texts))]


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return P(a correct sample scores above an incorrect one), or None without both classes."""
    _, index, count = np.unique(scores, return_inverse=True, return_counts=True)
    # Ranks begin at 1. Equal scores have the mean of their ranks (Mann and Whitney 1947).
    ranks = (count.cumsum() - (count - 1) / 2)[index]
    n_correct = int(np.sum(labels))
    pairs = n_correct * (len(labels) - n_correct)
    return float((ranks[labels].sum() - n_correct * (n_correct + 1) / 2) / pairs) if pairs else None


def auc_within(samples: list[common.Sample], scores: np.ndarray, labels: np.ndarray):
    """Return the mean AUC within a question, or None. Reranking needs this one."""
    ids = np.array([sample.problem.id for sample in samples])
    values = [auc(scores[ids == i], labels[ids == i]) for i in dict.fromkeys(ids.tolist())]
    return common.mean(value for value in values if value is not None)


def calibration(scores: np.ndarray, labels: np.ndarray) -> tuple[list[dict], float]:
    """Return a table by tenths of the score, and the calibration error (Naeini et al. 2015)."""
    tenths, table, gaps = np.minimum((scores * 10).astype(int), 9), [], 0.0
    for tenth in np.unique(tenths).tolist():
        inside = tenths == tenth
        n, score, correct = int(inside.sum()), scores[inside].mean(), labels[inside].mean()
        table.append({"from": tenth / 10, "n": n, "score": float(score), "correct": float(correct)})
        gaps += n * abs(score - correct)
    return table, float(gaps / len(scores))


def best_of_n(samples: list[common.Sample]) -> list[dict]:
    """Return, for n = 1, 2, 4 ..., how often a choice among n samples is correct.

    The choices are the best score, the most frequent answer, and a correct sample if there is one.
    """
    groups, table = common.by_problem(samples), []
    size = len(groups[0])
    for n in common.powers_of_two(size):
        blocks = [group[i : i + n] for group in groups for i in range(0, size - n + 1, n)]
        best = [max(block, key=lambda sample: sample.score).correct for block in blocks]
        votes = [common.vote([s.answer for s in b]) == b[0].problem.answer for b in blocks]
        solved = [any(sample.correct for sample in block) for block in blocks]
        row = {"n": n, "orm": common.mean(best), "majority": common.mean(votes)}
        table.append(row | {"oracle": common.mean(solved)})
    return table


def quality(samples: list[common.Sample], orm: RewardModel, token_budget: int) -> dict:
    """Return how good an ORM is, and set the scores. docs/metrics.md explains the keys."""
    by_token = orm.scores(samples, token_budget)
    for sample, p in zip(samples, by_token, strict=True):
        sample.score = float(p[-1])
    labels = np.array([sample.correct for sample in samples])
    scores = np.array([sample.score for sample in samples])
    table, error = calibration(scores, labels)
    choices, by_position = best_of_n(samples), []
    n, rerank, vote, solved = choices[-1].values()
    # Position 0 is after the first token, 1 after the last one.
    for position in (0.0, 0.25, 0.5, 0.75, 1.0):
        early = np.array([p[max(0, math.ceil(position * len(p)) - 1)] for p in by_token])
        accuracy = common.mean((early >= 0.5) == labels)
        by_position.append({"position": position, "accuracy": accuracy, "auc": auc(early, labels)})
    return {
        "base_rate": float(labels.mean()),
        "accuracy": common.mean((scores >= 0.5) == labels),
        "auc": auc(scores, labels),
        "auc_within": auc_within(samples, scores, labels),
        "calibration_error": error,
        "by_position": by_position,
        "reliability": table,
        "best_of_n": choices,
    } | {f"rerank@{n}": rerank, f"maj@{n}": vote, f"pass@{n}": solved}


def with_references(samples: list[common.Sample]) -> list[common.Sample]:
    """Add references. Without a gold solution the first correct sample is taken, and not scored."""
    kept = []
    for group in common.by_problem(samples):
        gold = group[0].problem.reference
        chosen = gold or next((sample.solution for sample in group if sample.correct), None)
        problem = dataclasses.replace(group[0].problem, reference=chosen)
        group = [sample for sample in group if chosen and (gold or sample.solution != chosen)]
        kept += [dataclasses.replace(sample, problem=problem) for sample in group]
    runtime.require(kept, "no dev question has a gold solution or a correct sample to compare with")
    return kept


def genrm_quality(samples: list[common.Sample], genrm: GenerativeRewardModel, token_budget: int):
    """Return how good a GenRM is. docs/metrics.md explains the keys."""
    candidates = [(s.problem, s.solution, s.problem.reference) for s in samples]
    verdicts = genrm.verdicts(candidates, token_budget)  # [samples, 2]
    scores, bias = verdicts.mean(1).round(6), verdicts[:, 0] - verdicts[:, 1]
    labels = np.array([sample.correct for sample in samples])
    problems = {sample.problem.id: sample.problem for sample in samples}.values()
    texts = {"empty": "", "colon": ":", "thinking": "Thought process:", "question": "{question}"}
    nonsense = []
    for name, text in texts.items():
        candidates = [(p, text.format(question=p.question), p.reference) for p in problems]
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


def train_step(model: common.Policy, optimizer, batch: list, token_budget: int):
    """Make one optimizer step on the binary cross-entropy of a batch.

    batch: (example, label, weight). The loss is the weighted mean over solutions of the mean over
    tokens. Returns it in nats per token, and the norm of the gradient before clipping.
    """
    total_weight, loss = sum(weight for _, _, weight in batch), 0.0
    for indices in common.micro_batches([len(p) + len(r) for (p, r), _, _ in batch], token_budget):
        examples, labels, weights = zip(*(batch[i] for i in indices), strict=True)
        log_odds = model.log_odds(examples)  # [response tokens]
        lengths = torch.tensor([len(response) for _, response in examples])
        y = torch.tensor(labels).repeat_interleave(lengths)
        w = (torch.tensor(weights) / lengths).repeat_interleave(lengths) / total_weight
        y, w = y.to(log_odds), w.to(log_odds)
        micro_loss = F.binary_cross_entropy_with_logits(log_odds, y, w, reduction="sum")
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = optimizer.param_groups[0]["params"]
    (loss,) = runtime.sum_gradients(parameters, loss)
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
    generative = args.kind == "genrm"
    kind, measure = (GenerativeRewardModel, genrm_quality) if generative else (RewardModel, quality)
    given = [s for file in args.train_samples for s in common.read_samples(Path(file), train)]
    args.base = args.base or args.model
    run = runtime.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    reward_model = kind(args.base, args.device, args.dtype, flag="--base", new=True)
    reward_model.prepare_training(args)
    student = common.Policy(args.model, args.device, args.dtype)
    common.encode_prompts(student, dev if given else train + dev)
    run.begin()

    # 1. Sample from the student. After a restart, read the samples that are on disk.
    how, folder = common.sampling(args) | dict(run=run), run.out / "samples"
    how |= dict(samples=args.samples, seed=[args.seed, 0], progress="train questions")
    samples = given or common.sample_to_file(student, train, folder / "train.jsonl", **how)
    how |= dict(samples=args.eval_samples, seed=[args.seed, 1], progress="dev questions")
    dev_samples = common.sample_to_file(student, dev, folder / "dev.jsonl", **how)
    dev_samples = with_references(dev_samples) if generative else dev_samples
    del student

    # 2. Label the samples and weigh them.
    found = comparisons(samples, args.pairs, args.seed) if generative else training_data(samples)
    data = [(reward_model.encode(*inputs), label, weight) for inputs, label, weight in found]
    correct = common.mean(sample.correct for sample in samples)
    print(f"{len(samples)} samples, {correct:.1%} correct; {len(data)} examples to train on")
    runtime.require(0 < correct < 1, "all samples are correct, or all incorrect: nothing to learn")
    runtime.require(data, "no question has a pair of solutions to compare; raise --samples")
    classes = [{sample.correct for sample in group} for group in common.by_problem(samples)]
    about_data = {
        "train_size": len(data),
        "informative": common.mean(len(both) == 2 for both in classes),
        "sampled_no_answer": common.mean(sample.answer is None for sample in samples),
        "sampled_truncated": common.mean(not sample.finished for sample in samples),
    }

    optimizer = common.adam_w(reward_model.trained.parameters(), args.lr)
    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    progress = {"epoch": 0, "step_in_epoch": 0, "step": 0, "tokens": 0, "losses": [], "best": -1.0}
    progress["samples"] = 0 if given else len(samples)
    if run.state:
        progress |= run.state["progress"]
        reward_model.trained.load_state_dict(run.state["trained"])
        optimizer.load_state_dict(run.state["optimizer"])
        # It is as large as the model and its optimizer.
        run.state = None

    for epoch in range(progress["epoch"], args.epochs):
        # 3. Train. The order depends on the seed and the epoch alone, so that a run can resume.
        order = common.shuffled(len(data), args.seed, epoch)
        steps = range(progress["step_in_epoch"], steps_per_epoch)
        for step in tqdm(steps, desc=f"epoch {epoch + 1}", disable=None):
            indices = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = [data[i] for i in indices]
            lr = common.cosine_lr(epoch * steps_per_epoch + step, n_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            loss, grad_norm = train_step(reward_model, optimizer, batch, args.token_budget)
            progress["losses"].append(loss)
            progress |= {"grad_norm": grad_norm, "lr": lr, "step_in_epoch": step + 1}
            progress["tokens"] += sum(len(response) for (_, response), _, _ in batch)
            progress["step"] += 1
            state = {
                "trained": reward_model.trained.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            run.checkpoint(**state, progress=progress)
        progress |= {"epoch": epoch + 1, "step_in_epoch": 0}

        # 4. Measure the quality on dev. The epoch with the best AUC becomes model/.
        report = measure(dev_samples, reward_model, args.token_budget)
        metrics = {key: value for key, value in report.items() if not isinstance(value, list)}
        counts = {key: progress[key] for key in ("step", "samples", "tokens")}
        loss = common.mean(progress["losses"][-steps_per_epoch:])
        training = {"loss": loss, "grad_norm": progress["grad_norm"], "lr": progress["lr"]}
        run.log(**counts, epoch=epoch + 1, **training, **about_data, **metrics)
        # Without an AUC no epoch is known to be the best. Then keep the last one.
        if report["auc"] is None or report["auc"] > progress["best"]:
            progress["best"] = report["auc"]
            runtime.write_json(run.out / "quality.json", report | {"epoch": epoch + 1})
            reward_model.save(run.out / "model")
    run.finish()
    if progress["best"] is None:
        runtime.warn("all dev samples are of one class, so there is no AUC: kept the last epoch")
    print(f"quality on dev in {run.out / 'quality.json'}; model in {run.out / 'model'}")


if __name__ == "__main__":
    runtime.run_main(main)
