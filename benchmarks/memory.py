"""How much memory training takes: `python benchmarks/memory.py [MODEL ...]`.

Prints a table in GiB for models of four sizes, or for the models that are named (folders or hub
names). Only their configs are read: the models are built on the device meta. The numbers are those
of `common.training_memory`, which every script compares with the free memory of its GPU.

    --check MODEL   train two steps on this machine and compare the formula with the peak
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import ppo  # noqa: E402
import runtime  # noqa: E402

# The shapes of Qwen2.5: width, layers, heads, heads of keys, width of the MLP, vocabulary, tied.
SIZES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}


def config_of(size: str):
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    names = f"{names} intermediate_size vocab_size tie_word_embeddings".split()
    return transformers.Qwen2Config(**dict(zip(names, SIZES[size], strict=True)))


class MetaPolicy(common.Policy):
    """A policy without weights, as it would be on a GPU."""

    def __init__(self, config):
        self.device, self.bfloat16 = torch.device("meta"), True
        with self.device:
            self.model = transformers.AutoModelForCausalLM.from_config(config)
        self.vocabulary = config.get_text_config().vocab_size


def needed(config, method: str, rank: int, recompute: bool, tokens: int) -> dict[str, int]:
    """Return the bytes of a training step by part. method: "SFT", "PPO" or "reward model"."""
    policy = MetaPolicy(config)
    critic = ppo.ValueFunction(policy, detach=True) if method == "PPO" else None
    if method == "reward model":
        policy.linear = torch.nn.Linear(config.get_text_config().hidden_size, 1, device="meta")
    args = dict(lora_rank=rank, frozen_dtype="bfloat16", recompute=recompute, seed=0)
    args = SimpleNamespace(**args, token_budget=tokens)
    policy.prepare_training(args)
    parts = common.training_memory(policy, args, critic)
    if method == "PPO" and not rank:
        parts["reference"] = 4 * policy.model.num_parameters()
    return parts


def print_table(configs: dict, lora_rank: int, tokens: int) -> None:
    """Print GiB of all weights and of adapters. In brackets: with --recompute."""
    methods = "SFT", "reward model", "PPO"
    columns = [f"{method}, {what}" for method in methods for what in ("all weights", "adapters")]
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, config in configs.items():
        cells = []
        for method in methods:
            for rank in (0, lora_rank):
                sizes = (needed(config, method, rank, again, tokens) for again in (False, True))
                plain, again = (sum(parts.values()) / 2**30 for parts in sizes)
                cells.append(f"{plain:.0f} ({again:.0f})")
        print(f"| {name} | {' | '.join(cells)} |")


def resident() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(model: str, rank: int, recompute: bool, tokens: int) -> dict:
    """Make two steps of two micro-batches. Return the peak, the formula and the seconds."""
    start, peak, done = resident(), [0], threading.Event()
    policy = common.Policy(model, "cpu")
    args = dict(lora_rank=rank, frozen_dtype="auto", recompute=recompute, seed=0)
    args = SimpleNamespace(**args, token_budget=tokens)
    policy.prepare_training(args)
    optimizer = common.adam_w(policy.trained.parameters(), 1e-4)

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident() - start)
            time.sleep(0.005)

    watcher, seconds = threading.Thread(target=watch), []
    watcher.start()
    # Nearly all tokens are trained on, so that the logits are as large as they can be.
    examples = [([1], [2] * (tokens // 4 - 1)) for _ in range(4)]
    for _ in range(2):
        began = time.monotonic()
        for _ in range(2):
            (-common.response_logprobs(policy, examples).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(round(time.monotonic() - began, 1))
    done.set()
    watcher.join()
    parts = common.training_memory(policy, args)
    facts = {"lora_rank": rank, "recompute": recompute, "tokens": tokens, "peak": peak[0]}
    return facts | {"formula": sum(parts.values()), "parts": parts, "seconds": seconds}


def check(model: str, tokens: int, out: str | None) -> None:
    """Measure all four ways, each in a process of its own."""
    found = []
    for rank, recompute in ((0, False), (0, True), (16, False), (16, True)):
        command = [sys.executable, __file__, "--train", model, str(rank), str(int(recompute))]
        # glibc keeps freed memory for itself unless these are set.
        fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        result = subprocess.run(
            [*command, str(tokens)], env=os.environ | fixed, stdout=subprocess.PIPE, check=True
        )
        row = json.loads(result.stdout.splitlines()[-1])
        found.append(row)
        what = f"{'adapters' if rank else 'all weights'}{', recomputed' * recompute}"
        sizes = f"peak {row['peak'] / 2**30:.2f} GiB, formula {row['formula'] / 2**30:.2f}"
        print(f"{what}: {sizes}, ratio {row['formula'] / row['peak']:.2f}, {row['seconds']} s")
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="folders or hub names (default: four sizes)")
    parser.add_argument("--tokens", type=int, help="tokens per micro-batch (4096; --check: 512)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the adapters in the table")
    parser.add_argument("--check", metavar="MODEL", help="compare with a run on this machine")
    parser.add_argument("--out", help="file of the measurements")
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        model, rank, recompute, tokens = args.train
        print(json.dumps(train(model, int(rank), recompute == "1", int(tokens))))
    elif args.check:
        check(args.check, args.tokens or 512, args.out)
    else:
        configs = {name: config_of(name) for name in SIZES}
        if args.models:
            folders = {name: runtime.model_folder(name) for name in args.models}
            configs = {name: runtime.load_config(folder) for name, folder in folders.items()}
        print_table(configs, args.rank, args.tokens or 4096)


if __name__ == "__main__":
    main()
