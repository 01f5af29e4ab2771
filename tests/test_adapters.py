"""Adapters and recomputation in every script that trains."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_scripts import cli, rows_of, without_time  # noqa: F401

import adapters
import common
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

SMALL = ["--max-new-tokens", 60, "--limit-eval", 8, "--seed", 7, "--lora-rank", 2, "--lr", 0.01]
TRAIN = ["--model", "tiny", *SMALL, "--limit-train", 24, "--epochs", 1, "--batch-size", 8]
RUNS = {
    "sft": (sft, ["--model", "tiny", *SMALL, "--epochs", 2]),
    "expert_iteration": (expert_iteration, [*TRAIN, "--samples", 2, "--pass-k", 0]),
    "continue": (expert_iteration, [*TRAIN, "--samples", 2, "--pass-k", 0, "--continue"]),
    "rcrl": (rcrl, [*TRAIN, "--samples", 4, "--completions", 2]),
    "orm": (reward_model, [*TRAIN, "--samples", 4, "--eval-samples", 2]),
    "genrm": (reward_model, [*TRAIN, "--samples", 4, "--eval-samples", 2, "--kind", "genrm"]),
    "ppo": (ppo, [*TRAIN, "--questions", 8, "--samples", 4, "--phases", 2, "--eval-every", 1]),
}


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rank_of(change: torch.Tensor) -> int:
    """Return how many directions a change has beyond the rounding of sums."""
    values = torch.linalg.svdvals(change.double())
    return int((values > 1e-5 * values[0]).sum()) if values[0] > 0 else 0


@pytest.fixture(scope="module", autouse=True)
def last_is_best():
    """Let dev accuracy rise with every round, epoch and phase, so that the last one is saved."""
    measure = common.dev_metrics

    def rising(policy, problems, args, number, *more, **how):
        return measure(policy, problems, args, number, *more, **how) | {"maj@1": float(number)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "dev_metrics", rising)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run every script once with adapters, and return the folder of a run."""
    folders = {}

    def run(name: str, cli):  # noqa: F811
        if name not in folders:
            script, argv = RUNS[name]
            out = tmp_path_factory.mktemp(name) / "run"
            assert cli(script, *argv, "--out", out)[0] == 0
            folders[name] = out
        return folders[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_the_change_of_every_matrix_has_the_rank_of_the_adapters(name, finished, cli):  # noqa: F811
    """All that is not a linear map of a layer stays as it is, but for a head and for labels."""
    before, after = weights_of(runtime.TINY), weights_of(finished(name, cli) / "model")
    new, ranks = after.keys() - before.keys(), []
    assert {key.partition(".")[0] for key in new} == ({"score"} if name == "orm" else set())
    for key in before.keys() & after.keys():
        n = len(before[key])
        if ".layers." in key and before[key].ndim == 2:
            ranks.append(rank_of(after[key] - before[key]))
        else:
            assert torch.equal(after[key][:n], before[key]), key
    assert max(ranks) == 2 and len(ranks) > 10, ranks
    if name == "orm":
        assert after["score.weight"].abs().max() > 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_adapters_resumes_to_the_same_weights(
    name,
    finished,
    cli,
    tmp_path,
    monkeypatch,  # noqa: F811
):
    script, argv = RUNS[name]
    whole, save, calls = finished(name, cli), runtime.Run.checkpoint, []

    def stop(run, now=False, **state):
        save(run, now=now, **state)
        calls.append(1)
        if len(calls) == 2 and not state.get("finished"):
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.Run, "checkpoint", stop)
    argv = [*argv, "--out", tmp_path / "run", "--checkpoint-every", 0]
    assert cli(script, *argv)[0] == 130 and len(calls) == 2
    monkeypatch.setattr(runtime.Run, "checkpoint", save)
    assert cli(script, *argv, "--resume")[0] == 0
    again = tmp_path / "run"
    assert without_time(again / "metrics.jsonl") == without_time(whole / "metrics.jsonl")
    one, other = weights_of(again / "model"), weights_of(whole / "model")
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("rank", [0, 2])
def test_recomputation_gives_the_same_run(rank, cli, tmp_path):  # noqa: F811
    argv = ["--model", "tiny", *SMALL, "--lora-rank", rank, "--lr", 1e-3, "--epochs", 1]
    for flags in ([], ["--recompute"]):
        assert cli(sft, *argv, *flags, "--out", tmp_path / f"run{len(flags)}")[0] == 0
    one, other = (without_time(tmp_path / f"run{n}" / "metrics.jsonl") for n in (0, 1))
    assert one == other
    one, other = (weights_of(tmp_path / f"run{n}" / "model") for n in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one)


