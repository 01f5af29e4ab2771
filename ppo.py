r"""PPO on reasoning problems: a KL-penalised policy gradient with a learned value function.

Objective, for question q and sampled solution s with tokens s_1 ... s_T:

    maximise   E_{q, s ~ pi} [ R(q, s)  -  kl_coef * sum_t ( log pi(s_t | q, s_<t) - log pi_ref(s_t | q, s_<t) ) ]

"Teaching Large Language Models to Reason with Reinforcement Learning" (Havrilla et al. 2024), its PPO, on the clipped
surrogate of "Proximal Policy Optimization Algorithms" (Schulman et al. 2017).

    0. once, with the initial policy: choose the questions to train on from a pool (--select)

Then, in every phase,

    1. draw questions (--curriculum) and sample solutions from the policy
    2. task reward of every token: 1 at the end of a solution with the right answer, as the answer check, the "verifier",
       finds it (--reward dense: also along the way; --reward orm: what a reward model thinks of it; --reward genrm,
       hybrid: how it compares with a reference solution)
    3. one forward pass: log-probabilities and values; another for the reference; reward of a token =
       task reward - kl_coef * (log pi - log pi_ref)
    4. advantages by GAE, whitened
    5. several epochs of minibatches: clipped policy loss and clipped value loss
    6. every few phases greedy accuracy on dev; the best becomes model/

The value function is a trainable copy of the policy's top layers with a scalar head, fed with the hidden states below
them, through which no gradient flows (--no-detach-value: it does). With --lora-rank the policy is the initial model plus
low-rank adapters, and the reference is the same network with the adapters off: there is no second one.

Step 0, the rewards genrm and hybrid and the curriculum verifiable_first are those of "Exploring Data Scaling Trends and
Effects in RLHF" (Shen et al. 2025), mapped to word problems.

pi and pi_ref are taken at --temperature, at which the solutions are sampled; dev accuracy is greedy.

Where this differs from the paper: the default model is tiny and fully fine-tuned, with larger learning rates and fewer
rollouts per phase; lambda of GAE is 1; the value function trains alone in the first phase, because at first it knows
nothing; the policy's learning rate rises over 20 steps and falls linearly, phase by phase, towards 0, that of the value
function stays; gamma is 1.

CPU, six minutes on one core after `python sft.py`, maj@1 on the test split from .75 to .87 (README.md has the table):
    python ppo.py
From the base, without any written solution:
    python ppo.py --model tiny --out runs/ppo_base
One GPU, the paper's setting as far as we know it (README.md), after sft.py:
    python ppo.py --model runs/gsm8k/sft/model --dataset gsm8k --lora-rank 128 --lr 1e-6 --value-lr 1e-5 --questions 256 \
        --samples 4 --epochs 4 --batch-size 256 --phases 250 --max-new-tokens 512 --out runs/gsm8k/ppo
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
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import common


def parse_args(argv: list[str]):
    parser = common.common_parser(
        __doc__, model="runs/sft/model", out="runs/ppo", samples=4, temperature=0.7, lr=2e-4, epochs=2, batch_size=128,
        limit_train=None, checkpoint_every=120,
    )  # fmt: skip
    whole, positive, share = (
        common.number(int, 1),
        common.number(float, 0),
        common.number(float, 0, 1),
    )
    add = parser.add_argument
    add("--phases", type=whole, default=20, help="rounds of sampling and training")
    add(
        "--questions",
        type=whole,
        default=128,
        help="questions a phase (paper: 256, with 4 samples each)",
    )
    add("--reward", choices=["sparse", "dense", "orm", "orm_dense", "genrm", "hybrid"], default="sparse",
        help="sparse: 1 for a correct answer; dense: also for each value of the reference solution; orm: the probability "
        "that a reward model gives the solution; orm_dense: the same in shares, what it rose by in each line; genrm: the "
        "score of a generative reward model beside a reference; hybrid: sparse for the questions whose answer can be "
        "checked, genrm for the others")  # fmt: skip
    add(
        "--orm",
        help="folder of the reward model (default: runs/reward_model/model, if --reward needs one)",
    )
    add(
        "--genrm",
        help="folder of the generative reward model (default: runs/genrm/model, if --reward needs one)",
    )
    add(
        "--hide-answers",
        type=share,
        help="hybrid: share of the questions that the reward cannot check (default: 0.5)",
    )
    add("--hide-solutions", type=share, default=0, help="genrm, hybrid: share of the questions that it cannot check for "
        "which it has no gold solution either; their reference is the best of --reference-samples by --orm")  # fmt: skip
    add(
        "--reference-samples",
        type=whole,
        default=16,
        help="samples of the initial policy to pick a reference from",
    )
    add(
        "--add-outcome",
        action="store_true",
        help="add 1 for a correct answer to the reward of the reward model",
    )
    add("--kl-coef", type=positive, default=0.05, help="weight of the KL penalty (paper: 0.05)")
    add("--kl-limit", type=positive, default=0, help="end a phase when a minibatch is this far (nats per token, `approx_kl`) "
        "from the policy that sampled; 0: never")  # fmt: skip
    add("--clip-range", type=positive, default=0.2, help="how far the ratio may leave 1")
    add(
        "--value-clip-range", type=positive, default=0.2, help="how far a value may move in a phase"
    )
    add(
        "--gae-lambda",
        type=share,
        default=1.0,
        help="lambda of GAE (usual: 0.95; results/README.md says what that changes)",
    )
    add(
        "--lr-warmup",
        type=whole,
        default=20,
        help="steps over which the policy's learning rate rises to --lr",
    )
    add("--value-lr", type=positive, default=1e-3, help="learning rate of the value function")
    add(
        "--value-layers",
        type=whole,
        default=4,
        help="layers of its own; at most half of the model's",
    )
    add("--value-warmup", type=common.number(int, 0), default=1, help="phases in which only the value function trains (the "
        "policy's rate is 0)")  # fmt: skip
    add(
        "--no-detach-value",
        action="store_true",
        help="let the value loss change the policy's layers, too",
    )
    add("--lora-rank", type=common.number(int, 0), help="rank of the adapters; 0: train all weights (default: 128, as in "
        "the paper, for a model of more than 10 million weights, 0 for a smaller one)")  # fmt: skip
    add("--curriculum", choices=["none", "backtracking", "plr", "verifiable_first"], default="none",
        help="backtracking: begin within the reference solution, reveal less as success grows; plr: prefer questions "
        "whose value was wrong; verifiable_first: at first only questions whose answer can be checked")  # fmt: skip
    add("--switch", type=share, nargs=2, default=[0.2, 0.4], metavar="SHARE", help="verifiable_first: after which shares of "
        "the phases the questions with a gold solution join, and those without")  # fmt: skip
    add("--select", choices=["lowest", "floor", "frontier", "random"], help="add questions of a pool to the first "
        "--limit-train ones: those that the initial policy scores lowest; lowest of those that it solves at least once; "
        "those that it solves nearest to half of the time; any")  # fmt: skip
    add("--select-fraction", type=common.number(float, 1e-6, 1), default=0.1,
        help="share of the pool to add (paper: 0.1)")  # fmt: skip
    add(
        "--select-samples",
        type=whole,
        default=8,
        help="samples per question of the pool, for its score",
    )
    add("--pool", nargs="+", default=[], metavar="DATASET", help="where to select from, each a domain of its own "
        "(default: the training questions of --dataset after the first --limit-train)")  # fmt: skip
    add(
        "--selection",
        metavar="FILE",
        help="selection.json of another run, whose scores are taken instead of sampling",
    )
    add("--few-shot", action="store_true", help="two worked examples in every prompt, for a base that never saw the "
        "format (then --temperature 0.2 as in the paper)")  # fmt: skip
    add("--eval-every", type=whole, default=4, help="phases between evaluations on dev")
    add(
        "--pass-k",
        type=common.number(int, 0),
        default=0,
        help="samples per dev problem for pass@k; 0: none",
    )
    args = parser.parse_args(argv)
    if args.temperature == 0:
        parser.error(
            "--temperature 0: greedy samples are all the same, there is nothing to learn from"
        )
    compares = args.reward in ("genrm", "hybrid")
    needs_orm = args.reward.startswith("orm") or compares and args.hide_solutions > 0
    if args.orm and not (needs_orm or compares) or args.genrm and not compares:
        parser.error(
            f"--reward {args.reward} asks no such model; --orm and --genrm are for the rewards that do"
        )
    if needs_orm:
        args.orm = args.orm or "runs/reward_model/model"
    if compares:
        args.genrm = args.genrm or "runs/genrm/model"
    parser.only_with("--reward hybrid", args.reward == "hybrid", args, "hide_answers")
    args.hide_answers = 0.5 if args.hide_answers is None else args.hide_answers
    parser.only_with(
        "--reward orm or orm_dense", args.reward.startswith("orm"), args, "add_outcome"
    )
    if args.select in ("floor", "frontier") and compares:
        parser.error(
            f"--select {args.select} counts successes, and beside a gold solution a score tells none: use lowest"
        )
    if args.curriculum == "backtracking" and compares:
        parser.error(
            f"--curriculum backtracking gives away what --reward {args.reward} hides; use another reward"
        )
    if args.curriculum == "verifiable_first" and (
        args.reward != "hybrid" or args.hide_answers == 1
    ):
        parser.error(
            "--curriculum verifiable_first needs --reward hybrid and questions whose answer can be checked"
        )
    if args.select and not (args.pool or args.limit_train):
        parser.error("--select: needs a --pool, or --limit-train, after which the pool begins")
    parser.only_with(
        "--curriculum verifiable_first", args.curriculum == "verifiable_first", args, "switch"
    )
    parser.only_with(
        "--select",
        bool(args.select),
        args,
        "pool",
        "selection",
        "select_fraction",
        "select_samples",
    )
    parser.only_with(
        "--reward genrm or hybrid", compares, args, "hide_solutions", "reference_samples"
    )
    return args


# ---- the formulas ----------------------------------------------------------------------------------------------------


def penalised_rewards(
    task: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kl_coef: float
):
    """Reward of every token: its task reward less its share of the KL penalty. All of the same shape."""
    return task - kl_coef * kl_k1(logprobs, ref_logprobs)


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of KL(pi, ref) from a sample of pi; may be negative ("Approximating KL Divergence", Schulman)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of the same that is never negative: r - 1 - log r with r = ref / pi."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def gae(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016) and the returns, advantages + values.

    rewards, values [samples, longest], zero behind the end of a sample: nothing follows its last token, cut or not."""
    advantages, following = torch.zeros_like(rewards), torch.zeros(len(rewards))
    next_value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = advantages[:, t] = delta + gamma * lam * following
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over all tokens."""
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
):
    """The clipped surrogate, per token."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """Half the squared error, per token, of the value or of the value held within `clip` of the old one, if larger."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


