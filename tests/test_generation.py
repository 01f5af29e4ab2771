"""Check that sampling follows the model token for token, with every batch size."""

import contextlib
import dataclasses
import gc
import os
import subprocess
import sys
import tracemalloc
import weakref
import zlib

import numpy as np
import pytest
import torch
import transformers
from conftest import DEVICES
from transformers import AutoTokenizer

import common
import engine
import runtime

QUESTIONS = [
    "Ann has 3 pens.",
    "How many?",
    "Ben has 12 nuts. Ann gives Ben 4 nuts. Then Ben loses 7 nuts. How many nuts has Ben got?",
    "",
    "a b c",
]
PROBLEMS = [common.Problem(f"p{i}", text, 1) for i, text in enumerate(QUESTIONS)]
SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
)
ARCHITECTURES = {
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, num_key_value_heads=2, **SMALL),
    "qwen3": lambda v: transformers.Qwen3Config(
        vocab_size=v, num_key_value_heads=2, head_dim=8, **SMALL
    ),
    "mistral": lambda v: transformers.MistralConfig(
        vocab_size=v, num_key_value_heads=2, sliding_window=8, **SMALL
    ),
    "gemma3": lambda v: transformers.Gemma3TextConfig(
        vocab_size=v,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        **SMALL,
    ),
    "gpt2": lambda v: transformers.GPT2Config(
        vocab_size=v, n_embd=32, n_layer=3, n_head=4, n_positions=256
    ),
    "gpt_neox": lambda v: transformers.GPTNeoXConfig(vocab_size=v, **SMALL),
}
_POLICIES = {}


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Restore the fast paths and the warnings that the previous test disabled or printed."""
    before = set(engine.graphs.disabled)
    runtime.warn.cache_clear()
    yield
    engine.graphs.disabled.clear()
    engine.graphs.disabled.update(before)


def takes_engine(policy: common.Policy) -> bool:
    return policy.model.config._attn_implementation == "paged_attention"


@contextlib.contextmanager
def plain_loop(policy: common.Policy):
    """Sample with `common.decode_plainly` in this block."""
    before = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        policy.model.set_attn_implementation(before)


@pytest.fixture(params=["engine", "plain loop"])
def loop(request):
    """Return a context manager that makes a policy sample with one of the two loops."""
    return plain_loop if request.param == "plain loop" else contextlib.nullcontext


def write_model(config_of, folder, scale: float = 8.0) -> None:
    """Write a small random model with the tokenizer of `tiny`.

    Its weights are scaled up. Otherwise its choices would be close to ties.
    """
    tokenizer = AutoTokenizer.from_pretrained(runtime.model_folder("tiny"))
    config = config_of(len(tokenizer))
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_policy(name: str, tmp_path_factory, device: str = "cpu") -> common.Policy:
    if (name, device) not in _POLICIES:
        folder = tmp_path_factory.mktemp(name)
        write_model(ARCHITECTURES[name], folder)
        _POLICIES[name, device] = common.Policy(str(folder), device=device, dtype="float32")
    return _POLICIES[name, device]


def ids_of(samples) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in samples]


def reference_greedy(policy: common.Policy, problems, max_new_tokens: int) -> list[list[int]]:
    """Return the greedy output of `model.generate` for each prompt alone.

    The end-of-text token is included.
    """
    out = []
    for problem in problems:
        prompt = policy.encode_prompt(common.prompt_text(problem))
        ids = torch.tensor([prompt], device=policy.device)
        how = dict(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
        how |= dict(eos_token_id=policy.eos_ids, attention_mask=torch.ones_like(ids))
        said = policy.model.generate(ids, **how)
        out.append(said[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_samples_equal_model_generate_for_every_architecture_and_batch_size(
    name, device, tmp_path_factory
):
    """Prompts have 6 to 40 tokens. 48 new tokens need two pages. Sliding windows are shorter.

    An incorrect position, mask or cache entry changes the text of a random model within a few
    tokens.
    """
    policy = random_policy(name, tmp_path_factory, device)
    assert takes_engine(policy)
    expected = reference_greedy(policy, PROBLEMS, 48)
    assert len({tuple(tokens) for tokens in expected}) > 1
    for rows in (1, 3, 64):
        got = common.generate(policy, PROBLEMS, temperature=0, max_new_tokens=48, batch_size=rows)
        assert ids_of(got) == expected, f"{rows} batch slots"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_samples_of_the_plain_loop_equal_model_generate(name, tmp_path_factory, monkeypatch):
    """Prompts of different lengths share a batch. Finished sequences are dropped from it.

    An incorrect position or a visible padding token changes the text.
    """
    policy = random_policy(name, tmp_path_factory)
    monkeypatch.setattr(engine, "generate_tokens", lambda *_, **__: pytest.fail("engine"))
    monkeypatch.setattr(policy, "eos_ids", [*policy.eos_ids, *range(20, 30)])
    with plain_loop(policy):
        expected = reference_greedy(policy, PROBLEMS, 48)
        assert len({tuple(tokens) for tokens in expected}) > 1
        for batch_size in (1, 3, 64):
            how = dict(temperature=0, max_new_tokens=48, batch_size=batch_size)
            assert ids_of(common.generate(policy, PROBLEMS, **how)) == expected, batch_size


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "tiny"])
def test_the_plain_loop_samples_the_same_tokens_as_the_engine(name, tmp_path_factory, tiny):
    """The log-probabilities are equal as well. The batch sizes do not matter."""
    if name == "tiny":
        policy, problems = tiny, common.load_problems("arithmetic", "dev", 6)
    else:
        policy, problems = random_policy(name, tmp_path_factory), PROBLEMS
    assert takes_engine(policy)
    for temperature, few_shot, batch_size in ((1.0, False, 7), (0.7, True, 64)):
        how = dict(samples=5, temperature=temperature, max_new_tokens=100, few_shot=few_shot)
        # The few-shot examples do not fit.
        if policy.max_length < 512:
            how |= dict(few_shot=False, max_new_tokens=40)
        fast = common.generate(policy, problems, batch_size=16, **how)
        with plain_loop(policy):
            plain = common.generate(policy, problems, batch_size=batch_size, **how)
        assert len({len(s.tokens) for s in plain}) > 1 or name != "tiny"
        assert ids_of(plain) == ids_of(fast) and len({tuple(ids) for ids in ids_of(plain)}) > 5
        assert [s.finished for s in plain] == [s.finished for s in fast]
        for one, other in zip(plain, fast, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)


def test_the_plain_loop_forces_the_same_labels_as_the_engine(tmp_path_factory, monkeypatch):
    """After each line break the label follows with log-probability 0."""
    policy = random_policy("llama", tmp_path_factory)
    # A random model hardly ever samples a line break. So one of seven tokens counts as one.
    breaks = np.arange(policy.vocabulary) % 7 == 3
    monkeypatch.setitem(policy.__dict__, "breaks_line", breaks)
    monkeypatch.setattr(policy, "label", 11)
    for every_line in (True, False):
        monkeypatch.setattr(policy, "label_every_line", every_line)
        how = dict(samples=6, max_new_tokens=30, batch_size=8)
        fast = common.generate(policy, PROBLEMS, **how)
        with plain_loop(policy):
            plain = common.generate(policy, PROBLEMS, **how)
        assert ids_of(plain) == ids_of(fast)
        for one, other in zip(plain, fast, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)
            after = 1 + np.flatnonzero(breaks[one.tokens[:-1]])
            forced = one.tokens[after] == 11
            assert one.prompt[-1] == 11 and (forced.all() or not every_line)
            assert not every_line or (one.logprobs[after] == 0).all()
        assert any(breaks[s.tokens[:-1]].any() for s in plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampled_tokens_do_not_depend_on_batch_size_order_or_other_samples(
    name, loop, tmp_path_factory
):
    policy = random_policy(name, tmp_path_factory)
    how = dict(samples=5, temperature=1.0, max_new_tokens=20, seed=3)
    with loop(policy):
        full = common.generate(policy, PROBLEMS, batch_size=64, **how)
        assert len({tuple(ids) for ids in ids_of(full)}) > 5
        for rows in (2, 7):
            assert ids_of(common.generate(policy, PROBLEMS, batch_size=rows, **how)) == ids_of(full)
        alone = common.generate(policy, PROBLEMS[2:3], batch_size=4, **how)
        assert ids_of(alone) == ids_of(s for s in full if s.problem.id == "p2")
        fewer = common.generate(policy, PROBLEMS, batch_size=1, **how | {"samples": 2})
        assert ids_of(fewer) == ids_of(s for s in full if s.number < 2)
        other = common.generate(policy, PROBLEMS, batch_size=64, **how | {"seed": 4})
        assert ids_of(other) != ids_of(full)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_of_sampling_equal_logprobs_of_training(temperature, device, tmp_path_factory):
    """Traps: a temperature that one of the two lacks, top-k in sampling only, padding that shifts.

    The last trap is left padding without position ids.
    """
    policy = random_policy("llama", tmp_path_factory, device)
    samples = common.generate(
        policy, PROBLEMS, samples=3, temperature=temperature, max_new_tokens=24, batch_size=7
    )
    examples = [
        (policy.encode_prompt(common.prompt_text(s.problem)), s.tokens.tolist()) for s in samples
    ]
    with torch.no_grad():
        again = (
            common.response_logprobs(policy, examples, temperature)
            .cpu()
            .split([len(s.tokens) for s in samples])
        )
    for sample, logprobs in zip(samples, again, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(sample.logprobs), logprobs, atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    """Chi-square over a vocabulary of 8 with 100,000 samples.

    With 7 degrees of freedom it exceeds 29.9 with probability 1e-4.
    """
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -30.0])
    n = 100_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(n, np.float32))
    tokens, logprobs = common.sample_softmax(logits.repeat(n, 1), uniforms, temperature)
    expected = torch.softmax(logits / temperature, -1) * n
    counts = torch.bincount(tokens, minlength=8)
    likely = expected > 5
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 29.9
    torch.testing.assert_close(logprobs, torch.log_softmax(logits / temperature, -1)[tokens])


@pytest.mark.parametrize("size", [3, 256, 700])
def test_sampled_tokens_follow_the_inverse_cdf(size):
    """The tokens equal the ones of a sum in float64, also with tokens of probability zero."""
    rng = np.random.default_rng(size)
    logits = torch.from_numpy(rng.normal(0, 3, (2000, size)))
    logits[:, : size // 2][rng.random((2000, size // 2)) < 0.3] = -torch.inf
    # A long run of tokens in the middle, and a run at the end, have probability zero.
    logits[:500, 256:512] = -torch.inf
    logits[500:1000, 512:] = -torch.inf
    uniforms = rng.random(2000, np.float32)
    uniforms[::7] = 1 - 2**-24
    tokens, _ = common.sample_softmax(logits.float(), torch.from_numpy(uniforms), 1.0)
    probabilities = torch.softmax(logits, -1).numpy()
    ends = probabilities.cumsum(1)
    expected = (ends <= uniforms[:, None] * ends[:, -1:]).sum(1)
    # Close to an edge, float32 may choose either side.
    edge = np.abs(ends - uniforms[:, None]).min(1) < 1e-6
    assert edge[::7].all() and edge.mean() < 0.2
    assert (tokens.numpy() == expected)[~edge].all()
    assert (probabilities[np.arange(2000), tokens] > 0).all()


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.25, 0.5, 0.75, 1 - 2**-24):
        for scale in (1.0, 1.37, 777.0):
            tokens, _ = common.sample_softmax(logits * scale, torch.tensor([u]), 1.0)
            assert tokens.item() in (1, 3)


def test_the_sampling_settings_of_a_checkpoint_are_ignored(tmp_path_factory):
    """Trap: a generation_config with top-k and top-p truncates the distribution silently."""
    policy = random_policy("gpt2", tmp_path_factory)
    how = dict(samples=4, temperature=1.0, max_new_tokens=16, batch_size=8)
    before = ids_of(common.generate(policy, PROBLEMS, **how))
    policy.model.generation_config.top_k, policy.model.generation_config.do_sample = 1, True
    after = ids_of(common.generate(policy, PROBLEMS, **how))
    policy.model.generation_config.top_k, policy.model.generation_config.do_sample = None, False
    assert before == after


def test_a_saved_model_does_not_keep_the_sampling_settings_of_its_checkpoint(nano, tmp_path):
    """Chat models have sampling settings, for example top-k 50.

    Users of the saved model would get samples from a truncated distribution.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(nano)
    model.generation_config.update(do_sample=True, top_k=50, top_p=0.9, temperature=0.6)
    model.save_pretrained(tmp_path / "chat")
    AutoTokenizer.from_pretrained(nano).save_pretrained(tmp_path / "chat")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "chat").top_k == 50
    common.Policy(str(tmp_path / "chat"), "cpu").save(tmp_path / "saved")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "saved").to_diff_dict()
    assert (
        not {"top_k", "top_p", "temperature", "do_sample"} & saved.keys() and saved["eos_token_id"]
    )


