"""Measure the tokens per second of `common.generate`.

It is compared with other ways to sample and with the limit of the machine:

    generate          The loop of engine/. It shares prompts and refills batch slots.
    plain loop        `common.decode_plainly`. It runs models that engine/ does not support.
    model.generate    `model.generate(num_return_sequences=K, top_k=0)`. This is the usual way.
                      Its batches have the same size.
    generate_batch    The continuous batching of transformers. It chooses its own batch size.
    merged            `generate` with adapters of rank 16, merged once as always.
    unmerged          The same with the two products of every adapter in every step.
    unconditioned     `generate` without the labels of a model of rcrl.py. `generate` puts [GOOD]
                      before every line. Labels do not count as tokens.

All engines sample equally often from the same prompts. Sequences end where the model ends them. So
the lengths agree in distribution. Every engine runs once to warm up. Then all engines run in turn,
`--repeats` times. The median is printed. The tokens of a sample include its end-of-text token.
Prompt tokens do not count. Tokens that an engine computes in vain do not count either.

Compute bound. A token takes 2 FLOP per weight of a matrix. The output head is included. Attention
and elementwise operations are left out. The rate of the machine is measured on a product of square
matrices:

    compute bound  =  FLOP/s  /  (2 x weights of matrices)                              [tokens/s]

Memory bound. On a GPU a step also reads the weights once. It reads the keys and values of every
sequence once. The K samples of a prompt can share one read of its keys and values:

    bytes per step  =  weights x 2
                       + batch size x (L + P / K) x (layers x 2 x key heads x head_dim) x 2
    memory bound    =  batch size x B / bytes per step                                  [tokens/s]

L is the mean number of a sample's own tokens in the cache over its life. P is the mean length of a
prompt. B is the memory bandwidth, measured on a copy.

The limit is the lower of the two bounds. Under torchrun, the tokens/s of `generate` and `plain
loop` are the sums over all processes. So are the rates of the machine: all processes measure at the
same time. `--gen-batch-size` is the batch size of each process. The other engines run in one
process only.

    python benchmarks/generation.py                  the embedded model, minutes on two cores
    python benchmarks/generation.py --gen-batch-size 64 128 256 --samples 1 8 96
                                                     every combination
    python benchmarks/generation.py --model MODEL --dataset gsm8k --split test --problems 16 \\
        --samples 32 --max-new-tokens 256 --out results/generation/gsm8k.json
"""

import contextlib
import copy
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
import adapters  # noqa: E402
import common  # noqa: E402
import engine  # noqa: E402
import runtime


def parse_args(argv: list[str]):
    parser = runtime.common_parser(__doc__, model="tiny", temperature=1.0)
    parser.set_defaults(gen_batch_size=[256])
    whole = runtime.number(int, 1)
    parser.add_argument(
        "--problems", type=whole, default=32, help="so many prompts; fewer with more --samples"
    )
    parser.add_argument(
        "--samples", type=whole, nargs="+", default=[96], help="samples per problem, K"
    )
    parser.add_argument("--split", default="dev", choices=["train", "dev", "test"])
    parser.add_argument("--repeats", type=whole, default=3, help="runs of each engine")
    parser.add_argument("--engines", nargs="+", choices=RUNNERS, default=DEFAULT_ENGINES)
    parser.add_argument("--out", help="a JSON file to write")
    # With several values every combination is measured.
    for action in parser._actions:
        if action.dest == "gen_batch_size":
            action.nargs = "+"
    return parser.parse_args(argv)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the product of two square matrices, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def bandwidth(device: torch.device) -> float:
    """Return the bytes/s that a copy reads and writes, the best of several.

    The copy has 1 GiB, on a CPU a quarter of it.
    """
    size = (1 << 30) // (1 if device.type == "cuda" else 4)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target, best = torch.empty_like(source), 0.0
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - started))
    return best


