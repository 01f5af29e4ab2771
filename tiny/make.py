"""Make the embedded base model: `python tiny/make.py` writes the files of this folder again.

It takes about 7 minutes on two cores. The model is a Llama of 0.7 million parameters. It is trained
once over 60,000 generated problems. No problem of the embedded task is among them.

The model stands for a *pretrained* model. It must know correct steps and incorrect steps. The
authors of its solutions have systematic misconceptions. Each kind of step is misread with its own
probability. For example "fewer" is taken as "more", or an irrelevant number is added. So only 40 %
of the solutions are correct.

A model of this corpus knows both readings of a step. At some steps it prefers the incorrect one.
Reinforcement learning can sharpen such a model. Two other ways to make a weak model would not show
this. Noise on the answers disappears under greedy decoding. A model that reads badly has no correct
samples to select.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from sft import train_step
from tiny import arithmetic

# Kind of step -> (operation of an author with the misconception, probability of the misconception).
MISCONCEPTIONS = {
    "fewer": ("+", 0.6),
    "more": ("-", 0.2),
    "unused": ("+", 0.6),
    "half": ("-", 0.5),
    "total": (None, 0.4),
    "times": ("+", 0.4),
    "groups": ("+", 0.3),
    "loss": ("+", 0.15),
    "gain": ("-", 0.1),
}


def corpus(n: int, seed: int) -> tuple[list[tuple[str, str]], float]:
    """Return `n` pairs (prompt, solution) and the fraction of correct solutions.

    No pair is a problem of the embedded task.
    """
    taken = {question for name in arithmetic.STEPS for question, _ in arithmetic.generate(name)}
    rng, pairs, right = random.Random(seed), [], 0
    while len(pairs) < n:
        question, plan = arithmetic.tell_story(rng, rng.randint(1, 4))
        misread = {kind: op for kind, (op, p) in MISCONCEPTIONS.items() if rng.random() < p}
        steps = arithmetic.solve_story(plan, arithmetic.OPERATIONS | misread)
        if question in taken or steps is None:
            continue
        taken.add(question)
        right += steps == arithmetic.solve_story(plan)
        problem = common.Problem("", question, 0)
        pairs.append((common.prompt_text(problem), arithmetic.write_solution(steps)))
    return pairs, right / n


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer for the words of the texts.

    One token is a word with the space before it, a digit, or a mark. Other text becomes bytes.
    So decoding returns every text unchanged.
    """
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?[A-Za-z]+|[0-9]|####|<<|>>|\n| ?[^\sA-Za-z0-9]"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = sorted({piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)})
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [word for word in words if word not in vocabulary]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--problems", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--hidden-size", type=int, default=128, help="a smaller one: 64, with --layers 2"
    )
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    pairs, right = corpus(args.problems, seed=1)
    print(f"{len(pairs)} problems, {right:.3f} of the solutions are right")
    tokenizer = make_tokenizer(
        [prompt + solution for prompt, solution in pairs[:5000]] + [common.FEW_SHOT]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        policy = common.Policy(folder)
    print(
        f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(tokenizer)} tokens"
    )
    examples = [(policy.encode_prompt(p), policy.encode_solution(s)) for p, s in pairs]
    # A pretrained model has read the questions too. Every token after the first is a target.
    examples = [(prompt[:1], prompt[1:] + solution) for prompt, solution in examples]
    optimizer = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    order, n_steps = common.shuffled(len(examples), 0), len(examples) // args.batch_size
    started = time.monotonic()
    for step in range(n_steps):
        batch = [examples[i] for i in order[step * args.batch_size : (step + 1) * args.batch_size]]
        lr = common.cosine_lr(step, n_steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        loss, _ = train_step(policy, optimizer, batch, token_budget=1 << 20)
        if step % 50 == 0 or step == n_steps - 1:
            print(
                f"step {step}/{n_steps}  loss {loss:.4f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    # The files of this folder change only now.
    policy.model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
