r"""PPO on reasoning problems: a KL-penalised policy gradient with a learned value function.

Objective, for question q and sampled solution s with tokens s_1 ... s_T:

    maximise  E_{q, s ~ pi} [ R(q, s) - kl_coef * sum_t KL_t ]
    KL_t = log pi(s_t | q, s_<t) - log pi_ref(s_t | q, s_<t)

This is the PPO of "Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla
et al. 2024). It maximises the clipped surrogate of "Proximal Policy Optimization Algorithms"
(Schulman et al. 2017).

    0. Once, with the initial policy: find references for the GenRM and select questions.

Then, in every phase,

    1. Choose questions (--curriculum) and sample solutions from the policy.
    2. Give every token its task reward (--reward).
    3. Compute log-probabilities and values in one forward pass, pi_ref in another. Subtract the
       KL penalty: reward of a token = task reward - kl_coef * KL_t.
    4. Estimate the advantages by GAE and whiten them.
    5. Train for several epochs on minibatches with the clipped policy loss and value loss.
    6. Every few phases measure greedy accuracy on dev. The best policy becomes model/.

Rewards (--reward). A truncated solution gets 0.
    sparse      1 at the end of a solution with the correct answer. The verifier checks the answer.
    dense       sparse, plus 1/n at the first appearance of each of the reference's n values.
    orm         The probability that an outcome reward model gives the solution.
    orm_dense   The same by line: each line gets the rise of that probability.
    genrm       The score of a generative reward model that compares with a reference solution.
    hybrid      sparse for questions with a checkable answer, genrm for the others.

Curricula (--curriculum).
    backtracking      Begin within the reference solution. Reveal less as success grows.
    plr               Prefer questions whose value was wrong (Prioritized Level Replay).
    verifiable_first  Begin with questions whose answer can be checked (--switch).

Selection (--select). It adds questions of a pool to the first --limit-train ones.
    lowest      Questions with the lowest scores under the initial policy.
    floor       The lowest among the questions that it solves at least once.
    frontier    Questions that it solves nearest to half of the time.
    random      Any questions.

The value function is a trainable copy of the policy's top layers with a scalar head. It reads the
hidden states below them. No gradient flows back into them, unless --no-detach-value is set.
With --lora-rank the policy is the initial model plus low-rank adapters. The reference is then the
same network without the adapters. By default a model with over 10 million weights gets rank 128, as
in the paper, and a smaller one is trained as a whole.

Selection, genrm, hybrid and verifiable_first follow "Exploring Data Scaling Trends and Effects in
RLHF" (Shen et al. 2025), here on word problems. pi and pi_ref are taken at --temperature, at which
solutions are sampled. Accuracy on dev is greedy.

Where this differs from the paper:
    * The default model is tiny, and all of its weights are trained. Learning rates are larger, and
      a phase has fewer rollouts. lambda of GAE is 1, and gamma is 1.
    * The value function trains alone in the first phase, because at first it knows nothing.
    * The learning rate of the policy rises over 20 steps and falls linearly, phase by phase,
      towards 0. The rate of the value function is constant.

CPU, six minutes on one core after `python sft.py`, maj@1 on the test split from .75 to .87
(README.md has the table):
    python ppo.py
From the base, without any written solution:
    python ppo.py --model tiny --out runs/ppo_base
One GPU, the paper's setting as far as we know it (README.md), after sft.py:
    python ppo.py --model runs/gsm8k/sft/model --dataset gsm8k --lora-rank 128 --lr 1e-6 \
        --value-lr 1e-5 --questions 256 --samples 4 --epochs 4 --batch-size 256 --phases 250 \
        --max-new-tokens 512 --out runs/gsm8k/ppo
"""

import contextlib
import copy
import dataclasses
import re
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import common


