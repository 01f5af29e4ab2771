r"""Return-conditioned RL: label every line of a solution as good or bad, learn what follows either label, ask for good.

Objective, for question q and solution s with lines l_1 ... l_n and labels z_i:

    minimise   - sum_(q, s)  sum_i  log pi(l_i | q, z_1, l_1, ..., z_(i-1), l_(i-1), z_i)

    z_i = [GOOD] if Q(q, l_1 ... l_i) >= 0.5 else [BAD],      Q: share of M completions of this beginning that are right

"Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et al. 2024), its RCRL, after "Decision
Transformer" (Chen et al. 2021).

    1. sample K solutions per training question from a policy (by default the best of expert iteration), or read samples
    2. mix right and wrong solutions as --ratio says; complete every beginning of these M times, and label its last line by
       the share that is right (--labels outcome: one label for the whole solution, whether it is right)
    3. train from the pretrained base: the lines are targets, the labels context
    4. after every epoch greedy accuracy on dev, one line at a time, each after a forced [GOOD]; the best becomes model/

The saved model knows its labels: `evaluate.py` forces [GOOD] by itself, and [BAD] or nothing with --condition.

Where this differs from the paper, and choices where it is silent: M is 8, at --temperature; the ratio is that of distinct
solutions, and those with the same sequence of arithmetic operations are the same (--no-deduplicate: every sample counts, as
in expert_iteration.py by default); solutions that were cut are left out; the default ratio is 10. The last line needs no
completion: its Q is 1 or 0. A blank line is a line: at inference a label follows every line break. The embeddings of the two
labels begin as random vectors of the spread of the others.

CPU, after `python expert_iteration.py` (README.md has the measured numbers):
    python rcrl.py
One GPU:
    python rcrl.py --model runs/gsm8k/ei/model --base HuggingFaceTB/SmolLM2-135M --dataset gsm8k --samples 32 --epochs 4 \
        --lr 2e-5 --batch-size 128 --max-new-tokens 512 --out runs/gsm8k/rcrl
"""

import argparse
import copy
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common

LABELS = {"good": "[GOOD]", "bad": "[BAD]"}


def parse_args(argv: list[str]):
    parser = common.common_parser(
        __doc__, model="runs/expert_iteration/model", out="runs/rcrl", samples=16, temperature=1.0, lr=1e-3, epochs=4,
        batch_size=16, limit_train=None, checkpoint_every=300,
    )  # fmt: skip
    add = parser.add_argument
    add("--base", default="tiny", help="pretrained model that is trained, whatever --model is")
    add("--train-samples", nargs="+", default=[], metavar="FILE",
        help="samples of the training questions that another script wrote, instead of sampling anew")  # fmt: skip
    add("--labels", choices=["step", "outcome", "none"], default="step",
        help="one for every line, or one for the solution, or the control: the same solutions without labels")  # fmt: skip
    add(
        "--completions",
        type=common.number(int, 1),
        default=8,
        help="M, per beginning of a solution",
    )
    add("--ratio", type=common.number(float, 0.01), default=10.0,
        help="right solutions for every wrong one, as far as there are enough; 1e9: none (paper: 1 is worst)")  # fmt: skip
    add("--deduplicate", action=argparse.BooleanOptionalAction, default=True,
        help="of a question's right solutions with the same sequence of operations take one, and of its wrong ones")  # fmt: skip
    add("--train-size", type=common.number(int, 1), help="solutions in the mixture at most; to compare ratios, which without "
        "it change the amount of data, too")  # fmt: skip
    add("--check-labels", type=common.number(int, 0), default=0,
        help="complete so many beginnings 64 times more, and log how often that changes the label")  # fmt: skip
    args = parser.parse_args(argv)
    parser.only_with("--labels step", args.labels == "step", args, "check_labels")
    if args.temperature == 0:
        parser.error("--temperature 0: all samples and all completions of a beginning are the same")
    return args


# ---- the labels ------------------------------------------------------------------------------------------------------


def lines_of(sample: common.Sample) -> list[str]:
    """The lines of a solution with their line breaks: "14+6=20\\n#### 20" -> ["14+6=20\\n", "#### 20"]."""
    *lines, last = sample.solution.split("\n")
    return [line + "\n" for line in lines] + [last] * bool(last)


