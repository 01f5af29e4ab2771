r"""PPO on reasoning problems: a clipped policy gradient with a KL penalty.

Objective, for question q and sampled solution s with tokens s_1 ... s_T:

    maximise  E_{q, s ~ pi} [ R(q, s) - kl_coef * sum_t KL_t ]
    KL_t = log pi(s_t | q, s_<t) - log pi_ref(s_t | q, s_<t)        (both at --temperature)

This is the PPO of "Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla
et al. 2024), with the clipped surrogate of Schulman et al. (2017). In every phase:

    1. Choose questions (--curriculum) and sample solutions from the policy.
    2. Give every token its task reward (--reward).
    3. Compute log-probabilities and values in one forward pass, pi_ref in another.
    4. Subtract the KL penalty: reward of a token = task reward - kl_coef * KL_t.
    5. Estimate the advantages (--advantage).
    6. Train for several epochs on minibatches with the clipped policy loss and value loss.
    7. Every few phases measure greedy accuracy on dev. The best policy becomes model/.
    8. Log the phase and save a checkpoint.

Rewards. A truncated solution gets 0.
    sparse     1 at the last token if the answer is correct. The verifier checks the answer.
    dense      sparse, plus 1/n at the end of a line that first has one of the reference's n values.
    orm        At the last token the probability that an outcome reward model (ORM) gives.
    orm_dense  The same by line: each line gets the rise of that probability.
    genrm      At the last token the score of a generative reward model (GenRM). It compares with
               the gold solution, or with a sample of --references if it is missing or hidden.
    hybrid     genrm for the questions whose answer is hidden (--hide), sparse for the others.
Advantages. K samples of a question. R_i: the summed rewards of sample i, less its KL penalty.
    gae    By a learned value function, whitened (Schulman et al. 2016). The others have none.
    group  A_i = R_i - mean_j R_j (Dr. GRPO, Liu et al. 2025). --group-std divides the task reward
           by its standard deviation in the group (GRPO, Shao et al. 2024).
    loo    A_i = R_i - mean of the others (RLOO, Ahmadian et al. 2024), an unbiased estimate.
    mc     Line j gets r_j + V_j - V_{j-1}, r_j the sum of its rewards. V_j is the fraction correct
           of --mc-samples completions of the lines 1 ... j, V_0 that of the other samples.
           Completions count as rollouts (VinePPO, Kazemnejad et al. 2024).
Curricula.
    backtracking      Begin within the reference solution. Reveal less as success grows.
    plr               Prefer questions whose value was wrong (Prioritized Level Replay).
    verifiable_first  Up to --switch leave out the questions that are compared with a sample.
Selection of questions to add to --limit-train, by --scores (samples of the initial policy).
    lowest    The lowest scores (Pre-PPO). floor: the lowest with at least one correct sample.
    frontier  Solved nearest to half of the time. random: any, as a control.

genrm, hybrid, verifiable_first and --select follow "Exploring Data Scaling Trends and Effects in
RLHF" (Shen et al. 2025). Our choices: lambda of GAE is 1. In the first phase only the value
function trains. The learning rate rises over 20 steps, then falls. The loss is a mean over tokens.

CPU, six minutes on one core after `python sft.py`, maj@1 on the test split from .75 to .87:
    python ppo.py
One GPU, the paper's setting as far as we know it (docs/gsm8k.md), after sft.py:
    python ppo.py --model runs/gsm8k/sft/model --dataset gsm8k --lora-rank 128 --lr 1e-6 \
        --value-lr 1e-5 --questions 256 --samples 4 --epochs 4 --batch-size 256 --phases 250 \
        --max-new-tokens 512 --out runs/gsm8k/ppo
"""

import contextlib
import copy
import itertools
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import common
import runtime

LR_WARMUP = 20  # steps in which the learning rate of the policy rises
VALUE_LAYERS = 4  # layers of the value function, at most half of the policy's
STATS = "policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "value_grad_norm"