def as_usual(policy: common.Policy) -> common.Policy:
    """Return the policy with bfloat16 weights if `generate` works in bfloat16 under autocast.

    Autocast does not suit the other engines. Their caches would be float32. generate_batch decodes
    in a thread of its own, where autocast is off.
    """
    if not policy.bfloat16:
        return policy
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model)
    # Keep the buffers. Rotary frequencies in bfloat16 would change the model.
    for weight in policy.model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return policy


def of_all_processes(measured: float) -> float:
    return sum(runtime.gather([measured]))


def limits(
    policy, batch_size: int, samples: int, prompt_lengths: list[int], lengths: list[int]
) -> dict:
    """Return the tokens/s that the machine allows. The top of this file has the formulas."""
    device, gpu = policy.device, policy.device.type == "cuda"
    head = policy.model.get_output_embeddings().weight
    matrices = [p for p in policy.model.parameters() if p.ndim == 2 and p is not head]
    weights = head.numel() + sum(p.numel() for p in matrices)
    embedding = policy.model.get_input_embeddings().weight
    # An embedding is looked up, not multiplied.
    weights -= 0 if embedding is head else embedding.numel()
    flops = of_all_processes(rate(device, torch.bfloat16 if gpu else torch.float32))
    found = {"matrix_flops": flops, "weights": weights, "compute_bound": flops / (2 * weights)}
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 if gpu else 4
    # The mean is over steps: a long sample counts for more steps.
    life = np.sum(np.square(lengths)) / (2 * np.sum(lengths))
    entries = life + np.mean(prompt_lengths) / samples
    entry = config.num_hidden_layers * 2 * heads * head_dim
    step = width * (weights + batch_size * entries * entry)
    found |= {"bandwidth": of_all_processes(bandwidth(device)), "bytes_per_step": float(step)}
    found["memory_bound"] = batch_size * found["bandwidth"] / step
    return found | {"limit": min(found["compute_bound"], found["memory_bound"] if gpu else np.inf)}


@contextlib.contextmanager
def counted(policy):
    """Count the tokens that go through the model: {"prefill": ..., "decode": ...}.

    Tokens of replayed CUDA graphs are not counted.
    """
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
    """Measure how far the memory in use rises: {"bytes": ...}.

    On a CPU it is measured every 10 ms (Linux only).
    """
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


def run_generate(policy, problems, samples, batch_size, args, seed) -> list[int]:
    """Return the number of sampled tokens of every sample."""
    drawn = common.generate(
        policy,
        problems,
        samples=samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    forced = [] if policy.label is None else [policy.label]
    return [len(sample.tokens) - int(np.isin(sample.tokens, forced).sum()) for sample in drawn]


@contextlib.contextmanager
def usual_attention(policy):
    """Use PyTorch's attention instead of engine/'s, which needs the cache of engine/."""
    ours = policy.model.config._attn_implementation
    if ours == "paged_attention":
        policy.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours == "paged_attention":
            policy.model.set_attn_implementation(ours)


def run_plain_loop(policy, *how) -> list[int]:
    with usual_attention(policy):
        return run_generate(policy, *how)


def run_unconditioned(policy, *how) -> list[int]:
    policy.condition("none")
    try:
        return run_generate(policy, *how)
    finally:
        policy.condition("good" if policy.labels else "none")


def sampling_config(policy, args, samples: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=policy.eos_ids,
        pad_token_id=policy.eos_ids[0],
    )


@torch.no_grad()
def run_model_generate(policy, problems, samples, batch_size, args, seed) -> list[int]:
    """Run batches of batch_size // K problems, padded on the left.

    If K is larger, a batch holds `batch_size` samples of one problem.
    """
    torch.manual_seed(seed)
    prompts = [policy.encode_prompt(common.prompt_text(problem)) for problem in problems]
    lengths, pad, device = [], policy.eos_ids[0], policy.device
    per_batch = max(1, batch_size // samples)
    for first in range(0, len(prompts), per_batch):
        batch = prompts[first : first + per_batch]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in batch]
        how = {"attention_mask": torch.tensor(mask, device=device)}
        for drawn in range(0, samples, batch_size):
            config = sampling_config(policy, args, min(batch_size, samples - drawn))
            said = policy.model.generate(ids, generation_config=config, **how)[:, width:].cpu()
            ended = torch.isin(said, torch.tensor(policy.eos_ids))
            lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, said.shape[1]).tolist()
    return lengths


