r"""Expert iteration: sample solutions, keep the correct ones, train the base on them, repeat.

This is the best method of "Teaching Large Language Models to Reason with Reinforcement Learning"
(Havrilla et al. 2024). The objective of round i, with the correct samples R_i of pi_{i-1} and the
data D_i = R_i u D_{i-1} (D_0: the SFT data), starting from the pretrained base:

    pi_i  =  argmin   - sum over (q, s) in D_i   sum_t log pi(s_t | q, s_<t)

    0. Load the problems. The written solutions are the data that round 1 adds to.
    1. In every round, sample K solutions per training question from pi_{i-1} at temperature 1.
    2. Keep the correct ones and add them to the data, each as often as it was sampled. With
       --deduplicate, keep one per question and sequence of arithmetic operations. With --orm, keep
       the ones that a reward model scores at 0.5 or more. With --max-per-question N, train on at
       most N solutions of a question, so that easy questions do not dominate.
    3. Train from the pretrained base again, as in sft.py. With --continue, train from pi_{i-1}.
    4. Measure greedy accuracy on dev. Keep the best round as model/. Stop when a round does not
       improve on the one before. The first policy is measured but never chosen. A warning says if
       no round was better.

Differences from the paper: The SFT data stays in the mix. --no-sft-data leaves it out, the default
if --model is the base itself. The paper counts distinct solutions by their operations. We could not
check whether it trains on de-duplicated solutions. De-duplication makes training faster but can
hurt. A solution that reached the answer by luck, sampled once, then counts as much as a correct
derivation that was sampled many times (README.md has the numbers).

--max-per-question follows ReST-EM (Singh et al. 2023, arXiv 2312.06585) and its version in VinePPO
(Kazemnejad et al. 2024, arXiv 2410.01679). Both take 10. If more than N were accepted in all rounds
so far, every round chooses N of them at random, each with the same chance. The choice depends on
the seed, the round and the question alone. The written solution counts and is always kept.

At the default --lr, the order in which sums are rounded moves maj@1 of the first round by up to ten
points. At 3e-4 it moves by half a point. But two rounds on the harder task are worse with 3e-4
(results/README.md, "What rounding does").

CPU, after `python sft.py`: 11 minutes on two cores, the first round 3 (README.md has the numbers):
    python expert_iteration.py
From the base, without any written solution:
    python expert_iteration.py --model tiny --samples 8 --epochs 3 --out runs/ei_base
One GPU, after sft.py, the paper's setting as far as we know it (README.md):
    python expert_iteration.py --model runs/gsm8k/sft/model --base HuggingFaceTB/SmolLM2-135M \
        --dataset gsm8k --samples 96 --epochs 4 --lr 2e-5 --batch-size 128 --max-new-tokens 512 \
        --out runs/gsm8k/ei
From a pretrained model B, with two worked examples in the prompt of round 1:
    python expert_iteration.py --model B --base B --few-shot ...
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

import common
import runtime


def parse_args(argv: list[str]):
    defaults = dict(model="runs/sft/model", out="runs/expert_iteration", samples=4)
    defaults |= dict(temperature=1.0, lr=1e-3, epochs=4, batch_size=16)
    parser = runtime.common_parser(__doc__, **defaults, limit_train=None, checkpoint_every=300)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--base", default="tiny", help="pretrained model that every round trains from")
    rounds_help = "at most (paper: 2 from SFT, 5 without); --resume may raise it"
    add("--rounds", type=runtime.WHOLE, default=2, help=rounds_help)
    add("--continue", dest="from_previous", action="store_true", help="train on from pi_{i-1}")
    sft_help = "mix in the written solutions (default: unless --model is the base)"
    add("--sft-data", action=switch, help=sft_help)
    add("--deduplicate", action=switch, default=False, help="keep a sequence of operations once")
    limit_help = "most solutions of a question to train on (ReST-EM: 10; default: no limit)"
    add("--max-per-question", type=runtime.WHOLE, metavar="N", help=limit_help)
    add("--few-shot", action="store_true", help="two worked examples in the prompt of round 1")
    pass_k_help = "samples per dev problem for pass@k, at --temperature, after a round; 0: none"
    add("--pass-k", type=runtime.number(int, 0), default=8, help=pass_k_help)
    add("--orm", help="folder of a reward model that accepts solutions, not the answer check")
    add("--orm-threshold", type=runtime.number(float, 0, 1), default=0.5, help="lowest score kept")
    args = parser.parse_args(argv)
    parser.only_with("--orm", args.orm is not None, args, "orm_threshold")
    if args.temperature == 0 and max(args.samples, args.pass_k) > 1:
        advice = "use --samples 1" if args.samples > 1 else "use --pass-k 0, maj@1 is greedy"
        parser.error(f"--temperature 0: all samples of a problem are the same; {advice}")
    return args


def keep_accepted(
    samples: list[common.Sample], kept: dict, threshold: float | None = None, deduplicate=False
) -> list[common.Sample]:
    """Add the accepted solutions to `kept`, and return their samples.

    A finished sample is accepted if it is correct. With `threshold`, it is accepted if it has an
    answer and the reward model scored it at least this high. kept: problem id -> key -> solution,
    also from earlier rounds. The key is a new number. With `deduplicate` it is the sequence of
    operations, and a key that is in `kept` already is skipped. After --resume this runs again for
    every earlier round. So the result must depend on the arguments alone.
    """
    new = []
    for sample in samples:
        accepted = sample.correct
        if threshold is not None:
            accepted = sample.answer is not None and sample.score >= threshold
        if not (accepted and sample.finished):
            continue
        solutions = kept.setdefault(sample.problem.id, {})
        key = common.equations(sample.text) if deduplicate else (len(solutions),)
        if key not in solutions:
            solutions[key] = sample.solution
            new.append(sample)
    return new


def choose_solutions(solutions: list[str], n_written: int, limit: int | None, *seed: int):
    """Return the solutions of a question to train on: at most `limit`, chosen at random.

    The first `n_written` solutions are written ones and always stay. The order does not change.
    """
    if limit is None or len(solutions) <= limit:
        return solutions
    written, sampled = solutions[:n_written], solutions[n_written:]
    chosen = common.shuffled(len(sampled), *seed)[: limit - n_written]
    return written + [sampled[i] for i in sorted(chosen)]


def sample_metrics(samples: list[common.Sample], new: list[common.Sample]) -> dict:
    """Return fractions of the samples of a round and of its accepted samples `new`."""
    pairs = [(s.text, s.problem.reference) for s in new if s.problem.reference]
    follows = [common.equations(text) == common.equations(reference) for text, reference in pairs]
    groups = common.by_problem(samples)
    return {
        "correct": common.mean(s.correct for s in samples),
        "kept": len(new),
        "kept_correct": common.mean(s.correct for s in new),
        "solved": common.mean(any(s.correct for s in group) for group in groups),
        "follows_reference": common.mean(follows),
        "sampled_no_answer": common.mean(s.answer is None for s in samples),
        "sampled_truncated": common.mean(not s.finished for s in samples),
    }


def train_step(
    policy: common.Policy, optimizer: torch.optim.Optimizer, batch: list, token_budget: int
) -> tuple[float, float]:
    """Make one optimizer step on the mean cross-entropy of the solution tokens of a batch.

    batch: pairs of prompt ids and solution ids. Returns the loss in nats per token and the norm of
    the gradient before clipping.
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