def parse_args(argv: list[str]):
    defaults = dict(model="runs/sft/model", out="runs/ppo", samples=4, temperature=0.7, lr=2e-4)
    defaults |= dict(epochs=2, batch_size=128, checkpoint_every=120)
    parser = runtime.common_parser(__doc__, **defaults, **runtime.TRAINING | {"lora_rank": None})
    whole, not_negative, fraction = runtime.WHOLE, runtime.NOT_NEGATIVE, runtime.number(float, 0, 1)
    add = parser.group("problem and model").add_argument
    add("--few-shot", action="store_true", help="show two worked examples, for a base model")
    add = parser.group("sampling").add_argument
    add("--questions", type=whole, default=128, help="questions per phase (paper: 256)")
    kinds = ["none", "backtracking", "plr", "verifiable_first"]
    add("--curriculum", choices=kinds, default="none", help="order of the questions")
    add("--switch", type=fraction, default=0.3, help="verifiable_first: fraction of the phases")
    add = parser.group("PPO").add_argument
    add("--phases", type=whole, default=20, help="rounds of sampling and training")
    add("--kl-coef", type=not_negative, default=0.05, help="weight of the KL penalty (paper: 0.05)")
    add("--kl-limit", type=not_negative, default=0, help="`approx_kl` that ends a phase; 0: none")
    add("--clip-range", type=not_negative, default=0.2, help="limit of ratios and value changes")
    add("--clip-high", type=not_negative, help="limit of rising ratios (default: --clip-range)")
    add("--advantage", choices=["gae", "group", "loo", "mc"], default="gae", help="estimator")
    add("--group-std", action="store_true", help="group: divide the task reward by its deviation")
    add("--mc-samples", type=whole, default=9, help="mc: completions per prefix (VinePPO: 9)")
    add("--drop-uniform", action="store_true", help="skip questions with all or none correct")
    add("--gae-lambda", type=fraction, default=1.0, help="lambda of GAE (often 0.95)")
    add("--value-lr", type=not_negative, default=1e-3, help="learning rate of the value function")
    add("--no-detach-value", action="store_true", help="the value loss trains the policy too")
    add = parser.group("rewards").add_argument
    kinds = ["sparse", "dense", "orm", "orm_dense", "genrm", "hybrid"]
    add("--reward", choices=kinds, default="sparse", help="who scores the samples")
    add("--orm", help="folder of the ORM (default, if needed: runs/reward_model/model)")
    add("--genrm", help="folder of the GenRM (default, if needed: runs/genrm/model)")
    add("--add-outcome", action="store_true", help="orm, orm_dense: add 1 for a correct answer")
    about = "fractions: hidden answers, of these hidden solutions (genrm: 1 0, hybrid: 0.5 0)"
    add("--hide", type=fraction, nargs=2, metavar=("ANSWERS", "SOLUTIONS"), help=about)
    add("--references", metavar="FILE", help="scored samples for missing or hidden solutions")
    add = parser.group("selection").add_argument
    add("--select", choices=["lowest", "floor", "frontier", "random"], help="some of --scores")
    add("--scores", nargs="+", default=[], metavar="FILE", help="one scored file per domain")
    add("--select-fraction", type=runtime.number(float, 1e-6, 1), default=0.1, help="paper: 0.1")
    add = parser.group("run").add_argument
    add("--eval-every", type=whole, default=4, help="phases between evaluations on dev")
    args = parser.parse_args(argv)
    uses_orm, uses_genrm = args.reward.startswith("orm"), args.reward in ("genrm", "hybrid")
    is_mc, is_gae, refuse = args.advantage == "mc", args.advantage == "gae", parser.error_if
    is_staged, compares = args.curriculum == "verifiable_first", args.drop_uniform or not is_gae
    refuse(args.temperature == 0, "--temperature 0: greedy samples of a question are all the same")
    refuse(is_staged and not uses_genrm, "verifiable_first needs --reward genrm or hybrid")
    refuse(args.samples == 1 and compares, "--samples 1: a sample is compared with the others")
    refuse(args.select and not args.scores, "--select needs --scores of evaluate.py --split train")
    refuse(is_mc and args.reward != "sparse", "--advantage mc needs --reward sparse")
    refuse(is_mc and not Path(__file__).with_name("rcrl.py").exists(), "mc: copy rcrl.py here")
    refuse(args.drop_uniform and uses_genrm, "--drop-uniform needs answers, and some are hidden")
    parser.only_with("--advantage group", args.advantage == "group", args, "group_std")
    parser.only_with("--advantage mc", is_mc, args, "mc_samples")
    parser.only_with("--advantage gae", is_gae, args, "gae_lambda", "value_lr", "no_detach_value")
    parser.only_with("--reward orm or orm_dense", uses_orm, args, "orm", "add_outcome")
    parser.only_with("--reward genrm or hybrid", uses_genrm, args, "genrm", "hide", "references")
    parser.only_with("--curriculum verifiable_first", is_staged, args, "switch")
    parser.only_with("--select", bool(args.select), args, "scores", "select_fraction")
    args.orm = (args.orm or "runs/reward_model/model") if uses_orm else None
    args.genrm = (args.genrm or "runs/genrm/model") if uses_genrm else None
    args.clip_high = args.clip_range if args.clip_high is None else args.clip_high
    args.hide = args.hide or [{"genrm": 1.0, "hybrid": 0.5}.get(args.reward, 0.0), 0.0]
    return args


# ---- 1. The formulas -----------------------------------------------------------------------------