def kept_bytes(model, loss) -> int:
    """Return the bytes that `loss()` keeps for the backward pass, the weights left out."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    size = sum(n for key, n in kept.items() if key not in own)
    del result
    return size


def test_recomputation_keeps_less(tiny):
    """It keeps one input per layer until the backward pass, and logits of the same size."""
    problems = common.load_problems("arithmetic", "train", 8)
    examples = [tiny.encode_example(p, p.reference) for p in problems]
    policy, sizes = common.Policy("tiny", "cpu"), []
    for again in (False, True):
        if again:
            adapters.recompute(policy)
        sizes.append(kept_bytes(policy.model, lambda: common.response_logprobs(policy, examples)))
    assert sizes[1] < 0.6 * sizes[0]


def test_sampling_merges_the_adapters_and_puts_the_weights_back():
    policy = common.Policy("tiny", "cpu")
    policy.lora = adapters.Lora(policy, 3)
    for up in policy.lora.up:
        up.data = torch.randn_like(up) * 0.1
    before = {key: value.clone() for key, value in policy.model.state_dict().items()}
    problems, how = common.load_problems("arithmetic", "dev", 4), dict(samples=4, max_new_tokens=40)
    samples = common.generate(policy, problems, **how)
    after = policy.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    # The log-probabilities of training are those of sampling.
    examples = [(list(s.prompt), s.tokens.tolist()) for s in samples]
    with torch.no_grad():
        found = common.by_example(common.response_logprobs(policy, examples), examples)
        with policy.lora.off():
            initial = common.by_example(common.response_logprobs(policy, examples), examples)
    for sample, logprobs in zip(samples, found, strict=True):
        assert abs(logprobs - sample.logprobs).max() < 1e-4
    assert max(abs(a - b).max() for a, b in zip(found, initial, strict=True)) > 0.1


def test_a_saved_model_gives_the_same_greedy_text_in_plain_transformers(finished, cli, tmp_path):  # noqa: F811
    out = finished("sft", cli)
    last = rows_of(out / "samples" / "dev_2.jsonl")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    for row in last:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:\n", return_tensors="pt")
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=60)[0]
        text = tokenizer.decode(ids[prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert text == row["text"]


def test_every_round_of_expert_iteration_begins_with_fresh_adapters(cli, tmp_path, monkeypatch):  # noqa: F811
    prepare, norms = common.Policy.prepare_training, []

    def prepared(policy, *args, **how):
        prepare(policy, *args, **how)
        norms.append([float(up.detach().norm()) for up in policy.lora.up])

    monkeypatch.setattr(common.Policy, "prepare_training", prepared)
    script, argv = RUNS["expert_iteration"]
    assert cli(script, *argv, "--out", tmp_path / "run")[0] == 0
    # The first call checks the memory.
    assert len(norms) >= 2 and not any(map(sum, norms))


def test_rounding_at_random_keeps_the_mean():
    random, x = torch.Generator().manual_seed(0), torch.full((100_000,), -0.1003)
    rounded = adapters.round_at_random(x, random)
    assert torch.equal(rounded, rounded.bfloat16().float()) and len(rounded.unique()) == 2
    assert abs(rounded.mean().item() + 0.1003) < 5e-6
    assert abs(x.bfloat16().float().mean().item() + 0.1003) > 1e-4
    exact = torch.tensor([0.0, -1.5, 2.0**-140])
    assert torch.equal(adapters.round_at_random(exact, random), exact.bfloat16().float())


def test_frozen_weights_in_bfloat16_train_and_are_saved_in_float32(cli, tmp_path):  # noqa: F811
    """The saved weights are the rounded ones and the change, which is not rounded."""
    argv = ["--model", "tiny", *SMALL, "--epochs", 1, "--frozen-dtype", "bfloat16"]
    code, message = cli(sft, *argv, "--out", tmp_path / "refused")
    assert code == 2 and "--frozen-dtype bfloat16 needs --dtype bfloat16" in message
    assert cli(sft, *argv, "--dtype", "bfloat16", "--out", tmp_path / "run")[0] == 0
    before, after = weights_of(runtime.TINY), weights_of(tmp_path / "run" / "model")
    key = "model.layers.0.mlp.up_proj.weight"
    change = after[key] - before[key].bfloat16().float()
    assert after[key].dtype == torch.float32 and rank_of(change) == 2
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_flag_without_adapters_and_a_fork_without_the_file_are_refused(
    cli,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    code, message = cli(sft, "--frozen-dtype", "float32", "--out", tmp_path / "run")
    assert code == 2 and "--frozen-dtype does nothing without --lora-rank" in message
    monkeypatch.setitem(sys.modules, "adapters", None)
    code, message = cli(sft, "--lora-rank", 2, "--out", tmp_path / "run")
    assert code == 2 and "adapters" in message and message.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 4])
def test_the_formula_of_the_memory_fits_what_autograd_keeps(rank):
    """256 tokens of the embedded model: the activations are within 20 percent."""
    policy = common.Policy("tiny", "cpu")
    args = dict(lora_rank=rank, frozen_dtype="auto", recompute=False, seed=0, token_budget=256)
    policy.prepare_training(SimpleNamespace(**args))
    parts = common.training_memory(policy, SimpleNamespace(**args))
    ids = torch.randint(0, policy.vocabulary, (2, 128))
    kept = kept_bytes(policy.model, lambda: policy.hidden_states(ids))
    assert parts["activations"] == pytest.approx(kept, rel=0.2)
    n = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.trained.parameters())
    assert parts["weights"] == 4 * (n + (trained if rank else 0))
    assert parts["gradients"] == 4 * trained and parts["moments"] == 8 * trained
    again = common.training_memory(policy, SimpleNamespace(**args | {"recompute": True}))
    assert again["activations"] < 0.5 * parts["activations"] and again["logits"] == parts["logits"]
    critic = ppo.ValueFunction(common.Policy("tiny", "cpu"), detach=True)
    more = common.training_memory(policy, SimpleNamespace(**args), critic)
    n = sum(p.numel() for p in critic.parameters())
    assert more["moments"] == parts["moments"] + 8 * n
    assert parts["activations"] < more["activations"] < 2 * parts["activations"]