def test_a_finished_sample_ends_with_eos_and_a_truncated_one_has_the_full_length(tiny):
    problems = common.load_problems("arithmetic", "dev", 8)
    for s in common.generate(tiny, problems, samples=4, max_new_tokens=128):
        assert (
            s.finished
            and s.tokens[-1] == tiny.tokenizer.eos_token_id
            and (s.tokens == s.tokens[-1]).sum() == 1
        )
        assert len(s.tokens) == len(s.logprobs) and s.answer is not None
    for s in common.generate(tiny, problems, samples=4, max_new_tokens=5):
        assert not s.finished and len(s.tokens) == 5 and not s.correct


def test_a_few_shot_sample_stops_at_its_answer_line(tiny, monkeypatch):
    """This model never ends by itself. Without the rule every sample would reach the limit."""
    monkeypatch.setattr(tiny, "eos_ids", [tiny.tokenizer.pad_token_id])
    problems = common.load_problems("arithmetic", "dev", 8)
    for s in common.generate(tiny, problems, temperature=0, max_new_tokens=200, few_shot=True):
        lines = s.text.split("\n")
        done = [line for line in lines[:-1] if "####" in line or line.startswith("Question:")]
        assert len(done) == (1 if s.finished else 0)
        assert s.finished == (len(s.tokens) < 200)