# Not inference_mode: generate_batch decodes in a thread of its own, outside of this mode.
@torch.no_grad()
def run_generate_batch(policy, problems, samples, batch_size, args, seed) -> list[int]:
    torch.manual_seed(seed)
    prompts = [policy.encode_prompt(common.prompt_text(problem)) for problem in problems]
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    config = sampling_config(policy, args, 1)
    with usual_attention(policy):
        said = policy.model.generate_batch(inputs=prompts, generation_config=config)
    came = sum(len(output.generated_tokens) > 0 for output in said.values())
    if came != len(prompts):
        raise RuntimeError(f"{came} of {len(prompts)} samples came back")
    return [len(output.generated_tokens) for output in said.values()]


@contextlib.contextmanager
def with_adapters(policy):
    """Give the policy adapters of rank 16. They stay on its layers, and do nothing later."""
    if not hasattr(policy, "tried_lora"):
        policy.tried_lora = adapters.Lora(policy, 16)
    policy.lora, policy.tried_lora.mode = policy.tried_lora, "on"
    try:
        yield
    finally:
        policy.lora, policy.tried_lora.mode = None, "merged"


def run_merged(policy, *how) -> list[int]:
    with with_adapters(policy):
        return run_generate(policy, *how)


def run_unmerged(policy, *how) -> list[int]:
    with with_adapters(policy):
        policy.lora = None  # `generate` merges nothing
        return run_generate(policy, *how)


RUNNERS = {
    "generate": run_generate,
    "plain loop": run_plain_loop,
    "model.generate": run_model_generate,
    "generate_batch": run_generate_batch,
    "merged": run_merged,
    "unmerged": run_unmerged,
    "unconditioned": run_unconditioned,
}
DEFAULT_ENGINES = ["generate", "plain loop", "model.generate"]
# Key of the report -> (engine, the engine that it is compared with).
SPEEDUPS = {
    "speedup": ("generate", "model.generate"),
    "plain_loop_speedup": ("plain loop", "model.generate"),
    "speedup_over_generate_batch": ("generate", "generate_batch"),
    "merged_speedup": ("merged", "unmerged"),
    "speed_conditioned_over_unconditioned": ("generate", "unconditioned"),
}


def replays_graphs(policy) -> bool:
    """Return whether `generate` replays CUDA graphs. Their tokens are not counted."""
    fast = policy.model.config._attn_implementation == "paged_attention"
    return fast and policy.device.type in engine.decode.GRAPH_DEVICES


