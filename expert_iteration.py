r"""Expert iteration: sample solutions, keep the correct ones, train the base on them, repeat.

This is the best method of "Teaching Large Language Models to Reason with Reinforcement Learning"
(Havrilla et al. 2024). D_0 is the SFT data. Round i adds the correct samples of pi_{i-1} to it:
D_i is D_{i-1} with these samples. The objective, starting from the pretrained base:

    pi_i  =  argmin   - mean over (q, s) in D_i and t of  log pi(s_t | q, s_<t)

    0. Load the problems and the written solutions.
    1. In every round, sample K solutions per training question from pi_{i-1} at temperature 1.
    2. Keep the correct ones, each as often as it was sampled (--deduplicate: one per sequence of
       operations). With --orm, keep what a reward model scores highly.
    3. Train the pretrained base again, with the loss of sft.py. With --continue, train pi_{i-1}.
    4. Measure greedy accuracy on dev. Keep the best round as model/. Stop when a round is not
       better than all before. The first policy is measured but never chosen.

Where the paper is silent: the SFT data stays in the mix, unless --model is the base itself. There
is no de-duplication. It would make a lucky solution count as much as a frequent derivation.
--max-per-question N is from ReST-EM (Singh et al. 2023) and VinePPO (Kazemnejad et al. 2024). Both
take 10, so that easy questions do not dominate. Every round chooses N of all solutions so far, at
random by seed, round and question. The written solution always stays.

CPU, after `python sft.py`, 11 minutes on two cores; the second command uses no written solution:
    python expert_iteration.py
    python expert_iteration.py --model tiny --samples 8 --epochs 3 --out runs/ei_base
One GPU, after sft.py, the paper's setting as far as we know it (docs/gsm8k.md):
    python expert_iteration.py --model runs/gsm8k/sft/model --base HuggingFaceTB/SmolLM2-135M \
        --dataset gsm8k --samples 96 --epochs 4 --lr 2e-5 --batch-size 128 --max-new-tokens 512 \
        --out runs/gsm8k/ei
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import common
import runtime


def parse_args(argv: list[str]):
    defaults = dict(model="runs/sft/model", out="runs/expert_iteration", samples=4)
    defaults |= dict(temperature=1.0, lr=1e-3, epochs=4, batch_size=16)
    parser = runtime.common_parser(__doc__, **defaults, **runtime.TRAINING, checkpoint_every=300)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--base", default="tiny", help="pretrained model that every round trains from")
    add("--rounds", type=runtime.WHOLE, default=2, help="at most; --resume may raise it (paper: 2)")
    add("--continue", dest="from_previous", action="store_true", help="train on from pi_{i-1}")
    add("--sft-data", action=switch, help="add written solutions (default: unless from the base)")
    add("--deduplicate", action=switch, default=False, help="keep a sequence of operations once")
    add("--max-per-question", type=runtime.WHOLE, help="most solutions of a question (ReST-EM: 10)")
    add("--few-shot", action="store_true", help="two worked examples in the prompt of round 1")
    add("--pass-k", type=runtime.number(int, 0), default=8, help="dev samples for pass@k; 0: none")
    add("--orm", help="reward model that accepts solutions instead of the answer check")
    add("--orm-threshold", type=runtime.number(float, 0, 1), default=0.5, help="lowest score kept")
    args = parser.parse_args(argv)
    parser.only_with("--orm", args.orm is not None, args, "orm_threshold")
    if args.temperature == 0 and max(args.samples, args.pass_k) > 1:
        parser.error("--temperature 0: all samples are the same; use --samples 1 and --pass-k 0")
    return args


def keep_accepted(samples, kept: dict, threshold: float | None = None, deduplicate=False) -> list:
    """Add the accepted solutions to `kept`, and return their samples.

    A finished sample is accepted if it is correct, or with `threshold` if a reward model scored it
    at least this high. kept: problem id -> number, or sequence of operations -> solution.
    """
    accepted = [s for s in samples if s.passed]  # correct and not truncated
    if threshold is not None:
        answered = [s for s in samples if s.finished and s.answer is not None]
        accepted = [s for s in answered if s.score >= threshold]
    new = []
    for sample in accepted:
        solutions = kept.setdefault(sample.problem.id, {})
        key = common.equations(sample.text) if deduplicate else (len(solutions),)
        if key not in solutions:
            solutions[key] = sample.solution
            new.append(sample)
    return new


def choose_solutions(kept: dict, n_written: int, limit: int | None, *seed: int) -> list[str]:
    """Return at most `limit` solutions of a question. The first `n_written` always stay."""
    solutions = list(kept.values())
    written, sampled = solutions[:n_written], solutions[n_written:]
    chosen = common.shuffled(len(sampled), *seed)[: limit - n_written if limit else None]
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
    # A larger norm lets the rounding of sums move the result by points (docs/findings.md).
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1).item()
    common.require_finite(loss, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    # 0. Load the problems and the policy. Encode everything now, so that errors show early.
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    if args.sft_data is None:
        model, base = runtime.model_folder(args.model), runtime.model_folder(args.base, "--base")
        args.sft_data = Path(model).resolve() != Path(base).resolve()
    run = runtime.Run(args, may_grow="rounds")
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    policy = common.Policy(args.model, args.device, args.dtype)
    common.check_base(policy, policy if args.from_previous else None, args)
    orm = None
    if args.orm:
        import reward_model

        orm = reward_model.RewardModel(args.orm, args.device, args.dtype)
    kept = {p.id: {} for p in train}
    written = {p.id: p for p in train if p.solution and args.sft_data}
    for problem in written.values():
        policy.encode_example(problem, problem.solution)
        kept[problem.id] = {common.equations(problem.solution): problem.solution}
    common.encode_prompts(policy, train + dev, args.few_shot)
    run.begin()

    progress = {"round": 1, "step_in_round": 0, "step": 0, "tokens": 0, "losses": [], "best": -1.0}
    if run.state:
        progress |= run.state["progress"]
    else:
        metrics = common.dev_metrics(policy, dev, args, 0, args.pass_k, args.few_shot)
        run.log(step=0, samples=0, tokens=0, round=0, **metrics)
        progress["start"] = metrics["maj@1"]

    for round_number in range(1, args.rounds + 1):
        # 1. Sample K solutions per question. A resumed run reads the ones that it has trained on.
        file, started = run.out / "samples" / f"round_{round_number}.jsonl", run.clock()
        if run.state:
            samples = common.read_samples(file, train)
            is_whole = len(samples) == len(train) * args.samples
            runtime.require(is_whole, f"--resume: {file} has lost samples")
        else:
            how = common.sampling(args) | dict(few_shot=args.few_shot and round_number == 1)
            how |= dict(seed=[args.seed, round_number], progress=f"round {round_number}")
            samples = common.sample_to_file(policy, train, file, run, **how)

        # 2. Keep the correct solutions.
        if orm:
            orm.grade(samples, args.token_budget)
        new = keep_accepted(samples, kept, args.orm_threshold if orm else None, args.deduplicate)
        if round_number < progress["round"]:
            continue
        runtime.require(any(kept.values()), "nothing to keep; raise --samples, --max-new-tokens")

        # 3. Train from the base again. There may be room for one model only.
        if not args.from_previous:
            del policy
            policy = common.Policy(args.base, args.device, args.dtype, flag="--base")
        policy.condition("none")  # without the labels of rcrl.py
        policy.prepare_training(args)
        examples, limit = [], args.max_per_question
        for i, p in enumerate(train, 1):
            seed = args.seed, round_number, 0, i
            solutions = choose_solutions(kept[p.id], int(p.id in written), limit, *seed)
            examples += [policy.encode_example(p, solution) for solution in solutions]
        optimizer = common.adam_w(policy.trained.parameters(), args.lr)
        # The order depends on the seed, round and epoch alone, so that a run can resume.
        n, starts = len(examples), range(0, len(examples), args.batch_size)
        orders = [common.shuffled(n, args.seed, round_number, e) for e in range(args.epochs)]
        batches = [order[i : i + args.batch_size] for order in orders for i in starts]
        if run.state:
            policy.trained.load_state_dict(run.state["trained"])
            optimizer.load_state_dict(run.state["optimizer"])
            run.state = None  # as large as the model and its optimizer
        else:
            progress |= {"seconds_sampling": run.clock() - started, "started": run.clock()}
        steps = range(progress["step_in_round"], len(batches))
        for step in tqdm(steps, desc=f"training in round {round_number}", disable=None):
            batch = [examples[i] for i in batches[step]]
            lr = common.cosine_lr(step, len(batches), args.lr, warmup=0.1)
            optimizer.param_groups[0]["lr"] = lr
            loss, grad_norm = train_step(policy, optimizer, batch, args.token_budget)
            progress["losses"].append(loss)
            progress |= {"grad_norm": grad_norm, "lr": lr, "step_in_round": step + 1}
            progress["tokens"] += sum(len(solution) for _, solution in batch)
            progress["step"] += 1
            state = {"trained": policy.trained.state_dict(), "optimizer": optimizer.state_dict()}
            # A run that is killed in the next sampling goes on from the last step of this round.
            run.checkpoint(now=step + 1 == len(batches), **state, progress=progress)
        progress["seconds_training"] = run.clock() - progress["started"]
        optimizer = state = None  # room for sampling

        # 4. Measure the round. The best one on dev becomes model/.
        metrics = common.dev_metrics(policy, dev, args, round_number, args.pass_k)
        keys = "step", "tokens", "grad_norm", "lr", "seconds_sampling", "seconds_training"
        row = {key: progress[key] for key in keys} | sample_metrics(samples, new) | metrics
        row |= {"samples": round_number * len(samples), "train_size": len(examples)}
        run.log(**row, round=round_number, loss=common.mean(progress["losses"][-len(starts) :]))
        if metrics["maj@1"] <= progress["best"]:
            print(f"round {round_number} did not improve dev accuracy: stopping")
            run.finish()  # for good; after the last round --resume may raise --rounds
            break
        progress |= {"best": metrics["maj@1"], "round": round_number + 1, "step_in_round": 0}
        policy.save(run.out / "model")
    if progress["best"] <= progress["start"]:
        runtime.warn(f"no round was better than what it started from ({progress['start']:.3f})")
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {run.out / 'model'}")


if __name__ == "__main__":
    runtime.run_main(main)