def load_policy(args: argparse.Namespace, run: runtime.Run) -> common.Policy:
    """Load the policy that comes first in this run: --model, or the one of the checkpoint."""
    if run.is_finished:
        # More rounds are asked for. The weights of the last round are in model/ alone.
        run.state["model"] = common.Policy(str(run.out / "model"), "cpu").model.state_dict()
    from_base = run.state and not args.from_previous
    name, flag = (args.base, "--base") if from_base else (args.model, "--model")
    policy = common.Policy(name, args.device, args.dtype, flag)
    if run.state:
        policy.condition("none")
        policy.model.load_state_dict(run.state["model"])
        return policy
    # Fail now rather than after hours of sampling if training will not fit or --base is wrong.
    common.check_memory(policy.model)
    if not args.from_previous:
        base = common.Policy(args.base, "cpu", flag="--base")
        common.check_base(policy, base, args.base)
    return policy


def read_round(file: Path, train: list[common.Problem], n: int) -> list[common.Sample]:
    """Read the `n` samples per problem of a round. Raises UserError if one is missing."""
    samples = runtime.on_first(lambda: common.read_samples(file, train, n))
    is_complete = len(samples) == len(train) * n
    runtime.require(is_complete, f"--resume: {file} is damaged after line {len(samples)}")
    return samples


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    # 0. Load the problems and the policy. Encode everything now, so that errors show early.
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    if args.sft_data is None:
        model, base = runtime.model_folder(args.model), runtime.model_folder(args.base, "--base")
        args.sft_data = Path(model).resolve() != Path(base).resolve()
    run = runtime.Run(args, may_grow="rounds")
    if run.is_finished and run.state["progress"]["round"] > args.rounds:
        print(f"{args.out} is complete")
        return
    policy = load_policy(args, run)
    orm = None
    if args.orm:
        import reward_model

        orm = reward_model.RewardModel(args.orm, args.device, args.dtype)
    written = {p.id: p.solution for p in train if p.solution and args.sft_data}
    kept = {p.id: {} for p in train}
    for problem in [p for p in train if p.id in written]:
        policy.encode_example(problem, problem.solution)
        kept[problem.id] = {common.equations(problem.solution): problem.solution}
    common.encode_prompts(policy, train + dev, args.few_shot and not run.state)
    run.begin()

    def evaluate(round_number: int) -> dict:
        file = run.out / "samples" / f"dev_{round_number}.jsonl"
        few_shot = args.few_shot and round_number == 0
        return common.dev_metrics(policy, dev, args, args.pass_k, file, few_shot)

    progress = {"epoch": 0, "step_in_epoch": 0, "step": 0, "samples": 0, "tokens": 0}
    progress |= {"losses": [], "best": -1.0, "start": 0.0, "round": 1}
    if run.state:
        progress |= run.state["progress"]
        if run.is_finished:
            run.checkpoint(now=True, progress=progress, model=policy.model.state_dict())
    else:
        metrics = evaluate(0)
        run.log(step=0, samples=0, tokens=0, round=0, **metrics)
        progress["start"] = metrics["maj@1"]

    for round_number in range(1, args.rounds + 1):
        # 1. Sample K solutions per question. Read the ones that the run has trained on before.
        is_past, in_training = round_number < progress["round"], progress["step_in_epoch"] > 0
        file, started = run.out / "samples" / f"round_{round_number}.jsonl", run.clock()
        if is_past or in_training:
            samples = read_round(file, train, args.samples)
        else:
            how = dict(samples=args.samples, temperature=args.temperature)
            how |= dict(max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size)
            how |= dict(seed=[args.seed, round_number], progress=f"round {round_number}")
            how |= dict(few_shot=args.few_shot and round_number == 1)
            samples = common.sample_to_file(policy, train, file, run, **how)
            seconds = run.clock() - started
            progress["timing"] = {"seconds_sampling": seconds, "seconds_training": 0.0}

        # 2. Keep the correct solutions.
        if orm:
            orm.grade(samples, args.token_budget)
        threshold = args.orm_threshold if orm else None
        new = keep_accepted(samples, kept, threshold, args.deduplicate)
        if is_past:
            continue
        filtered, data = sample_metrics(samples, new), []
        for i, p in enumerate(train, 1):
            # The data order of an epoch has the seed (seed, round, epoch). This one has one more.
            seed = args.seed, round_number, 0, i
            solutions, limit = list(kept[p.id].values()), args.max_per_question
            solutions = choose_solutions(solutions, int(p.id in written), limit, *seed)
            data += [(p, solution) for solution in solutions]
        filtered["train_size"] = len(data)
        truncated = f"{filtered['sampled_truncated']:.0%} were truncated"
        hint = f"{truncated}; raise --max-new-tokens or --samples, or start from SFT"
        runtime.require(data, f"no sample was accepted to train on; {hint}")

        # 3. Train from the base again.
        if not (args.from_previous or in_training):
            # There may be room for one model only.
            del policy
            policy = common.Policy(args.base, args.device, args.dtype, flag="--base")
        # A model of rcrl.py may sample the first round with its labels. Training has no labels.
        policy.condition("none")
        examples = [policy.encode_example(p, s) for p, s in data]
        optimizer = common.adam_w(policy.model.parameters(), args.lr)
        steps_per_epoch = math.ceil(len(examples) / args.batch_size)
        n_steps = args.epochs * steps_per_epoch
        if in_training:
            optimizer.load_state_dict(run.state["optimizer"])
        # It is as large as the model and its optimizer.
        run.state = None
        started = run.clock() - progress["timing"]["seconds_training"]

        for epoch in range(progress["epoch"], args.epochs):
            # The order depends on the seed, round and epoch alone, so that a run can resume.
            order = common.shuffled(len(examples), args.seed, round_number, epoch)
            steps = range(progress["step_in_epoch"], steps_per_epoch)
            for step in tqdm(steps, desc=f"round {round_number} epoch {epoch + 1}", disable=None):
                indices = order[step * args.batch_size : (step + 1) * args.batch_size]
                batch = [examples[i] for i in indices]
                lr = common.cosine_lr(epoch * steps_per_epoch + step, n_steps, args.lr)
                optimizer.param_groups[0]["lr"] = lr
                loss, grad_norm = train_step(policy, optimizer, batch, args.token_budget)
                progress["losses"].append(loss)
                progress |= {"grad_norm": grad_norm, "lr": lr, "step_in_epoch": step + 1}
                progress["tokens"] += sum(len(solution) for _, solution in batch)
                progress["step"] += 1
                progress["timing"]["seconds_training"] = run.clock() - started
                state = {"model": policy.model.state_dict(), "optimizer": optimizer.state_dict()}
                run.checkpoint(**state, progress=progress)
            progress |= {"epoch": epoch + 1, "step_in_epoch": 0}
        # It is twice as large as the model, and sampling comes next.
        del optimizer

        # 4. Measure the round. The best one on dev becomes model/.
        metrics = evaluate(round_number)
        progress["samples"] += len(samples)
        counts = {key: progress[key] for key in ("step", "samples", "tokens")}
        loss = common.mean(progress["losses"][-steps_per_epoch:])
        training = {"loss": loss, "grad_norm": progress["grad_norm"], "lr": progress["lr"]}
        training |= metrics | progress["timing"]
        run.log(**counts, round=round_number, **filtered, **training)
        if metrics["maj@1"] <= progress["best"]:
            print(f"round {round_number} did not improve dev accuracy: stopping")
            # More rounds do not go on from here.
            progress["round"] = math.inf
            break
        progress["best"] = metrics["maj@1"]
        policy.save(run.out / "model")
        progress |= {"round": round_number + 1, "epoch": 0, "losses": []}
        run.checkpoint(now=True, progress=progress, model=policy.model.state_dict())
    run.finish(progress=progress)
    if progress["best"] <= progress["start"]:
        hint = f"with maj@1 {progress['start']:.3f} on dev"
        runtime.warn(f"no round was better than what it started from, {hint}")
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {run.out / 'model'}")


if __name__ == "__main__":
    runtime.run_main(main)
