"""Follow one question through every method: print all blocks of docs/tour.md.

Make the runs first. The quick start makes the first of them. No policy is trained here.

    python sft.py
    python expert_iteration.py --rounds 1 --lr 3e-4
    python ppo.py
    python rcrl.py
    python reward_model.py
    python results/tour.py > results/tour.txt
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import expert_iteration  # noqa: E402
import ppo  # noqa: E402
import rcrl  # noqa: E402
import reward_model  # noqa: E402
import runtime  # noqa: E402

METHODS = ["base", "sft", "expert_iteration", "ppo", "rcrl"]
COLUMNS = ["reward", "penalty", "value", "advantage", "whitened"]


def parse_args(argv: list[str]):
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=__doc__, **how)
    parser.add_argument("--question", default="arithmetic4-772", help="id of the problem")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    about = "other questions, whose samples the value function learns from"
    parser.add_argument("--value-questions", type=runtime.WHOLE, default=512, help=about)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def load(args, name: str) -> common.Policy:
    return common.Policy(str(args.runs / name / "model"), args.device, flag="--runs")


def show(title: str, lines) -> None:
    print(f"{title}:", *(f"  {line}".rstrip() for line in lines), "", sep="\n")


def outcome(sample: common.Sample) -> str:
    return "correct" if sample.passed else "incorrect" if sample.finished else "truncated"


def show_greedy(args, settings, problem: common.Problem) -> None:
    """Print the greedy solution of every method, and a table of their answers."""
    rows = ["| method | greedy answer | |", "|---|---|---|"]
    for name in METHODS:
        base = common.Policy(settings.base, args.device) if name == "base" else None
        policy = base or load(args, name)
        for label in rcrl.LABELS if policy.labels else ["none"]:
            policy.condition(label)
            how = dict(temperature=0, max_new_tokens=settings.max_new_tokens)
            (sample,) = common.generate(policy, [problem], **how)
            title = f"{name} {rcrl.LABELS[label]}" if policy.labels else name
            show(f"{title}, greedy, {outcome(sample)}", sample.solution.splitlines())
            rows.append(f"| {title} | {sample.answer} | {outcome(sample)} |")
    print(*rows, "", sep="\n")


def show_kept(args, problem: common.Problem, samples: list[common.Sample]) -> None:
    """Print which samples expert iteration keeps, and the ORM's prediction after each line."""
    kept = expert_iteration.keep_accepted(samples, {})
    for s in samples:
        title = f"sample {s.number} of sft, {'kept' if s in kept else 'dropped'}: {outcome(s)}"
        same = common.equations(s.text) == common.equations(problem.reference or "")
        lucky = ", not by the reference's operations" if s.passed and not same else ""
        show(title + lucky, s.solution.splitlines())
    orm = reward_model.RewardModel(str(args.runs / "reward_model" / "model"), args.device)
    for s, scores in zip(samples, orm.scores(samples), strict=True):
        after = [scores[end] for end in orm.line_ends(orm.encode(s)[1])]
        pairs = zip(after, s.solution.splitlines(), strict=True)
        lines = [f"{p:.3f}  {line}" for p, line in pairs]
        show(f"P(correct) after each line of sample {s.number}, {outcome(s)}", lines)


def estimate(policy, critic, reference, samples: list, args) -> dict[str, torch.Tensor]:
    """Take steps 2 to 5 of ppo.py. Every table is [samples, longest]."""
    examples = [(list(sample.prompt), sample.tokens.tolist()) for sample in samples]
    columns = ppo.compute_old_logprobs(policy, critic, reference, examples, args)
    columns = [*columns, ppo.task_rewards(args, policy, samples)]
    columns = [[torch.from_numpy(row) for row in rows] for rows in columns]
    logprobs, values, ref_logprobs, task = (pad_sequence(rows, True) for rows in columns)
    rewards = ppo.penalised_rewards(task, logprobs, ref_logprobs, args.kl_coef)
    advantages, returns = ppo.gae(rewards, values, 1.0, args.gae_lambda)
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    real = torch.arange(task.shape[1]) < lengths[:, None]
    whitened = torch.zeros_like(task)
    whitened[real] = ppo.whiten(advantages[real])
    tables = task, rewards - task, values, advantages, whitened
    return dict(zip(COLUMNS, tables, strict=True)) | {"returns": returns, "real": real}