def prefixes_of(solutions: list[common.Sample]) -> dict[tuple[str, str], common.Problem]:
    """All distinct beginnings of the solutions that end with a line, the last line left out: (problem id, text) -> the
    problem, with its place here added to its id, so that each has random numbers of its own."""
    found = {}
    for sample in solutions:
        for text in itertools.accumulate(lines_of(sample)[:-1]):
            key = (sample.problem.id, text)
            found.setdefault(
                key, dataclasses.replace(sample.problem, id=f"{sample.problem.id}/{len(found)}")
            )
    return found


def estimate_q(
    policy: common.Policy, starts: dict[tuple[str, str], common.Problem], completions: int, file: Path, run: common.Run,
    args, seed: int,
) -> dict[tuple[str, str], float]:  # fmt: skip
    """The share of right completions of every beginning, sampled from the policy and written to `file`. One that is cut is
    not right."""
    if not starts:
        return {}
    drawn = common.sample_to_file(
        policy, list(starts.values()), file, run, prefixes=[text for _, text in starts], samples=completions,
        temperature=args.temperature, max_new_tokens=args.max_new_tokens,
        batch_size=args.gen_batch_size, seed=[args.seed, seed], progress="completions",
    )  # fmt: skip
    right = np.array([sample.correct and sample.finished for sample in drawn]).reshape(
        len(starts), completions
    )
    return dict(zip(starts, right.mean(1).tolist(), strict=True))


def label_solution(sample: common.Sample, q: dict[tuple[str, str], float], by: str) -> dict:
    """A solution with the label of every line, as it is written to labelled.jsonl. Except by "step", Q is the outcome."""
    texts = lines_of(sample)
    values = [float(sample.correct)] * len(texts)
    if by == "step":
        values[:-1] = [q[sample.problem.id, start] for start in itertools.accumulate(texts[:-1])]
    lines = [
        {"label": "good" if value >= 0.5 else "bad", "q": value, "text": text}
        for value, text in zip(values, texts, strict=True)
    ]
    return {
        "problem": sample.problem.id,
        "question": sample.problem.question,
        "correct": sample.correct,
        "lines": lines,
    }


def mix(right: list, wrong: list, ratio: float, size: int | None, seed: int) -> list:
    """The largest part of both, but no more than `size`, that has `ratio` right ones for every wrong one; at random. Where
    right ones are too few for another wrong one, all of them."""
    n_wrong = min(len(wrong), int(len(right) / ratio))
    n_right = max(1, round(ratio * n_wrong)) if n_wrong and n_wrong == len(wrong) else len(right)
    if size and n_right + n_wrong > size:
        n_wrong = min(n_wrong, round(size / (1 + ratio)), size - 1)
        n_right = min(n_right, size - n_wrong)
    chosen = [right[i] for i in sorted(common.shuffled(len(right), seed, 0)[:n_right])]
    return chosen + [wrong[i] for i in sorted(common.shuffled(len(wrong), seed, 1)[:n_wrong])]


def usable(samples: list[common.Sample], deduplicate: bool) -> list[common.Sample]:
    """The finished samples; with `deduplicate` one for each sequence of operations and outcome of a question."""
    found = {}
    for sample in samples:
        if sample.finished and lines_of(sample):
            key = common.equations(sample.text) if deduplicate else len(found)
            found.setdefault((sample.problem.id, key, sample.correct), sample)
    return list(found.values())


# ---- the model -------------------------------------------------------------------------------------------------------


def teach_labels(policy: common.Policy, by: str) -> None:
    """Add a token for each label to the tokenizer and a row for it to the embedding.

    The saved model knows its labels and where they stand. by: "step", "outcome" or "none".
    Raises UserError if the model takes no new tokens.
    """
    if by == "none":
        policy.condition("none")
        return
    names, tokenizer = list(LABELS.values()), copy.deepcopy(policy.tokenizer)
    try:
        tokenizer.add_special_tokens({"extra_special_tokens": names})
        if len(tokenizer) > policy.model.get_input_embeddings().weight.shape[0]:
            policy.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # as far apart as other tokens are: new rows that all lie at the mean, as is usual, would stay hard to tell apart
        rows, n = policy.model.get_input_embeddings().weight.data, len(policy.tokenizer)
        std, mean = torch.std_mean(rows[:n], dim=0)
        rows[tokenizer.convert_tokens_to_ids(names)] = mean + std * torch.randn(
            2, len(mean), device=rows.device
        )
        policy.tokenizer, policy.vocabulary = (
            tokenizer,
            policy.model.get_output_embeddings().weight.shape[0],
        )
    except (NotImplementedError, ValueError, AttributeError) as error:
        reason = common.first_line(error)
        raise common.UserError(
            f"--base: this model takes no new tokens for labels ({reason})"
        ) from None
    policy.labels = LABELS | {"by": by}
    policy.condition("good")