def test_a_few_shot_sample_stops_where_the_next_question_starts(tiny, monkeypatch):
    """An answer line before the question is not required. The sample stops at the end of a line."""
    texts = [
        "2+2=4\nQuestion: and?\nAnswer:\n5",
        "2+2=4\n#### 4\nQuestion:",
        "A Question: x?\n5\nQuestion",
    ]

    def decode(model, batch_size, *, pending, is_complete, **request):
        assert list(pending) == [0, 1, 2]
        for i, text in enumerate(texts):
            ids = np.array(tiny.encode_prefix(text))
            length = next((n for n in range(1, len(ids)) if is_complete(ids[:n])), len(ids))
            yield i, 0, ids[:length], np.zeros(length, np.float32), True

    monkeypatch.setattr(engine, "generate_tokens", decode)
    samples = common.generate(tiny, [common.Problem(t, "?", 1) for t in texts], few_shot=True)
    assert [s.text for s in samples] == ["2+2=4\nQuestion: and?\n", "2+2=4\n#### 4\n", *texts[2:]]


def test_a_sample_continues_the_few_shot_examples_and_the_prefix(tiny):
    """The logged prompt contains both. The log-probabilities equal training after this prompt."""
    problems = common.load_problems("arithmetic", "train", 3)
    prefixes = [problem.reference.splitlines(keepends=True)[0] for problem in problems]
    for few_shot in (False, True):
        samples = common.generate(
            tiny, problems, samples=2, max_new_tokens=20, few_shot=few_shot, prefixes=prefixes
        )
        for sample, prefix in zip(samples, np.repeat(prefixes, 2), strict=True):
            text = common.FEW_SHOT * few_shot + f"Question: {sample.problem.question}\nAnswer:\n"
            assert list(sample.prompt) == tiny.encode_prompt(text) + tiny.encode_prefix(str(prefix))
            assert sample.prefix == prefix and sample.text.startswith(prefix)
            with torch.no_grad():
                again = common.response_logprobs(
                    tiny, [(list(sample.prompt), sample.tokens.tolist())]
                )
            np.testing.assert_allclose(sample.logprobs, again, atol=1e-4)


def test_a_prompt_that_is_too_long_gives_a_one_line_error(loop, tmp_path_factory):
    policy = random_policy("gpt2", tmp_path_factory)
    question = "many " * 100
    while len(policy.encode_prompt(f"Question: {question}\nAnswer:\n")) < 256:
        question += "a"
    n = len(policy.encode_prompt(f"Question: {question}\nAnswer:\n"))
    problems = [*PROBLEMS, common.Problem("long", question, 1)]
    message = f"the longest prompt is {n} tokens long; the model has 256 positions"
    with loop(policy), pytest.raises(runtime.UserError, match=message):
        common.generate(policy, problems, max_new_tokens=250)


def test_a_sample_ends_at_the_last_position_of_the_model(loop, tmp_path_factory):
    """The sample counts as truncated. Its last token is predicted at the last position but one."""
    policy = random_policy("gpt2", tmp_path_factory)
    how = dict(samples=3, batch_size=4)
    with loop(policy):
        samples = common.generate(policy, PROBLEMS, max_new_tokens=300, **how)
        shorter = common.generate(policy, PROBLEMS, max_new_tokens=100, **how)
    assert sum(not s.finished for s in samples) > 5
    for sample, beginning in zip(samples, shorter, strict=True):
        length = len(sample.prompt) + len(sample.tokens)
        assert length < 256 if sample.finished else length == 256
        assert sample.tokens[:100].tolist() == beginning.tokens.tolist()
    with torch.no_grad():
        again = common.response_logprobs(policy, [(s.prompt, s.tokens.tolist()) for s in samples])
    said = torch.from_numpy(np.concatenate([s.logprobs for s in samples]))
    torch.testing.assert_close(said, again, atol=1e-3, rtol=1e-3)


def test_weights_that_are_not_finite_give_an_error(nano, loop):
    policy = common.Policy(nano)
    with torch.no_grad():
        policy.head.__self__.model.get_output_embeddings().weight.fill_(float("nan"))
    with loop(policy), pytest.raises(runtime.UserError, match="not finite"):
        common.generate(policy, PROBLEMS[:1], max_new_tokens=4)


def test_one_prefill_serves_all_samples_of_a_problem(loop, tmp_path_factory, monkeypatch):
    """Count the tokens that go through the model.

    Each prompt runs once. After that a step has one token per batch slot.
    """
    policy, calls = random_policy("llama", tmp_path_factory), []
    model = policy.model.base_model
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda *a, **k: calls.append(tuple(k["input_ids"].shape)) or forward(*a, **k),
    )
    how = dict(samples=16, max_new_tokens=10, batch_size=16)
    with loop(policy):
        samples = common.generate(policy, PROBLEMS[:2], **how)
    prefills = [shape for shape in calls if shape[1] > 1]
    decoded = sum(rows for rows, width in calls if width == 1)
    assert sum(rows for rows, _ in prefills) == 2
    # The prompt gives the first token. At most half of a batch is idle.
    if loop is plain_loop:
        needed = sum(len(s.tokens) - 1 for s in samples)
        assert needed <= decoded < 2 * needed
    else:
        assert decoded == sum(len(s.tokens) for s in samples), "no step for a finished sample"


