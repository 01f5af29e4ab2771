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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

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
    add("--base", help="weights that the reward model starts from (default: those of --model, the student)")
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
        parser.error("--temperature 0: all samples of a question are the same, and right or wrong together")
    return args


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


def comparisons(samples: list[common.Sample], n_pairs: int, seed: int) -> tuple[list[tuple], list[float]]:
    """What a generative reward model learns from: (problem, A, B) and P(A is better). At most `n_pairs` of a kind and
    question: wrong and gold 0, right and gold 0.5, right and wrong 1; or the other way round with 1 less that. One of each
    kind that no policy samples, but one that is optimised against the model finds, all 0: the question instead of a
    solution, the gold solution of another question, and the beginning of this one's, of any length and often a short one."""
    asked, targets, rng, previous = [], [], np.random.default_rng([seed, 2]), ""
    for group in common.by_problem(samples):
        problem, reference = group[0].problem, group[0].problem.reference
        right, wrong = (list(dict.fromkeys(s.solution for s in group if s.correct == kind)) for kind in (True, False))
        right, wrong = ([texts[i] for i in rng.permutation(len(texts))] for texts in (right, wrong))
        pairs = [(w, reference, 0.0) for w in wrong[:n_pairs] if reference]
        pairs += [(r, reference, 0.5) for r in right[:n_pairs] if reference]
        if reference:
            end = max(1, reference.find(common.MARKER))
            beginning = reference[: int(end ** rng.random() - 0.5)]  # as often 1 to 4 characters as 10 to 40, or none
            others = [t for t in (problem.question, previous) if t and not common.is_correct(t, problem.answer)]
            pairs += [(text, reference, 0.0) for text in (*others, beginning)]
            previous = reference
        n_mixed, turn = min(n_pairs, len(right) * len(wrong)), math.lcm(len(right), len(wrong))
        pairs += [
            (right[i % len(right)], wrong[(i + i // turn) % len(wrong)], 1.0) for i in range(n_mixed)
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


def auc_within(samples: list[common.Sample], scores: np.ndarray, labels: np.ndarray) -> float | None:
    """The AUC over the pairs of one question, mean over the questions that have both kinds: what reranking needs."""
    groups = np.split(np.arange(len(samples)), np.cumsum([len(g) for g in common.by_problem(samples)])[:-1])
    return common.mean([auc(scores[g], labels[g]) for g in groups if 0 < labels[g].sum() < len(g)])


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict]:
    """Bins of equal width over the scores: how many fall in, their mean score, and the share that is right."""
    where = np.minimum((scores * bins).astype(int), bins - 1)
    return [
        {"from": b / bins, "n": int(inside.sum()), "score": float(scores[inside].mean()), "right": float(labels[inside].mean())}
        for b in range(bins) if (inside := where == b).any()
    ]  # fmt: skip


def calibration_error(table: list[dict]) -> float:
    """Expected calibration error (Naeini et al. 2015): |mean score - share right| of a bin, averaged over the samples."""
    return sum(row["n"] * abs(row["score"] - row["right"]) for row in table) / sum(row["n"] for row in table)


def best_of_n(samples: list[common.Sample], scores: list[float]) -> list[dict]:
    """For n = 1, 2, 4 ...: the share of questions solved by the best-scored of n samples, by their majority, and by any
    of them (the oracle). Averaged over the disjoint groups of n that a question's samples make."""
    place, rows = itertools.count(), []
    numbered = [[(sample, scores[next(place)]) for sample in group] for group in common.by_problem(samples)]
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
            {"position": place, "accuracy": common.mean((p >= 0.5) == labels), "auc": auc(p, labels)}
            for place, p in at.items()
        ],
        "reliability": table,
        "best_of_n": best_of_n(samples, scores.tolist()),
    }


NONSENSE = {"empty": "", "colon": ":", "thinking": "Thought process:", "question": None}  # None: the question repeated


def comparable(samples: list[common.Sample]) -> tuple[list[common.Sample], dict[str, str]]:
    """The samples that a generative reward model is tried on, and the reference of each question by its id: the gold solution
    or, where there is none, the question's first right sample; that text is not scored beside itself, and a question without
    a right sample is left out. UserError if nothing is left."""
    references = {group[0].problem.id: group[0].problem.reference for group in common.by_problem(samples)}
    for sample in samples:
        if references[sample.problem.id] is None and sample.correct:
            references[sample.problem.id] = sample.solution
    samples = [
        sample
        for sample in samples
        if (reference := references[sample.problem.id]) and (sample.problem.reference or sample.solution != reference)
    ]
    if not samples:
        raise common.UserError("no dev question has a gold solution or a right sample to compare with")
    return samples, references


def genrm_quality(samples: list[common.Sample], genrm: common.GenerativeRewardModel, token_budget: int) -> dict:
    """What a generative reward model is worth on the samples of questions that it was not trained on."""
    samples, references = comparable(samples)
    problems = {sample.problem.id: sample.problem for sample in samples}
    candidates = [(s.problem, s.solution, references[s.problem.id]) for s in samples]
    asked = genrm.verdicts(candidates, token_budget)
    scores, labels = asked.mean(1).round(6), np.array([sample.correct for sample in samples])
    nonsense = {
        name: genrm.verdicts(
            [(p, p.question if text is None else text, references[i]) for i, p in problems.items()], token_budget
        ).mean(1)
        for name, text in NONSENSE.items()
    }
    mean = common.mean
    return {
        "base_rate": float(labels.mean()),
        "auc": auc(scores, labels),
        "auc_within": auc_within(samples, scores, labels),
        "score_if_right": mean(scores[labels]),
        "score_if_wrong": mean(scores[~labels]),
        "half_if_wrong": mean(scores[~labels] >= 0.5),
        "above_half": mean(scores > 0.5),
        "order_bias": mean(asked[:, 0] - asked[:, 1]),
        "order_gap": mean(np.abs(asked[:, 0] - asked[:, 1])),
        "nonsense_worst": max(mean(s) for s in nonsense.values()),
        "nonsense": [{"candidate": n, "score": mean(s), "highest": float(s.max())} for n, s in nonsense.items()],
    }


def orm_step(
    orm: common.RewardModel, optimizer: torch.optim.Optimizer, examples: list, labels: list[float], weights: list[float],
    lr: float, token_budget: int,
) -> tuple[float, float]:  # fmt: skip
    """One optimizer step on the mean over the batch's solutions, weighted by their share of its weights, of the mean over
    their tokens -> (loss in nats per token, gradient norm). As in `common.cross_entropy_step` the gradient does not depend on how the batch is split."""

    def backward(indices: list[int]) -> list[float]:
        lengths = torch.tensor([len(examples[i][1]) for i in indices])
        y = torch.tensor([labels[i] for i in indices]).repeat_interleave(lengths)
        w = (torch.tensor([weights[i] for i in indices]) / lengths).repeat_interleave(lengths) / sum(weights)
        log_odds = orm.log_odds([examples[i] for i in indices])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            log_odds, y.to(orm.device), w.to(orm.device), reduction="sum"
        )
        loss.backward()
        return [loss.item()]

    parameters = list(orm.model.parameters())
    (loss,) = common.backward_in_parts([len(p) + len(r) for p, r in examples], token_budget, backward, parameters)
    optimizer.param_groups[0]["lr"] = lr
    return loss, *common.clipped_step(optimizer, loss)


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # 0. problems
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    written = [sample for file in args.train_samples for sample in common.load_samples(Path(file), train)]
    args.base = args.base or args.model
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    generative = args.kind == "genrm"
    kind = common.GenerativeRewardModel if generative else common.RewardModel
    orm = kind(args.base, args.device, args.dtype, flag="--base", new=True)
    common.check_memory(orm.model)  # which the student leaves before the training
    student = common.Policy(args.model, args.device, args.dtype)
    # whether all fit must show now, not after the sampling
    common.encode_prompts(student, dev if written else train + dev, args.max_new_tokens)
    orm.check_lengths([p for p in train + dev if p.reference or not generative], args.max_new_tokens)
    run.begin()

    # 1. samples of the student (read back where a restart finds them on disk)
    how = dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens, rows=args.rows)
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
        examples, labels = [orm.encode(sample) for sample in data], [float(sample.correct) for sample in data]
    mixed = common.mean(0 < sum(s.correct for s in group) < len(group) for group in common.by_problem(samples))
    right = common.mean(sample.correct for sample in samples)
    print(f"{len(samples)} samples, {right:.1%} right; {mixed:.1%} of the questions have both kinds; "
          f"{len(data)} {'comparisons' if generative else 'distinct solutions'} to train on")  # fmt: skip
    if right in (0, 1):
        raise common.UserError("the samples are all right or all wrong: there is nothing to tell apart")
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
    for step in tqdm(range(first, n_steps), desc="training", initial=first, total=n_steps, disable=None):
        epoch, place = divmod(step, steps_per_epoch)
        order = common.shuffled(len(examples), args.seed, epoch)
        batch = order[place * args.batch_size : (place + 1) * args.batch_size]
        lr = common.cosine_lr(step, n_steps, args.lr)
        loss, norm = orm_step(
            orm, optimizer, [examples[i] for i in batch], [labels[i] for i in batch], [weights[i] for i in batch], lr,
            args.token_budget,
        )  # fmt: skip
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
                loss=float(np.mean(progress["losses"])), grad_norm=norm, lr=lr, train_size=len(data), mixed=mixed,
                sampled_unreadable=common.mean(s.answer is None for s in samples),
                sampled_cut=common.mean(not s.finished for s in samples),
                **{key: value for key, value in report.items() if not isinstance(value, list)},
                **ranked,
            )  # fmt: skip
            progress["losses"] = []
            if report["auc"] is None or report["auc"] > progress["best"]:  # None: nothing says that it is not better
                progress["best"] = -1.0 if report["auc"] is None else report["auc"]
                common.write_json(run.out / "quality.json", report | {"epoch": epoch + 1})
                orm.save(run.out / "model")
        run.checkpoint(progress=progress, model=orm.model.state_dict(), optimizer=optimizer.state_dict())
    run.finish()
    if progress["best"] < 0:
        common.warn("the dev samples are all right or all wrong, so there is no AUC, and the last epoch was kept")
    best = f"best AUC on dev {progress['best']:.3f}; " if progress["best"] >= 0 else ""
    print(f"{best}model in {run.out / 'model'}, details in {run.out / 'quality.json'}")


if __name__ == "__main__":
    common.run_main(main)
