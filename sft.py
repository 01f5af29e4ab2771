r"""Supervised fine-tuning on written solutions, the starting point of every other method.

Objective, for question q and solution s = s_1 ... s_T (the last token is the end-of-text token):

    minimise   - sum_t log pi(s_t | q, s_<t)   /   number of solution tokens in the batch

"Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et al. 2024), the SFT baseline: full
fine-tuning for 4 epochs (2 in the light variant) with a cosine schedule.

    0. load the problems that have a written solution; hold out dev
    1. every epoch: shuffle, then one optimizer step per batch
    2. after every epoch: greedy accuracy on dev; keep the best epoch as model/ (of equally good ones, as where nothing is
       right yet, the one with fewer solutions without an answer)

Where this differs from the paper: the question is masked and the epoch is chosen on dev (the paper does not say); no
weight decay; dropout is off.

CPU, a quarter of a minute, maj@1 on the test split from .44 to .75 (README.md has the table):
    python sft.py
One GPU, the paper's setting as far as we know it (README.md):
    python sft.py --model HuggingFaceTB/SmolLM2-135M --dataset gsm8k --epochs 4 --lr 2e-5 --batch-size 128 \
        --max-new-tokens 512 --out runs/gsm8k/sft
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common


def parse_args(argv: list[str]):
    parser = common.common_parser(
        __doc__, model="tiny", out="runs/sft", lr=2e-4, epochs=4, batch_size=8,
        temperature=0.7, limit_train=None, checkpoint_every=300,
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=common.number(int, 0), default=0,
        help="after every epoch also draw so many samples per dev problem at --temperature, for pass@k",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.temperature == 0 and args.samples > 1:
        parser.error(
            "--temperature 0: all samples of a problem are the same; the greedy one is maj@1"
        )
    return args


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


@torch.no_grad()
def cross_entropy(
    policy: common.Policy, examples: list[common.Example], token_budget: int
) -> float:
    """Mean cross-entropy of the response tokens, in nats per token."""
    total = 0.0
    for indices in common.micro_batches([len(p) + len(s) for p, s in examples], token_budget):
        total += common.response_logprobs(policy, [examples[i] for i in indices]).sum().item()
    return -sum(common.gather([total])) / sum(len(solution) for _, solution in examples)


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # 0. problems with a written solution; prompt and solution are encoded apart, as they are in sampling
    train = [p for p in common.load_problems(args.dataset, "train") if p.solution][
        : args.limit_train
    ]
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    if not train:
        raise common.UserError(
            f"--dataset {args.dataset} has no written solutions to fine-tune on; expert_iteration.py needs only answers"
        )
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    policy = common.Policy(args.model, args.device, args.dtype)
    policy.condition("none")  # a model of rcrl.py is trained on without its labels
    examples = [policy.encode_example(p, p.solution) for p in train]
    dev_examples = [policy.encode_example(p, p.solution) for p in dev if p.solution]
    common.encode_prompts(policy, dev)  # a prompt that is too long must show now
    run.begin()
    optimizer = common.adam_w(policy.model.parameters(), args.lr)
    steps_per_epoch = -(-len(examples) // args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    print(f"{len(examples)} solutions, {len(dev)} dev problems, {n_steps} steps")

    def evaluate(epoch: int) -> dict:
        metrics = common.dev_metrics(
            policy, dev, args, args.samples, run.out / "samples" / f"dev_{epoch}.jsonl"
        )
        if dev_examples:
            metrics["dev_loss"] = cross_entropy(policy, dev_examples, args.token_budget)
        return metrics

    progress = {"step": 0, "tokens": 0, "best": -1.0, "no_answer": 1.0, "losses": []}
    if run.state:
        progress |= run.state["progress"]
        policy.model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None  # as large as the model and its optimizer
    else:
        run.log(step=0, samples=0, tokens=0, epoch=0, **evaluate(0))

    first = progress["step"]
    for step in tqdm(
        range(first, n_steps), desc="training", initial=first, total=n_steps, disable=None
    ):
        # 1. one optimizer step; the order of an epoch depends on the seed alone, so a restart needs only `step`
        epoch, place = divmod(step, steps_per_epoch)
        order = common.shuffled(len(examples), args.seed, epoch)
        batch = [
            examples[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]
        ]
        lr = common.cosine_lr(step, n_steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        loss, grad_norm = train_step(policy, optimizer, batch, args.token_budget)
        progress["losses"].append(loss)
        progress["tokens"] += sum(len(solution) for _, solution in batch)
        progress["step"] = step + 1

        # 2. the best epoch by dev accuracy becomes model/
        if place == steps_per_epoch - 1:
            metrics = evaluate(epoch + 1)
            run.log(
                step=step + 1, samples=0, tokens=progress["tokens"], epoch=epoch + 1,
                loss=float(np.mean(progress["losses"])), grad_norm=grad_norm, lr=lr, **metrics,
            )  # fmt: skip
            progress["losses"] = []
            if (metrics["maj@1"], -metrics["no_answer"]) > (
                progress["best"],
                -progress["no_answer"],
            ):
                progress |= {"best": metrics["maj@1"], "no_answer": metrics["no_answer"]}
                policy.save(run.out / "model")
        run.checkpoint(
            progress=progress, model=policy.model.state_dict(), optimizer=optimizer.state_dict()
        )
    run.finish()
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {Path(args.out) / 'model'}")


if __name__ == "__main__":
    common.run_main(main)
