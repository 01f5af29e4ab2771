"""Check log-probabilities, batches and the training step."""

import copy
import importlib
import math
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import DEVICES, train_step
from test_generation import ARCHITECTURES, SMALL, random_policy, write_model
from test_scripts import cli, rows_of  # noqa: F401
from tokenizers.processors import TemplateProcessing

import common
import engine
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

EXAMPLES = [
    ([5, 6, 7], [8, 9, 1]),
    ([10], [11, 12, 13, 14, 15, 1]),
    ([5, 6, 7, 8, 9, 10, 11, 12], [1]),
    ([7, 7], [20, 21, 1]),
]


def naive_logprobs(policy, example, temperature):
    """Compute one sequence with the whole softmax, without padding and without chunks."""
    prompt, response = example
    logits = (
        policy.model(torch.tensor([prompt + response], device=policy.device)).logits[0].float()
        / temperature
    )
    logprobs = torch.log_softmax(logits, -1)
    return torch.stack([logprobs[len(prompt) + i - 1, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_padded_batch_has_the_logprobs_of_each_sequence_alone(
    name, temperature, device, tmp_path_factory
):
    policy = random_policy(name, tmp_path_factory, device)
    with torch.no_grad():
        expected = torch.cat([naive_logprobs(policy, example, temperature) for example in EXAMPLES])
        got = common.response_logprobs(policy, EXAMPLES, temperature)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [0, 1 << 24])
def test_gradients_equal_the_plain_computation(at_once, tmp_path_factory, monkeypatch):
    """Large logits are recomputed in the backward pass. The gradient must stay the same."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", at_once)
    policy = random_policy("llama", tmp_path_factory)
    policy.model.zero_grad()
    common.response_logprobs(policy, EXAMPLES).sum().backward()
    got = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    torch.cat([naive_logprobs(policy, example, 1.0) for example in EXAMPLES]).sum().backward()
    for mine, plain in zip(got, [p.grad for p in policy.model.parameters()], strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-3)
    policy.model.zero_grad()


@pytest.mark.parametrize("budget", [1, 12, 20, 10_000])
def test_the_step_does_not_depend_on_the_micro_batches(nano, budget):
    """Trap: a mean of means gives the tokens of short micro-batches more weight."""
    reference = common.Policy(nano, device="cpu")
    loss = -torch.cat([naive_logprobs(reference, example, 1.0) for example in EXAMPLES]).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
    torch.optim.SGD(reference.model.parameters(), lr=0.5).step()
    policy = common.Policy(nano, device="cpu")
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=123.0)
    got = train_step(policy, optimizer, EXAMPLES, 0.5, budget)
    assert got == pytest.approx((loss.item(), norm.item()), rel=1e-4)
    for mine, plain in zip(policy.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_micro_batches_have_every_sequence_once_within_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 100, size=rng.integers(1, 60)).tolist()
        groups = list(common.micro_batches(lengths, 128))
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= 128 for g in groups)


def test_the_end_of_text_token_is_trained_on_even_if_it_is_the_pad_token(nano):
    """Trap: a mask made by comparing with the pad id removes the end-of-text token.

    Then the model never learns to stop.
    """
    policy = common.Policy(nano, device="cpu")
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    solution = policy.encode_solution("1+1=<<1+1=2>>2\n#### 2")
    assert solution[-1] == policy.tokenizer.eos_token_id and solution.count(solution[-1]) == 1
    optimizer = torch.optim.AdamW(policy.model.parameters())
    for _ in range(60):
        train_step(policy, optimizer, [(policy.encode_prompt("Question: a"), solution)], 1e-2, 1000)
    with torch.no_grad():
        assert common.response_logprobs(policy, [(policy.encode_prompt("Question: a"), solution)])[
            -1
        ] > math.log(0.9)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(nano):
    """Trap: the solution would come after the end of the text."""
    policy = common.Policy(nano, device="cpu")
    plain, eos = policy.encode_prompt("Question: a"), policy.tokenizer.eos_token_id
    policy.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["$A", policy.tokenizer.eos_token],
        special_tokens=[(policy.tokenizer.eos_token, eos)],
    )
    assert policy.tokenizer("Question: a").input_ids == [*plain, eos]
    assert policy.encode_prompt("Question: a") == plain and policy.encode_prompt("") == []
    assert policy.encode_solution("1").count(eos) == 1


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(nano):
    policy = common.Policy(nano, device="cpu")
    weight = policy.model.get_output_embeddings().weight
    with torch.no_grad():
        weight[0, 0] = float("inf")
    before = [p.clone() for p in policy.model.parameters()]
    with pytest.raises(runtime.UserError, match="not finite"):
        train_step(policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), EXAMPLES, 1.0, 1000)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


# Script -> one optimizer step on EXAMPLES.
STEPS = {
    sft: lambda model, optimizer: sft.train_step(model, optimizer, EXAMPLES, 20),
    expert_iteration: lambda *both: expert_iteration.train_step(*both, EXAMPLES, 20),
    rcrl: lambda *both: rcrl.train_step(
        *both, EXAMPLES, [[i % 3 > 0 for i in range(len(r))] for _, r in EXAMPLES], 20
    ),
    reward_model: lambda *both: reward_model.train_step(
        *both, [(example, float(i % 2), 0.5 + i) for i, example in enumerate(EXAMPLES)], 20
    ),
}


@pytest.mark.parametrize("script", STEPS, ids=lambda script: script.__name__)
def test_a_gradient_that_is_not_finite_stops_the_run_even_if_the_loss_is_finite(script, nano):
    """The gradient of a square root at 0 is an example. It would destroy the weights."""
    if script is reward_model:
        policy = reward_model.RewardModel(nano, "cpu", new=True)
    else:
        policy = common.Policy(nano, device="cpu")
    optimizer = common.adam_w(policy.model.parameters(), 1e-3)
    before = [p.clone() for p in policy.model.parameters()]
    *_, last = policy.model.parameters()
    hook = last.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(runtime.UserError, match="not finite") as error:
        STEPS[script](policy, optimizer)
    loss, norm = re.search(r"\((.*), (.*)\)", str(error.value)).groups()
    assert math.isfinite(float(loss)) and norm == "nan"
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    hook.remove()
    optimizer.zero_grad()
    assert STEPS[script](policy, optimizer)[0] == pytest.approx(float(loss))
    after = list(policy.model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("script", STEPS, ids=lambda script: script.__name__)
def test_gradients_are_clipped_at_norm_1_in_expert_iteration_and_rcrl_at_a_tenth(script, nano):
    kind = reward_model.RewardModel if script is reward_model else common.Policy
    policy = kind(nano, "cpu", **{"new": True} if script is reward_model else {})
    optimizer, norms = common.adam_w(policy.model.parameters(), 1e-3), []
    for weight in policy.model.parameters():
        weight.register_hook(lambda gradient: 100 * gradient)

    def measure(*_):
        gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    optimizer.register_step_pre_hook(measure)
    _, before = STEPS[script](policy, optimizer)
    expected = 0.1 if script in (expert_iteration, rcrl) else 1.0
    assert before > 2 and norms == [pytest.approx(expected, rel=1e-3)]


def test_large_logits_are_computed_in_parts(nano, monkeypatch):
    """At most 2,048 rows of logits are computed at a time, forward and backward.

    The values do not change. Smaller logits are computed at once, and only once.
    """
    policy, rng = common.Policy(nano, device="cpu"), np.random.default_rng(0)
    examples = [
        (rng.integers(5, 60, 4).tolist(), rng.integers(5, 60, 500).tolist()) for _ in range(9)
    ]
    head, sizes = policy.head, []
    monkeypatch.setattr(policy, "head", lambda hidden: sizes.append(len(hidden)) or head(hidden))
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 4500 * policy.vocabulary)
    at_once = common.response_logprobs(policy, examples)
    at_once.mean().backward()
    assert sizes == [4500]
    sizes.clear()
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 4500 * policy.vocabulary - 1)
    logprobs = common.response_logprobs(policy, examples)
    expected = torch.cat([naive_logprobs(policy, example, 1.0) for example in examples])
    torch.testing.assert_close(at_once, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
    weights = list(policy.model.parameters())
    gradients = torch.autograd.grad(logprobs.mean(), weights)
    assert sizes == [2048, 2048, 404] + sizes[3:] and sorted(sizes[3:]) == [404, 2048, 2048], (
        "computed again in the backward pass"
    )
    for got, wanted in zip(gradients, torch.autograd.grad(expected.mean(), weights), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-3)


def test_the_cross_entropy_is_minus_the_mean_log_probability(tiny):
    problems = common.load_problems("arithmetic", "train", 4)
    examples = [
        (tiny.encode_prompt(common.prompt_text(p)), tiny.encode_solution(p.solution))
        for p in problems
    ]
    with torch.no_grad():
        expected = (
            -torch.cat([naive_logprobs(tiny, example, 1.0) for example in examples]).mean().item()
        )
    assert (
        sft.cross_entropy(tiny, examples, 100) == pytest.approx(expected, rel=1e-5) and expected > 0
    )


class Pickled:
    """Write a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return self.file.touch, ()


def test_weights_and_checkpoints_are_never_unpickled(nano, cli, tmp_path):  # noqa: F811
    """A pickle is a program. So weights of a hub model and checkpoints are loaded without it."""
    done, folder, run = tmp_path / "done", tmp_path / "model", tmp_path / "run"
    shutil.copytree(nano, folder)
    (folder / "model.safetensors").unlink()
    harmless = transformers.AutoModelForCausalLM.from_pretrained(nano).state_dict()
    for weights in (harmless, {"model.embed_tokens.weight": Pickled(done)}):
        torch.save(weights, folder / "pytorch_model.bin")
        for load in (
            common.Policy,
            lambda name, device: reward_model.RewardModel(name, device, new=True),
        ):
            with pytest.raises(runtime.UserError):
                load(str(folder), "cpu")
    argv = ["--model", nano, "--epochs", 1, "--limit-eval", 2, "--max-new-tokens", 2, "--out", run]
    assert cli(sft, *argv)[0] == 0
    torch.save({"run": Pickled(done)}, run / "checkpoint" / "state.pt")
    code, message = cli(sft, *argv, "--resume")
    assert code == 2 and "not a checkpoint of this program" in message and not done.exists()


def test_training_that_does_not_fit_the_gpu_is_refused(monkeypatch):
    """What is loaded already is not counted. The GPU is a fake."""
    parts = {"weights": 10**9, "gradients": 4 * 10**6, "moments": 7 * 10**6}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 10**6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**7, 10**8))
    common.check_memory(parts, torch.device("cuda", 0))
    common.check_memory(parts | {"logits": 10**12}, torch.device("cpu"))
    with pytest.raises(runtime.UserError, match="GiB more .*gradients.*--recompute"):
        common.check_memory(parts | {"logits": 1}, torch.device("cuda", 0))