# ---- rewards ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Judges:
    """Who judges whole solutions: the answer check ("verifier"), or a model in its place."""

    orm: object = None  # --reward orm, orm_dense
    genrm: object = None  # --reward genrm, hybrid
    # problem id -> text that the generative reward model compares with; the answers of all other problems are checked
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    golden: set[str] = dataclasses.field(
        default_factory=set
    )  # the ids whose reference is a gold solution
    token_budget: int = 1024

    def scores(self, kind: str, samples: list[common.Sample]) -> list[float]:
        """What each solution as a whole is worth. One that was cut is worth nothing, even if its answer is right."""
        scores = [float(sample.correct and sample.finished) for sample in samples]
        by_orm = kind.startswith("orm")
        places = [
            i
            for i, s in enumerate(samples)
            if s.finished and (by_orm or s.problem.id in self.references)
        ]
        judged = [samples[i] for i in places]
        if by_orm:
            found = [
                float(probabilities[-1])
                for probabilities in self.orm.scores(judged, self.token_budget)
            ]
        else:
            found = self.genrm.scores(judged, self.references, self.token_budget) if judged else []
        for i, score in zip(places, found, strict=True):
            scores[i] = score
        return scores


def task_rewards(
    kind: str,
    policy: common.Policy,
    samples: list[common.Sample],
    judges: Judges,
    add_outcome: bool = False,
) -> list[np.ndarray]:
    """The reward of every token of every sample. A sample that was cut gets none: to a reward of your own that may be
    negative that would be a prize for being cut, so give such a sample the penalty, too. (--select scores with
    `Judges.scores`, not with this.)"""
    rewards = [np.zeros(len(sample.tokens), np.float32) for sample in samples]
    along = judges.orm.scores(samples, judges.token_budget) if kind == "orm_dense" else None
    scores = judges.scores(kind, samples) if along is None else None
    for i, (reward, sample) in enumerate(zip(rewards, samples, strict=True)):
        if not sample.finished:
            continue
        if kind == "orm_dense":
            reward += potential_rewards(policy, sample, judges.orm, along[i])
        else:
            reward[-1] += scores[i]
        if kind == "dense":
            reward += step_rewards(policy, sample)
        if add_outcome and kind.startswith("orm"):
            reward[-1] += float(sample.correct)
    return rewards


