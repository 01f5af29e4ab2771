"""Tokens per second of `common.generate`, beside two ways of transformers and beside the limit of the machine.

    generate          common.py: shared prompts, rows that are refilled, one random number a token
    model.generate    `model.generate(num_return_sequences=K, top_k=0)` on batches of as many rows; the usual way
    generate_batch    transformers' continuous batching, with its own choice of batch size
    plain             for a model of rcrl.py: `generate` without its labels, where generate puts [GOOD] before every line;
                      the labels are not counted as tokens
    own cache         `generate` as it samples from a model that its shared cache does not fit: with the model's own
    no cache          and from one that has none

The same prompts and as many samples of each; lengths are natural, so they agree in distribution. Every engine runs once
to warm up and then `--repeats` times in turn; medians are printed. Tokens: those of the samples, the end-of-text token
included, prompts and whatever an engine computes in vain excluded.

Limit. A token takes 2 FLOP per weight of a matrix (the output head included; attention and everything elementwise are
left out), and the machine's rate is measured here on a product of square matrices:

    compute bound  =  FLOP/s  /  (2 x weights of matrices)                                       [tokens/s]

On a GPU a step also has to read the weights once, and the keys and values of every row once; the prompt's are counted
once per K samples, as they need to be read only once for them. With L the mean number of a sample's own tokens in the
cache over its life, P the prompt's, B the memory bandwidth, measured on a copy:

    bytes per step  =  weights x 2  +  rows x (L + P / K) x (layers x 2 x key heads x head_dim) x 2
    memory bound    =  rows x B / bytes per step                                                 [tokens/s]

The limit is the lower of the two bounds. Started by torchrun, `generate` is that of all processes, `--rows` those of each, and the
machine's rates are the sums of what the processes measure at the same time. The other engines know of one process only.

    python benchmarks/generation.py                                        the embedded model, two minutes on two cores
    python benchmarks/generation.py --rows 64 128 256 --samples 1 8 96     every combination
    python benchmarks/generation.py --model MODEL --dataset gsm8k --split test --problems 16 --samples 32 \\
        --max-new-tokens 256 --out results/generation/gsm8k.json
"""

import contextlib
import copy
import functools
import platform
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

ENGINES = ["generate", "model.generate", "generate_batch", "plain", "own cache", "no cache"]


def parse_args(argv: list[str]):
    parser = common.common_parser(__doc__, model="tiny", temperature=1.0)
    parser.set_defaults(rows=[256])
    whole = common.number(int, 1)
    parser.add_argument(
        "--problems", type=whole, default=32, help="so many prompts; fewer with more --samples"
    )
    parser.add_argument(
        "--samples", type=whole, nargs="+", default=[96], help="samples per problem, K"
    )
    parser.add_argument("--split", default="dev", choices=["train", "dev", "test"])
    parser.add_argument("--repeats", type=whole, default=3, help="runs of each engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES[:2])
    parser.add_argument("--out", help="a JSON file to write")
    for action in parser._actions:  # several values make a table
        if action.dest == "rows":
            action.nargs = "+"
    return parser.parse_args(argv)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, best = (
        torch.randn(n, n, device=device, dtype=dtype),
        torch.randn(n, n, device=device, dtype=dtype),
        0.0,
    )
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def bandwidth(device: torch.device) -> float:
    """Bytes/s read and written by a copy of 1 GiB (a quarter on a CPU), the best of several."""
    source = torch.ones(
        (1 << 30) // (1 if device.type == "cuda" else 4), device=device, dtype=torch.uint8
    )
    target, best = torch.empty_like(source), 0.0
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - started))
    return best


def as_usual(policy: common.Policy) -> common.Policy:
    """With weights of bfloat16 where `generate` works in it under autocast: under autocast the caches of the other engines
    would be float32, and generate_batch, which decodes in a thread of its own, would not be under it."""
    with policy.autocast():
        if not torch.is_autocast_enabled(policy.device.type):
            return policy
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model)
    for weight in (
        policy.model.parameters()
    ):  # not the buffers: rotary frequencies in bfloat16 make it another model
        weight.data = weight.data.to(torch.bfloat16)
    return policy


def of_all_processes(measured: float) -> float:
    return sum(common.gather([measured]))


def limits(policy, rows: int, samples: int, prompt_lengths: list[int], lengths: list[int]) -> dict:
    """Tokens/s that the machine allows; the arithmetic is in the docstring of this file."""
    device, gpu = policy.device, policy.device.type == "cuda"
    head = policy.model.get_output_embeddings().weight
    weights = head.numel() + sum(
        p.numel() for p in policy.model.parameters() if p.ndim == 2 and p is not head
    )
    embedding = policy.model.get_input_embeddings().weight
    weights -= 0 if embedding is head else embedding.numel()  # looked up, not multiplied
    flops = of_all_processes(rate(device, torch.bfloat16 if gpu else torch.float32))
    found = {"matrix_flops": flops, "weights": weights, "compute_bound": flops / (2 * weights)}
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 if gpu else 4
    life = np.sum(np.square(lengths)) / (
        2 * np.sum(lengths)
    )  # a long sample is there for more steps
    entries = life + np.mean(prompt_lengths) / samples
    step = width * (weights + rows * entries * config.num_hidden_layers * 2 * heads * head_dim)
    found |= {"bandwidth": of_all_processes(bandwidth(device)), "bytes_per_step": float(step)}
    found["memory_bound"] = rows * found["bandwidth"] / step
    return found | {"limit": min(found["compute_bound"], found["memory_bound"] if gpu else np.inf)}