def encode(
    policy: common.Policy, problem: common.Problem, lines: list[dict]
) -> tuple[common.Example, list[bool]]:
    """Prompt and response ids, as sampling sees them: label, line, label, line ..., end-of-text token (with --labels outcome
    only the first label, with none no label); and for each response token whether it is a target. Labels are not."""
    prompt, response, targets = policy.encode_prompt(common.prompt_text(problem)), [], []
    if (
        not policy.label_every_line
    ):  # one text, which a tokenizer may cut elsewhere than at line breaks
        lines = [{"label": lines[0]["label"], "text": "".join(line["text"] for line in lines)}]
    for line in lines:
        label = [] if policy.label is None else policy.encode_prefix(policy.labels[line["label"]])
        ids = policy.encode_prefix(line["text"])
        response += label + ids
        targets += [False] * len(label) + [True] * len(ids)
    example = policy.check_length((prompt, [*response, policy.tokenizer.eos_token_id]))
    return example, [*targets, True]


def train_step(
    policy: common.Policy,
    optimizer: torch.optim.Optimizer,
    batch: list,
    targets: list,
    token_budget: int,
) -> tuple[float, float]:
    """Make one optimizer step on the mean cross-entropy of the targets of a batch.

    targets: for every response token whether it is one. Labels are not.
    Returns the loss in nats per token and the norm of the gradient before clipping.
    """
    n_tokens, loss = sum(map(sum, targets)), 0.0
    for indices in common.micro_batches([len(p) + len(s) for p, s in batch], token_budget):
        logprobs = common.response_logprobs(policy, [batch[i] for i in indices])
        mask = torch.tensor([flag for i in indices for flag in targets[i]], device=policy.device)
        micro_loss = -logprobs[mask].sum() / n_tokens
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = list(policy.model.parameters())
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
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    policy = common.Policy(args.base, args.device, args.dtype, flag="--base")
    common.check_memory(policy.model)  # which the sampler leaves before the training
    sampler = common.Policy(args.model, args.device, args.dtype)
    common.check_base(sampler, policy, args.base)
    for flag, model in (("--model", sampler), ("--base", policy)):
        if model.label is not None:
            raise common.UserError(
                f"{flag}: is a model of rcrl.py; take one that was trained without labels"
            )
    torch.manual_seed(args.seed)  # of the new rows of the embedding
    teach_labels(policy, args.labels)
    common.encode_prompts(policy, dev)
    common.encode_prompts(sampler, [] if written else train)
    run.begin()

    # 1. sample K solutions per question (read back where a restart finds them on disk)
    started = run.clock()
    samples = written or common.sample_to_file(
        sampler, train, run.out / "samples" / "train.jsonl", run, samples=args.samples, temperature=args.temperature,
        max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size, seed=[args.seed, 0], progress="solutions",
    )  # fmt: skip
    solutions = usable(samples, args.deduplicate)
    if not any(sample.correct for sample in solutions):
        what = "right" if solutions else "finished"
        raise common.UserError(
            f"no sample is {what}: raise --{'samples' if solutions else 'max-new-tokens'}"
        )

    # 2. mix, and label every line of what is in the mix
    right, wrong = ([s for s in solutions if s.correct == correct] for correct in (True, False))
    chosen = mix(right, wrong, args.ratio, args.train_size, args.seed)
    file = run.out / "samples" / "labelled.jsonl"
    by_id = {problem.id: problem for problem in train}
    if not common.on_first(file.exists):
        starts = prefixes_of(chosen) if args.labels == "step" else {}
        folder = run.out / "samples"
        q = estimate_q(
            sampler, starts, args.completions, folder / "completions.jsonl", run, args, 1
        )
        facts = {
            "correct": common.mean(s.correct for s in samples),
            "sampled_no_answer": common.mean(s.answer is None for s in samples),
            "sampled_truncated": common.mean(not s.finished for s in samples), "n_correct": sum(s.correct for s in chosen),
            "n_incorrect": sum(not s.correct for s in chosen), "prefixes": len(starts),
            "completions": len(starts) * args.completions,
        }  # fmt: skip
        if args.check_labels and starts:
            some = [
                list(starts)[i]
                for i in common.shuffled(len(starts), args.seed, 2)[: args.check_labels]
            ]
            again = {key: starts[key] for key in some}
            again = estimate_q(sampler, again, 64, folder / "completions_64.jsonl", run, args, 2)
            facts["completions"] += 64 * len(some)
            facts["label_agreement"] = common.mean(
                (q[key] >= 0.5) == (again[key] >= 0.5) for key in some
            )
            facts["q_difference"] = common.mean(abs(q[key] - again[key]) for key in some)
        facts["seconds_sampling"] = run.clock() - started
        lines = [
            json.dumps(label_solution(s, q, args.labels), ensure_ascii=False) + "\n" for s in chosen
        ]
        common.write_json(folder / "labelled.facts.json", facts)
        with common.atomic_write(file) as out:
            out.write("".join(lines).encode())
    facts = common.on_first(lambda: common.read_json(run.out / "samples" / "labelled.facts.json"))
    rows = common.on_first(
        lambda: [row for _, row in common.json_lines(file.read_text(encoding="utf-8"), file)]
    )
    facts["good_lines"] = common.mean(
        line["label"] == "good" for row in rows for line in row["lines"]
    )
    facts["good_if_incorrect"] = common.mean(  # a wrong solution may begin well
        line["label"] == "good" for row in rows if not row["correct"] for line in row["lines"]
    )
    del sampler

    # 3. train from the base; as in sft.py, the order of the data depends on the seed and the epoch alone
    encoded = [encode(policy, by_id[row["problem"]], row["lines"]) for row in rows]
    examples, targets = [example for example, _ in encoded], [mask for _, mask in encoded]
    optimizer = common.adam_w(policy.model.parameters(), args.lr)
    steps_per_epoch = -(-len(examples) // args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    progress = {"step": 0, "tokens": 0, "best": -1.0, "losses": [], "seconds": 0.0}  # of the epoch
    if run.state:
        progress |= run.state["progress"]
        policy.model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None  # as large as the model and its optimizer
    started, first = time.monotonic() - progress["seconds"], progress["step"]
    for step in tqdm(
        range(first, n_steps), desc="training", initial=first, total=n_steps, disable=None
    ):
        epoch, index = divmod(step, steps_per_epoch)
        order = common.shuffled(len(examples), args.seed, epoch)
        batch = order[index * args.batch_size : (index + 1) * args.batch_size]
        lr = common.cosine_lr(step, n_steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        loss, norm = train_step(
            policy,
            optimizer,
            [examples[i] for i in batch],
            [targets[i] for i in batch],
            args.token_budget,
        )
        progress["losses"].append(loss)
        progress["tokens"] += sum(sum(targets[i]) for i in batch)
        progress["step"] = step + 1

        # 4. the best epoch by dev accuracy, conditioned on [GOOD], becomes model/
        if (step + 1) % steps_per_epoch == 0:
            metrics = common.dev_metrics(
                policy, dev, args, 0, run.out / "samples" / f"dev_{epoch + 1}.jsonl"
            )
            run.log(
                step=step + 1, samples=0 if written else len(samples), tokens=progress["tokens"], epoch=epoch + 1,
                train_size=len(examples), **facts, loss=float(np.mean(progress["losses"])), grad_norm=norm, lr=lr,
                **metrics, seconds_training=time.monotonic() - started,
            )  # fmt: skip
            progress["losses"], started = [], time.monotonic()
            if metrics["maj@1"] > progress["best"]:
                progress["best"] = metrics["maj@1"]
                policy.save(run.out / "model")
        progress["seconds"] = time.monotonic() - started
        run.checkpoint(
            progress=progress, model=policy.model.state_dict(), optimizer=optimizer.state_dict()
        )
    run.finish()
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {run.out / 'model'}")


if __name__ == "__main__":
    common.run_main(main)