def test_no_problems_give_no_samples(tmp_path_factory):
    assert common.generate(random_policy("llama", tmp_path_factory), []) == []


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_reading_every_16_steps_with_rounded_sizes_gives_the_same_samples(
    name, tmp_path_factory, monkeypatch
):
    """This runs the algorithm of a GPU on a CPU.

    Rows run on after their end until the host reads them. Idle rows are computed as well. A step is
    called again on the tensors of its first call.
    """
    policy = random_policy(name, tmp_path_factory)
    for how in (
        dict(samples=5, max_new_tokens=37, seed=3),
        dict(samples=12, max_new_tokens=70, seed=4),
    ):
        monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", set())
        expected = common.generate(policy, PROBLEMS, batch_size=64, **how)
        for rows in (7, 64):
            monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
            got = common.generate(policy, PROBLEMS, batch_size=rows, **how)
            assert ids_of(got) == ids_of(expected), f"{rows} batch slots"
            assert [s.finished for s in got] == [s.finished for s in expected]


def test_few_shot_samples_stop_at_the_same_token_when_read_every_16_steps(tiny, monkeypatch):
    problems = common.load_problems("arithmetic", "dev", 8)
    how = dict(samples=3, max_new_tokens=100, few_shot=True, batch_size=10)
    monkeypatch.setattr(tiny, "eos_ids", [tiny.tokenizer.pad_token_id])
    expected = common.generate(tiny, problems, **how)
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
    assert [(s.text, s.finished) for s in common.generate(tiny, problems, **how)] == [
        (s.text, s.finished) for s in expected
    ]
    assert any(s.finished for s in expected)


def test_a_sample_that_ends_beyond_the_limit_is_truncated_at_the_limit(tiny, monkeypatch):
    """If the host reads every 16 steps, a row may end by itself after the limit."""
    problems = common.load_problems("arithmetic", "dev", 4)
    whole = common.generate(tiny, problems, temperature=0)
    shortest = min(len(sample.tokens) for sample in whole if sample.finished)
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
    # One of the limits is no multiple of 16.
    for limit in (shortest - 1, shortest - 2):
        again = common.generate(tiny, problems, temperature=0, max_new_tokens=limit)
        for cut, sample in zip(again, whole, strict=True):
            assert not cut.finished and cut.tokens.tolist() == sample.tokens[:limit].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_give_the_same_samples_as_single_steps(tmp_path_factory, monkeypatch):
    folder = random_policy("llama", tmp_path_factory).model.config._name_or_path
    # With bfloat16, other sizes of a step would round differently.
    policy = common.Policy(folder, "cuda", "float32")
    how = dict(samples=40, max_new_tokens=70, batch_size=50)
    graphs = common.generate(policy, PROBLEMS, **how)
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", set())
    assert ids_of(graphs) == ids_of(common.generate(policy, PROBLEMS, **how))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_fused_kernel_samples_the_same_tokens_as_the_plain_attention(
    name, tmp_path_factory, monkeypatch
):
    """Prompts have 6 to 40 tokens, and sampled tokens lie on two pages.

    The models have a window, and key heads with one query or two. Without a GPU, set
    TRITON_INTERPRET=1 before pytest. Then Triton runs the kernel on the CPU, in minutes.
    """
    if torch.cuda.is_available():
        device = "cuda"
    elif engine.kernel.triton and os.environ.get("TRITON_INTERPRET") == "1":
        device = "cpu"
    else:
        pytest.skip("no GPU, nor Triton with TRITON_INTERPRET=1")
    policy = random_policy(name, tmp_path_factory, device)
    how = dict(samples=2, max_new_tokens=40, batch_size=8)
    monkeypatch.setattr(engine.decode, "FUSED_DEVICES", set())
    plain = common.generate(policy, PROBLEMS, **how)
    monkeypatch.setattr(engine.decode, "FUSED_DEVICES", {device})
    launched, fused_attention = [], engine.kernel.fused_attention
    monkeypatch.setattr(
        engine.kernel, "fused_attention", lambda *how: launched.append(1) or fused_attention(*how)
    )
    fused = common.generate(policy, PROBLEMS, **how)
    assert launched and ids_of(fused) == ids_of(plain)
    for one, other in zip(fused, plain, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)


def test_if_the_kernel_cannot_be_built_pytorch_computes_the_attention(
    tmp_path_factory, monkeypatch, capsys
):
    """Triton needs a C compiler. Many containers lack one."""
    policy = random_policy("llama", tmp_path_factory)
    how = dict(samples=3, max_new_tokens=20, batch_size=7)
    expected = ids_of(common.generate(policy, PROBLEMS, **how))
    monkeypatch.setattr(engine.decode, "FUSED_DEVICES", {"cpu"})

    def refuse(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(engine.kernel, "fused_attention", refuse)
    for _ in range(2):
        assert ids_of(common.generate(policy, PROBLEMS, **how)) == expected
    said = capsys.readouterr().err
    assert said.count("warning") == said.count("C compiler") == 1 and takes_engine(policy)
    assert engine.graphs.disabled == {"fused attention"}


def test_steps_that_cannot_be_recorded_run_without_graphs(tmp_path_factory, monkeypatch, capsys):
    policy = random_policy("llama", tmp_path_factory)
    how = dict(samples=12, max_new_tokens=40, batch_size=20)
    expected = ids_of(common.generate(policy, PROBLEMS, **how))
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engine.graphs, "record", refuse)
    assert ids_of(common.generate(policy, PROBLEMS, **how)) == expected
    assert capsys.readouterr().err.count("cannot be recorded") == 1


def test_a_step_that_waits_for_the_gpu_is_run_again_without_recording(
    tmp_path_factory, monkeypatch, capsys
):
    """A failed recording damages PyTorch's allocator.

    So the first step tests whether a step can be recorded.
    """
    policy = random_policy("llama", tmp_path_factory)
    how = dict(samples=12, max_new_tokens=40, batch_size=20)
    expected = ids_of(common.generate(policy, PROBLEMS, **how))
    forward = policy.model.base_model.forward

    @contextlib.contextmanager
    def waiting_is_an_error(device):
        def refuse(*args, **kwargs):
            # The step has written to the cache before it waits.
            forward(*args, **kwargs)
            raise RuntimeError("called a synchronizing CUDA operation")

        with monkeypatch.context() as patch:
            patch.setattr(policy.model.base_model, "forward", refuse)
            yield

    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr(engine.graphs, "waiting_is_an_error", waiting_is_an_error)
    monkeypatch.setattr(engine.graphs, "record", lambda *_: pytest.fail("recorded"))
    assert ids_of(common.generate(policy, PROBLEMS, **how)) == expected
    assert capsys.readouterr().err.count("cannot be recorded") == 1