def fit_values(policy, critic, samples: list, returns, real, args) -> None:
    """Train the value function alone, as in phase 1 of ppo.py, with 16 samples per step."""
    optimizer = common.adam_w(critic.parameters(), args.value_lr)
    order = common.shuffled(len(samples), args.seed)
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        examples = [(list(samples[i].prompt), samples[i].tokens.tolist()) for i in batch]
        _, values = critic(policy, examples, args.temperature)
        targets = returns[batch][real[batch]].to(values.device)
        ppo.value_loss(values, values.detach(), targets, np.inf).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def show_advantages(args, settings, problem: common.Problem, others: list) -> None:
    """Sample from the trained policy of PPO. Print its signals line by line."""
    policy, reference, n = load(args, "ppo"), load(args, "sft"), settings.samples
    critic = ppo.ValueFunction(policy, detach=True)
    policy.model.requires_grad_(False)
    how = common.sampling(settings) | dict(seed=[settings.seed, settings.phases + 1])
    samples = common.generate(policy, [problem, *others], **how)
    tables = estimate(policy, critic, reference, samples, settings)
    fit_values(policy, critic, samples[n:], tables["returns"][n:], tables["real"][n:], settings)
    tables = estimate(policy, critic, reference, samples, settings)
    first = {outcome(samples[i]): i for i in reversed(range(n))}
    for i in sorted(first.values()):
        lines, start = ["".join(f"{name:>11}" for name in COLUMNS)], 0
        for end in policy.line_ends(samples[i].tokens):
            row = [tables[name][i, start : end + 1].tolist() for name in COLUMNS]
            # Reward and penalty are sums over the line. The others belong to its first token.
            row = [sum(row[0]), sum(row[1]), *(numbers[0] for numbers in row[2:])]
            text = policy.decode(samples[i].tokens[start : end + 1]).strip()
            lines.append("".join(f"{number:z11.3f}" for number in row) + f"  {text}")
            start = end + 1
        show(f"sample {samples[i].number} of ppo, {outcome(samples[i])}", lines)


def show_labels(file: Path, problem: common.Problem) -> None:
    """Print Q and label of every line of the question's solutions in the mixture of RCRL."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["problem"] == problem.id]
    runtime.require(rows, f"{file}: has no solution of {problem.id}; choose another --question")
    for i, row in enumerate(rows, 1):
        lines = [f"{x['q']:.3f}  {rcrl.LABELS[x['label']]:6} {x['text']}" for x in row["lines"]]
        show(f"solution {i} of rcrl, {'correct' if row['correct'] else 'incorrect'}", lines)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    names = "expert_iteration", "ppo"
    ei, settings = (runtime.read_json(args.runs / name / "args.json") for name in names)
    runtime.require(settings["reward"] == "sparse", "--runs: needs ppo with --reward sparse")
    settings = argparse.Namespace(**settings, base=ei["base"], device=args.device)
    train = common.load_problems(settings.dataset, "train")
    problem = next((p for p in train if p.id == args.question), None)
    runtime.require(problem, f"--question {args.question}: ids are like {train[0].id}")
    file = args.runs / "expert_iteration" / "samples" / "round_1.jsonl"
    samples = [s for s in common.read_samples(file, train) if s.problem.id == problem.id]
    runtime.require(samples, f"{file}: has no sample of {problem.id}; choose another --question")

    show(f"question {problem.id}", [problem.question])
    show("reference", (problem.reference or f"#### {problem.answer}").splitlines())
    show_greedy(args, settings, problem)
    show_kept(args, problem, samples)
    others = [p for p in train if p.id != problem.id][: args.value_questions]
    show_advantages(args, settings, problem, others)
    show_labels(args.runs / "rcrl" / "samples" / "labelled.jsonl", problem)


if __name__ == "__main__":
    runtime.run_main(main)