def routes(
    problems: list[common.Problem], hide_answers: float, hide_solutions: float, seed: int
) -> list[str]:
    """Who judges the solutions of each problem: "verifier", "gold" or "best", the generative reward model beside the gold
    solution or beside the best of several samples. hide_answers: share that the verifier cannot check; hide_solutions:
    share of these without a gold solution, to which those that never had one are added."""
    order = np.random.default_rng([seed, 3, 1 << 31]).permutation(
        len(problems)
    )  # no pass over them has this order
    order = order[: round(hide_answers * len(problems))].tolist()
    hidden, bare = set(order), set(order[: round(hide_solutions * len(order))])
    bare |= {i for i in hidden if not problems[i].reference}
    return [
        "verifier" if i not in hidden else "best" if i in bare else "gold"
        for i in range(len(problems))
    ]


def best_of_n(
    policy: common.Policy, problems: list[common.Problem], orm, run: common.Run, args
) -> dict[str, str]:
    """For every problem the sample of the initial policy that the outcome reward model likes best, of those that were not
    cut if there are any. Not of the samples that reward_model.py draws from the same policy (seed [.., 0]), whose labels
    that model has seen."""
    samples = common.sample_to_file(
        policy, problems, run.out / "samples" / "references.jsonl", run, samples=args.reference_samples,
        temperature=args.temperature, max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size, seed=[args.seed, 0, 1],
        few_shot=args.few_shot, progress="references",
    )  # fmt: skip
    orm.grade(samples, args.token_budget)
    best = [
        max(group, key=lambda sample: (sample.finished, sample.score))
        for group in common.by_problem(samples)
    ]
    return {sample.problem.id: sample.solution for sample in best}


def find_references(
    judges: Judges,
    policy: common.Policy,
    golden: list[common.Problem],
    bare: list[common.Problem],
    run: common.Run,
    args,
) -> None:
    """Tell the judges what the generative reward model compares with: of the golden problems the gold solution, of the bare
    ones the best of several samples, which lie in samples/references.json after a restart."""
    judges.references = {problem.id: problem.reference for problem in golden}
    judges.golden = set(judges.references)
    if bare:
        file = run.out / "samples" / "references.json"
        if not run.state:
            common.write_json(file, best_of_n(policy, bare, judges.orm, run, args))
        judges.references |= common.on_first(lambda: common.read_json(file))


def line_ends(policy: common.Policy, ids) -> list[int]:
    """Return the index of every token that ends a line, the last token included."""
    return sorted({*np.flatnonzero(policy.breaks_line[ids]).tolist(), len(ids) - 1})


def potential_rewards(
    policy: common.Policy, sample: common.Sample, orm, scores: np.ndarray
) -> np.ndarray:
    """At the end of every line what the reward model's probability rose by (or fell), 0 before the first: together the
    last probability, as with "orm" (a prefix is paid for with the first line that is sampled: the same for all samples that
    have it). scores: after each of the reward model's tokens, which need not be the policy's; so
    places are matched by how many lines with text are over."""

    def lines(text: str) -> int:
        return sum(bool(line.strip()) for line in text.split("\n"))

    _, ids = orm.encode(sample)
    ends = line_ends(orm, ids)
    potential = {lines(orm.decode(ids[: end + 1])): scores[end] for end in reversed(ends)} | {
        0: 0.0
    }
    reward, before = np.zeros(len(sample.tokens), np.float32), 0.0
    for end in line_ends(policy, sample.tokens)[:-1]:
        after = potential.get(
            lines(sample.prefix + policy.decode(sample.tokens[: end + 1])), scores[-1]
        )
        reward[end], before = after - before, after
    reward[-1] = scores[-1] - before
    return reward


def computed_values(text: str) -> list[Fraction]:
    """The results in the calculator annotations of a text, in order: "14+6=<<14+6=20>>20\n#### 20" -> [20]."""
    found = (
        common.extract_answer(f"{common.MARKER} {value}")
        for value in re.findall(r"<<[^<>]*=([^<>=]*)>>", text)
    )
    return [value for value in found if value is not None]


def step_rewards(policy: common.Policy, sample: common.Sample) -> np.ndarray:
    """1 / (values in the reference) at the end of the line in which one of them appears for the first time."""
    reward = np.zeros(len(sample.tokens), np.float32)
    reference = computed_values(sample.problem.reference or "")
    open_values, seen = list(reference), 0
    ends = line_ends(policy, sample.tokens)
    for place, line_end in enumerate([None, *ends]):
        text = sample.prefix + (
            "" if line_end is None else policy.decode(sample.tokens[: line_end + 1])
        )
        found = computed_values(common.first_solution(text))
        for value in found[seen:]:
            if value in open_values:
                open_values.remove(value)
                if place:  # what the prefix gives away earns nothing
                    reward[line_end] += 1 / len(reference)
        seen = len(found)
    return reward