@pytest.mark.parametrize("script", [sft, expert_iteration, ppo, rcrl, reward_model])
def test_every_script_refuses_training_that_does_not_fit_before_it_samples(
    script, cli, tmp_path, monkeypatch
):  # noqa: F811
    def refuse(parts, device):
        raise runtime.UserError(f"no room for {sorted(parts)}")

    monkeypatch.setattr(common, "check_memory", refuse)
    monkeypatch.setattr(common, "generate", None)
    code, message = cli(script, "--model", "tiny", "--out", tmp_path / "run")
    assert code == 2 and "no room for ['activations', 'gradients'" in message
    assert not (tmp_path / "run").exists()


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nand much more"),
    MemoryError("Tried to allocate 20 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 20 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling 20 GiB"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_out_of_memory_in_training_gives_one_line_that_names_the_token_budget(
    error, cli, nano, tmp_path, monkeypatch
):  # noqa: F811
    """Training does not try again. Other errors keep their traceback."""
    logprobs, calls = common.response_logprobs, []

    def full(*args):
        if not torch.is_grad_enabled():
            return logprobs(*args)
        calls.append(1)
        raise error

    monkeypatch.setattr(common, "response_logprobs", full)
    argv = ["--model", nano, "--limit-eval", 2, "--max-new-tokens", 2, "--out", tmp_path / "run"]
    code, message = cli(sft, *argv)
    assert code == 2 and message.count("\n") == 1 and len(calls) == 1
    assert "out of memory" in message and "--token-budget" in message and "20 GiB" in message
    error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        cli(sft, *argv[:-1], tmp_path / "other")


def test_weights_are_float32_also_from_a_bfloat16_checkpoint(nano, tmp_path):
    """Trap: at a learning rate of 1e-6 the update of a bfloat16 weight rounds to zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(nano).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    common.Policy(nano).tokenizer.save_pretrained(tmp_path)
    policy = common.Policy(str(tmp_path))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    before = policy.model.get_output_embeddings().weight.clone()
    train_step(policy, torch.optim.AdamW(policy.model.parameters()), EXAMPLES, 1e-6, 1000)
    assert (policy.model.get_output_embeddings().weight != before).float().mean() > 0.5


def test_dropout_is_off_in_training(tmp_path_factory):
    """Trap: with dropout on, the log-probabilities differ from call to call."""
    policy = random_policy("gpt2", tmp_path_factory)
    assert policy.model.config.resid_pdrop > 0 and not policy.model.training
    assert torch.equal(
        common.response_logprobs(policy, EXAMPLES), common.response_logprobs(policy, EXAMPLES)
    )


@pytest.mark.parametrize("script", [sft, ppo], ids=lambda script: script.__name__)
def test_dropout_is_off_in_the_scripts(script, cli, tmp_path, monkeypatch):  # noqa: F811
    write_model(ARCHITECTURES["gpt2"], tmp_path / "gpt2", scale=1.0)
    modes, logprobs = [], common.response_logprobs

    def spied(policy, *args):
        modes.append(policy.model.training)
        return logprobs(policy, *args)

    monkeypatch.setattr(common, "response_logprobs", spied)
    argv = ["--model", tmp_path / "gpt2", "--out", tmp_path / "run", "--limit-eval", 2]
    argv += ["--max-new-tokens", 8, "--epochs", 1]
    argv += ["--phases", 2, "--questions", 2, "--limit-train", 8] if script is ppo else []
    assert cli(script, *argv)[0] == 0
    assert len(modes) > 3 and not any(modes)
    if script is ppo:
        assert all(
            row["max_ratio_deviation"] < 1e-4
            for row in rows_of(tmp_path / "run" / "metrics.jsonl")[1:]
        )


def test_a_head_that_is_not_linear_is_refused(nano, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def softcapped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.tanh() * 0.01
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", softcapped)
    with pytest.raises(runtime.UserError, match="scaled or capped"):
        common.Policy(nano)


@pytest.mark.parametrize(
    "family, setting",
    [
        ("Granite", "logits_scaling"),
        ("Cohere", "logit_scale"),
        ("NanoChat", "final_logit_softcapping"),
    ],
)
def test_logits_are_scaled_and_capped_as_in_the_model(family, setting, tmp_path):
    """Granite divides its logits and Cohere multiplies them. Gemma 2 and nanochat bound them.

    Otherwise the policy would train and sample at another temperature than the saved model.
    """
    config = getattr(transformers, f"{family}Config")
    write_model(
        lambda v: config(vocab_size=v, num_key_value_heads=2, **{setting: 0.3}, **SMALL), tmp_path
    )
    policy = common.Policy(str(tmp_path), device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt, response = [3, 4, 5], [6, 7, 8, 9]
    common.response_logprobs(policy, [(prompt, response)]).sum().backward()
    assert policy.model.get_input_embeddings().weight.grad.abs().sum() > 0
    with torch.no_grad():
        logits = plain(torch.tensor([prompt + response])).logits[0, 2:-1]
        last = policy.head(policy.hidden_states(torch.tensor([prompt])))[0, -1]
        torch.testing.assert_close(last, logits[0], atol=1e-4, rtol=1e-4)
        found = common.response_logprobs(policy, [(prompt, response)])
    torch.testing.assert_close(
        found, logits.log_softmax(-1)[range(4), response], atol=1e-4, rtol=1e-4
    )
    problem = common.Problem("p", "Ann has 3 pens.", 3)
    for sample in common.generate(policy, [problem], samples=3, max_new_tokens=8):
        example = list(sample.prompt), sample.tokens.tolist()
        with torch.no_grad():
            again = common.response_logprobs(policy, [example]).numpy()
        assert sample.logprobs == pytest.approx(again, abs=1e-4)
    setattr(policy.model if family == "Cohere" else policy.model.config, setting, 1.0)
    with torch.no_grad():
        assert (common.response_logprobs(policy, [(prompt, response)]) - found).abs().max() > 1e-2


def test_the_cosine_schedule_warms_up_and_ends_at_a_hundredth():
    rates = [common.cosine_lr(step, 200, 2e-5) for step in range(200)]
    assert rates[0] < rates[3] < rates[5] == pytest.approx(2e-5)
    assert all(a >= b for a, b in zip(rates[5:], rates[6:], strict=False))
    assert rates[-1] == pytest.approx(2e-7)
    longer = [common.cosine_lr(step, 200, 2e-5, warmup=0.1) for step in range(200)]
    assert longer[9] == pytest.approx(1e-5) and longer[19] == longer[20] == pytest.approx(2e-5)
    assert longer[-1] == pytest.approx(2e-7)
    assert common.cosine_lr(0, 1, 1.0) == 1.0


def test_a_saved_folder_is_an_ordinary_model_with_the_same_greedy_samples(tiny, tmp_path):
    """It loads with the Auto classes, and generates with plain tokenizer and generate calls."""
    tiny.save(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert not list(tmp_path.glob("*.part")) and not list((tmp_path / "model").glob("*.bin"))
    for sample in common.generate(
        tiny, common.load_problems("arithmetic", "dev", 5), temperature=0, max_new_tokens=128
    ):
        ids = tokenizer(common.prompt_text(sample.problem), return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=128)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert text == sample.text and sample.finished
    # A folder can be replaced as well.
    tiny.save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists() and len(
        list(tmp_path.iterdir())
    ) == 1


def test_a_fingerprint_changes_with_any_weight(tmp_path):
    """Adapters do not change the embeddings, the first megabytes of most files."""
    model = tmp_path / "model"
    shutil.copytree(runtime.model_folder("tiny"), model)
    before, file = runtime.fingerprint(str(model)), model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert runtime.fingerprint(str(model)) != before
    content[-1] ^= 1
    file.write_bytes(content)
    assert runtime.fingerprint(str(model)) == before


@pytest.mark.parametrize("name, fused", [("llama", 7), ("qwen3", 13), ("gemma3", 0), ("gpt2", 0)])
def test_fused_norms_equal_the_norms_of_the_model(name, fused, tmp_path_factory):
    """Norms that multiply by 1 + weight are not fused.

    A copy of the model, for example the reference of PPO, has its own weights.
    """
    model = copy.deepcopy(random_policy(name, tmp_path_factory).model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.uniform_(0.5, 1.5)
    ids = torch.arange(40).view(2, 20)
    logits, keys = model(ids).logits, model.state_dict().keys()
    logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    engine.fuse_norms(model)
    assert sum("forward" in module.__dict__ for module in model.modules()) == fused
    assert model.state_dict().keys() == keys
    again = model(ids).logits
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    again.sum().backward()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], gradients, atol=1e-3, rtol=1e-3
    )
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
        torch.testing.assert_close(reference(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama.LlamaRMSNorm", "olmo2.Olmo2RMSNorm"])
def test_a_fused_norm_returns_the_values_and_the_type_of_the_norm_of_the_model(kind):
    """One norm promotes a bfloat16 input to the precision of its weight. The other does not.

    The mean is computed in float32.
    """
    module, name = kind.split(".")
    norm = getattr(
        importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name
    )(64)
    x = 100 * torch.randn(3, 64)
    for weights, inputs in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        norm.to(weights)
        own = norm(x.to(inputs))
        engine.fuse_norms(norm)
        fused = norm(x.to(inputs))
        assert norm.__dict__.pop("forward") and fused.dtype == own.dtype
        torch.testing.assert_close(fused, own, atol=0.01, rtol=0.01)


def test_other_kinds_of_norms_are_not_fused():
    # FalconMamba has a norm without weights that is called on other widths.
    class WeightlessRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(8))
            self.eps = 1e-6

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], None, self.eps)

    class GatedRMSNorm(WeightlessRMSNorm):
        def __init__(self):
            super().__init__()
            del self.weight
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x, gate):
            return super().forward(x) * gate

    class BiasedRMSNorm(GatedRMSNorm):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps) + self.bias

    for norm in (WeightlessRMSNorm(), GatedRMSNorm(), BiasedRMSNorm()):
        engine.fuse_norms(norm)
        assert "forward" not in norm.__dict__


def test_there_is_no_weight_decay():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    common.adam_w([weight], 0.1).step()
    assert torch.equal(weight, torch.ones(3))