def measure(policy, problems, samples: int, batch_size: int, args) -> dict:
    """Run all engines on the same problems, in turn."""
    usual = as_usual(policy)
    row = {"gen_batch_size": batch_size, "samples": samples, "problems": len(problems)}
    seconds, tokens, broken = {}, {}, {}
    lengths: list[int] = []
    for repeat in range(args.repeats + 1):
        for name in args.engines:
            if name in broken:
                continue
            # The first run warms up.
            part = problems if repeat else problems[: max(1, len(problems) // 8)]
            runs = usual if name in ("model.generate", "generate_batch") else policy
            try:
                with counted(runs) as counts, peak_memory(policy.device) as peak:
                    synchronize(policy.device)
                    started = time.perf_counter()
                    drawn = RUNNERS[name](runs, part, samples, batch_size, args, repeat)
                    synchronize(policy.device)
                    elapsed = time.perf_counter() - started
            # Report the error and go on with the other engines.
            except Exception as error:
                if runtime.process_count() > 1:
                    # The other processes wait for this one.
                    raise
                broken[name] = f"{type(error).__name__}: {runtime.first_line(error)}"[:300]
                continue
            if not repeat:
                continue
            seconds.setdefault(name, []).append(elapsed)
            tokens.setdefault(name, []).append(sum(drawn))
            lengths += drawn if name == "generate" else []
            speeds = [n / t for n, t in zip(tokens[name], seconds[name], strict=True)]
            # generate_batch runs prompt tokens and decoded tokens in the same calls.
            hidden = name in ("generate", "unconditioned") and replays_graphs(policy)
            seen = name != "generate_batch" and not hidden
            row[name] = {
                "tokens_per_second": statistics.median(speeds),
                "runs": [round(speed, 1) for speed in speeds],
                "mean_length": float(np.mean(drawn)),
                "wasted": max(0.0, 1 - sum(drawn) / max(1, counts["decode"])) if seen else None,
                "prompt_tokens_run": counts["prefill"],
                "peak_memory_bytes": peak["bytes"],
            }
    row |= {name: {"error": error} for name, error in broken.items()}
    speed = {name: row.get(name, {}).get("tokens_per_second") for name in RUNNERS}
    if speed["generate"]:
        prompts = [policy.encode_prompt(common.prompt_text(problem)) for problem in problems]
        row |= limits(policy, batch_size, samples, [len(prompt) for prompt in prompts], lengths)
        row["fraction_of_limit"] = speed["generate"] / row["limit"]
    for key, (name, other) in SPEEDUPS.items():
        if speed[name] and speed[other]:
            row[key] = speed[name] / speed[other]
    return row


def shown_number(value: float | int | str | None) -> str:
    """Return a number with three digits. From 1000 on return it without decimals."""
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    policy = common.Policy(args.model, args.device, args.dtype)
    on_gpu = policy.device.type == "cuda"
    device = torch.cuda.get_device_name(policy.device) if on_gpu else platform.machine()
    report = {
        "model": args.model,
        "dataset": args.dataset,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "repeats": args.repeats,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": runtime.process_count(),
        "dtype": args.dtype,
        "graphs": replays_graphs(policy),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "table": [],
    }
    shown = ["batch size", "K", "problems", "engine", "tokens/s", "wasted", "peak MB"]
    print("".join(f"{name:>15}" for name in shown))
    for batch_size in args.gen_batch_size:
        for samples in args.samples:
            n = max(1, args.problems * max(args.samples) // samples)
            problems = common.load_problems(args.dataset, args.split, n)
            row = measure(policy, problems, samples, batch_size, args)
            report["table"].append(row)
            keys = "speedup", "plain_loop_speedup", "fraction_of_limit"
            # The report has the values of the last combination.
            report |= {key: row.get(key) for key in keys}
            for name in args.engines:
                found = row.get(name, {})
                if "error" in found:
                    print(f"  {name}: {found['error']}")
                    continue
                peak = found["peak_memory_bytes"]
                cells = [batch_size, samples, len(problems), name, found["tokens_per_second"]]
                cells += [found["wasted"], None if peak is None else peak / 1e6]
                print("".join(f"{shown_number(cell):>15}" for cell in cells))
            facts = {key: row[key] for key in (*SPEEDUPS, "fraction_of_limit") if key in row}
            print("  " + "  ".join(f"{key} {shown_number(value)}" for key, value in facts.items()))
            if args.out:
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
                runtime.write_json(Path(args.out), report)
    flops, limit = row.get("matrix_flops", 0) / 1e9, row.get("limit", 0)
    print(f"matrix products: {flops:.0f} GFLOP/s; limit {limit:.0f} tokens/s")


if __name__ == "__main__":
    runtime.run_main(main)