def parse_args(argv: list[str]):
    defaults = dict(model="runs/sft/model", out="runs/ppo", samples=4, temperature=0.7, lr=2e-4)
    defaults |= dict(epochs=2, batch_size=128, limit_train=None, checkpoint_every=120)
    parser = common.common_parser(__doc__, **defaults)
    whole, not_negative, count = common.WHOLE, common.NOT_NEGATIVE, common.number(int, 0)
    fraction, group = common.number(float, 0, 1), parser.add_argument_group

    add = group("problem and model").add_argument
    add("--lora-rank", type=count, help="rank of the adapters; 0: train all weights; see above")
    text = "two worked examples in every prompt, for a base that never saw the format"
    add("--few-shot", action="store_true", help=text + " (paper: with --temperature 0.2)")

    add = group("sampling").add_argument
    kinds = ["none", "backtracking", "plr", "verifiable_first"]
    add("--questions", type=whole, default=128, help="questions per phase (paper: 256)")
    add("--curriculum", choices=kinds, default="none", help="how to choose questions; see above")
    text = "fractions of the phases after which questions with and without a gold solution join"
    add("--switch", type=fraction, nargs=2, default=[0.2, 0.4], metavar="FRACTION", help=text)

    add = group("PPO").add_argument
    add("--phases", type=whole, default=20, help="rounds of sampling and training")
    add("--kl-coef", type=not_negative, default=0.05, help="weight of the KL penalty (paper: 0.05)")
    text = "end a phase when `approx_kl` of a minibatch (nats per token) exceeds this; 0: never"
    add("--kl-limit", type=not_negative, default=0, help=text)
    add("--clip-range", type=not_negative, default=0.2, help="how far the ratio may leave 1")
    add("--value-clip-range", type=not_negative, default=0.2, help="how far values move in a phase")
    add("--gae-lambda", type=fraction, default=1.0, help="usual: 0.95; see results/README.md")
    add("--lr-warmup", type=whole, default=20, help="steps of rising policy learning rate")
    add("--value-lr", type=not_negative, default=1e-3, help="learning rate of the value function")
    add("--value-layers", type=whole, default=4, help="its layers; at most half of the model's")
    add("--value-warmup", type=count, default=1, help="phases in which it alone is trained")
    add("--no-detach-value", action="store_true", help="its loss trains the policy too")

    add = group("rewards").add_argument
    kinds = ["sparse", "dense", "orm", "orm_dense", "genrm", "hybrid"]
    add("--reward", choices=kinds, default="sparse", help="see above")
    add("--orm", help="folder of the ORM (default, if needed: runs/reward_model/model)")
    add("--genrm", help="folder of the GenRM (default, if needed: runs/genrm/model)")
    add("--add-outcome", action="store_true", help="orm, orm_dense: add 1 for a correct answer")
    text = "hybrid: fraction of the questions whose answer cannot be checked (default: 0.5)"
    add("--hide-answers", type=fraction, help=text)
    text = "genrm, hybrid: fraction of the GenRM's questions that have no gold solution"
    add("--hide-solutions", type=fraction, default=0, help=text)
    text = "samples of such a question; the best by --orm is its reference"
    add("--reference-samples", type=whole, default=16, help=text)

    add = group("selection").add_argument
    kinds, share = ["lowest", "floor", "frontier", "random"], common.number(float, 1e-6, 1)
    add("--select", choices=kinds, help="add questions of a pool; see above")
    add("--select-fraction", type=share, default=0.1, help="fraction of the pool (paper: 0.1)")
    add("--select-samples", type=whole, default=8, help="samples that score a question of the pool")
    text = "datasets, each a domain (default: --dataset after the first --limit-train questions)"
    add("--pool", nargs="+", default=[], metavar="DATASET", help=text)
    add("--selection", metavar="FILE", help="use the scores in selection.json of another run")

    add = group("run").add_argument
    add("--eval-every", type=whole, default=4, help="phases between evaluations on dev")
    add("--pass-k", type=count, default=0, help="samples per dev problem for pass@k; 0: none")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def check_flags(parser, args) -> None:
    """Refuse flags that contradict each other. Set the defaults that depend on --reward."""
    reward, only_with = args.reward, parser.only_with
    uses_orm, uses_genrm = reward.startswith("orm"), reward in ("genrm", "hybrid")
    staged, is_staged = "--curriculum verifiable_first", args.curriculum == "verifiable_first"
    if args.temperature == 0:
        parser.error("--temperature 0: greedy samples are all the same, so nothing is learned")
    if args.orm and not (uses_orm or uses_genrm) or args.genrm and not uses_genrm:
        parser.error(f"--reward {reward} uses no such model; drop --orm or --genrm")
    if args.select in ("floor", "frontier") and uses_genrm:
        parser.error(f"--select {args.select} counts successes; with a GenRM use lowest")
    if args.curriculum == "backtracking" and uses_genrm:
        parser.error(f"--curriculum backtracking reveals what --reward {reward} hides")
    if is_staged and (reward != "hybrid" or args.hide_answers == 1):
        parser.error(f"{staged} needs --reward hybrid and questions whose answer can be checked")
    if args.select and not (args.pool or args.limit_train):
        parser.error("--select: needs a --pool, or --limit-train, after which the pool begins")
    only_with("--reward hybrid", reward == "hybrid", args, "hide_answers")
    args.hide_answers = 0.5 if args.hide_answers is None else args.hide_answers
    only_with("--reward orm or orm_dense", uses_orm, args, "add_outcome")
    only_with("--reward genrm or hybrid", uses_genrm, args, "hide_solutions", "reference_samples")
    only_with(staged, is_staged, args, "switch")
    flags = "pool", "selection", "select_fraction", "select_samples"
    only_with("--select", bool(args.select), args, *flags)
    if uses_orm or uses_genrm and args.hide_solutions > 0:
        args.orm = args.orm or "runs/reward_model/model"
    if uses_genrm:
        args.genrm = args.genrm or "runs/genrm/model"


# ---- 1. The formulas -----------------------------------------------------------------------------


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(pi, ref) per token, without bias ("Approximating KL Divergence", Schulman)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the same KL without bias and never below 0: r - 1 - log r with r = ref / pi."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def penalised_rewards(task: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl_coef: float):
    """Return the reward of every token: its task reward minus its KL penalty. Shapes are equal."""
    return task - kl_coef * kl_k1(logprobs, ref_logprobs)


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