# ---- the value function and the adapters -----------------------------------------------------------------------------


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The stack of layers of any decoder."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise common.UserError(
        f"--model: a {type(model).__name__} has no plain stack of layers, which PPO builds on"
    )


class ValueFunction(torch.nn.Module):
    """A trainable copy of the policy's top layers and a scalar head that starts at zero.

    It is fed with what the policy's own layers are called with (hidden states, masks, position embeddings, ...), caught
    on the way in a forward pass of the policy, so that it works for any decoder."""

    def __init__(self, policy: common.Policy, n_layers: int, detach: bool):
        super().__init__()
        layers = decoder_layers(policy.model)
        n_layers = min(n_layers, max(1, len(layers) // 2))
        own = list(layers)[len(layers) - n_layers :]
        self.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in own)
        width = policy.model.config.get_text_config().hidden_size
        self.norm = torch.nn.LayerNorm(width, device=policy.device)
        self.head = torch.nn.Linear(width, 1, device=policy.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.detach, self.calls, self.catching = detach, [], False
        for layer in own:
            layer.register_forward_pre_hook(self._catch, with_kwargs=True)

    def _catch(self, module, args, kwargs):
        if self.catching:
            self.calls.append((args, kwargs))

    @contextlib.contextmanager
    def listening(self):
        """Around a forward pass of the policy, after which `values` can be asked for."""
        self.calls, self.catching = [], True
        try:
            yield
        finally:
            self.catching = False

    def values(self, policy: common.Policy, examples: list[common.Example]) -> torch.Tensor:
        """Expected return before every response token: [response tokens of all examples]."""
        calls, self.calls = self.calls, []
        rows, columns = common.response_positions(examples, policy.device)
        with policy.autocast():
            args, kwargs = calls[0]
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = hidden.detach() if self.detach else hidden
            for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
                args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}
                hidden = layer(hidden, *args, **kwargs)
                hidden = hidden[0] if isinstance(hidden, (tuple, list)) else hidden
        return self.head(self.norm(hidden[rows, columns - 1].float()))[:, 0]


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module computes W x + b. What is derived from a linear layer may (Falcon) or not (the router of Phimoe)."""
    if type(module) in (torch.nn.Linear, Conv1D):
        return True
    if not isinstance(module, torch.nn.Linear):
        return False
    x = torch.ones(1, 1, module.in_features, device=module.weight.device)
    with torch.no_grad(), contextlib.suppress(Exception):
        return torch.allclose(
            module(x), torch.nn.functional.linear(x, module.weight, module.bias), atol=1e-4
        )
    return False


class Lora(torch.nn.Module):
    """Low-rank adapters (Hu et al. 2021) on every linear map within the layers: W x + B A x, with B = 0 at first. They
    hang on the modules as hooks, so the model itself, its names and its checkpoint, stay what they are. Experts whose
    weights are one tensor, and what routes to them, get none."""

    def __init__(self, policy: common.Policy, rank: int):
        super().__init__()
        policy.model.requires_grad_(False)
        self.on, self.targets, self.down, self.up = (
            True,
            [],
            torch.nn.ParameterList(),
            torch.nn.ParameterList(),
        )
        for module in decoder_layers(policy.model).modules():
            if not is_linear(module):
                continue
            weight, transposed = (
                module.weight,
                isinstance(module, Conv1D),
            )  # of GPT-2; keeps [in, out]
            n_out, n_in = weight.T.shape if transposed else weight.shape
            self.down.append(
                torch.nn.Parameter(torch.randn(rank, n_in, device=weight.device) / n_in**0.5)
            )
            self.up.append(torch.nn.Parameter(torch.zeros(n_out, rank, device=weight.device)))
            self.targets.append((module, transposed))
            module.register_forward_hook(self._adapter(len(self.targets) - 1))
        if not self.targets:
            raise common.UserError(
                "--lora-rank: this model has no linear layers for adapters; 0 trains all weights"
            )

    def _adapter(self, i: int):
        def hook(module, inputs, output):
            if not self.on:
                return (
                    output.float()
                )  # as with the adapters: they begin at a KL of 0, in bfloat16 too
            change = torch.nn.functional.linear(
                torch.nn.functional.linear(inputs[0], self.down[i]), self.up[i]
            )
            return (
                output.float() + change.float()
            )  # a sum in bfloat16 would round most of a small change off

        return hook

    @contextlib.contextmanager
    def off(self):
        """The initial model."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @contextlib.contextmanager
    def merged(self):
        """The adapters within the weights, as they are saved. In float32 that is the same policy; in bfloat16, whose neighbours
        of 0.1 are 0.0005 away, a part of a small change is rounded off. The weights wait on the CPU until they return."""
        kept = [module.weight.data.to("cpu", copy=True) for module, _ in self.targets]
        try:
            for (module, transposed), down, up in zip(
                self.targets, self.down, self.up, strict=True
            ):
                delta = up.data @ down.data
                module.weight.data += delta.T if transposed else delta
            with self.off():
                yield
        finally:
            for (module, _), weight in zip(self.targets, kept, strict=True):
                module.weight.data.copy_(weight)


# ---- Pre-PPO: which questions of a pool to train on ------------------------------------------------------------------


def load_pool(args, train: list[common.Problem]) -> tuple[list[common.Problem], list[str]]:
    """The questions that --select may add to `train`, none of dev or the test, and the domain (dataset) of each."""
    names = args.pool or [args.dataset]
    found = [
        common.load_problems(name, "train")[0 if args.pool else len(train) :] for name in names
    ]
    held_out = [common.load_problems(args.dataset, "dev")]
    with contextlib.suppress(common.UserError):  # a folder may have no test split
        held_out.append(common.load_problems(args.dataset, "test"))
    taken = {problem.question for problems in (train, *held_out) for problem in problems}
    new = [
        (p, name)
        for name, problems in zip(names, found, strict=True)
        for p in problems
        if p.question not in taken
    ]
    if not new:
        raise common.UserError(
            "--select: the pool has no question beyond those to train on, of dev and of the test"
        )
    pool, domains = [problem for problem, _ in new], [name for _, name in new]
    if len({problem.id for problem in train + pool}) < len(
        train + pool
    ):  # files of one name, as folders have
        pool = [
            dataclasses.replace(p, id=f"{name}: {p.id}")
            for p, name in zip(pool, domains, strict=True)
        ]
    if len(set(args.pool)) < len(args.pool):
        raise common.UserError("--pool: names a dataset twice")
    return pool, domains


def standardised(scores: list[float], domains: list[str]) -> np.ndarray:
    """Mean 0 and variance 1 within every domain, so that a hard domain does not take all places."""
    scores, result = np.array(scores, np.float64), np.zeros(len(scores))
    for domain in set(domains):
        here = np.array([d == domain for d in domains])
        result[here] = (scores[here] - scores[here].mean()) / (scores[here].std() + 1e-8)
    return result


def choose(
    kind: str,
    scores: list[float],
    passed: list[float],
    domains: list[str],
    fraction: float,
    seed: int,
) -> list[int]:
    """Indices of the questions to keep. scores: the mean reward of each one's samples; passed: the share of them that is
    right (with a generative reward model: scored at least half). Ties are broken at random: with rewards of 0 and 1 they
    are most of the lowest tenth."""
    rng, count = np.random.default_rng([seed, 4]), max(1, round(fraction * len(scores)))
    passed, key = np.array(passed), standardised(scores, domains)
    candidates = np.arange(len(scores))
    if kind == "floor":
        candidates = np.flatnonzero(passed > 0)
    elif kind == "frontier":
        key = np.abs(passed - 0.5)
    elif kind == "random":
        key = np.zeros(len(scores))
    if len(candidates) < count:
        common.warn(
            f"only {len(candidates)} of {count} questions to select are solved at least once"
        )
    order = np.lexsort((rng.random(len(candidates)), key[candidates]))
    return sorted(candidates[order[:count]].tolist())


def read_scores(file: str, pool: list[common.Problem]) -> tuple[list[float], list[float]]:
    """What `score_pool` gives, from the selection.json of another run."""
    try:
        rows = {
            row["id"]: (row["score"], row["passed"], row.get("question"))
            for row in common.read_json(Path(file))["questions"]
        }
    except (KeyError, TypeError):
        raise common.UserError(
            f"--selection {file}: not a selection.json of this program"
        ) from None
    # the question is the same, too; older files do not have it
    missing = [p.id for p in pool if p.id not in rows or rows[p.id][2] not in (None, p.question)]
    if missing:
        raise common.UserError(
            f"--selection {file}: has no score for {missing[0]} ({len(missing)} missing)"
        )
    return [rows[p.id][0] for p in pool], [rows[p.id][1] for p in pool]


def score_pool(
    policy: common.Policy, pool: list[common.Problem], judges: Judges, run: common.Run, args
) -> tuple[list[float], list[float]]:
    """Mean score of every question's samples by whoever judges whole solutions (what --reward dense pays along the way does
    not count), and the share of them that is right (with a generative reward model: scored at least half)."""
    samples = common.sample_to_file(
        policy, pool, run.out / "samples" / "pool.jsonl", run, samples=args.select_samples, few_shot=args.few_shot,
        temperature=args.temperature, max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size,
        seed=[args.seed, 0] + [2] * bool(judges.orm or judges.genrm),  # not the samples that such a model was trained on
        progress="pool",
    )  # fmt: skip
    scores = np.array(judges.scores(args.reward, samples))
    right = np.array([sample.correct and sample.finished for sample in samples])
    passed = scores >= 0.5 if judges.genrm else right
    scores = scores + right if args.add_outcome else scores
    return tuple(each.reshape(len(pool), -1).mean(1).tolist() for each in (scores, passed))


def select_questions(
    policy: common.Policy, pool: list[common.Problem], domains: list[str], given_scores: tuple | None, judges: Judges,
    run: common.Run, args,
) -> list[int]:  # fmt: skip
    """Indices of the questions of the pool to train on. They and all scores (new ones, unless they are given) are written to
    selection.json, which is read after a restart."""
    file = run.out / "selection.json"
    if not run.state:
        scores, passed = given_scores or score_pool(policy, pool, judges, run, args)
        kept = set(choose(args.select, scores, passed, domains, args.select_fraction, args.seed))
        questions = [
            {
                "id": p.id,
                "question": p.question,
                "domain": d,
                "score": s,
                "passed": share,
                "standardised": z,
                "chosen": i in kept,
            }
            for i, (p, d, s, share, z) in enumerate(
                zip(
                    pool,
                    domains,
                    scores,
                    passed,
                    standardised(scores, domains).tolist(),
                    strict=True,
                )
            )
        ]
        common.write_json(
            file, {"model": args.model, "select": args.select, "questions": questions}
        )
    rows = common.on_first(lambda: common.read_json(file)["questions"])
    chosen = [i for i, row in enumerate(rows) if row["chosen"]]
    print(f"{len(chosen)} of {len(pool)} questions of the pool chosen, scored {np.mean([rows[i]['score'] for i in chosen]):.3f} "
          f"on average (all: {np.mean([row['score'] for row in rows]):.3f})")  # fmt: skip
    return chosen


# ---- curricula -------------------------------------------------------------------------------------------------------


def verifiable_first(
    route: list[str], phases: int, switch: list[float]
) -> list[tuple[int, list[int]]]:
    """The stages of this curriculum: (from which phase on, the questions that are asked then). switch: after which shares of
    the phases those with a gold solution join, and those without."""
    stages = []
    for n_kinds, share in enumerate([0.0, *sorted(switch)], 1):
        allowed = ("verifier", "gold", "best")[:n_kinds]
        stages.append((1 + round(share * phases), [i for i, r in enumerate(route) if r in allowed]))
    return stages


def prefix_of(problem: common.Problem, hidden: int) -> str:
    """The reference solution without its last `hidden` lines."""
    lines = common.first_solution(problem.reference or "").splitlines(keepends=True)
    return "".join(lines[: max(0, len(lines) - hidden)])


class Curriculum:
    """Which questions a phase asks, and how much of the reference solution it gives away. Its state is plain data."""

    def __init__(
        self,
        kind: str,
        problems: list[common.Problem],
        seed: int,
        stages: list[tuple[int, list[int]]] = (),
    ):
        """stages: as `verifiable_first` returns them; without any, all questions are asked in all phases."""
        self.kind, self.problems, self.seed = kind, problems, seed
        self.stages = list(stages) or [(1, list(range(len(problems))))]
        self.state = {"next": 0, "score": [-1.0] * len(problems), "hidden": 1, "stage": 0}

    def draw(self, phase: int, count: int) -> tuple[list[int], list[str]]:
        """Indices of questions, and for each the beginning of a solution that is given away."""
        stage = max(i for i, (begin, _) in enumerate(self.stages) if phase >= begin)
        if stage != self.state["stage"]:
            self.state |= {"stage": stage, "next": 0}
        asked = self.stages[stage][1]
        n, rng = len(asked), np.random.default_rng([self.seed, phase, 1])
        fresh = count = min(count, n)  # a question that came twice would get the same samples twice
        if self.kind == "plr":  # half of the questions new as long as there are such, half by score
            fresh = min(max(1, count // 2), self.state["score"].count(-1.0)) if phase > 1 else count
        chosen: list[int] = []
        while len(chosen) < fresh:
            turn, place = divmod(self.state["next"], n)
            i = asked[common.shuffled(n, self.seed, turn)[place]]
            self.state["next"] += 1
            chosen += [i] if i not in chosen else []
        if fresh < count:
            seen = np.array(
                [i for i in range(n) if self.state["score"][i] >= 0 and i not in chosen]
            )
            rank = np.argsort(
                np.argsort([-self.state["score"][i] for i in seen], kind="stable")
            )  # from 0
            weight = 1 / (1 + rank)
            chosen += rng.choice(
                seen, min(count - fresh, len(seen)), replace=False, p=weight / weight.sum()
            ).tolist()
        backtracking, hidden = self.kind == "backtracking", self.state["hidden"]
        return chosen, [prefix_of(self.problems[i], hidden) if backtracking else "" for i in chosen]

    def update(self, chosen: list[int], correct: list[float], errors: list[float]) -> None:
        """After a phase: for each question the share of correct samples and the mean size of the value's error."""
        for i, error in zip(chosen, errors, strict=True):
            self.state["score"][i] = error
        if np.mean(correct) >= 0.5:  # begin a line earlier from now on (Salimans and Chen 2018)
            self.state["hidden"] += 1


# ---- what is logged -------------------------------------------------------------------------------------------------


def explained_variance(returns: torch.Tensor, values: torch.Tensor) -> float | None:
    """1 - Var(return - value) / Var(return): 1 for values that know the returns, 0 for a constant. None where all returns
    are the same, as when no solution was right, and there is nothing to explain."""
    variance = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / variance if variance > 1e-8 else None


def genrm_metrics(
    judges: Judges, samples: list[common.Sample], rewards: list[np.ndarray]
) -> dict[str, float | None]:
    """Of the samples that the generative reward model judged: the share of wrong ones that it finds as good as the
    reference; of those beside a gold solution the share that it finds better, which none is. None where there are none."""
    judged = [
        (sample.problem.id in judges.golden, sample.correct, float(reward.sum()))
        for sample, reward in zip(samples, rewards, strict=True) if sample.finished and sample.problem.id in judges.references
    ]  # fmt: skip
    return {
        "false_positive_rate": common.mean(
            [score >= 0.5 for _, correct, score in judged if not correct]
        ),
        "beats_gold_rate": common.mean([score > 0.5 for golden, _, score in judged if golden]),
        "score_if_correct": common.mean([score for _, correct, score in judged if correct]),
    }


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    # the problems
    train = common.load_problems(args.dataset, "train", args.limit_train)
    dev = common.load_problems(args.dataset, "dev", args.limit_eval)
    pool, domains = load_pool(args, train) if args.select else ([], [])
    given_scores = read_scores(args.selection, pool) if args.selection else None
    if args.reward == "dense" and not any(computed_values(p.reference or "") for p in train):
        raise common.UserError(
            f"--reward dense: --dataset {args.dataset} has no solutions with <<a+b=c>> annotations"
        )
    if args.curriculum == "backtracking" and not any(p.reference for p in train):
        raise common.UserError(
            f"--curriculum backtracking: --dataset {args.dataset} has no reference solutions"
        )
    run = common.Run(args)
    if run.is_finished:
        print(f"{args.out} is complete")
        return
    if args.phases <= args.value_warmup:
        common.warn(
            f"only the value function trains in {args.phases} phases with --value-warmup {args.value_warmup}"
        )

    # the policy, its reference (a copy, or with adapters the same network without them), its value function
    policy = common.Policy(args.model, args.device, args.dtype)
    policy.condition("none")  # a model of rcrl.py is trained on without its labels
    torch.manual_seed(args.seed)  # of the adapters; nothing else draws from it
    is_tiny = sum(weight.numel() for weight in policy.model.parameters()) <= 10**7
    lora_rank = (0 if is_tiny else 128) if args.lora_rank is None else args.lora_rank
    if not lora_rank:
        reference = copy.copy(policy)
        reference.model = copy.deepcopy(policy.model).requires_grad_(False)
        trained, reference_mode, merged = (
            policy.model,
            contextlib.nullcontext,
            contextlib.nullcontext,
        )
    critic = ValueFunction(policy, args.value_layers, detach=not args.no_detach_value)
    if lora_rank:
        lora = Lora(policy, lora_rank)
        trained, reference, reference_mode, merged = lora, policy, lora.off, lora.merged

    # who judges the solutions of each question
    judges = Judges(token_budget=args.token_budget)
    if args.orm or args.genrm:
        import reward_model

        if args.orm:
            judges.orm = reward_model.RewardModel(args.orm, args.device, args.dtype)
        if args.genrm:
            judges.genrm = reward_model.GenerativeRewardModel(args.genrm, args.device, args.dtype)
    everything, route = train + pool, ["verifier"] * len(train + pool)
    if judges.genrm:
        hide_answers = 1.0 if args.reward == "genrm" else args.hide_answers
        route = routes(everything, hide_answers, args.hide_solutions, args.seed)
        domains = [
            f"{domain}, {r}" for domain, r in zip(domains, route[len(train) :], strict=True)
        ]  # other scales
    golden, bare = (
        [p for p, r in zip(everything, route, strict=True) if r == kind]
        for kind in ("gold", "best")
    )
    if bare and not judges.orm:
        raise common.UserError(
            f"{len(bare)} questions have no solution to compare with; --orm must pick a sample"
        )
    if args.curriculum == "verifiable_first" and "verifier" not in route[: len(train)]:
        raise common.UserError(
            "--curriculum verifiable_first: no question is left whose answer can be checked"
        )
    common.encode_prompts(policy, train + pool + dev, args.few_shot)
    run.begin()

    # 0. references to compare with, and the questions of the pool; a restart takes what was chosen before
    if judges.genrm:
        find_references(judges, policy, golden, bare, run, args)
    if args.select:
        chosen = select_questions(policy, pool, domains, given_scores, judges, run, args)
        train, route = (
            train + [pool[i] for i in chosen],
            route[: len(train)] + [route[len(train) + i] for i in chosen],
        )
        print(f"{len(train)} questions to train on")

    weights, critic_weights = list(trained.parameters()), list(critic.parameters())
    optimizer = common.adam_w(
        [{"params": weights}, {"params": critic_weights, "lr": args.value_lr}], args.lr
    )
    stages = (
        verifiable_first(route, args.phases, args.switch)
        if args.curriculum == "verifiable_first"
        else ()
    )
    curriculum = Curriculum(args.curriculum, train, args.seed, stages)

    progress = {
        "phase": 0,
        "step": 0,
        "policy_steps": 0,
        "samples": 0,
        "tokens": 0,
        "best": -1.0,
        "start": -1.0,
    }
    if run.state:
        progress |= run.state["progress"]
        curriculum.state = run.state["curriculum"]
        trained.load_state_dict(run.state["trained"])
        critic.load_state_dict(run.state["critic"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = None

    def evaluate(phase: int) -> dict:
        file = run.out / "samples" / f"dev_{phase}.jsonl"
        # what is saved is what is measured, adapters within the weights in float32, because bfloat16 rounds them off
        dtype = "bfloat16" if policy.bfloat16 else "float32"
        policy.set_dtype("float32" if lora_rank else dtype)
        with merged():
            metrics = common.dev_metrics(policy, dev, args, args.pass_k, file, args.few_shot)
            if metrics["maj@1"] > progress["best"]:
                progress["best"] = metrics["maj@1"]
                policy.save(run.out / "model")
        policy.set_dtype(dtype)
        return {
            f"dev_{key}" if key in ("no_answer", "truncated") else key: value
            for key, value in metrics.items()
        }

    def forward(examples: list[common.Example]) -> tuple[torch.Tensor, torch.Tensor]:
        with critic.listening():
            logprobs = common.response_logprobs(policy, examples, args.temperature)
        return logprobs, critic.values(policy, examples)

    @torch.no_grad()
    def compute_old_logprobs(examples: list[common.Example]) -> list[tuple]:
        """For every response its log-probabilities, its values, and its log-probabilities under the reference."""
        found = []
        for indices in common.micro_batches(
            [len(p) + len(r) for p, r in examples], args.token_budget
        ):
            batch = [examples[i] for i in indices]
            logprobs, values = forward(batch)
            with reference_mode():
                ref_logprobs = common.response_logprobs(reference, batch, args.temperature)
            parts = (common.by_example(flat, batch) for flat in (logprobs, values, ref_logprobs))
            found += zip(indices, *parts, strict=True)
        return [arrays for _, *arrays in sorted(common.gather(found), key=lambda row: row[0])]

    if progress["phase"] == 0:
        run.log(step=0, samples=0, tokens=0, phase=0, **evaluate(0))
        progress["start"] = progress["best"]

    for phase in range(progress["phase"] + 1, args.phases + 1):
        # 1. questions and solutions
        started = time.monotonic()
        chosen, prefixes = curriculum.draw(phase, args.questions)
        samples = common.generate(
            policy, [train[i] for i in chosen], samples=args.samples, temperature=args.temperature,
            max_new_tokens=args.max_new_tokens, batch_size=args.gen_batch_size, seed=[args.seed, phase], few_shot=args.few_shot,
            prefixes=prefixes, progress=f"phase {phase}",
        )  # fmt: skip
        common.write_samples(run.out / "samples" / f"phase_{phase}.jsonl", samples)
        seconds_sampling, started = time.monotonic() - started, time.monotonic()

        # 2. task rewards
        rewards = task_rewards(args.reward, policy, samples, judges, args.add_outcome)

        # 3. log-probabilities and values of the policy that sampled, as training computes them; of the reference
        examples = [(list(sample.prompt), sample.tokens.tolist()) for sample in samples]
        lengths = [len(response) for _, response in examples]
        found = compute_old_logprobs(examples)
        old_logprobs, old_values, ref_logprobs, task = (  # [samples, longest]
            pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
            for rows in (*zip(*found, strict=True), rewards)
        )
        sampled = torch.from_numpy(np.concatenate([sample.logprobs for sample in samples]))
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

        # 4. advantages; gamma is 1, and a cut solution is over like any other
        token_rewards = penalised_rewards(task, old_logprobs, ref_logprobs, args.kl_coef)
        advantages, returns = gae(token_rewards, old_values, 1.0, args.gae_lambda)
        errors = [float(advantages[i, : lengths[i]].abs().mean()) for i in range(len(samples))]
        advantages[real] = whiten(advantages[real])
        correct = np.array([float(s.correct and s.finished) for s in samples])
        solved, error = (
            np.reshape(each, (len(chosen), -1)).mean(1).tolist() for each in (correct, errors)
        )
        curriculum.update(chosen, solved, error)

        # 5. minibatches
        stats, max_ratio_deviation = [], None
        warming = phase <= args.value_warmup
        value_clip = (
            np.inf if warming else args.value_clip_range
        )  # from zero it has a long way to go
        orders = (
            common.shuffled(len(samples), args.seed, phase, epoch) for epoch in range(args.epochs)
        )
        starts = range(0, len(samples), args.batch_size)
        minibatches = [
            order[first : first + args.batch_size] for order in orders for first in starts
        ]
        for minibatch in tqdm(minibatches, desc=f"phase {phase} training", disable=None):
            n_tokens = sum(lengths[i] for i in minibatch)
            sums, deviation = np.zeros(4), 0.0
            for places in common.micro_batches(
                [len(examples[i][0]) + lengths[i] for i in minibatch], args.token_budget
            ):
                indices = [minibatch[place] for place in places]
                logprobs, values = forward([examples[i] for i in indices])
                old, old_value, advantage, target = (
                    table[indices][real[indices]].to(policy.device)
                    for table in (old_logprobs, old_values, advantages, returns)
                )
                losses = (
                    policy_loss(logprobs, old, advantage, args.clip_range),
                    value_loss(values, old_value, target, value_clip),
                )
                loss = losses[1] if warming else losses[0] + losses[1]
                (loss.sum() / n_tokens).backward()
                with torch.no_grad():
                    deviations = ((logprobs - old).exp() - 1).abs()
                    deviation = max(deviation, deviations.max().item())
                    clipped, approx_kl = (
                        (deviations > args.clip_range).float(),
                        kl_k3(old, logprobs),
                    )
                    sums += [x.sum().item() / n_tokens for x in (*losses, clipped, approx_kl)]
            sums = common.sum_gradients(weights + critic_weights, *sums)
            total = dict(
                zip(("policy_loss", "value_loss", "clip_fraction", "approx_kl"), sums, strict=True)
            )
            if max_ratio_deviation is None:
                max_ratio_deviation = max(common.gather([deviation]))
            if args.kl_limit and total["approx_kl"] > args.kl_limit:
                optimizer.zero_grad(set_to_none=True)
                break
            if (
                not warming
            ):  # Adam's first steps are as long as any, in directions that are mostly noise
                progress["policy_steps"] += 1
            warmed, left = (
                min(1.0, progress["policy_steps"] / args.lr_warmup),
                1 - (phase - 1) / args.phases,
            )
            optimizer.param_groups[0]["lr"] = args.lr * warmed * left
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
            value_grad_norm = torch.nn.utils.clip_grad_norm_(critic_weights, 1.0).item()
            common.require_finite(
                total["policy_loss"] + total["value_loss"], grad_norm, value_grad_norm
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stats.append(total | {"grad_norm": grad_norm, "value_grad_norm": value_grad_norm})
            progress["step"] += 1
            progress["tokens"] += n_tokens

        # 6. what happened, and how good the policy is
        progress |= {"phase": phase, "samples": progress["samples"] + len(samples)}
        row = {
            "reward": common.mean(reward.sum() for reward in rewards),
            "reward_if_incorrect": common.mean(
                r.sum() for r, c in zip(rewards, correct, strict=True) if not c
            ),
            **(genrm_metrics(judges, samples, rewards) if judges.genrm else {}),
            "correct": common.mean(correct),
            "ref_kl_k1": kl_k1(old_logprobs, ref_logprobs)[real].mean().item(),
            "ref_kl_k3": kl_k3(old_logprobs, ref_logprobs)[real].mean().item(),
            "entropy": -old_logprobs[real].mean().item(),
            "logprob_mismatch": ((old_logprobs[real] - sampled).exp() - 1).abs().max().item(),
            "max_ratio_deviation": max_ratio_deviation,
            **{key: float(np.mean([s[key] for s in stats])) for key in (stats[0] if stats else ())},
            "lr": optimizer.param_groups[0]["lr"],
            "explained_variance": explained_variance(returns[real], old_values[real]),
            "minibatches": len(stats),
            "informative": common.mean(0 < c < 1 for c in solved),
            "response_length": common.mean(lengths),
            "no_answer": common.mean(s.answer is None for s in samples),
            "truncated": common.mean(not s.finished for s in samples),
            "with_prefix": common.mean(bool(prefix) for prefix in prefixes),
            "seconds_sampling": seconds_sampling,
            "seconds_training": time.monotonic() - started,
        }
        if phase % args.eval_every == 0 or phase == args.phases:
            row |= evaluate(phase)
        run.log(
            step=progress["step"],
            samples=progress["samples"],
            tokens=progress["tokens"],
            phase=phase,
            **row,
        )
        run.checkpoint(
            progress=progress, curriculum=curriculum.state, trained=trained.state_dict(), critic=critic.state_dict(),
            optimizer=optimizer.state_dict(),
        )  # fmt: skip
    run.finish()
    if progress["best"] <= progress["start"]:
        common.warn(
            "no phase was better on dev than the initial policy, and that is what model/ holds"
        )
    print(f"best maj@1 on dev {progress['best']:.3f}; model in {Path(args.out) / 'model'}")
    if lora_rank:
        print(
            "its weights hold the adapters: bfloat16 rounds small changes off, so evaluate it with --dtype float32"
        )


if __name__ == "__main__":
    common.run_main(main)
