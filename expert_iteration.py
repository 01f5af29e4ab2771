r"""Expert iteration: sample solutions, keep the correct ones, train the base on them, repeat.

Objective of round i, with R_i the correct samples of pi_{i-1} and D_i = R_i u D_{i-1} (D_0: the SFT data):

    pi_i  =  argmin   - sum over (q, s) in D_i   sum_t log pi(s_t | q, s_<t)      starting from the pretrained base

"Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et al. 2024), the best method of the
paper. A round is

    1. sample K solutions per training question from pi_{i-1} at temperature 1
    2. keep the correct ones (--orm: those that a reward model scores at 0.5 or more), each as often as it was sampled
       (--deduplicate: once per question and sequence of arithmetic operations); add them to the data
    3. train from the pretrained base again (--continue: from pi_{i-1}), as in sft.py
    4. greedy accuracy on dev; keep the best round as model/; stop when a round does not improve on the one before (the
       policy it begins with is measured, too, but never chosen: a warning says so if no round was better)

Whether the paper trains on de-duplicated solutions we could not check; it counts distinct solutions that way. Training on
them is quicker, and worse where luck is common: a lucky solution that is sampled once then weighs as much as a faithful one
that is sampled often (README.md has the numbers). Where this differs from the paper: the SFT data stays in the mix
(--no-sft-data leaves it out; it is out by default when --model is the base itself).

At the default --lr the order in which sums are rounded moves the first round by up to ten points of maj@1, at 3e-4 by half
a point; but two rounds on the harder task are worse with 3e-4 (results/README.md, "What rounding does").

CPU, eleven minutes on two cores after `python sft.py`, three of them for the first round (README.md has the numbers):
    python expert_iteration.py
From the base, without any written solution:
    python expert_iteration.py --model tiny --samples 8 --epochs 3 --out runs/ei_base
One GPU, the paper's setting as far as we know it (README.md), after sft.py; and from a pretrained model with a two-shot prompt in round 1:
    python expert_iteration.py --model runs/gsm8k/sft/model --base HuggingFaceTB/SmolLM2-135M --dataset gsm8k --samples 96 \
        --epochs 4 --lr 2e-5 --batch-size 128 --max-new-tokens 512 --out runs/gsm8k/ei
    python expert_iteration.py --model HuggingFaceTB/SmolLM2-135M --base HuggingFaceTB/SmolLM2-135M --few-shot ...
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common


def parse_args(argv: list[str]):
    parser = common.common_parser(
        __doc__, model="runs/sft/model", out="runs/expert_iteration", samples=4, temperature=1.0, lr=1e-3, epochs=4,
        batch_size=16, limit_train=None, checkpoint_every=300,
    )  # fmt: skip
    add, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "--base",
        default="tiny",
        help="pretrained model that every round trains from, whatever --model is",
    )
    add("--rounds", type=common.number(int, 1), default=2,
        help="at most (paper: 2 from SFT, 5 without); with --resume also more than before")  # fmt: skip
    add("--continue", dest="from_previous", action="store_true", help="train on from the last round's policy, not the base")  # fmt: skip
    add(
        "--sft-data",
        action=yes_or_no,
        help="mix in the written solutions (default: unless --model is the base)",
    )
    add("--deduplicate", action=yes_or_no, default=False,
        help="of a question's solutions with the same sequence of operations keep the first, not all that are sampled")  # fmt: skip
    add("--few-shot", action="store_true",
        help="two worked examples in the prompt of round 1, for a base that never saw the format")  # fmt: skip
    add("--pass-k", type=common.number(int, 0), default=8, help="samples per dev problem for pass@k after a round; 0: none")  # fmt: skip
    add(
        "--orm",
        help="folder of a reward model that decides in place of the answer check what is kept",
    )
    add("--orm-threshold", type=common.number(float, 0, 1), help="with --orm: the lowest score that is kept (default: 0.5)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.orm_threshold is not None and not args.orm:
        parser.error("--orm-threshold is for --orm; without it right solutions are kept")
    args.orm_threshold = 0.5 if args.orm_threshold is None else args.orm_threshold
    if args.temperature == 0 and args.samples > 1:
        parser.error(
            "--temperature 0: greedy samples of a question are all the same; use --samples 1"
        )
    if args.temperature == 0 and args.pass_k > 1:
        parser.error(
            "--temperature 0: all samples of a problem are the same; use --pass-k 0, the greedy one is maj@1"
        )
    return args


def keep_accepted(
    samples: list[common.Sample],
    kept: dict[str, dict[tuple, str]],
    threshold: float | None = None,
    deduplicate: bool = False,
) -> list[common.Sample]:
    """The finished samples that are correct, or with `threshold` those that the ORM scored at least so high. They are added
    to `kept` (problem id -> key -> solution; the written solutions and those of earlier rounds are there already) under a
    number of their own; with `deduplicate` under their sequence of operations, and only if there is none with it yet. After
    --resume this runs again for every earlier round, so it must depend on its arguments alone."""
    new = []
    for sample in samples:
        accepted = (
            sample.correct
            if threshold is None
            else sample.answer is not None and sample.score >= threshold
        )
        if not (accepted and sample.finished):
            continue
        solutions = kept.setdefault(sample.problem.id, {})
        key = common.equations(sample.text) if deduplicate else (len(solutions),)
        if key not in solutions:
            solutions[key] = sample.solution
            new.append(sample)
    return new


def train_step(
    policy: common.Policy, optimizer: torch.optim.Optimizer, batch: list, token_budget: int
) -> tuple[float, float]:
    """Make one optimizer step on the mean cross-entropy of the solution tokens of a batch.

    Returns the loss in nats per token and the norm of the gradient before clipping.
    """
    n_tokens, loss = sum(len(solution) for _, solution in batch), 0.0
    for indices in common.micro_batches([len(p) + len(s) for p, s in batch], token_budget):
        logprobs = common.response_logprobs(policy, [batch[i] for i in indices])
        micro_loss = -logprobs.sum() / n_tokens
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = list(policy.model.parameters())
    (loss,) = common.sum_gradients(parameters, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    common.require_finite(loss, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # 0. problems; the written solutions, if they take part, are the data that round 1 adds to
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    if args.sft_data is None:
        starts = (args.model, "--model"), (args.base, "--base")
        args.sft_data = len({Path(common.model_folder(*start)).resolve() for start in starts}) > 1
    run = common.Run(args, may_grow="rounds")
    if run.is_finished and run.state.get("progress", {}).get("round", math.inf) > args.rounds:
        print(f"{args.out} is complete")
        return
    if (
        run.is_finished
    ):  # and more rounds are asked for: the last one was the best, and model/ holds its weights
        folder = str(run.out / "model")
        run.state["model"] = common.Policy(folder, "cpu").model.state_dict()
    if (
        run.state and not args.from_previous
    ):  # the checkpoint holds weights that were trained from the base
        policy = common.Policy(args.base, args.device, args.dtype, flag="--base")
    else:
        policy = common.Policy(args.model, args.device, args.dtype)
        common.check_memory(
            policy.model
        )  # like a wrong --base, this must not show only after hours of sampling
        if not args.from_previous:
            # a wrong base must show now
            common.check_base(policy, common.Policy(args.base, "cpu", flag="--base"), args.base)
    if run.state:
        policy.condition("none")
    orm = None
    if args.orm:
        import reward_model

        orm = reward_model.RewardModel(args.orm, args.device, args.dtype)
    if args.sft_data:
        for problem in train:  # whether they fit must show now, not after the sampling
            policy.encode_example(problem, problem.solution or "")
    common.encode_prompts(policy, train + dev, args.few_shot and not run.state)
    run.begin()
    kept = {
        p.id: {common.equations(p.solution): p.solution}
        for p in train
        if p.solution and args.sft_data
    }

    def accept(samples: list[common.Sample]) -> list[common.Sample]:
        if orm:
            orm.grade(samples, args.token_budget)
        return keep_accepted(samples, kept, args.orm_threshold if orm else None, args.deduplicate)

    progress = {"round": 1, "step_in_round": 0, "step": 0, "samples": 0, "tokens": 0}
    progress |= {"best": -1.0, "start": 0.0, "losses": [], "timing": {}}
    if run.state:
        progress |= run.state["progress"]
        policy.model.load_state_dict(run.state["model"])
        if run.is_finished:
            run.checkpoint(now=True, progress=progress, model=policy.model.state_dict())
    else:
        start = common.dev_metrics(
            policy, dev, args, args.pass_k, run.out / "samples" / "dev_0.jsonl", args.few_shot
        )
        run.log(step=0, samples=0, tokens=0, round=0, **start)
        progress["start"] = start["maj@1"]
    # what a restart builds on must be on the disk in full: earlier rounds, and this one's if it is training already
    for finished in range(1, progress["round"] + (progress["step_in_round"] > 0)):
        file = run.out / "samples" / f"round_{finished}.jsonl"
        samples = common.on_first(lambda file=file: common.read_samples(file, train, args.samples))
        if len(samples) != len(train) * args.samples:
            raise common.UserError(
                f"--resume: {run.out}/samples/round_{finished}.jsonl is damaged after line {len(samples)}"
            )
        if finished < progress["round"]:
            accept(samples)

    for round_number in range(progress["round"], args.rounds + 1):
        # 1. sample K solutions per question (read back where a restart finds them on disk)
        started = run.clock()
        samples = common.sample_to_file(
            policy, train, run.out / "samples" / f"round_{round_number}.jsonl", run,
            samples=args.samples, temperature=args.temperature, max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size,
            seed=[args.seed, round_number], few_shot=args.few_shot and round_number == 1,
            progress=f"round {round_number}",
        )  # fmt: skip
        progress["timing"].setdefault("seconds_sampling", run.clock() - started)

        # 2. keep the correct ones, add them to the data
        new = accept(samples)
        data = [(p, solution) for p in train for solution in kept.get(p.id, {}).values()]
        references = {p.id: common.equations(p.reference) for p in train if p.reference}
        follows = [
            common.equations(s.text) == references[s.problem.id]
            for s in new
            if s.problem.id in references
        ]
        filtering = {
            "correct": common.mean(s.correct for s in samples),
            "kept": len(new),
            "kept_correct": common.mean(s.correct for s in new),
            "solved": common.mean(
                any(s.correct for s in group) for group in common.by_problem(samples)
            ),
            "follows_reference": common.mean(follows),
            "sampled_no_answer": common.mean(s.answer is None for s in samples),
            "sampled_truncated": common.mean(not s.finished for s in samples),
            "train_size": len(data),
        }
        if not data:
            truncated = not any(sample.finished for sample in samples)
            remedy = (
                "all were truncated, raise --max-new-tokens"
                if truncated
                else "raise --samples or start from SFT"
            )
            raise common.UserError(
                f"no sample was accepted, so there is nothing to train on; {remedy}"
            )

        # 3. train from the base again; as in sft.py, the order of the data depends on the seed and the epoch alone
        if not args.from_previous and not (run.state and progress["step_in_round"]):
            del policy  # there may be room for one only
            policy = common.Policy(args.base, args.device, args.dtype, flag="--base")
        policy.condition(
            "none"
        )  # a model of rcrl.py may sample the first round, labels and all, but not be trained so
        optimizer = common.adam_w(policy.model.parameters(), args.lr)
        if run.state and progress["step_in_round"]:
            optimizer.load_state_dict(run.state["optimizer"])
        run.state = None
        examples = [policy.encode_example(p, s) for p, s in data]
        steps_per_epoch = -(-len(examples) // args.batch_size)
        n_steps = args.epochs * steps_per_epoch
        started = time.monotonic() - progress["timing"].get("seconds_training", 0.0)
        for step in tqdm(
            range(progress["step_in_round"], n_steps),
            desc=f"round {round_number} training",
            disable=None,
        ):
            epoch, index = divmod(step, steps_per_epoch)
            order = common.shuffled(len(examples), args.seed, round_number, epoch)
            batch = [
                examples[i] for i in order[index * args.batch_size : (index + 1) * args.batch_size]
            ]
            lr = common.cosine_lr(step, n_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            loss, progress["grad_norm"] = train_step(policy, optimizer, batch, args.token_budget)
            progress["losses"].append(loss)
            progress["tokens"] += sum(len(solution) for _, solution in batch)
            progress["step_in_round"], progress["timing"]["seconds_training"] = (
                step + 1,
                time.monotonic() - started,
            )
            run.checkpoint(
                progress=progress, model=policy.model.state_dict(), optimizer=optimizer.state_dict()
            )
        del optimizer  # twice as large as the model, and the next round samples first

        # 4. the best round by dev accuracy becomes model/
        metrics = common.dev_metrics(
            policy, dev, args, args.pass_k, run.out / "samples" / f"dev_{round_number}.jsonl"
        )
        progress |= {
            "step": progress["step"] + n_steps,
            "samples": progress["samples"] + len(samples),
        }
        run.log(
            step=progress["step"], samples=progress["samples"], tokens=progress["tokens"], round=round_number,
            **filtering, loss=float(np.mean(progress["losses"][-steps_per_epoch:])), grad_norm=progress["grad_norm"],
            lr=common.cosine_lr(n_steps - 1, n_steps, args.lr), **metrics, **progress["timing"],
        )  # fmt: skip
        if metrics["maj@1"] <= progress["best"]:
            print(f"round {round_number} did not improve dev accuracy: stopping")
            run.finish()
            break
        progress["best"] = metrics["maj@1"]
        policy.save(run.out / "model")
        progress |= {"round": round_number + 1, "step_in_round": 0, "losses": [], "timing": {}}
        run.checkpoint(now=True, progress=progress, model=policy.model.state_dict())
    else:
        run.finish(progress=progress)
    if progress["best"] <= progress["start"]:
        common.warn(
            f"no round was better than what it started from, with maj@1 {progress['start']:.3f} on dev"
        )
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {Path(args.out) / 'model'}")


if __name__ == "__main__":
    common.run_main(main)