def test_the_cache_is_freed_at_once_if_steps_are_not_recorded(tmp_path_factory, monkeypatch):
    """Python's collector of cycles would come too late: the next model needs the memory."""
    policy, caches = random_policy("llama", tmp_path_factory), []
    start = engine.cache.PagedCache.__init__
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
    engine.graphs.disabled.add("graphs")
    monkeypatch.setattr(
        engine.cache.PagedCache,
        "__init__",
        lambda self, *args, **how: caches.append(weakref.ref(self)) or start(self, *args, **how),
    )
    gc.collect()
    gc.disable()
    try:
        common.generate(policy, PROBLEMS, samples=3, max_new_tokens=20)
    finally:
        gc.enable()
    assert caches and all(cache() is None for cache in caches)


def test_few_sizes_are_recorded(tiny, monkeypatch):
    """When rows end, the graph for more rows is used again.

    A recording is more expensive than a few idle pages.
    """
    problems, recorded, steps = common.load_problems("arithmetic-hard", "dev", 12), [], []
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr(engine.graphs, "record", lambda step, *_: recorded.append(step) or step)
    begin_step = engine.cache.PagedCache.begin_step
    monkeypatch.setattr(
        engine.cache.PagedCache,
        "begin_step",
        lambda self, ages, *how: steps.append(len(ages)) or begin_step(self, ages, *how),
    )
    common.generate(tiny, problems, samples=16, batch_size=32, max_new_tokens=256)
    looks = len(steps) / 16
    assert looks > 30 and len(recorded) < looks / 3


def test_a_model_that_the_engine_does_not_support_uses_the_plain_loop_and_warns_once(
    tmp_path_factory, monkeypatch, capsys
):
    """The family decides. The samples equal the samples of the engine."""
    known = random_policy("llama", tmp_path_factory)
    monkeypatch.setattr(engine, "FAMILIES", engine.FAMILIES - {"llama"})
    policy = common.Policy(known.model.config._name_or_path, "cpu", "float32")
    assert takes_engine(known) and not takes_engine(policy)
    how = dict(samples=2, temperature=1.0, max_new_tokens=12, batch_size=7)
    got = [common.generate(policy, PROBLEMS, **how) for _ in range(2)][0]
    monkeypatch.setattr(engine.decode, "GRAPH_DEVICES", {"cpu"})
    assert ids_of(common.generate(policy, PROBLEMS, **how)) == ids_of(got), (
        "the plain loop has no steps of 16"
    )
    assert capsys.readouterr().err.count("sampling uses the plain loop") == 1
    monkeypatch.undo()
    assert ids_of(got) == ids_of(common.generate(known, PROBLEMS, **how))
    assert not capsys.readouterr().err


def test_without_the_engine_a_model_uses_the_plain_loop(tmp_path_factory, monkeypatch, capsys):
    """A fork may not have copied engine/."""
    known = random_policy("llama", tmp_path_factory)
    monkeypatch.setattr(common, "engine", None)
    policy = common.Policy(known.model.config._name_or_path, "cpu", "float32")
    got = ids_of(common.generate(policy, PROBLEMS, samples=2, max_new_tokens=12))
    assert "no engine/" in capsys.readouterr().err
    monkeypatch.undo()
    assert got == ids_of(common.generate(known, PROBLEMS, samples=2, max_new_tokens=12))


@pytest.mark.parametrize("kinds", [["full_attention", "linear_attention"], ["chunked_attention"]])
def test_the_engine_does_not_support_other_kinds_of_layers(kinds):
    config = ARCHITECTURES["gemma3"](385)
    assert engine.supports(config)
    config.layer_types = kinds
    assert not engine.supports(config)


def test_bfloat16_arithmetic_uses_the_engine(tmp_path_factory):
    folder = random_policy("llama", tmp_path_factory).model.config._name_or_path
    policy = common.Policy(folder, device="cpu", dtype="bfloat16")
    samples = common.generate(policy, PROBLEMS, samples=2, max_new_tokens=8)
    assert takes_engine(policy) and all(np.isfinite(s.logprobs).all() for s in samples)


def test_logits_are_not_rounded_to_bfloat16(tiny):
    """Between 16 and 32 the numbers of bfloat16 are 0.125 apart."""
    policy, problems = (
        common.Policy("tiny", "cpu", "bfloat16"),
        common.load_problems("arithmetic", "train", 12),
    )
    examples = [
        (policy.encode_prompt(common.prompt_text(p)), policy.encode_solution(p.reference))
        for p in problems[:2]
    ]
    ids = torch.tensor([policy.encode_prompt(common.prompt_text(problems[0]))])
    with torch.no_grad(), policy.autocast():
        hidden = policy.hidden_states(ids)
        logits = policy.head(hidden)
        rounded = policy.model.get_output_embeddings()(hidden)
    assert rounded.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert (logits - rounded).abs().max() > 1e-2
    apart = []
    for head in (policy.head, lambda hidden: policy.model.get_output_embeddings()(hidden)):
        policy.head = head
        samples = common.generate(policy, problems, samples=2, max_new_tokens=32)
        with torch.no_grad():
            again = common.response_logprobs(
                policy, [(s.prompt, s.tokens.tolist()) for s in samples]
            )
        said = torch.from_numpy(np.concatenate([s.logprobs for s in samples]))
        apart.append((again - said).square().mean().sqrt().item())
    assert apart[0] < 0.8 * apart[1], "rounded logits agree less with training"
    del policy.head
    common.response_logprobs(policy, examples).sum().backward()
    assert policy.model.get_output_embeddings().weight.grad.dtype == torch.float32