def penalised_rewards(task: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float):
    """Subtract the KL penalty. log pi - log pi_ref estimates the KL of a token without bias."""
    return task - kl_coef * (logprobs - ref_logprobs)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the same KL, never below 0: r - 1 - log r with r = ref / pi (Schulman 2020)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages by generalised advantage estimation, and returns (Schulman et al. 2016).

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};  return = A + V.
    rewards, values: [samples, longest], zero after the end of a sample. Nothing follows the last
    token, whether the sample was truncated or not.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage, next_value = torch.zeros(2, len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def group_advantages(rewards: Tensor, k: int, kind: str, task: Tensor | None = None) -> Tensor:
    """Compare the summed reward of each sample with those of its question: [samples, longest].

    rewards: [samples, longest], the k samples of a question in a row. kind: "group" (less the mean
    of all) or "loo" (less the mean of the others). task: the part of the rewards to divide by its
    standard deviation. The KL penalty is not divided: equally good samples differ in it alone.
    """
    if task is not None:
        std = task.sum(1).view(-1, k).std(1, correction=0).repeat_interleave(k)[:, None]
        rewards = rewards - task + task / torch.where(std > 1e-6, std, 1.0)
    totals = rewards.sum(1).view(-1, k)
    advantages = totals - totals.mean(1, keepdim=True)
    if kind == "loo":
        advantages = advantages * k / (k - 1)
    return advantages.view(-1, 1).repeat(1, rewards.shape[1])


def mc_advantages(rewards: Tensor, lines: Tensor, values: Tensor) -> Tensor:
    """Give every token of line j the advantage r_j + V_j - V_{j-1}: [samples, longest].

    lines: the line of every token, from 0. values: V_0 V_1 ..., 0 for the last line: [samples, n].
    """
    per_line = values.diff()
    return per_line.scatter_add(1, lines, rewards).gather(1, lines)


def pad(rows: list) -> Tensor:
    """Stack rows of numbers, with zeros after their ends: [rows, longest]."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


def whiten(x: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over all tokens."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low, high) -> Tensor:
    """Return the clipped surrogate of every token (Schulman et al. 2017, equation 7), negated."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error of the value, or of the clipped value if it is larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(returns: Tensor, values: Tensor) -> float | None:
    """Return 1 - Var(return - value) / Var(return). It is None if all returns are equal."""
    variance = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / variance if variance > 1e-8 else None


# ---- 2. Rewards, values and questions ------------------------------------------------------------


def reward_sources(problems, hide: list[float], seed: int) -> dict[str, str]:
    """Return the source of the reward by problem id: verifier, genrm_gold or genrm_sampled.

    The GenRM compares with the gold solution, or with a sample if there is none. hide: fraction of
    the problems whose answer is hidden, and of these the fraction whose solution is hidden.
    """
    order = np.random.default_rng([seed, 3, 1 << 31]).permutation(len(problems))
    hidden = [problems[i] for i in order[: round(hide[0] * len(problems))]]
    n_sampled = round(hide[1] * len(hidden))
    sources = {problem.id: "verifier" for problem in problems}
    sources |= {p.id: "genrm_gold" if p.reference else "genrm_sampled" for p in hidden}
    return sources | {problem.id: "genrm_sampled" for problem in hidden[:n_sampled]}


def find_references(problems, sources: dict[str, str], file: str | None) -> dict[str, str]:
    """Return the solution to compare with, by id, of every problem that the GenRM scores.

    file: scored samples. The best one, finished if any is, takes the place of a gold solution.
    """
    references = {p.id: p.reference for p in problems if sources[p.id] == "genrm_gold"}
    samples = [s for s in common.read_samples(Path(file)) if s.score is not None] if file else []
    samples.sort(key=lambda sample: (sample.finished, sample.score))
    best = {sample.problem.question: sample.solution for sample in samples}
    for problem in [p for p in problems if sources[p.id] == "genrm_sampled"]:
        reason = "has no gold solution and no sample with a score in --references"
        runtime.require(problem.question in best, f"{problem.id} {reason}")
        references[problem.id] = best[problem.question]
    return references


def task_rewards(args, policy, samples, reward_model=None, references=()) -> list[np.ndarray]:
    """Return the task reward of every token: one array per sample. Truncated samples get zero.

    If you add a reward that can be negative, give it to truncated samples as well. Otherwise the
    policy learns to run into the length limit.
    """
    rewards = [np.zeros(len(sample.tokens), np.float32) for sample in samples]
    finished = [i for i, sample in enumerate(samples) if sample.finished]
    scores = {i: [float(samples[i].correct)] for i in finished}
    compared = [i for i in finished if samples[i].problem.id in references]
    if args.reward.startswith("orm"):
        found = reward_model.scores([samples[i] for i in finished], args.token_budget)
        scores = dict(zip(finished, found, strict=True))  # probabilities after every token
    elif compared:
        found = reward_model.scores([samples[i] for i in compared], references, args.token_budget)
        scores |= {i: [score] for i, score in zip(compared, found, strict=True)}
    for i in finished:
        if args.reward == "orm_dense":
            rewards[i] += potential_rewards(policy, samples[i], reward_model, scores[i])
        else:
            rewards[i][-1] += scores[i][-1]
        if args.reward == "dense":
            rewards[i] += step_rewards(policy, samples[i])
        if args.add_outcome:
            rewards[i][-1] += float(samples[i].correct)
    return rewards


def potential_rewards(policy: common.Policy, sample, orm, scores: np.ndarray) -> np.ndarray:
    """Return the rise of the ORM's probability in each line, at the end of the line.

    The probability is 0 before the first line, so the sum is the last probability, as with "orm".
    scores: the probability after each token of the ORM. Its tokens may differ from the policy's,
    so lines are matched by the number of lines with text before them.
    """
    lines, (_, ids) = re.compile(r"\S.*"), orm.encode(sample)
    texts = {end: orm.decode(ids[: end + 1]) for end in reversed(orm.line_ends(ids))}
    potential = {len(lines.findall(text)): scores[end] for end, text in texts.items()} | {0: 0.0}
    reward, before = np.zeros(len(sample.tokens), np.float32), 0.0
    for end in policy.line_ends(sample.tokens)[:-1]:
        text = sample.prefix + policy.decode(sample.tokens[: end + 1])
        after = potential.get(len(lines.findall(text)), scores[-1])
        reward[end], before = after - before, after
    reward[-1] = scores[-1] - before
    return reward


def step_rewards(policy: common.Policy, sample: common.Sample) -> np.ndarray:
    """Return 1/n at the end of each line that first computes one of the reference's n values."""
    reward = np.zeros(len(sample.tokens), np.float32)
    reference = common.computed_values(sample.problem.reference or "")
    missing, n_seen = list(reference), 0
    # The values of the given prefix, which ends before token 0, earn nothing.
    for end in [-1, *policy.line_ends(sample.tokens)]:
        text = sample.prefix + policy.decode(sample.tokens[: end + 1])
        found = common.computed_values(common.first_solution(text))
        for value in found[n_seen:]:
            if value in missing:
                missing.remove(value)
                if end >= 0:
                    reward[end] += 1 / len(reference)
        n_seen = len(found)
    return reward


class ValueFunction(torch.nn.Module):
    """A trainable copy of the policy's top layers with a scalar head that starts at zero."""

    def __init__(self, policy: common.Policy, detach: bool):
        super().__init__()
        layers, self.detach = list(policy.layers()), detach
        self.top = layers[len(layers) - min(VALUE_LAYERS, max(1, len(layers) // 2)) :]
        self.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in self.top)
        width = policy.model.config.get_text_config().hidden_size
        self.norm = torch.nn.LayerNorm(width, device=policy.device)
        self.head = torch.nn.Linear(width, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, policy, examples: list, temperature: float) -> tuple[Tensor, Tensor]:
        """Run the policy once. Return log-probabilities and values: both [response tokens].

        Hooks record the inputs of the policy's own layers, so the copies get the same ones.
        """
        calls = []
        how = dict(hook=lambda _, *inputs: calls.append(inputs), with_kwargs=True)
        hooks = [layer.register_forward_pre_hook(**how) for layer in self.top]
        logprobs = common.response_logprobs(policy, examples, temperature)
        for hook in hooks:
            hook.remove()
        rows, columns = common.response_positions(examples, policy.device)
        with policy.autocast():
            args, kwargs = calls[0]
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = hidden.detach() if self.detach else hidden
            for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
                others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                hidden = layer(hidden, *args[1:], **others)
                hidden = hidden[0] if isinstance(hidden, (tuple, list)) else hidden
        return logprobs, self.head(self.norm(hidden[rows, columns - 1].float()))[:, 0]


class NoValues(torch.nn.Module):
    """Stands for the value function where there is none. All values are 0."""

    def forward(self, policy, examples: list, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs = common.response_logprobs(policy, examples, temperature)
        return logprobs, torch.zeros_like(logprobs)


def complete_lines(policy, samples, used, file: Path, how: dict) -> tuple[Tensor, Tensor, int]:
    """Return lines and values for `mc_advantages`, and the number of completions (of `used`)."""
    from rcrl import estimate_q, lines_of, prefixes_of  # not part of every fork

    prefixes = prefixes_of([samples[i] for i in used])  # a shared prefix is completed once
    q, lines, values = estimate_q(policy, prefixes, file, None, **how), [], []
    for group in common.by_problem(samples):
        n_passed, n_others = sum(sample.passed for sample in group), len(group) - 1
        for sample in group:
            texts = list(itertools.accumulate(lines_of(sample)))[:-1]
            of_others = (n_passed - sample.passed) / n_others
            found = [q.get((sample.problem.id, text), of_others) for text in texts]
            values.append([of_others, *found, 0])
            breaks = [policy.decode([token]).count("\n") for token in sample.tokens[:-1]]
            # Empty lines before the first one belong to it.
            start = sample.prefix.count("\n") - re.match(r"\s*", sample.text)[0].count("\n")
            lines.append(np.cumsum([start, *breaks]).clip(0, len(texts)))
    return pad(lines), pad(values), len(prefixes) * how["samples"]


def estimate_advantages(args, task, rewards, values, *of_lines) -> tuple[Tensor, Tensor]:
    """Return advantages and returns: both [samples, longest]. Without values no return is used."""
    if args.advantage == "gae":
        return gae(rewards, values, 1.0, args.gae_lambda)
    if args.advantage == "mc":
        return mc_advantages(rewards, *of_lines), torch.zeros_like(rewards)
    how = dict(k=args.samples, kind=args.advantage, task=task if args.group_std else None)
    return group_advantages(rewards, **how), torch.zeros_like(rewards)


@torch.no_grad()
def compute_old_logprobs(policy, critic, reference, examples, args) -> list[tuple]:
    """Return log-probabilities, values and log-probabilities of pi_ref, one array per sample."""
    found = []
    for indices in common.micro_batches([len(p) + len(r) for p, r in examples], args.token_budget):
        batch = [examples[i] for i in indices]
        logprobs, values = critic(policy, batch, args.temperature)
        with policy.lora.off() if policy.lora else contextlib.nullcontext():
            ref_logprobs = common.response_logprobs(reference, batch, args.temperature)
        parts = (common.by_example(flat, batch) for flat in (logprobs, values, ref_logprobs))
        found += zip(indices, *parts, strict=True)
    _, *columns = zip(*sorted(runtime.gather(found), key=lambda row: row[0]), strict=True)
    return columns


def read_scores(args, train: list[common.Problem]) -> list[dict]:
    """Return the questions of --scores: problem, file, score, correct and standardised.

    score: mean of its samples' scores, or of their correctness. standardised: with mean 0 and
    variance 1 within a file. Otherwise the questions of a hard file would fill the selection.
    """
    taken = {p.question for p in train + common.load_problems(args.dataset, "dev")}
    with contextlib.suppress(runtime.UserError):  # a folder may have no test split
        taken |= {p.question for p in common.load_problems(args.dataset, "test")}
    known = {(p.id, p.question): p for p in common.load_problems(args.dataset, "train")}
    questions, mean = [], common.mean
    for file in args.scores:
        rows = []
        for group in common.by_problem(common.read_samples(Path(file))):
            problem = group[0].problem
            other = common.Problem(f"{file}: {problem.id}", problem.question, problem.answer)
            problem = known.get((problem.id, problem.question), other)
            if problem.question not in taken:
                row = {"problem": problem, "file": file, "correct": mean(s.passed for s in group)}
                scores = [s.passed if s.score is None else s.score * s.finished for s in group]
                rows.append(row | {"score": mean(scores)})
        scores = np.array([row["score"] for row in rows])
        for row in rows:
            row["standardised"] = (row["score"] - scores.mean()) / (scores.std() + 1e-8)
        questions += rows
    runtime.require(questions, "--select: --scores has no question beyond train, dev and test")
    texts = {question["problem"].question for question in questions}
    runtime.require(len(texts) == len(questions), "--scores: a question occurs twice")
    return questions


def choose(kind: str, questions: list[dict], fraction: float, seed: int) -> list[dict]:
    """Return the questions of `read_scores` to keep. Ties are broken at random."""
    rng, count = np.random.default_rng([seed, 4]), max(1, round(fraction * len(questions)))
    correct = np.array([question["correct"] for question in questions])
    key = np.array([question["standardised"] for question in questions])
    key = {"frontier": np.abs(correct - 0.5), "random": 0 * key}.get(kind, key)
    candidates = np.flatnonzero((correct > 0) | (kind != "floor"))
    order = np.lexsort((rng.random(len(candidates)), key[candidates]))
    return [questions[i] for i in sorted(candidates[order[:count]])]


class Curriculum:
    """Which questions a phase asks, and which prefix it gives. Its state is plain data."""

    def __init__(self, args, problems: list[common.Problem], sources: dict[str, str]):
        self.kind, self.seed, self.problems = args.curriculum, args.seed, problems
        # verifiable_first asks these in its first phases.
        self.n_early = round(args.switch * args.phases) if self.kind == "verifiable_first" else 0
        self.early = [i for i, p in enumerate(problems) if sources[p.id] != "genrm_sampled"]
        mixed = not self.n_early or 0 < len(self.early) < len(problems)
        runtime.require(mixed, "verifiable_first needs questions with and without gold (--hide)")
        self.state = {"next": 0, "score": [-1.0] * len(problems), "hidden": 1}

    def draw(self, phase: int, count: int) -> tuple[list[int], list[str]]:
        """Return the indices of a phase's questions, and the prefix given with each."""
        candidates = self.early if phase <= self.n_early else list(range(len(self.problems)))
        scores, n = self.state["score"], len(candidates)
        if phase == self.n_early + 1:
            self.state["next"] = 0
        # A question that is asked twice in a phase would get the same samples twice.
        n_new = count = min(count, n)
        # plr: half of the questions are new as long as there are any.
        if self.kind == "plr" and phase > 1:
            n_new = min(max(1, count // 2), scores.count(-1.0))
        chosen: list[int] = []
        while len(chosen) < n_new:
            epoch, position = divmod(self.state["next"], n)
            i = candidates[common.shuffled(n, self.seed, epoch)[position]]
            self.state["next"] += 1
            chosen += [i] if i not in chosen else []
        # The others are sampled with a weight of 1 / rank of their score.
        if n_new < count:
            seen = np.array([i for i in candidates if scores[i] >= 0 and i not in chosen])
            order = np.argsort([-scores[i] for i in seen], kind="stable")
            weight = 1 / (1 + np.argsort(order))
            how = dict(replace=False, p=weight / weight.sum())
            rng = np.random.default_rng([self.seed, phase, 1])
            chosen += rng.choice(seen, min(count - n_new, len(seen)), **how).tolist()
        if self.kind != "backtracking":
            return chosen, [""] * len(chosen)
        texts = [common.first_solution(self.problems[i].reference or "") for i in chosen]
        shown = [text.splitlines(keepends=True)[: -self.state["hidden"]] for text in texts]
        return chosen, ["".join(lines) for lines in shown]

    def update(self, chosen: list[int], solved: list[float], errors: list[float]) -> None:
        """Take each question's fraction of correct samples and the mean error of its values."""
        for i, error in zip(chosen, errors, strict=True):
            self.state["score"][i] = error
        # If half of the samples are correct, begin one line earlier (Salimans and Chen 2018).
        if np.mean(solved) >= 0.5:
            self.state["hidden"] += 1


# ---- 3. The algorithm ----------------------------------------------------------------------------


def sample_metrics(samples, rewards, solved, sources: dict[str, str]) -> dict[str, float | None]:
    """Describe the samples. solved: the fraction of correct samples of each question."""
    mean, rewards = common.mean, [float(reward.sum()) for reward in rewards]
    pairs = list(zip(samples, rewards, strict=True))
    metrics = {
        "reward": mean(rewards),
        "reward_if_incorrect": mean(r for s, r in pairs if not s.passed),
        "correct": mean(s.passed for s in samples),
        "informative": mean(0 < rate < 1 for rate in solved),
        "response_length": mean(len(s.tokens) for s in samples),
        "sampled_no_answer": mean(s.answer is None for s in samples),
        "sampled_truncated": mean(not s.finished for s in samples),
        "with_prefix": mean(bool(s.prefix) for s in samples),
    }
    scored = [(s, r) for s, r in pairs if s.finished and sources[s.problem.id] != "verifier"]
    with_gold = [r for s, r in scored if sources[s.problem.id] == "genrm_gold"]
    if set(sources.values()) != {"verifier"}:
        metrics["false_positive_rate"] = mean(r >= 0.5 for s, r in scored if not s.correct)
        metrics["beats_gold_rate"] = mean(r > 0.5 for r in with_gold)
        metrics["score_if_correct"] = mean(r for s, r in scored if s.correct)
    return metrics


def load_questions(args) -> tuple[list[common.Problem], list[dict]]:
    """Load the questions to train on. Also return those of --select among them, with scores."""
    train = common.load_problems(args.dataset, "train", args.limit_train)
    solutions = [p.reference for p in train if p.reference]
    fits = args.reward != "dense" or any(map(common.computed_values, solutions))
    runtime.require(fits, "--reward dense: no solution has <<a+b=c>> annotations")
    fits = args.curriculum != "backtracking" or solutions
    runtime.require(fits, "--curriculum backtracking: the questions have no solutions")
    if not args.select:
        return train, []
    selected = choose(args.select, read_scores(args, train), args.select_fraction, args.seed)
    runtime.require(selected, f"--select {args.select}: no question of --scores is solved")
    return train + [question["problem"] for question in selected], selected


def load_models(args) -> tuple:
    """Return the policy, its initial copy, its value function, and the reward model or None."""
    policy, reward_model = common.Policy(args.model, args.device, args.dtype), None
    policy.condition("none")  # without the labels of rcrl.py
    # Copy the top layers before the adapters are added.
    detach = not args.no_detach_value
    critic = ValueFunction(policy, detach) if args.advantage == "gae" else NoValues()
    if args.orm or args.genrm:
        from reward_model import GenerativeRewardModel, RewardModel  # not part of every fork

        kind = RewardModel if args.orm else GenerativeRewardModel
        reward_model = kind(args.orm or args.genrm, args.device, args.dtype)
    policy.prepare_training(args, critic=critic)
    # With adapters off the policy is its initial copy.
    reference = policy if policy.lora else common.Policy(args.model, args.device, args.dtype)
    return policy, reference, critic, reward_model


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    # 0. Load the questions, so that errors show before a model is loaded. Load the models.
    train, selected = load_questions(args)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    sources = reward_sources(train, args.hide, args.seed)
    references = find_references(train, sources, args.references)
    curriculum = Curriculum(args, train, sources)
    run = runtime.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    policy, reference, critic, reward_model = load_models(args)
    common.encode_prompts(policy, train + dev, args.few_shot)  # refuses one that is too long
    run.begin()
    if selected:
        rows = [question | {"problem": question["problem"].id} for question in selected]
        runtime.write_json(run.out / "samples" / "selected.json", rows)

    weights, critic_weights = list(policy.trained.parameters()), list(critic.parameters())
    groups = [{"params": weights}, {"params": critic_weights, "lr": args.value_lr}]
    optimizer = common.adam_w(groups, args.lr)
    progress = dict(phase=0, step=0, policy_steps=0, samples=0, tokens=0)
    if run.state:
        progress = run.state["progress"]
        curriculum.state = run.state["curriculum"]
        policy.trained.load_state_dict(run.state["trained"])
        critic.load_state_dict(run.state["critic"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None  # as large as the weights and the optimizer
    else:
        metrics = common.dev_metrics(policy, dev, args, 0, few_shot=args.few_shot)
        policy.save(run.out / "model")
        run.log(step=0, samples=0, tokens=0, phase=0, **metrics)
        progress |= {"best": metrics["maj@1"], "start": metrics["maj@1"]}

    for phase in range(progress["phase"] + 1, args.phases + 1):
        # 1. Choose questions and sample solutions.
        started = time.monotonic()
        chosen, prefixes = curriculum.draw(phase, args.questions)
        how = common.sampling(args) | dict(few_shot=args.few_shot)
        of_phase = dict(seed=[args.seed, phase], prefixes=prefixes, progress=f"phase {phase}")
        samples = common.generate(policy, [train[i] for i in chosen], **how, **of_phase)
        common.write_samples(run.out / "samples" / f"phase_{phase}.jsonl", samples)
        solved = np.reshape([s.passed for s in samples], (len(chosen), -1)).mean(1).tolist()
        kept = [0 < rate < 1 or not args.drop_uniform for rate in solved]
        used = np.flatnonzero(np.repeat(kept, args.samples))  # the samples to train on
        of_lines, n_completions = [], 0
        if args.advantage == "mc":
            file = run.out / "samples" / f"completions_{phase}.jsonl"
            how |= dict(samples=args.mc_samples, seed=[args.seed, phase, 1])
            *of_lines, n_completions = complete_lines(policy, samples, used, file, how)
        seconds_sampling, started = time.monotonic() - started, time.monotonic()

        # 2. Give every token its task reward.
        rewards = task_rewards(args, policy, samples, reward_model, references)

        # 3. Compute log-probabilities and values.
        examples = [(list(sample.prompt), sample.tokens.tolist()) for sample in samples]
        lengths = [len(response) for _, response in examples]
        per_token = *compute_old_logprobs(policy, critic, reference, examples, args), rewards
        old_logprobs, old_values, ref_logprobs, task = map(pad, per_token)  # [samples, longest]
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

        # 4. Subtract the KL penalty.
        token_rewards = penalised_rewards(task, old_logprobs, ref_logprobs, args.kl_coef)

        # 5. Estimate the advantages. For plr their size tells how wrong the value was.
        advantages, returns = estimate_advantages(args, task, token_rewards, old_values, *of_lines)
        errors = [float(advantages[i, :n].abs().mean()) for i, n in enumerate(lengths)]
        if critic_weights:
            advantages[real] = whiten(advantages[real])
        curriculum.update(chosen, solved, np.reshape(errors, (len(chosen), -1)).mean(1).tolist())

        # 6. Train. A value function first trains alone, unclipped: from zero it has a long way.
        low, high = args.clip_range, args.clip_high
        value_clip = low if phase > 1 else np.inf
        trains_policy = phase > 1 or not critic_weights
        orders = [used[common.shuffled(len(used), args.seed, phase, e)] for e in range(args.epochs)]
        starts = range(0, len(used), args.batch_size)
        minibatches = [order[i : i + args.batch_size] for order in orders for i in starts]
        stats, deviations = [], []
        for minibatch in tqdm(minibatches, desc=f"phase {phase} training", disable=None):
            n_tokens, sums, deviation = sum(lengths[i] for i in minibatch), np.zeros(4), 0.0
            sizes = [len(examples[i][0]) + lengths[i] for i in minibatch]
            for indices in common.micro_batches(sizes, args.token_budget):
                micro = [minibatch[i] for i in indices]
                logprobs, values = critic(policy, [examples[i] for i in micro], args.temperature)
                tables = old_logprobs, old_values, advantages, returns
                flat = (table[micro][real[micro]].to(policy.device) for table in tables)
                old_logprob, old_value, advantage, target = flat  # [response tokens]
                pi_loss = policy_loss(logprobs, old_logprob, advantage, low, high)
                v_loss = value_loss(values, old_value, target, value_clip)
                loss = pi_loss + v_loss if trains_policy else v_loss
                (loss.sum() / n_tokens).backward()
                with torch.no_grad():
                    change = (logprobs - old_logprob).exp() - 1
                    deviation = max(deviation, change.abs().max().item())
                    clipped = ((change > high) | (-change > low)).float()
                    logged = pi_loss, v_loss, clipped, kl_k3(old_logprob, logprobs)
                    sums += [x.sum().item() / n_tokens for x in logged]
            means = runtime.sum_gradients(weights + critic_weights, *sums)
            pi_loss, v_loss, _, approx_kl = means
            deviations.append(deviation)
            if 0 < args.kl_limit < approx_kl:
                optimizer.zero_grad(set_to_none=True)
                break
            # The first steps of Adam are as long as any, in directions that are mostly noise.
            progress["policy_steps"] += trains_policy
            rising = min(1.0, progress["policy_steps"] / LR_WARMUP)
            optimizer.param_groups[0]["lr"] = args.lr * rising * (1 - (phase - 1) / args.phases)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
            value_grad_norm = torch.nn.utils.clip_grad_norm_(critic_weights, 1.0).item()
            common.require_finite(pi_loss, v_loss, grad_norm, value_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stats.append([*means, grad_norm, value_grad_norm])
            progress["step"] += 1
            progress["tokens"] += n_tokens

        # 7. Describe the phase. Every few phases measure the policy on dev.
        progress |= {"phase": phase, "samples": progress["samples"] + len(samples) + n_completions}
        row = {key: progress[key] for key in ("step", "samples", "tokens", "phase")}
        row |= sample_metrics(samples, rewards, solved, sources)
        sampled = torch.from_numpy(np.concatenate([sample.logprobs for sample in samples]))
        old, ref = old_logprobs[real], ref_logprobs[real]
        row |= {"ref_kl_k1": (old - ref).mean().item(), "ref_kl_k3": kl_k3(old, ref).mean().item()}
        row |= {"entropy": -old.mean().item(), "minibatches": len(stats)}
        row |= {"logprob_mismatch": ((old - sampled).exp() - 1).abs().max().item()}
        row |= {"explained_variance": explained_variance(returns[real], old_values[real])}
        if stats:
            row |= dict(zip(STATS, np.mean(stats, 0).tolist(), strict=True))
            row |= {"lr": optimizer.param_groups[0]["lr"]}
        row |= {"max_ratio_deviation": max(runtime.gather(deviations[:1]), default=None)}
        row |= dict(seconds_sampling=seconds_sampling, seconds_training=time.monotonic() - started)
        if phase % args.eval_every == 0 or phase == args.phases:
            row |= common.dev_metrics(policy, dev, args, phase, few_shot=args.few_shot)
            if row["maj@1"] > progress["best"]:
                progress["best"] = row["maj@1"]
                policy.save(run.out / "model")

        # 8. Log and save.
        run.log(**row)
        state = {"trained": policy.trained.state_dict(), "critic": critic.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "curriculum": curriculum.state}
        run.checkpoint(**state, progress=progress)
    run.finish()
    if progress["best"] <= progress["start"]:
        runtime.warn("no phase was better on dev than the initial policy, which is in model/")
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {run.out / 'model'}")


if __name__ == "__main__":
    runtime.run_main(main)