@contextlib.contextmanager
def counted(policy):
    """Counts the tokens that go through the model: {"prefill": ..., "decode": ...}. A CUDA graph's replays bypass it."""
    model = policy.model.base_model
    counts, forward = {"prefill": 0, "decode": 0}, model.forward

    def counting(*args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        counts["decode" if ids.shape[1] == 1 else "prefill"] += ids.numel()
        return forward(*args, **kwargs)

    model.forward = counting
    try:
        yield counts
    finally:
        del model.forward


@contextlib.contextmanager
def peak_memory(device: torch.device):
    """{"bytes": how far the memory in use rose above where it stood}; on a CPU looked at every 10 ms (Linux only)."""
    result, done = {"bytes": None}, threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield result
        return
    resident = lambda: int(statm.read_text().split()[1]) * 4096  # noqa: E731
    before = resident()
    result["bytes"] = 0

    def watch():
        while not done.wait(0.01):
            result["bytes"] = max(result["bytes"], resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


def run_generate(policy, problems, samples, rows, args, seed) -> list[int]:
    """-> the length of every sample, in tokens that were sampled"""
    drawn = common.generate(
        policy, problems, samples=samples, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=seed,
        rows=rows,
    )  # fmt: skip
    forced = policy.label if len(policy.label) == 1 else []  # labels that are plain text count
    return [len(sample.tokens) - int(np.isin(sample.tokens, forced).sum()) for sample in drawn]


def run_plain(policy, problems, samples, rows, args, seed) -> list[int]:
    policy.condition("none")
    try:
        return run_generate(policy, problems, samples, rows, args, seed)
    finally:
        policy.condition("good")


def run_without_shared_cache(
    policy, problems, samples, rows, args, seed, *, has_cache: bool
) -> list[int]:
    policy = copy.copy(policy)
    policy.decode_loop = functools.partial(common.decode_plainly, cached=has_cache)
    return run_generate(policy, problems, samples, rows, args, seed)


def sampling_config(policy, args, samples: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0, num_return_sequences=samples,
        max_new_tokens=args.max_new_tokens, eos_token_id=policy.eos_ids, pad_token_id=policy.eos_ids[0],
    )  # fmt: skip


@torch.no_grad()
def run_model_generate(policy, problems, samples, rows, args, seed) -> list[int]:
    """Batches of rows // K problems, or of `rows` samples of one problem where K is larger; left padding."""
    torch.manual_seed(seed)
    prompts = [policy.encode_prompt(common.prompt_text(problem)) for problem in problems]
    lengths = []
    per_batch = max(1, rows // samples)
    for first in range(0, len(prompts), per_batch):
        batch = prompts[first : first + per_batch]
        width = max(map(len, batch))
        ids = torch.tensor(
            [[policy.eos_ids[0]] * (width - len(p)) + p for p in batch], device=policy.device
        )
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=policy.device
        )
        for drawn in range(0, samples, rows):
            config = sampling_config(policy, args, min(rows, samples - drawn))
            said = policy.model.generate(ids, attention_mask=mask, generation_config=config)[
                :, width:
            ].cpu()
            ended = torch.isin(said, torch.tensor(policy.eos_ids))
            lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, said.shape[1]).tolist()
    return lengths


@torch.no_grad()  # not inference_mode: it decodes in a thread of its own, outside of it
def run_generate_batch(policy, problems, samples, rows, args, seed) -> list[int]:
    torch.manual_seed(seed)
    prompts = [
        policy.encode_prompt(common.prompt_text(problem))
        for problem in problems
        for _ in range(samples)
    ]
    ours = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("sdpa")  # it has its own cache, which ours does not know
    try:
        said = policy.model.generate_batch(
            inputs=prompts, generation_config=sampling_config(policy, args, 1)
        )
    finally:
        policy.model.set_attn_implementation(ours)
    came = sum(len(output.generated_tokens) > 0 for output in said.values())
    if came != len(prompts):
        raise RuntimeError(f"{came} of {len(prompts)} samples came back")
    return [len(output.generated_tokens) for output in said.values()]


run_own_cache, run_no_cache = (
    functools.partial(run_without_shared_cache, has_cache=has) for has in (True, False)
)
runners = (
    run_generate,
    run_model_generate,
    run_generate_batch,
    run_plain,
    run_own_cache,
    run_no_cache,
)
RUNNERS = dict(zip(ENGINES, runners, strict=True))


def measure(policy, problems, samples: int, rows: int, args) -> dict:
    """All engines on the same problems, in turn."""
    usual = as_usual(policy)
    row = {"rows": rows, "samples": samples, "problems": len(problems)}
    seconds, tokens, broken = {}, {}, {}
    lengths: list[int] = []
    for repeat in range(args.repeats + 1):
        for engine in args.engines:
            if engine in broken:
                continue
            part = (
                problems if repeat else problems[: max(1, len(problems) // 8)]
            )  # the first time is to warm up
            runs = usual if engine in ("model.generate", "generate_batch") else policy
            try:
                with counted(runs) as counts, peak_memory(policy.device) as peak:
                    synchronize(policy.device)
                    started = time.perf_counter()
                    drawn = RUNNERS[engine](runs, part, samples, rows, args, repeat)
                    synchronize(policy.device)
                    elapsed = time.perf_counter() - started
            except Exception as error:  # an engine that does not run here is reported, and does not stop the others
                if common.process_count() > 1:
                    raise  # the other processes wait for this one
                broken[engine] = f"{type(error).__name__}: {common.first_line(error)}"[:300]
                continue
            if repeat:
                # what a CUDA graph replays is not seen, nor is what the other engine runs in processes of its own
                seen = engine != "generate_batch" and (
                    engine != "generate" or policy.device.type not in common.GRAPH_DEVICES
                )
                seconds.setdefault(engine, []).append(elapsed)
                tokens.setdefault(engine, []).append(sum(drawn))
                lengths += drawn if engine == "generate" else []
                row[engine] = {
                    "tokens_per_second": statistics.median(n / t for n, t in zip(tokens[engine], seconds[engine], strict=True)),
                    "runs": [round(n / t, 1) for n, t in zip(tokens[engine], seconds[engine], strict=True)],
                    "mean_length": float(np.mean(drawn)),
                    "wasted": max(0.0, 1 - sum(drawn) / max(1, counts["decode"])) if seen else None,
                    "prompt_tokens_run": counts["prefill"],
                    "peak_memory_bytes": peak["bytes"],
                }  # fmt: skip
    row |= {engine: {"error": error} for engine, error in broken.items()}
    if "tokens_per_second" in row.get("generate", {}):
        prompt_lengths = [
            len(policy.encode_prompt(common.prompt_text(problem))) for problem in problems
        ]
        row |= limits(policy, rows, samples, prompt_lengths, lengths)
        speed = row["generate"]["tokens_per_second"]
        row["fraction_of_limit"] = speed / row["limit"]
        for engine, key in (
            ("model.generate", "speedup"),
            ("generate_batch", "speedup_over_generate_batch"),
            ("plain", "speed_conditioned_over_plain"),
            ("own cache", "speedup_over_own_cache"),
            ("no cache", "speedup_over_no_cache"),
        ):
            if "tokens_per_second" in row.get(engine, {}):
                row[key] = speed / row[engine]["tokens_per_second"]
    return row


def shown_number(value: float | None) -> str:
    """In three digits, or whole."""
    if value is None:
        return "-"
    return (
        str(value) if isinstance(value, int) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    )


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    policy = common.Policy(args.model, args.device, args.dtype)
    device = (
        torch.cuda.get_device_name(policy.device)
        if policy.device.type == "cuda"
        else platform.machine()
    )
    report = {
        "model": args.model, "dataset": args.dataset, "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature, "repeats": args.repeats, "device": device,
        "threads": torch.get_num_threads(), "processes": common.process_count(), "dtype": args.dtype, "graphs": policy.device.type in common.GRAPH_DEVICES,
        "torch": torch.__version__, "transformers": transformers.__version__, "table": [],
    }  # fmt: skip
    shown = ["rows", "K", "problems", "tokens/s", "speedup", "of limit", "wasted", "peak MB", "model.generate", "wasted", "peak MB"]  # fmt: skip
    print("".join(f"{name:>15}" for name in shown))
    for rows in args.rows:
        for samples in args.samples:
            n = max(1, args.problems * max(args.samples) // samples)
            problems = common.load_problems(args.dataset, args.split, n)
            row = measure(policy, problems, samples, rows, args)
            report["table"].append(row)
            report |= {
                key: row.get(key) for key in ("speedup", "fraction_of_limit")
            }  # of the last line
            ours, theirs = row.get("generate", {}), row.get("model.generate", {})
            cells = [
                rows,
                samples,
                len(problems),
                ours.get("tokens_per_second"),
                row.get("speedup"),
            ]
            cells += [
                row.get("fraction_of_limit"),
                ours.get("wasted"),
                (ours.get("peak_memory_bytes") or 0) / 1e6,
            ]
            cells += [
                theirs.get("tokens_per_second"),
                theirs.get("wasted"),
                (theirs.get("peak_memory_bytes") or 0) / 1e6,
            ]
            print("".join(f"{shown_number(cell):>15}" for cell in cells))
            for engine in ENGINES:
                if "error" in row.get(engine, {}):
                    print(f"  {engine}: {row[engine]['error']}")
            if args.out:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                common.write_json(Path(args.out), report)
    print(
        f"matrix products: {row.get('matrix_flops', 0) / 1e9:.0f} GFLOP/s; limit {row.get('limit', 0):.0f} tokens/s"
    )


if __name__ == "__main__":
    common.run_main(main)