_GROUPED = dict(num_key_value_heads=2, **SMALL)
_HEADS = dict(head_dim=8, **_GROUPED)
_WINDOW = dict(sliding_window=8, **_GROUPED)
_KINDS = dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"])
# More families, in addition to ARCHITECTURES.
FAST = {
    "Cohere2": [_WINDOW | _KINDS],
    "Gemma": [_HEADS | {"tie_word_embeddings": False}],
    "Gemma4Text": [
        dict(
            sliding_window=8, final_logit_softcapping=3.0, vocab_size_per_layer_input=400,
            hidden_size_per_layer_input=8, **_HEADS,
        ),
        # Layers that use the keys of other layers, keys as values, heads of two widths.
        dict(
            sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2, vocab_size_per_layer_input=400, hidden_size_per_layer_input=8,
            **_HEADS | {"num_hidden_layers": 4},
        ),
        dict(
            sliding_window=8, global_head_dim=16, num_global_key_value_heads=1,
            attention_k_eq_v=True, hidden_size_per_layer_input=0, **_HEADS | _KINDS,
        ),
    ],
    "Glm4": [_HEADS],
    "Granite": [
        dict(attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=3.0, **_GROUPED)
    ],
    "Mixtral": [dict(num_local_experts=2, **_GROUPED), dict(num_local_experts=4, **_WINDOW)],
    "NanoChat": [_GROUPED],
    "Olmo2": [_GROUPED],
    "OPT": [dict(ffn_dim=64, word_embed_proj_dim=width, **SMALL) for width in (32, 16)],
    "Phi3": [_GROUPED, _WINDOW],
    "Qwen2": [_GROUPED, dict(use_sliding_window=True, **_WINDOW | _KINDS)],
    "SmolLM3": [_GROUPED, dict(use_sliding_window=True, **_WINDOW | _KINDS)],
    "Starcoder2": [_GROUPED, _WINDOW],
}  # fmt: skip


def test_every_family_of_the_engine_is_tested():
    configs = [config_of(385) for config_of in ARCHITECTURES.values()]
    configs += [getattr(transformers, f"{name}Config")(**FAST[name][0]) for name in FAST]
    assert {config.model_type for config in configs} == engine.FAMILIES


@pytest.mark.parametrize("name", FAST)
def test_more_families_sample_with_the_engine(name, tmp_path):
    """Greedy output equals `model.generate`, with windows shorter than the text.

    Log-probabilities equal the ones of training.
    """
    config = getattr(transformers, f"{name}Config")
    for i, variant in enumerate(FAST[name]):
        folder = tmp_path / str(i)
        scale = 2.0 if name == "Gemma" else 8.0
        write_model(lambda v, variant=variant: config(vocab_size=v, **variant), folder, scale)
        policy = common.Policy(str(folder), "cpu", "float32")
        if name == "Gemma4Text" and not takes_engine(policy):
            pytest.skip("Gemma 4 samples with engine/ from transformers 5.24 on")
        assert takes_engine(policy) and policy.model.config.model_type in engine.FAMILIES
        with plain_loop(policy):
            expected = reference_greedy(policy, PROBLEMS, 48)
        assert len({tuple(tokens) for tokens in expected}) > 3
        assert len(set(sum(expected, []))) > 10, "a text with few tokens hides incorrect ones"
        for batch_size in (1, 3, 64):
            how = dict(temperature=0, max_new_tokens=48, batch_size=batch_size)
            assert ids_of(common.generate(policy, PROBLEMS, **how)) == expected, batch_size
        samples = common.generate(policy, PROBLEMS, samples=2, max_new_tokens=12, batch_size=4)
        examples = [(s.prompt, s.tokens.tolist()) for s in samples]
        with torch.no_grad():
            again = common.response_logprobs(policy, examples)
        said = torch.from_numpy(np.concatenate([s.logprobs for s in samples]))
        torch.testing.assert_close(said, again, atol=1e-3, rtol=1e-3)


