r"""Return-conditioned RL: label every line of a solution good or bad, then ask for good lines.

This is RCRL of "Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et
al. 2024). The objective, for a question q and a solution s with lines l_1 ... l_n and labels z_i:

    minimise   - sum_(q, s)  sum_i  log pi(l_i | q, z_1, l_1, ..., z_(i-1), l_(i-1), z_i)

    z_i = [GOOD] if Q(q, l_1 ... l_i) >= 0.5 else [BAD]
    Q   = fraction of correct solutions among M completions of the prefix l_1 ... l_i

    1. Sample K solutions per training question, or read --train-samples.
    2. Mix correct and incorrect solutions in the ratio --ratio.
    3. Complete every prefix of the mixture M times. Label the last line of the prefix by Q.
       With --labels outcome the whole solution has one label: is it correct?
    4. Train from the pretrained base. The lines are targets, the labels are context.
    5. After every epoch measure greedy accuracy on dev, with [GOOD] before every line. The best
       epoch becomes model/. `evaluate.py` forces [GOOD] as well, or as --condition says.

Choices where the paper gives no detail: M is 8. Truncated solutions are left out. The ratio counts
distinct solutions, one for every sequence of operations, unless --no-deduplicate is given. The Q of
the last line is 1 or 0. The new embeddings are random vectors, spread like the other embeddings.
GLoRe (Havrilla et al. 2024, arXiv 2402.10963) labels steps by two other rules. --label-rule any: a
line is good if at least one completion is correct. --monotone: a line before a good line is good.

CPU, 5 minutes, after `python expert_iteration.py` (README.md has the measured numbers):
    python rcrl.py
One GPU:
    python rcrl.py --model runs/gsm8k/ei/model --base HuggingFaceTB/SmolLM2-135M --dataset gsm8k \
        --samples 32 --epochs 4 --lr 2e-5 --batch-size 128 --max-new-tokens 512 \
        --out runs/gsm8k/rcrl
"""

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import common
import runtime

LABELS = {"good": "[GOOD]", "bad": "[BAD]"}
Prefix = tuple[str, str]  # problem id, first lines of a solution


def parse_args(argv: list[str]):
    defaults = dict(model="runs/expert_iteration/model", out="runs/rcrl", samples=16)
    defaults |= dict(temperature=1.0, lr=1e-3, epochs=4, batch_size=16)
    parser = runtime.common_parser(__doc__, **defaults, **runtime.TRAINING, checkpoint_every=300)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--base", default="tiny", help="pretrained model to train; --model only samples")
    add("--train-samples", nargs="+", default=[], metavar="FILE", help="use samples of another run")
    kinds, rules = ["step", "outcome", "none"], ["mean", "any"]
    add("--labels", choices=kinds, default="step", help="one per line, one per solution, none")
    add("--label-rule", choices=rules, default="mean", help="good: Q >= 0.5 (mean), Q > 0 (any)")
    add("--monotone", action="store_true", help="a line before a good line is good")
    add("--completions", type=runtime.WHOLE, default=8, help="completions per prefix, M")
    add("--ratio", type=runtime.number(float, 0.01), default=10.0, help="correct per incorrect")
    add("--deduplicate", action=switch, default=True, help="keep a sequence of operations once")
    add("--train-size", type=runtime.WHOLE, help="most solutions in the mixture, to compare ratios")
    args = parser.parse_args(argv)
    parser.only_with("--labels step", args.labels == "step", args, "label_rule", "monotone")
    if args.temperature == 0:
        parser.error("--temperature 0: all samples and all completions of a prefix are the same")
    return args


def lines_of(sample: common.Sample) -> list[str]:
    """Split a solution after its line breaks: "14+6=20\\n#### 20" -> ["14+6=20\\n", "#### 20"]."""
    *lines, last = sample.solution.split("\n")
    return [line + "\n" for line in lines] + [last] * bool(last)


def usable(samples: list[common.Sample], deduplicate: bool) -> list[common.Sample]:
    """Return the finished samples. deduplicate: one per question, outcome and operations."""
    found = {}
    for sample in samples:
        if sample.finished and lines_of(sample):
            key = common.equations(sample.text) if deduplicate else len(found)
            found.setdefault((sample.problem.id, key, sample.correct), sample)
    return list(found.values())


def mix(correct: list, incorrect: list, ratio: float, size: int | None, seed: int) -> list:
    """Choose the largest mixture with `ratio` correct solutions per incorrect one, at random."""
    n_correct, n_incorrect = len(correct), min(len(incorrect), int(len(correct) / ratio))
    if 0 < n_incorrect == len(incorrect):
        n_correct = max(1, round(ratio * n_incorrect))
    if size and n_correct + n_incorrect > size:
        n_incorrect = min(n_incorrect, round(size / (1 + ratio)), size - 1)
        n_correct = min(n_correct, size - n_incorrect)
    mixture = []
    for stream, (group, n) in enumerate([(correct, n_correct), (incorrect, n_incorrect)]):
        mixture += [group[i] for i in sorted(common.shuffled(len(group), seed, stream)[:n])]
    return mixture