def whiten(x: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over all tokens."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float):
    """Return the clipped surrogate of every token (Schulman et al. 2017, equation 7), negated."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the squared error of the value, or of the clipped value if it is larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(returns: Tensor, values: Tensor) -> float | None:
    """Return 1 - Var(return - value) / Var(return). It is None if all returns are equal."""
    variance = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / variance if variance > 1e-8 else None


# ---- 2. Rewards ----------------------------------------------------------------------------------


@dataclasses.dataclass
class RewardModels:
    """The models that score whole solutions. Where none is asked, the verifier checks the answer.

    references: problem id -> the solution that the GenRM compares with. The answers of all other
    problems are checked. with_gold: ids of the problems whose reference is a gold solution.
    """

    orm: object = None  # of --reward orm, orm_dense
    genrm: object = None  # of --reward genrm, hybrid
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    with_gold: set[str] = dataclasses.field(default_factory=set)
    token_budget: int = 1024

    @classmethod
    def load(cls, args):
        models = cls(token_budget=args.token_budget)
        # A fork without learned rewards has no reward_model.py.
        if args.orm or args.genrm:
            import reward_model
        if args.orm:
            models.orm = reward_model.RewardModel(args.orm, args.device, args.dtype)
        if args.genrm:
            models.genrm = reward_model.GenerativeRewardModel(args.genrm, args.device, args.dtype)
        return models

    def scores(self, kind: str, samples: list[common.Sample]) -> list[float]:
        """Return the score of every whole solution. A truncated one gets 0, even if correct."""
        scores = [float(sample.correct and sample.finished) for sample in samples]
        indices = [i for i, s in enumerate(samples) if s.finished]
        if kind.startswith("orm"):
            found = self.orm.scores([samples[i] for i in indices], self.token_budget)
            found = [float(probabilities[-1]) for probabilities in found]
        else:
            indices = [i for i in indices if samples[i].problem.id in self.references]
            scored = [samples[i] for i in indices]
            found = self.genrm.scores(scored, self.references, self.token_budget) if scored else []
        for i, score in zip(indices, found, strict=True):
            scores[i] = score
        return scores


def task_rewards(kind: str, policy, samples, models: RewardModels, add_outcome=False) -> list:
    """Return the task reward of every token: one array per sample. Truncated samples get zero.

    If you add a reward that can be negative, give it to truncated samples as well. Otherwise the
    policy learns to run into the length limit. --select scores with `RewardModels.scores` instead.
    """
    rewards = [np.zeros(len(sample.tokens), np.float32) for sample in samples]
    if kind == "orm_dense":
        scores = models.orm.scores(samples, models.token_budget)
    else:
        scores = models.scores(kind, samples)
    for reward, sample, score in zip(rewards, samples, scores, strict=True):
        if not sample.finished:
            continue
        if kind == "orm_dense":
            reward += potential_rewards(policy, sample, models.orm, score)
        else:
            reward[-1] += score
        if kind == "dense":
            reward += step_rewards(policy, sample)
        if add_outcome:
            reward[-1] += float(sample.correct)
    return rewards


def line_ends(policy: common.Policy, ids) -> list[int]:
    """Return the index of every token that ends a line, the last token included."""
    return sorted({*np.flatnonzero(policy.breaks_line[ids]).tolist(), len(ids) - 1})


def potential_rewards(policy: common.Policy, sample, orm, scores: np.ndarray) -> np.ndarray:
    """Return the rise of the reward model's probability in each line, at the end of the line.

    The probability is 0 before the first line, so the sum is the last probability, as with "orm".
    The first sampled line gets the share of a given prefix, the same for all of its samples.
    scores: the probability after each token of the reward model. Its tokens may differ from the
    policy's tokens, so lines are matched by the number of lines with text before them.
    """

    def lines(text: str) -> int:
        return sum(bool(line.strip()) for line in text.split("\n"))

    _, ids = orm.encode(sample)
    ends = reversed(line_ends(orm, ids))
    potential = {lines(orm.decode(ids[: end + 1])): scores[end] for end in ends} | {0: 0.0}
    reward, before = np.zeros(len(sample.tokens), np.float32), 0.0
    for end in line_ends(policy, sample.tokens)[:-1]:
        text = sample.prefix + policy.decode(sample.tokens[: end + 1])
        after = potential.get(lines(text), scores[-1])
        reward[end], before = after - before, after
    reward[-1] = scores[-1] - before
    return reward


def computed_values(text: str) -> list[Fraction]:
    """Return the results of the calculator annotations: "14+6=<<14+6=20>>20" -> [20]."""
    results = re.findall(r"<<[^<>]*=([^<>=]*)>>", text)
    values = [common.extract_answer(f"{common.MARKER} {result}") for result in results]
    return [value for value in values if value is not None]


def step_rewards(policy: common.Policy, sample: common.Sample) -> np.ndarray:
    """Return 1/n at the end of each line that first computes one of the reference's n values."""
    reward = np.zeros(len(sample.tokens), np.float32)
    reference = computed_values(sample.problem.reference or "")
    missing, n_seen = list(reference), 0
    # The values of the given prefix, which ends before token 0, earn nothing.
    for end in [-1, *line_ends(policy, sample.tokens)]:
        text = sample.prefix + policy.decode(sample.tokens[: end + 1])
        found = computed_values(common.first_solution(text))
        for value in found[n_seen:]:
            if value in missing:
                missing.remove(value)
                if end >= 0:
                    reward[end] += 1 / len(reference)
        n_seen = len(found)
    return reward


# ---- 3. The value function and the adapters ------------------------------------------------------


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the stack of layers of a decoder. Raises UserError if it has no plain stack."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    advice = "has no plain stack of layers, which PPO builds on"
    raise common.UserError(f"--model: a {type(model).__name__} {advice}")


class ValueFunction(torch.nn.Module):
    """A trainable copy of the policy's top layers with a scalar head that starts at zero.

    The copies get the arguments of the policy's own layers: hidden states, masks, position
    embeddings. Hooks record them in a forward pass of the policy, so any decoder will do.
    """

    def __init__(self, policy: common.Policy, n_layers: int, detach: bool):
        super().__init__()
        layers = decoder_layers(policy.model)
        n_layers = min(n_layers, max(1, len(layers) // 2))
        top = list(layers)[len(layers) - n_layers :]
        self.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in top)
        width = policy.model.config.get_text_config().hidden_size
        self.norm = torch.nn.LayerNorm(width, device=policy.device)
        self.head = torch.nn.Linear(width, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.detach, self.calls, self.is_listening = detach, [], False
        for layer in top:
            layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        if self.is_listening:
            self.calls.append((args, kwargs))

    @contextlib.contextmanager
    def listening(self):
        """Record a forward pass of the policy. `values` needs it."""
        self.calls, self.is_listening = [], True
        try:
            yield
        finally:
            self.is_listening = False

    def values(self, policy: common.Policy, examples: list[common.Example]) -> Tensor:
        """Return the expected return before every response token: [response tokens]."""
        calls, self.calls = self.calls, []
        rows, columns = common.response_positions(examples, policy.device)
        with policy.autocast():
            args, kwargs = calls[0]
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = hidden.detach() if self.detach else hidden
            for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
                others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                hidden = layer(hidden, *args[1:], **others)
                hidden = hidden[0] if isinstance(hidden, (tuple, list)) else hidden
        return self.head(self.norm(hidden[rows, columns - 1].float()))[:, 0]


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module computes W x + b."""
    if type(module) in (torch.nn.Linear, Conv1D):
        return True
    if not isinstance(module, torch.nn.Linear):
        return False
    # A subclass of Linear may do so (Falcon) or not (the router of Phimoe).
    x = torch.ones(1, 1, module.in_features, device=module.weight.device)
    with torch.no_grad(), contextlib.suppress(Exception):
        return torch.allclose(module(x), F.linear(x, module.weight, module.bias), atol=1e-4)
    return False


class Lora(torch.nn.Module):
    """Low-rank adapters on every linear map of the layers: W x + B A x (Hu et al. 2021).

    B is 0 at first. The adapters are hooks, so the names and the checkpoint of the model stay.
    Experts whose weights are one tensor get no adapters, and routers get none.
    """

    def __init__(self, policy: common.Policy, rank: int):
        super().__init__()
        policy.model.requires_grad_(False)
        self.is_on, self.targets = True, []
        self.down, self.up = torch.nn.ParameterList(), torch.nn.ParameterList()
        for module in filter(is_linear, decoder_layers(policy.model).modules()):
            # The Conv1D of GPT-2 keeps its weight as [in, out].
            weight, transposed = module.weight, isinstance(module, Conv1D)
            n_out, n_in = weight.T.shape if transposed else weight.shape
            down = torch.randn(rank, n_in, device=weight.device) / n_in**0.5
            self.down.append(torch.nn.Parameter(down))
            self.up.append(torch.nn.Parameter(torch.zeros(n_out, rank, device=weight.device)))
            self.targets.append((module, transposed))
            module.register_forward_hook(self._adapter(len(self.targets) - 1))
        advice = "this model has no linear layers for adapters; 0 trains all weights"
        common.require(self.targets, f"--lora-rank: {advice}")

    def _adapter(self, i: int):
        def hook(module, inputs, output):
            # Sums in bfloat16 would round most of a small change off. With the adapters off the
            # output is float32 as well, so the KL is 0 at first even in bfloat16.
            if not self.is_on:
                return output.float()
            change = F.linear(F.linear(inputs[0], self.down[i]), self.up[i])
            return output.float() + change.float()

        return hook

    @contextlib.contextmanager
    def off(self):
        """Switch to the initial model."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    @contextlib.contextmanager
    def merged(self):
        """Add the adapters to the weights, to save them. Meanwhile the old weights are on the CPU.

        In float32 the policy is the same. bfloat16 rounds: the neighbours of 0.1 are 0.0005 away.
        """
        kept = [module.weight.data.to("cpu", copy=True) for module, _ in self.targets]
        adapters = zip(self.targets, self.down, self.up, strict=True)
        try:
            for (module, transposed), down, up in adapters:
                delta = up.data @ down.data
                module.weight.data += delta.T if transposed else delta
            with self.off():
                yield
        finally:
            for (module, _), weight in zip(self.targets, kept, strict=True):
                module.weight.data.copy_(weight)


def logprobs_and_values(policy, critic, examples, temperature: float) -> tuple[Tensor, Tensor]:
    """Run the policy once. Return log-probabilities and values: both [response tokens]."""
    with critic.listening():
        logprobs = common.response_logprobs(policy, examples, temperature)
    return logprobs, critic.values(policy, examples)


@torch.no_grad()
def compute_old_logprobs(policy, critic, reference, lora, examples, args) -> list[tuple]:
    """Return log-probabilities, values and reference log-probabilities, one array per sample."""
    found = []
    for indices in common.micro_batches([len(p) + len(r) for p, r in examples], args.token_budget):
        batch = [examples[i] for i in indices]
        logprobs, values = logprobs_and_values(policy, critic, batch, args.temperature)
        with lora.off() if lora else contextlib.nullcontext():
            ref_logprobs = common.response_logprobs(reference, batch, args.temperature)
        parts = (common.by_example(flat, batch) for flat in (logprobs, values, ref_logprobs))
        found += zip(indices, *parts, strict=True)
    _, *columns = zip(*sorted(common.gather(found), key=lambda row: row[0]), strict=True)
    return columns


# ---- 4. Step 0: references and selected questions ------------------------------------------------


def sampling_settings(args) -> dict:
    settings = dict(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    return settings | dict(batch_size=args.gen_batch_size, few_shot=args.few_shot)


def reward_sources(problems, hide_answers: float, hide_solutions: float, seed: int) -> list[str]:
    """Return the source of each problem's reward: "verifier", "genrm_gold" or "genrm_sampled".

    The GenRM compares with the gold solution or with the best of several samples. hide_answers:
    fraction of the problems that the verifier cannot check. hide_solutions: fraction of
    the hidden problems without a gold solution. Problems that never had one come on top.
    """
    # No pass over the problems has this order.
    order = np.random.default_rng([seed, 3, 1 << 31]).permutation(len(problems))
    hidden = order[: round(hide_answers * len(problems))].tolist()
    without_gold = set(hidden[: round(hide_solutions * len(hidden))])
    sources = ["verifier"] * len(problems)
    for i in hidden:
        has_gold = problems[i].reference and i not in without_gold
        sources[i] = "genrm_gold" if has_gold else "genrm_sampled"
    return sources


def best_of_n(policy: common.Policy, problems, orm, run: common.Run, args) -> dict[str, str]:
    """Return, by problem id, the sample of the initial policy that the ORM scores highest.

    Finished samples come before truncated ones. The seed differs from the seed of the samples that
    the ORM was trained on.
    """
    file, settings = run.out / "samples" / "references.jsonl", sampling_settings(args)
    settings |= dict(samples=args.reference_samples, seed=[args.seed, 0, 1], progress="references")
    samples = common.sample_to_file(policy, problems, file, run, **settings)
    orm.grade(samples, args.token_budget)
    groups = common.by_problem(samples)
    best = [max(group, key=lambda sample: (sample.finished, sample.score)) for group in groups]
    return {sample.problem.id: sample.solution for sample in best}


def find_references(models: RewardModels, policy, problems, sources, run, args) -> None:
    """Set the references that the GenRM compares with. A restart reads the sampled ones back."""
    pairs = list(zip(problems, sources, strict=True))
    models.references = {p.id: p.reference for p, source in pairs if source == "genrm_gold"}
    models.with_gold = set(models.references)
    without_gold = [p for p, source in pairs if source == "genrm_sampled"]
    if without_gold:
        file = run.out / "samples" / "references.json"
        if not run.state:
            common.write_json(file, best_of_n(policy, without_gold, models.orm, run, args))
        models.references |= common.on_first(lambda: common.read_json(file))


def load_pool(args, train: list[common.Problem]) -> tuple[list[common.Problem], list[str]]:
    """Return the questions that --select may add to `train`, and the domain of each.

    A domain is the name of a dataset. Questions of dev and of the test are left out.
    """
    common.require(len(set(args.pool)) == len(args.pool), "--pool: names a dataset twice")
    held_out = common.load_problems(args.dataset, "dev")
    with contextlib.suppress(common.UserError):  # a folder may have no test split
        held_out += common.load_problems(args.dataset, "test")
    taken = {problem.question for problem in train + held_out}
    pool, domains, first = [], [], 0 if args.pool else len(train)
    for name in args.pool or [args.dataset]:
        problems = common.load_problems(name, "train")[first:]
        new = [problem for problem in problems if problem.question not in taken]
        pool, domains = pool + new, domains + [name] * len(new)
    message = "the pool has no question beyond those to train on, of dev and of the test"
    common.require(pool, f"--select: {message}")
    # Files in different folders may have the same name, and ids contain it.
    if len({problem.id for problem in train + pool}) < len(train + pool):
        names = zip(pool, domains, strict=True)
        pool = [dataclasses.replace(p, id=f"{name}: {p.id}") for p, name in names]
    return pool, domains


def standardised(scores: list[float], domains: list[str]) -> np.ndarray:
    """Shift and scale to mean 0 and variance 1 per domain. A hard one would fill the selection."""
    scores, result = np.array(scores, np.float64), np.zeros(len(scores))
    for domain in set(domains):
        inside = np.array([d == domain for d in domains])
        deviation = scores[inside].std() + 1e-8
        result[inside] = (scores[inside] - scores[inside].mean()) / deviation
    return result


def choose(kind: str, scores, passed, domains, fraction: float, seed: int) -> list[int]:
    """Return the indices of the questions to keep.

    scores: mean reward of each question's samples. passed: the fraction of them that is correct,
    or that a GenRM scores at least 0.5. Ties are broken at random, because with rewards of 0 and 1
    most of the lowest tenth is tied.
    """
    rng, count = np.random.default_rng([seed, 4]), max(1, round(fraction * len(scores)))
    passed, key = np.array(passed), standardised(scores, domains)
    candidates = np.flatnonzero(passed > 0) if kind == "floor" else np.arange(len(scores))
    if kind == "frontier":
        key = np.abs(passed - 0.5)
    elif kind == "random":
        key = np.zeros(len(scores))
    if (n := len(candidates)) < count:
        common.warn(f"only {n} of {count} questions to select are solved at least once")
    order = np.lexsort((rng.random(len(candidates)), key[candidates]))
    return sorted(candidates[order[:count]].tolist())


def read_scores(file: str, pool: list[common.Problem]) -> tuple[list[float], list[float]]:
    """Read the result of `score_pool` from the selection.json of another run."""
    try:
        rows = {row["id"]: row for row in common.read_json(Path(file))["questions"]}
        found = {i: (row["score"], row["passed"]) for i, row in rows.items()}
    except (KeyError, TypeError):
        message = f"--selection {file}: not a selection.json of this program"
        raise common.UserError(message) from None
    # Files of earlier versions do not hold the question.
    fits = [p.id in rows and rows[p.id].get("question", p.question) == p.question for p in pool]
    missing = [p.id for p, is_found in zip(pool, fits, strict=True) if not is_found]
    first = f"has no score for {', '.join(missing[:1])} ({len(missing)} missing)"
    common.require(not missing, f"--selection {file}: {first}")
    return [found[p.id][0] for p in pool], [found[p.id][1] for p in pool]


def score_pool(policy, pool, models: RewardModels, run, args) -> tuple[list[float], list[float]]:
    """Return the mean score of each question's samples, and the fraction that passed.

    A sample passes if it is correct, or if a GenRM scores it at least 0.5. The extra reward of
    --reward dense does not count.
    """
    file, settings = run.out / "samples" / "pool.jsonl", sampling_settings(args)
    # A reward model was trained on samples of the seed [args.seed, 0].
    seed = [args.seed, 0] + ([2] if models.orm or models.genrm else [])
    settings |= dict(samples=args.select_samples, seed=seed, progress="pool")
    samples = common.sample_to_file(policy, pool, file, run, **settings)
    scores = np.array(models.scores(args.reward, samples))
    correct = np.array([sample.correct and sample.finished for sample in samples])
    passed = scores >= 0.5 if models.genrm else correct
    scores = scores + correct if args.add_outcome else scores
    return tuple(each.reshape(len(pool), -1).mean(1).tolist() for each in (scores, passed))


def select_questions(policy, pool, domains, given_scores, models, run, args) -> list[int]:
    """Return the indices of the pool's questions to train on.

    given_scores: from --selection, or None to sample. All scores and the choice are written to
    selection.json, which a restart reads back.
    """
    file = run.out / "selection.json"
    if not run.state:
        scores, passed = given_scores or score_pool(policy, pool, models, run, args)
        kept = set(choose(args.select, scores, passed, domains, args.select_fraction, args.seed))
        columns = pool, domains, scores, passed, standardised(scores, domains).tolist()
        questions = []
        for i, (p, domain, score, rate, z) in enumerate(zip(*columns, strict=True)):
            row = {"id": p.id, "question": p.question, "domain": domain, "score": score}
            questions.append(row | {"passed": rate, "standardised": z, "chosen": i in kept})
        selection = {"model": args.model, "select": args.select, "questions": questions}
        common.write_json(file, selection)
    rows = common.on_first(lambda: common.read_json(file)["questions"])
    chosen = [i for i, row in enumerate(rows) if row["chosen"]]
    mean, of_all = np.mean([rows[i]["score"] for i in chosen]), np.mean([r["score"] for r in rows])
    scored = f"scored {mean:.3f} on average (all: {of_all:.3f})"
    print(f"{len(chosen)} of {len(pool)} questions of the pool chosen, {scored}")
    return chosen


# ---- 5. Curricula --------------------------------------------------------------------------------


def verifiable_first(sources: list[str], phases: int, switch: list[float]) -> list[tuple]:
    """Return the stages of this curriculum: (first phase, indices of its questions).

    switch: fractions of the phases after which problems with and without a gold solution join.
    """
    stages = []
    for n_kinds, fraction in enumerate([0.0, *sorted(switch)], 1):
        allowed = ("verifier", "genrm_gold", "genrm_sampled")[:n_kinds]
        indices = [i for i, source in enumerate(sources) if source in allowed]
        stages.append((1 + round(fraction * phases), indices))
    return stages


def prefix_of(problem: common.Problem, hidden: int) -> str:
    """Return the reference solution without its last `hidden` lines."""
    lines = common.first_solution(problem.reference or "").splitlines(keepends=True)
    return "".join(lines[: max(0, len(lines) - hidden)])


class Curriculum:
    """Which questions a phase asks, and which prefix it gives. Its state is plain data.

    stages: from `verifiable_first`. Without stages every phase may ask every question.
    """

    def __init__(self, kind: str, problems: list[common.Problem], seed: int, stages=()):
        self.kind, self.problems, self.seed = kind, problems, seed
        self.stages = list(stages) or [(1, list(range(len(problems))))]
        self.state = {"next": 0, "score": [-1.0] * len(problems), "hidden": 1, "stage": 0}

    def draw(self, phase: int, count: int) -> tuple[list[int], list[str]]:
        """Return the indices of a phase's questions, and the prefix given with each."""
        stage = max(i for i, (first, _) in enumerate(self.stages) if phase >= first)
        if stage != self.state["stage"]:
            self.state |= {"stage": stage, "next": 0}
        candidates, scores = self.stages[stage][1], self.state["score"]
        # A question that is asked twice in a phase would get the same samples twice.
        n = len(candidates)
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
            seen = np.array([i for i in range(n) if scores[i] >= 0 and i not in chosen])
            order = np.argsort([-scores[i] for i in seen], kind="stable")
            weight = 1 / (1 + np.argsort(order))
            how = dict(replace=False, p=weight / weight.sum())
            rng = np.random.default_rng([self.seed, phase, 1])
            chosen += rng.choice(seen, min(count - n_new, len(seen)), **how).tolist()
        if self.kind != "backtracking":
            return chosen, [""] * len(chosen)
        return chosen, [prefix_of(self.problems[i], self.state["hidden"]) for i in chosen]

    def update(self, chosen: list[int], solved: list[float], errors: list[float]) -> None:
        """Take each question's fraction of correct samples and the mean error of its values."""
        for i, error in zip(chosen, errors, strict=True):
            self.state["score"][i] = error
        # Begin one line earlier from now on (Salimans and Chen 2018).
        if np.mean(solved) >= 0.5:
            self.state["hidden"] += 1


# ---- 6. Metrics ----------------------------------------------------------------------------------


def genrm_metrics(models: RewardModels, samples, rewards) -> dict[str, float | None]:
    """Measure the GenRM on the samples that it scored. A value is None without such samples.

    false_positive_rate: incorrect samples that it finds as good as the reference. beats_gold_rate:
    samples that it prefers to a gold solution. None is really better.
    """
    pairs, mean = [(s, float(r.sum())) for s, r in zip(samples, rewards, strict=True)], common.mean
    scored = [(s, r) for s, r in pairs if s.finished and s.problem.id in models.references]
    return {
        "false_positive_rate": mean(r >= 0.5 for s, r in scored if not s.correct),
        "beats_gold_rate": mean(r > 0.5 for s, r in scored if s.problem.id in models.with_gold),
        "score_if_correct": mean(r for s, r in scored if s.correct),
    }


def sample_metrics(models: RewardModels, samples, rewards, solved) -> dict[str, float | None]:
    """Describe the samples of a phase. solved: the fraction of correct samples of each question."""
    correct, mean = [s.correct and s.finished for s in samples], common.mean
    incorrect = [reward.sum() for reward, c in zip(rewards, correct, strict=True) if not c]
    metrics = {"reward": mean(r.sum() for r in rewards), "reward_if_incorrect": mean(incorrect)}
    if models.genrm:
        metrics |= genrm_metrics(models, samples, rewards)
    return metrics | {
        "correct": mean(correct),
        "informative": mean(0 < rate < 1 for rate in solved),
        "response_length": mean(len(s.tokens) for s in samples),
        "no_answer": mean(s.answer is None for s in samples),
        "truncated": mean(not s.finished for s in samples),
        "with_prefix": mean(bool(s.prefix) for s in samples),
    }


def token_metrics(sampled, logprobs, ref_logprobs, values, returns) -> dict[str, float | None]:
    """Describe the tokens of a phase: [response tokens]. sampled: log-probabilities in sampling."""
    return {
        "ref_kl_k1": kl_k1(logprobs, ref_logprobs).mean().item(),
        "ref_kl_k3": kl_k3(logprobs, ref_logprobs).mean().item(),
        "entropy": -logprobs.mean().item(),
        "logprob_mismatch": ((logprobs - sampled).exp() - 1).abs().max().item(),
        "explained_variance": explained_variance(returns, values),
    }


# ---- 7. The algorithm ----------------------------------------------------------------------------


def load_data(args) -> tuple:
    """Load the problems to train on, dev, the pool, and the domain of each pool question."""
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    pool, domains = load_pool(args, train) if args.select else ([], [])
    references, dataset = [p.reference for p in train if p.reference], f"--dataset {args.dataset}"
    annotated = args.reward != "dense" or any(map(computed_values, references))
    message = "has no solutions with <<a+b=c>> annotations"
    common.require(annotated, f"--reward dense: {dataset} {message}")
    written = args.curriculum != "backtracking" or references
    common.require(written, f"--curriculum backtracking: {dataset} has no reference solutions")
    return train, dev, pool, domains


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    train, dev, pool, domains = load_data(args)
    given_scores = read_scores(args.selection, pool) if args.selection else None
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    if args.phases <= args.value_warmup:
        warmup = f"--value-warmup {args.value_warmup}"
        common.warn(f"only the value function trains in {args.phases} phases with {warmup}")

    # The networks. Copy the reference and the top layers before hooks are added.
    policy = common.Policy(args.model, args.device, args.dtype)
    policy.condition("none")  # without the labels of rcrl.py
    is_small = sum(weight.numel() for weight in policy.model.parameters()) <= 10**7
    lora_rank = (0 if is_small else 128) if args.lora_rank is None else args.lora_rank
    reference = copy.copy(policy)
    if not lora_rank:
        reference.model = copy.deepcopy(policy.model).requires_grad_(False)
    torch.manual_seed(args.seed)  # for the adapters alone
    critic = ValueFunction(policy, args.value_layers, detach=not args.no_detach_value)
    lora = Lora(policy, lora_rank) if lora_rank else None
    trained = lora if lora else policy.model

    # The reward models and the source of each question's reward.
    models, everything = RewardModels.load(args), train + pool
    hide_answers = {"genrm": 1.0, "hybrid": args.hide_answers}.get(args.reward, 0.0)
    sources = reward_sources(everything, hide_answers, args.hide_solutions, args.seed)
    # Scores of different sources have different scales, so each is a domain.
    if models.genrm:
        pool_sources = zip(domains, sources[len(train) :], strict=True)
        domains = [f"{domain}, {source}" for domain, source in pool_sources]
    n_sampled = sources.count("genrm_sampled")
    advice = "questions have no solution to compare with; --orm must choose a sample"
    common.require(models.orm or not n_sampled, f"{n_sampled} {advice}")
    checkable = args.curriculum != "verifiable_first" or "verifier" in sources[: len(train)]
    advice = "--curriculum verifiable_first: no question is left whose answer can be checked"
    common.require(checkable, advice)
    common.encode_prompts(policy, everything + dev, args.few_shot)  # refuses one that is too long
    run.begin()

    # 0. References for the GenRM and questions of the pool. A restart reads both back.
    if models.genrm:
        find_references(models, policy, everything, sources, run, args)
    if args.select:
        added = select_questions(policy, pool, domains, given_scores, models, run, args)
        kept = [*range(len(train)), *(len(train) + i for i in added)]
        train, sources = [everything[i] for i in kept], [sources[i] for i in kept]
        print(f"{len(train)} questions to train on")

    is_staged = args.curriculum == "verifiable_first"
    stages = verifiable_first(sources, args.phases, args.switch) if is_staged else ()
    curriculum = Curriculum(args.curriculum, train, args.seed, stages)
    weights, critic_weights = list(trained.parameters()), list(critic.parameters())
    groups = [{"params": weights}, {"params": critic_weights, "lr": args.value_lr}]
    optimizer = common.adam_w(groups, args.lr)
    progress = {"phase": 0, "step": 0, "policy_steps": 0, "samples": 0, "tokens": 0}
    progress |= {"best": -1.0, "start": -1.0}
    if run.state:
        progress |= run.state["progress"]
        curriculum.state = run.state["curriculum"]
        trained.load_state_dict(run.state["trained"])
        critic.load_state_dict(run.state["critic"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None  # as large as the weights and the optimizer

    def evaluate(phase: int) -> dict:
        """Measure the policy on dev as it is saved: with adapters merged, in float32."""
        dtype = "bfloat16" if policy.bfloat16 else "float32"
        policy.set_dtype("float32" if lora else dtype)
        with lora.merged() if lora else contextlib.nullcontext():
            file = run.out / "samples" / f"dev_{phase}.jsonl"
            metrics = common.dev_metrics(policy, dev, args, args.pass_k, file, args.few_shot)
            if metrics["maj@1"] > progress["best"]:
                progress["best"] = metrics["maj@1"]
                policy.save(run.out / "model")
        policy.set_dtype(dtype)
        names = {"no_answer": "dev_no_answer", "truncated": "dev_truncated"}
        return {names.get(key, key): value for key, value in metrics.items()}

    if progress["phase"] == 0:
        run.log(step=0, samples=0, tokens=0, phase=0, **evaluate(0))
        progress["start"] = progress["best"]

    for phase in range(progress["phase"] + 1, args.phases + 1):
        # 1. Choose questions and sample solutions.
        started = time.monotonic()
        chosen, prefixes = curriculum.draw(phase, args.questions)
        settings = sampling_settings(args) | dict(samples=args.samples, seed=[args.seed, phase])
        settings |= dict(prefixes=prefixes, progress=f"phase {phase}")
        samples = common.generate(policy, [train[i] for i in chosen], **settings)
        common.write_samples(run.out / "samples" / f"phase_{phase}.jsonl", samples)
        seconds_sampling, started = time.monotonic() - started, time.monotonic()

        # 2. Give every token its task reward.
        rewards = task_rewards(args.reward, policy, samples, models, args.add_outcome)

        # 3. Compute log-probabilities and values. Subtract the KL penalty.
        examples = [(list(sample.prompt), sample.tokens.tolist()) for sample in samples]
        lengths = [len(response) for _, response in examples]
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        columns = compute_old_logprobs(policy, critic, reference, lora, examples, args)
        tables = [[torch.from_numpy(row) for row in rows] for rows in (*columns, rewards)]
        tables = (pad_sequence(table, batch_first=True) for table in tables)
        old_logprobs, old_values, ref_logprobs, task = tables  # each [samples, longest]
        token_rewards = penalised_rewards(task, old_logprobs, ref_logprobs, args.kl_coef)

        # 4. Estimate the advantages and whiten them. Their size is the error of the values.
        advantages, returns = gae(token_rewards, old_values, 1.0, args.gae_lambda)
        errors = [float(advantages[i, :n].abs().mean()) for i, n in enumerate(lengths)]
        advantages[real] = whiten(advantages[real])
        correct = [float(sample.correct and sample.finished) for sample in samples]
        solved, error = np.reshape([correct, errors], (2, len(chosen), -1)).mean(2).tolist()
        curriculum.update(chosen, solved, error)

        # 5. Train. First the value function alone, without clipping: from zero it has a long way.
        warming = phase <= args.value_warmup
        value_clip = np.inf if warming else args.value_clip_range
        stats, max_ratio_deviation, too_far = [], None, False
        firsts = range(0, len(samples), args.batch_size)
        bar = tqdm(total=args.epochs * len(firsts), desc=f"phase {phase} training", disable=None)
        for epoch in range(args.epochs):
            if too_far:
                break
            order = common.shuffled(len(samples), args.seed, phase, epoch)
            for first in firsts:
                minibatch = order[first : first + args.batch_size]
                n_tokens, sums, deviation = sum(lengths[i] for i in minibatch), np.zeros(4), 0.0
                sizes = [len(examples[i][0]) + lengths[i] for i in minibatch]
                for indices in common.micro_batches(sizes, args.token_budget):
                    micro = [minibatch[i] for i in indices]
                    batch = [examples[i] for i in micro]
                    logprobs, values = logprobs_and_values(policy, critic, batch, args.temperature)
                    tables = old_logprobs, old_values, advantages, returns
                    flat = (table[micro][real[micro]].to(policy.device) for table in tables)
                    old_logprob, old_value, advantage, target = flat  # [response tokens]
                    pi_loss = policy_loss(logprobs, old_logprob, advantage, args.clip_range)
                    v_loss = value_loss(values, old_value, target, value_clip)
                    loss = v_loss if warming else pi_loss + v_loss
                    (loss.sum() / n_tokens).backward()
                    with torch.no_grad():
                        ratio = (logprobs - old_logprob).exp()
                        distance = (ratio - 1).abs()
                        deviation = max(deviation, distance.max().item())
                        clipped = (distance > args.clip_range).float()
                        logged = pi_loss, v_loss, clipped, kl_k3(old_logprob, logprobs)
                        sums += [x.sum().item() / n_tokens for x in logged]
                sums = common.sum_gradients(weights + critic_weights, *sums)
                names = "policy_loss", "value_loss", "clip_fraction", "approx_kl"
                total = dict(zip(names, sums, strict=True))
                if max_ratio_deviation is None:
                    max_ratio_deviation = max(common.gather([deviation]))
                too_far = 0 < args.kl_limit < total["approx_kl"]
                if too_far:
                    optimizer.zero_grad(set_to_none=True)
                    break
                # The first steps of Adam are as long as any, in directions that are mostly noise.
                if not warming:
                    progress["policy_steps"] += 1
                rising = min(1.0, progress["policy_steps"] / args.lr_warmup)
                falling = 1 - (phase - 1) / args.phases
                optimizer.param_groups[0]["lr"] = args.lr * rising * falling
                grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
                value_grad_norm = torch.nn.utils.clip_grad_norm_(critic_weights, 1.0).item()
                both_losses = total["policy_loss"] + total["value_loss"]
                common.require_finite(both_losses, grad_norm, value_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                stats.append(total | {"grad_norm": grad_norm, "value_grad_norm": value_grad_norm})
                progress["step"] += 1
                progress["tokens"] += n_tokens
                bar.update()
        bar.close()

        # 6. Log what happened. Every few phases measure the policy on dev.
        progress |= {"phase": phase, "samples": progress["samples"] + len(samples)}
        sampled = torch.from_numpy(np.concatenate([sample.logprobs for sample in samples]))
        row = sample_metrics(models, samples, rewards, solved)
        flat = (table[real] for table in (old_logprobs, ref_logprobs, old_values, returns))
        row |= token_metrics(sampled, *flat)
        row |= {key: float(np.mean([s[key] for s in stats])) for key in (stats[0] if stats else ())}
        row |= {"max_ratio_deviation": max_ratio_deviation, "minibatches": len(stats)}
        row |= {"lr": optimizer.param_groups[0]["lr"], "seconds_sampling": seconds_sampling}
        row["seconds_training"] = time.monotonic() - started
        if phase % args.eval_every == 0 or phase == args.phases:
            row |= evaluate(phase)
        done = {key: progress[key] for key in ("step", "samples", "tokens", "phase")}
        run.log(**done, **row)
        state = dict(progress=progress, curriculum=curriculum.state, trained=trained.state_dict())
        run.checkpoint(**state, critic=critic.state_dict(), optimizer=optimizer.state_dict())
    run.finish()
    if progress["best"] <= progress["start"]:
        common.warn("no phase was better on dev than the initial policy, which is in model/")
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {Path(args.out) / 'model'}")
    if lora:
        print("evaluate it with --dtype float32: bfloat16 rounds the merged adapters off")


if __name__ == "__main__":
    common.run_main(main)