# Attention with capped scores, with sinks or with its own biases. States instead of keys. Both.
PLAIN = {
    "Gemma2": dict(sliding_window=8, attn_logit_softcapping=5.0, **_HEADS),
    "GptOss": dict(sliding_window=8, num_local_experts=2, num_experts_per_tok=1, **_HEADS),
    "Bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "Mamba": dict(hidden_size=16, num_hidden_layers=2, state_size=4),
    "Qwen3_5Text": dict(
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **_HEADS | {"num_hidden_layers": 4},
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_that_the_engine_does_not_support_uses_its_own_cache(
    name, tmp_path, monkeypatch, capsys
):
    """The samples equal samples without a cache. The batch size does not matter.

    The log-probabilities equal training. Greedy samples equal `model.generate`. Rows end after 2 to
    24 tokens, so some are dropped before the last step.
    """
    config = getattr(transformers, f"{name}Config")
    write_model(
        lambda v: config(vocab_size=v, **PLAIN[name]),
        tmp_path,
        scale=1.0 if name == "Mamba" else 4.0,
    )
    policy = common.Policy(str(tmp_path), "cpu")
    assert not takes_engine(policy)
    # One of seven tokens ends a sample.
    policy.eos_ids += range(20, 60)
    how = dict(samples=5, temperature=1.0, max_new_tokens=24)
    batches, decode_batch = [], common.decode_batch
    monkeypatch.setattr(
        common, "decode_batch", lambda *a, **k: batches.append(1) or decode_batch(*a, **k)
    )
    reordered, reorder_cache = [], transformers.Cache.reorder_cache
    monkeypatch.setattr(
        transformers.Cache,
        "reorder_cache",
        lambda cache, rows: reordered.append(len(rows)) or reorder_cache(cache, rows),
    )
    samples = common.generate(policy, PROBLEMS, batch_size=8, **how)
    assert "sampling uses the plain loop" in capsys.readouterr().err
    assert len(reordered) > len(batches) > 1, "no ended sequence was dropped"
    assert len({len(s.tokens) for s in samples}) > 3
    for array in (each for s in samples for each in (s.tokens, s.logprobs)):
        # The memory of a tensor, or of the array that the sample is a row of.
        whole = array if array.base is None else array.base
        held = whole.untyped_storage().nbytes() if isinstance(whole, torch.Tensor) else whole.nbytes
        assert held == array.nbytes, "a sample keeps the memory of its batch"
    with torch.no_grad():
        again = common.response_logprobs(policy, [(s.prompt, s.tokens.tolist()) for s in samples])
    said = torch.from_numpy(np.concatenate([s.logprobs for s in samples]))
    torch.testing.assert_close(said, again, atol=1e-3, rtol=1e-3)
    # Without a cache, one pass gives all tokens of a sample.
    for s in samples:
        ids = torch.tensor([[*s.prompt, *s.tokens.tolist()[:-1]]])
        uniforms = np.random.default_rng([0, zlib.crc32(s.problem.id.encode()), s.number])
        uniforms = torch.from_numpy(uniforms.random(24, np.float32)[: len(s.tokens)])
        with torch.no_grad():
            hidden = policy.hidden_states(ids)[0, len(s.prompt) - 1 :]
            tokens, _ = common.pick_tokens(policy, 1.0, hidden, uniforms)
        assert tokens.tolist() == s.tokens.tolist()
    for batch_size in (2, 64):
        other = common.generate(policy, PROBLEMS, batch_size=batch_size, **how)
        assert ids_of(other) == ids_of(samples)
    greedy = common.generate(policy, PROBLEMS, temperature=0, max_new_tokens=6)
    assert ids_of(greedy) == reference_greedy(policy, PROBLEMS, 6)


def test_one_long_prompt_does_not_slow_down_the_others(tiny, monkeypatch):
    """The plain loop makes no more steps than the samples have tokens."""
    problems = [*PROBLEMS[:4], dataclasses.replace(PROBLEMS[0], id="long", question="many " * 200)]
    steps, head = [], tiny.head
    monkeypatch.setattr(tiny, "head", lambda hidden: steps.append(len(hidden)) or head(hidden))
    with plain_loop(tiny):
        samples = common.generate(tiny, problems, samples=2, max_new_tokens=10, batch_size=64)
    assert len(samples) == 10 and len(steps) < 60 and sum(steps) < 400


def test_sampling_refuses_a_model_without_a_cache(tmp_path):
    write_model(
        lambda v: transformers.OpenAIGPTConfig(vocab_size=v, n_embd=16, n_layer=2, n_head=2),
        tmp_path,
    )
    policy = common.Policy(str(tmp_path), "cpu")
    assert not takes_engine(policy)
    with pytest.raises(runtime.UserError, match="no cache of keys and values"):
        common.generate(policy, PROBLEMS[:3], temperature=0, max_new_tokens=6, batch_size=2)


def test_out_of_memory_halves_the_batch_and_loses_no_sample(tiny, monkeypatch, capsys):
    """A fake allocator fails for more than 12 rows, after some of the samples have finished."""
    problems = common.load_problems("arithmetic", "dev", 6)
    how = dict(samples=8, max_new_tokens=96)
    expected = common.generate(tiny, problems, batch_size=48, **how)
    attend, calls, delivered = engine.kernel.attend, [], []

    def limited(query, keys, values, bias):
        calls.append(len(query))
        if len(query) > 40 and len(calls) > 100:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return attend(query, keys, values, bias)

    monkeypatch.setattr(engine.kernel, "attend", limited)
    monkeypatch.setattr(tiny, "max_batch_size", tiny.max_batch_size)
    monkeypatch.setattr(
        tiny, "decode", lambda ids: delivered.append(1) or common.Policy.decode(tiny, ids)
    )
    got = common.generate(tiny, problems, batch_size=48, **how)
    assert ids_of(got) == ids_of(expected)
    assert "going on with 24" in capsys.readouterr().err
    assert len(delivered) == 48, "no finished sample is sampled again"
    fits, decode, asked = tiny.max_batch_size, engine.generate_tokens, []

    def watched(model, batch_size, **request):
        asked.append(batch_size)
        return decode(model, batch_size, **request)

    monkeypatch.setattr(engine, "generate_tokens", watched)
    common.generate(tiny, problems[:1], batch_size=48, samples=48, max_new_tokens=4)
    assert asked == [fits] and fits < 48, "a batch size that did not fit is not tried again"


def test_out_of_memory_in_the_plain_loop_halves_the_batch(tiny, monkeypatch, capsys):
    """The model fails for more than 12 rows after some samples have finished."""
    problems = common.load_problems("arithmetic", "dev", 6)
    how = dict(samples=8, max_new_tokens=96, batch_size=48)
    delivered, model = [], tiny.model.base_model
    forward = model.forward

    def limited(*args, **kwargs):
        if len(kwargs["input_ids"]) > 12 and delivered:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny, "max_batch_size", tiny.max_batch_size)
    with plain_loop(tiny):
        expected = ids_of(common.generate(tiny, problems, **how))
        monkeypatch.setattr(model, "forward", limited)
        monkeypatch.setattr(
            tiny, "decode", lambda ids: delivered.append(1) or common.Policy.decode(tiny, ids)
        )
        assert ids_of(common.generate(tiny, problems, **how)) == expected
    assert len(delivered) == 48, "no finished sample is sampled again"
    assert 1 <= tiny.max_batch_size <= 24
    assert f"going on with {tiny.max_batch_size}" in capsys.readouterr().err


def test_finished_samples_are_kept_if_the_next_prompts_do_not_fit(tiny, monkeypatch):
    """Finished samples are emitted during the next step. Here the next step fails."""
    problems, ended, delivered, kept = common.load_problems("arithmetic", "dev", 12), [], [], []
    how = dict(samples=4, max_new_tokens=96, batch_size=16)
    expected = ids_of(common.generate(tiny, problems, **how))
    give_back, keep_prompts, warn = (
        engine.cache.Pool.give_back,
        engine.cache.PagedCache.keep_prompts,
        common.warn,
    )

    def counting(self, numbers):
        # Count pages only. The other pool has prompts.
        ended.extend([1] * (self.layers[0][1].shape[-1] == engine.cache.PAGE))
        give_back(self, numbers)

    def refusing(self):
        kept.append(1)
        if len(kept) == 2:
            raise MemoryError("cannot allocate memory")
        return keep_prompts(self)

    monkeypatch.setattr(engine.cache.Pool, "give_back", counting)
    monkeypatch.setattr(engine.cache.PagedCache, "keep_prompts", refusing)
    monkeypatch.setattr(tiny, "max_batch_size", tiny.max_batch_size)
    monkeypatch.setattr(
        tiny, "decode", lambda ids: delivered.append(1) or common.Policy.decode(tiny, ids)
    )
    at_the_warning = []
    monkeypatch.setattr(
        common,
        "warn",
        lambda *what, **how: (
            at_the_warning.append((len(ended), len(delivered))) or warn(*what, **how)
        ),
    )
    assert ids_of(common.generate(tiny, problems, **how)) == expected
    assert at_the_warning[0][0] == at_the_warning[0][1] > 0


def test_sampling_works_under_a_real_memory_limit(tmp_path):
    """The address space of a process is limited to a little more than its size.

    Then it samples 4,096 rows from a model with wide keys.
    """
    script = f"""
import resource, sys
sys.path.insert(0, {str(common.__file__)!r}.rsplit("/", 1)[0])
import torch, transformers, common, runtime
torch.set_num_threads(1)
tokenizer = transformers.AutoTokenizer.from_pretrained(runtime.model_folder("tiny"))
config = transformers.LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=16, head_dim=64, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
transformers.LlamaForCausalLM(config).save_pretrained({str(tmp_path)!r})
tokenizer.save_pretrained({str(tmp_path)!r})
policy = common.Policy({str(tmp_path)!r}, "cpu")
problems = common.load_problems("arithmetic", "dev", 2)
common.generate(policy, problems, samples=8, max_new_tokens=2)
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
samples = common.generate(policy, problems, samples=2048, max_new_tokens=2, batch_size=4096)
print(len(samples), len({{s.number for s in samples}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["4096", "2048"], done.stderr[-2000:]
    assert "going on with 2048" in done.stderr


def test_memory_does_not_grow_with_the_number_of_samples(tiny):
    """A pending sample needs no memory. A finished one keeps token ids, log-probabilities and text.

    From 500 to 2,000 samples of two tokens, this is about one kilobyte per sample.
    """
    problems = common.load_problems("arithmetic", "dev", 2)
    peaks = []
    for samples in (250, 1000):
        tracemalloc.start()
        common.generate(tiny, problems, samples=samples, max_new_tokens=2, batch_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1500 < 1200


def test_a_step_computes_few_unused_pages_and_prompts(tiny, monkeypatch):
    """When the last samples run, their pages and prompts are moved together.

    Otherwise the last row would be as expensive as all rows.
    """
    seen, begin = [], engine.cache.PagedCache.begin_step

    def watching(self, ages, starts, view):
        used = len(np.unique(view.table[view.table > 0]))
        seen.append((used, len(view.own_row), len(view.grid)))
        begin(self, ages, starts, view)

    monkeypatch.setattr(engine.cache.PagedCache, "begin_step", watching)
    how = dict(samples=8, max_new_tokens=100, seed=2)
    samples = common.generate(
        tiny, common.load_problems("arithmetic", "dev", 24), batch_size=192, **how
    )
    assert all(own <= 1.25 * (used + 1) + 4 for used, own, _ in seen)
    assert max(own for _, own, _ in seen) > 150 and seen[-1][1] < 30 and seen[-1][2] < 16
    monkeypatch.setattr(engine.cache.Pool, "compact", lambda *_: None)
    assert ids_of(samples) == ids_of(
        common.generate(tiny, common.load_problems("arithmetic", "dev", 24), batch_size=192, **how)
    )


def test_packed_weights_give_the_same_logits_and_are_packed_again_after_a_change(tiny):
    """Afterwards the layers are unpacked again."""
    model, ids = tiny.model, torch.arange(5, 25)[None]
    layer = model.base_model.layers[0].mlp.up_proj
    with torch.no_grad():
        for _ in range(2):
            plain = model(ids).logits
            with engine.graphs.packed_weights(tiny.model):
                assert "forward" in vars(layer)
                torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
            assert "forward" not in vars(layer)
            layer.weight.mul_(1.5)
        layer.weight.div_(1.5**2)


def test_a_family_with_its_own_attention_keeps_it(tmp_path):
    """The position biases of BLOOM are not part of the attention interface.

    With this interface every token would see the tokens after it. But a later token must not change
    the log-probability of an earlier one.
    """
    write_model(
        lambda v: transformers.BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4),
        tmp_path,
    )
    policy = common.Policy(str(tmp_path), "cpu")
    one, other = (common.response_logprobs(policy, [([3, 4, 5], [6, 7, last])]) for last in (8, 99))
    torch.testing.assert_close(one[:2], other[:2])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, plain(ids).logits)
    samples = common.generate(policy, PROBLEMS, samples=1, temperature=0, max_new_tokens=6)
    assert ids_of(samples) == reference_greedy(policy, PROBLEMS, 6)


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    write_model(lambda v: transformers.BertConfig(vocab_size=v, **SMALL), tmp_path)
    with pytest.raises(runtime.UserError, match="not a causal language model"):
        common.Policy(str(tmp_path))


def test_every_end_of_text_token_of_a_chat_model_ends_a_sample(nano, tmp_path):
    """The generation settings have a list of end tokens. One of them is beyond the vocabulary.

    It cannot be sampled, and it causes no error.
    """
    policy = common.Policy(nano, device="cpu")
    greedy = common.generate(policy, PROBLEMS[:1], temperature=0, max_new_tokens=8)[
        0
    ].tokens.tolist()
    policy.model.generation_config.eos_token_id = [
        *policy.eos_ids,
        greedy[2],
        policy.vocabulary + 9,
    ]
    policy.model.save_pretrained(tmp_path)
    # A stop has to be a special token of the tokenizer.
    token = policy.tokenizer.convert_ids_to_tokens(greedy[2])
    policy.tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    policy.tokenizer.save_pretrained(tmp_path)
    again = common.Policy(str(tmp_path), device="cpu")
    assert again.eos_ids == sorted({*policy.eos_ids, greedy[2]})
    (sample,) = common.generate(again, PROBLEMS[:1], temperature=0, max_new_tokens=8)
    assert sample.finished and sample.tokens.tolist() == greedy[: greedy.index(greedy[2]) + 1]


def test_frozen_weights_are_cast_as_rarely_as_trained_weights(nano):
    """Under autocast, as on a GPU, a weight is cast once and not once per token."""

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default and isinstance(
                args[0], torch.nn.Parameter
            )
            return function(*args, **(kwargs or {}))

    policy, counts = common.Policy(nano, device="cpu", dtype="bfloat16"), []
    for frozen in (False, True):
        policy.model.requires_grad_(not frozen)
        with Casts() as casts:
            common.generate(policy, PROBLEMS, max_new_tokens=12)
        counts.append(casts.count)
        assert all(weight.requires_grad != frozen for weight in policy.model.parameters())
    # The head is float32.
    n_linear = sum(isinstance(module, torch.nn.Linear) for module in policy.model.modules()) - 1
    assert n_linear <= counts[1] <= counts[0] + n_linear


def test_each_problem_has_its_own_uniforms(tmp_path_factory):
    """Two problems may have the same text, for example prefixes in rcrl.py.

    With shared uniforms the k-th sample of both would be the same.
    """
    policy = random_policy("llama", tmp_path_factory)
    twins = [common.Problem(name, "How many?", 1) for name in "ab"]
    samples = common.generate(policy, twins, samples=4, max_new_tokens=20)
    assert len({tuple(ids) for ids in ids_of(samples)}) == 8
