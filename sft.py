r"""Supervised fine-tuning on written solutions, the starting point of every other method.

This is the SFT baseline of "Teaching Large Language Models to Reason with Reinforcement Learning"
(Havrilla et al. 2024): all weights, 4 epochs (2 in the paper's light variant), a cosine schedule.
The objective for a question q and a solution s = s_1 ... s_T, with the end-of-text token as s_T:

    minimise   - sum_t log pi(s_t | q, s_<t)   /   number of solution tokens in the batch

    0. Load the problems that have a written solution. Hold out dev.
    1. In every epoch, shuffle the solutions and make one optimizer step per batch.
    2. After every epoch, measure greedy accuracy on dev (maj@1). Keep the best epoch as model/. If
       two epochs are equally good, keep the one with fewer missing answers.

Choices where the paper is silent: the loss leaves out the question, dev chooses the epoch, and
there is no weight decay and no dropout.

CPU, 15 seconds, maj@1 on the test split from .44 to .75 (README.md has the table):
    python sft.py
One GPU, the paper's setting as far as we know it (docs/gsm8k.md):
    python sft.py --model HuggingFaceTB/SmolLM2-135M --dataset gsm8k --epochs 4 --lr 2e-5 \
        --batch-size 128 --max-new-tokens 512 --out runs/gsm8k/sft
"""

import math

import torch
from tqdm import tqdm

import common
import runtime


def parse_args(argv: list[str]):
    defaults = dict(model="tiny", out="runs/sft", lr=2e-4, epochs=4, batch_size=8, temperature=0.7)
    parser = runtime.common_parser(__doc__, **defaults, **runtime.TRAINING, checkpoint_every=300)
    samples_help = "samples per dev problem for pass@k, at --temperature; 0: none"
    parser.add_argument("--samples", type=runtime.number(int, 0), default=0, help=samples_help)
    args = parser.parse_args(argv)
    if args.temperature == 0 and args.samples > 1:
        parser.error("--temperature 0: all samples of a problem are the same; maj@1 is greedy")
    return args


def train_step(policy, optimizer, batch: list, token_budget: int) -> tuple[float, float]:
    """Make one optimizer step on the mean cross-entropy of the solution tokens of a batch.

    batch: pairs of prompt and solution ids. Returns the loss per token and the gradient norm.
    """
    n_tokens, loss = sum(len(solution) for _, solution in batch), 0.0
    for indices in common.micro_batches([len(p) + len(s) for p, s in batch], token_budget):
        logprobs = common.response_logprobs(policy, [batch[i] for i in indices])
        micro_loss = -logprobs.sum() / n_tokens
        micro_loss.backward()
        loss += micro_loss.item()
    parameters = optimizer.param_groups[0]["params"]
    (loss,) = runtime.sum_gradients(parameters, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    common.require_finite(loss, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


@torch.no_grad()
def cross_entropy(policy: common.Policy, examples: list, token_budget: int) -> float:
    """Return the mean cross-entropy of the solution tokens, in nats per token."""
    n_tokens, total = sum(len(solution) for _, solution in examples), 0.0
    for indices in common.micro_batches([len(p) + len(s) for p, s in examples], token_budget):
        total += common.response_logprobs(policy, [examples[i] for i in indices]).sum().item()
    return -sum(runtime.gather([total])) / n_tokens


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    # 0. Load the problems and the policy. Encode everything now, so that errors show early.
    train = [p for p in common.load_problems(args.dataset, "train") if p.solution]
    train = train[: args.limit_train]
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    hint = "no written solutions to fine-tune on; expert_iteration.py needs only answers"
    runtime.require(train, f"--dataset {args.dataset} has {hint}")
    run = runtime.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    policy = common.Policy(args.model, args.device, args.dtype)
    # If --model comes from rcrl.py, continue without its return labels.
    policy.condition("none")
    policy.prepare_training(args)
    examples = [policy.encode_example(p, p.solution) for p in train]
    dev_examples = [policy.encode_example(p, p.solution) for p in dev if p.solution]
    common.encode_prompts(policy, train + dev)
    run.begin()

    def evaluate(epoch: int) -> dict:
        metrics = common.dev_metrics(policy, dev, args, epoch, args.samples)
        if dev_examples:
            metrics["dev_loss"] = cross_entropy(policy, dev_examples, args.token_budget)
        return metrics

    optimizer = common.adam_w(policy.trained.parameters(), args.lr)
    steps_per_epoch = math.ceil(len(examples) / args.batch_size)
    n_steps = args.epochs * steps_per_epoch
    print(f"{len(examples)} solutions, {len(dev)} dev problems, {n_steps} steps")
    progress = {"epoch": 0, "step_in_epoch": 0, "step": 0, "samples": 0, "tokens": 0}
    progress |= {"losses": [], "best": (-1.0, 0.0)}
    if run.state:
        progress |= run.state["progress"]
        policy.trained.load_state_dict(run.state["trained"])
        optimizer.load_state_dict(run.state["optimizer"])
        # It is as large as the model and its optimizer.
        run.state = None
    else:
        run.log(step=0, samples=0, tokens=0, epoch=0, **evaluate(0))

    for epoch in range(progress["epoch"], args.epochs):
        # 1. Train. The order depends on the seed and the epoch alone, so that a run can resume.
        order = common.shuffled(len(examples), args.seed, epoch)
        steps = range(progress["step_in_epoch"], steps_per_epoch)
        for step in tqdm(steps, desc=f"epoch {epoch + 1}", disable=None):
            indices = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = [examples[i] for i in indices]
            lr = common.cosine_lr(epoch * steps_per_epoch + step, n_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr
            loss, grad_norm = train_step(policy, optimizer, batch, args.token_budget)
            progress["losses"].append(loss)
            progress |= {"grad_norm": grad_norm, "lr": lr, "step_in_epoch": step + 1}
            progress["tokens"] += sum(len(solution) for _, solution in batch)
            progress["step"] += 1
            state = {"trained": policy.trained.state_dict(), "optimizer": optimizer.state_dict()}
            run.checkpoint(**state, progress=progress)
        progress |= {"epoch": epoch + 1, "step_in_epoch": 0}

        # 2. Measure the epoch. The best one on dev becomes model/.
        metrics = evaluate(epoch + 1)
        counts = {key: progress[key] for key in ("step", "samples", "tokens")}
        loss = common.mean(progress["losses"][-steps_per_epoch:])
        training = {"loss": loss, "grad_norm": progress["grad_norm"], "lr": progress["lr"]}
        run.log(**counts, epoch=epoch + 1, **training, **metrics)
        score = metrics["maj@1"], -metrics["no_answer"]
        if score > progress["best"]:
            progress["best"] = score
            policy.save(run.out / "model")
    run.finish()
    print(f"best maj@1 on dev {progress['best'][0]:.3f}; model in {run.out / 'model'}")


if __name__ == "__main__":
    runtime.run_main(main)