def prefixes_of(solutions: list[common.Sample]) -> dict[Prefix, common.Problem]:
    """Return the distinct prefixes that end before the last line, each with its problem."""
    found = {}
    for sample in solutions:
        for text in itertools.accumulate(lines_of(sample)[:-1]):
            # With an id of its own each prefix has random numbers of its own.
            name = f"{sample.problem.id}/{len(found)}"
            problem = dataclasses.replace(sample.problem, id=name)
            found.setdefault((sample.problem.id, text), problem)
    return found


def estimate_q(policy, prefixes: dict[Prefix, common.Problem], file, run, **how):
    """Return the fraction of correct completions of every prefix: {prefix: Q}."""
    how |= dict(prefixes=[text for _, text in prefixes], progress="completions")
    samples = common.sample_to_file(policy, list(prefixes.values()), file, run, **how)
    shares = [common.mean(s.passed for s in group) for group in common.by_problem(samples)]
    return dict(zip(prefixes, shares, strict=True))


def label_solution(sample, q: dict[Prefix, float], by: str, rule="mean", monotone=False) -> dict:
    """Label every line of a solution. Return a row of labelled.jsonl.

    The Q of the last line is 1 or 0, the outcome. Unless `by` is "step", it is the Q of all lines.
    """
    problem, texts = sample.problem, lines_of(sample)
    values = [float(sample.correct)] * len(texts)
    if by == "step":
        values[:-1] = [q[problem.id, prefix] for prefix in itertools.accumulate(texts[:-1])]
    good = [value >= 0.5 or (rule == "any" and value > 0) for value in values]
    if monotone:
        good = [any(good[i:]) for i in range(len(good))]
    labels = ["good" if flag else "bad" for flag in good]
    lines = zip(labels, values, texts, strict=True)
    row = {"problem": problem.id, "question": problem.question, "correct": sample.correct}
    return row | {"lines": [{"label": z, "q": value, "text": text} for z, value, text in lines]}


def describe(samples: list[common.Sample], rows: list[dict]) -> dict:
    """Return the outcomes of the samples, and the outcomes and labels of the mixture."""
    lines = [(row["correct"], line["label"] == "good") for row in rows for line in row["lines"]]
    return {
        "correct": common.mean(sample.correct for sample in samples),
        "sampled_no_answer": common.mean(sample.answer is None for sample in samples),
        "sampled_truncated": common.mean(not sample.finished for sample in samples),
        "n_correct": sum(row["correct"] for row in rows),
        "n_incorrect": sum(not row["correct"] for row in rows),
        "good_lines": common.mean(good for _, good in lines),
        "good_if_incorrect": common.mean(good for correct, good in lines if not correct),
    }


def teach_labels(policy: common.Policy, by: str) -> None:
    """Add a token for each label to the tokenizer, and a row for it to the embedding."""
    model, tokenizer, labels = policy.model, policy.tokenizer, list(LABELS.values())
    n_known = len(tokenizer)
    try:
        tokenizer.add_special_tokens({"extra_special_tokens": labels})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        policy.vocabulary = model.get_output_embeddings().weight.shape[0]
    except (NotImplementedError, ValueError, AttributeError) as error:
        message = f"this model takes no new tokens for labels ({runtime.first_line(error)})"
        raise runtime.UserError(f"--base: {message}") from None
    # Usually new rows are put at the mean. The two labels would stay hard to tell apart there.
    rows = model.get_input_embeddings().weight.data  # [vocabulary, width]
    std, mean = torch.std_mean(rows[:n_known], dim=0)
    noise = torch.randn(len(labels), len(mean), device=rows.device)
    rows[tokenizer.convert_tokens_to_ids(labels)] = mean + std * noise
    policy.labels = LABELS | {"by": by}
    policy.condition("good")


def encode(policy: common.Policy, problem: common.Problem, lines: list[dict]):
    """Encode a labelled solution as it is sampled: label, line, label, line ..., end-of-text.

    Returns prompt and response ids, and for every response id whether it is a target.
    """
    if not policy.label_every_line:
        # Encode one text: a tokenizer may split it at other positions than line breaks.
        lines = [lines[0] | {"text": "".join(line["text"] for line in lines)}]
    response, targets = [], []
    for line in lines:
        label = [] if policy.label is None else policy.encode_prefix(policy.labels[line["label"]])
        ids = policy.encode_prefix(line["text"])
        response += label + ids
        targets += [False] * len(label) + [True] * len(ids)
    prompt = policy.encode_prompt(common.prompt_text(problem))
    example = prompt, [*response, policy.tokenizer.eos_token_id]
    return example, [*targets, True]


def train_step(policy, optimizer, batch: list, targets: list, token_budget: int):
    """Make one optimizer step on the mean cross-entropy of the targets of a batch.

    targets: whether each solution id is one. Returns the loss per token and the gradient norm.
    """
    n_tokens, loss = sum(map(sum, targets)), 0.0
    for indices in common.micro_batches([len(p) + len(s) for p, s in batch], token_budget):
        logprobs = common.response_logprobs(policy, [batch[i] for i in indices])
        mask = torch.tensor([flag for i in indices for flag in targets[i]], device=policy.device)
        micro_loss = -logprobs[mask].sum() / n_tokens
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = optimizer.param_groups[0]["params"]
    (loss,) = runtime.sum_gradients(parameters, loss)
    # With a norm of 1 and a warm-up of 3 % it loses ten points (docs/findings.md).
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1).item()
    common.require_finite(loss, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    # 0. Load the problems, the policy to train and the sampler.
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    written = [s for name in args.train_samples for s in common.read_samples(Path(name), train)]
    run = runtime.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    policy = common.Policy(args.base, args.device, args.dtype, flag="--base")
    sampler = common.Policy(args.model, args.device, args.dtype)
    unlabelled = sampler.label is None and policy.label is None
    runtime.require(unlabelled, "--model and --base: take models that were trained without labels")
    if args.labels != "none":
        torch.manual_seed(args.seed)
        teach_labels(policy, args.labels)
    common.check_base(sampler, policy, args)
    common.encode_prompts(policy, dev)
    common.encode_prompts(sampler, [] if written else train)
    run.begin()

    # 1. Sample K solutions per question, unless samples were read.
    folder = run.out / "samples"
    how = common.sampling(args) | dict(seed=[args.seed, 0], progress="solutions")
    samples = written or common.sample_to_file(sampler, train, folder / "train.jsonl", run, **how)
    solutions = usable(samples, args.deduplicate)

    # 2. Mix correct and incorrect solutions.
    correct, incorrect = ([s for s in solutions if s.correct == y] for y in (True, False))
    runtime.require(correct, "no sample is finished and correct: raise --samples, --max-new-tokens")
    mixture = mix(correct, incorrect, args.ratio, args.train_size, args.seed)

    # 3. Label every line of the mixture. A resumed run reads samples and completions back.
    prefixes = prefixes_of(mixture) if args.labels == "step" else {}
    how |= {"samples": args.completions, "seed": [args.seed, 1]}
    q = estimate_q(sampler, prefixes, folder / "completions.jsonl", run, **how)
    del sampler
    rules = args.labels, args.label_rule, args.monotone
    rows = [label_solution(sample, q, *rules) for sample in mixture]
    with runtime.atomic_write(folder / "labelled.jsonl") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    facts = describe(samples, rows) | {"prefixes": len(q), "completions": len(q) * args.completions}

    # 4. Train from the base. Labels lengthen a solution, so a long one may not fit any more.
    labelled = zip(mixture, rows, strict=True)
    encoded = [encode(policy, sample.problem, row["lines"]) for sample, row in labelled]
    fitting = [pair for pair in encoded if sum(map(len, pair[0])) <= policy.max_length]
    runtime.require(fitting, "no labelled solution fits the positions of the model")
    if n_long := len(encoded) - len(fitting):
        runtime.warn(f"{n_long} of {len(encoded)} labelled solutions are too long and left out")
    examples, targets = zip(*fitting, strict=True)
    optimizer = common.adam_w(policy.trained.parameters(), args.lr)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    progress = {"step": 0, "tokens": 0, "losses": [], "best": -1.0}
    progress |= {"seconds_sampling": run.clock(), "started": run.clock()}
    if run.state:
        progress |= run.state["progress"]
        policy.trained.load_state_dict(run.state["trained"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None  # as large as the model and its optimizer
    for epoch in range(progress["step"] // steps_per_epoch, args.epochs):
        # The order depends on the seed and the epoch alone, so that a run can resume.
        order = common.shuffled(len(examples), args.seed, epoch)
        steps = range(progress["step"] % steps_per_epoch, steps_per_epoch)
        for step in tqdm(steps, desc=f"epoch {epoch + 1}", disable=None):
            state = {"trained": policy.trained.state_dict(), "optimizer": optimizer.state_dict()}
            run.checkpoint(**state, progress=progress)
            indices = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch, is_target = [examples[i] for i in indices], [targets[i] for i in indices]
            n_steps = args.epochs * steps_per_epoch
            lr = common.cosine_lr(progress["step"], n_steps, args.lr, warmup=0.1)
            optimizer.param_groups[0]["lr"] = lr
            loss, grad_norm = train_step(policy, optimizer, batch, is_target, args.token_budget)
            progress["losses"].append(loss)
            progress["tokens"] += sum(map(sum, is_target))
            progress["step"] += 1

        # 5. Measure the epoch with [GOOD] before every line. The best one on dev becomes model/.
        metrics = common.dev_metrics(policy, dev, args, epoch + 1)
        row = {key: progress[key] for key in ("step", "tokens", "seconds_sampling")}
        row |= {"samples": 0 if written else len(samples), "train_size": len(examples)}
        loss = common.mean(progress["losses"][-steps_per_epoch:])
        row |= {"epoch": epoch + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        seconds = run.clock() - progress["started"]
        run.log(**row, **facts, **metrics, seconds_training=seconds)
        progress["started"] = run.clock()
        if metrics["maj@1"] > progress["best"]:
            progress["best"] = metrics["maj@1"]
            policy.save(run.out / "model")
    run.finish()
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {run.out / 'model'}")


if __name__ == "__main__":
    runtime.run_main(main)
