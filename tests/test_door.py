"""Model folders and files that do not fit the scripts are refused before anything is written."""

import json
import os
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_scripts import FORKS, KILLED, cli, contents, resumed, run_in_process  # noqa: F401
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
import evaluate
import expert_iteration
import ppo
import rcrl
import reward_model
import runtime
import sft

SAME = [
    {"question": f"What is 2+2, number {i}?", "answer": "2+2=<<2+2=4>>4\n#### 4"} for i in range(60)
]
SHORT = "--limit-eval 4 --max-new-tokens 12 --device cpu".split()
SCRIPTS = [sft, expert_iteration, ppo, rcrl, reward_model, evaluate]


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(cli, script, folder: Path, tmp_path: Path, *more) -> str:  # noqa: F811
    """Run a script on a model folder. Return the line of the error that refuses the folder."""
    data = write_rows(tmp_path / "same.jsonl", SAME)
    out = tmp_path / "out" / ("report.json" if script is evaluate else "")
    code, message = cli(script, *SHORT, "--model", folder, "--dataset", data, "--out", out, *more)
    lines = [line for line in message.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(lines) == 1, message
    assert not (tmp_path / "out").exists()
    return lines[0]


def copy_of(nano: str, folder: Path, weights=None, **settings) -> Path:
    """Copy a model folder with other settings. `weights` changes the weights of the copy."""
    folder.mkdir()
    for file in Path(nano).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    if weights:
        tensors = load_file(folder / "model.safetensors")
        save_file(weights(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def model_for(tokenizer, folder: Path, size: int | None = None, **settings) -> Path:
    """Save a small random model with this tokenizer."""
    config = LlamaConfig(
        vocab_size=size or len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        **{"eos_token_id": tokenizer.eos_token_id} | settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def characters(text: str, **special) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters. Other characters become <unk>."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *dict.fromkeys(text)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    tokenizer.decoder = decoders.Fuse()
    how = {"unk_token": "<unk>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **how)


ALL = "".join(map(chr, range(32, 127))) + "\n"


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_folder_that_lacks_weights_is_refused(script, cli, nano, tmp_path):  # noqa: F811
    def without_last_layer(tensors):
        return {name: t for name, t in tensors.items() if "layers.1." not in name}

    folder = copy_of(nano, tmp_path / "m", without_last_layer)
    message = refused(cli, script, folder, tmp_path)
    assert "lacks 9 weights" in message and "model.layers.1." in message


def test_weights_with_other_names_are_refused(nano, tmp_path):
    def renamed(tensors):
        return {name.replace("self_attn", "attention"): t for name, t in tensors.items()}

    with pytest.raises(runtime.UserError, match="lacks 8 weights of the model.*self_attn"):
        common.Policy(str(copy_of(nano, tmp_path / "m", renamed)), "cpu")


def test_a_missing_head_is_refused_and_a_tied_one_is_not(nano, tmp_path):
    def without_head(tensors):
        return {name: t for name, t in tensors.items() if name != "lm_head.weight"}

    with pytest.raises(runtime.UserError, match="lacks 1 weights.*lm_head.weight"):
        common.Policy(str(copy_of(nano, tmp_path / "m", without_head)), "cpu")
    tied = copy_of(nano, tmp_path / "tied", without_head, tie_word_embeddings=True)
    model = common.Policy(str(tied), "cpu").model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_folder_without_a_head_loads_if_its_head_is_tied(nano, tmp_path):
    def trunk(tensors):
        return {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}

    folder = copy_of(nano, tmp_path / "m", trunk, tie_word_embeddings=True)
    before = load_file(Path(nano) / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(
        common.Policy(str(folder), "cpu").model.model.layers[1].mlp.up_proj.weight, before
    )


def test_code_in_a_model_folder_is_never_run(cli, nano, tmp_path):  # noqa: F811
    folder = copy_of(
        nano, tmp_path / "m", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}
    )
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")
    assert "custom code" in refused(cli, sft, folder, tmp_path)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_of_all_characters_is_accepted(tmp_path):
    policy = common.Policy(str(model_for(characters(ALL), tmp_path / "m")), "cpu")
    assert policy.decode(policy.encode_solution("1+2=3\n#### 3")) == "1+2=3\n#### 3"


@pytest.mark.parametrize("missing", ["#", "\n", "7"])
def test_a_tokenizer_that_cannot_write_solutions_is_refused(missing, cli, tmp_path):  # noqa: F811
    folder = model_for(characters(ALL.replace(missing, "")), tmp_path / "m")
    assert "its tokenizer makes" in refused(cli, sft, folder, tmp_path)


def test_a_tokenizer_that_cannot_write_the_given_solutions_is_refused_before_training(
    cli, tmp_path
):  # noqa: F811
    """A tokenizer without "<" can write answers but not the annotations of these solutions."""
    folder = model_for(characters(ALL.replace("<", "")), tmp_path / "m")
    assert common.Policy(str(folder), "cpu")
    assert "<<2+2=4>>4" in refused(cli, sft, folder, tmp_path)


def test_a_tokenizer_that_splits_the_answer_marker_is_refused(cli, tmp_path):  # noqa: F811
    pieces = ["[UNK]", "[SEP]", *ALL.strip(), *(f"##{c}" for c in ALL.strip())]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
    assert "its tokenizer makes" in refused(cli, sft, model_for(fast, tmp_path / "m"), tmp_path)


@pytest.mark.parametrize("script", [sft, evaluate], ids=lambda script: script.__name__)
def test_a_tokenizer_that_ends_the_text_within_a_solution_is_refused(script, cli, tmp_path):  # noqa: F811
    folder = model_for(characters(ALL, eos_token="#"), tmp_path / "m")
    assert "its tokenizer makes" in refused(cli, script, folder, tmp_path)
    folder = model_for(characters(ALL, eos_token="\n"), tmp_path / "n")
    assert "its tokenizer makes" in refused(cli, script, folder, tmp_path)


@pytest.mark.parametrize("stops", [None, 4, [4, 1], [4, -1, 10**9, True], []])
def test_a_model_ends_a_text_only_with_special_tokens(stops, tmp_path):
    """4 is an ordinary character here. As an end token it would end every solution at once."""
    tokenizer = characters(ALL)
    folder = model_for(tokenizer, tmp_path / "m")
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token_id", None)
    file.write_text(json.dumps(settings | ({} if stops is None else {"eos_token_id": stops})))
    assert common.Policy(str(folder), "cpu").eos_ids == [1]


def test_a_second_special_token_ends_a_text(tmp_path):
    tokenizer = characters(ALL)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    folder = model_for(tokenizer, tmp_path / "m", eos_token_id=[1, turn])
    policy = common.Policy(str(folder), "cpu")
    assert policy.eos_ids == [1, turn]
    assert policy.decode([*policy.encode_prefix("#### 3"), turn]) == "#### 3"


def test_a_model_with_an_ordinary_character_as_its_end_token_learns(cli, tmp_path):  # noqa: F811
    """Without special care its loss is near 0, but it samples "#" as its end and has no answer."""
    torch.manual_seed(0)
    tokenizer = characters(ALL)
    hash_id = tokenizer.convert_tokens_to_ids("#")
    folder = model_for(tokenizer, tmp_path / "m", eos_token_id=hash_id)
    argv = ["--dataset", write_rows(tmp_path / "same.jsonl", SAME), "--model", folder]
    argv += ["--limit-eval", 4, "--max-new-tokens", 40, "--lr", 0.03, "--epochs", 6]
    assert cli(sft, *argv, "--out", tmp_path / "run")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[-1]["maj@1"] == 1 and rows[-1]["no_answer"] == 0


def test_an_answer_marker_that_is_a_single_token_stays_in_the_text(tmp_path):
    tokenizer = characters(ALL)
    tokenizer.add_special_tokens({"extra_special_tokens": ["####"]})
    policy = common.Policy(str(model_for(tokenizer, tmp_path / "m")), "cpu")
    ids = policy.encode_solution("1+2=3\n#### 3")
    assert policy.tokenizer.convert_tokens_to_ids("####") in ids
    assert policy.decode(ids) == "1+2=3\n#### 3"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma"])
def test_a_folder_without_a_tokenizer_is_refused(family, cli, tmp_path):  # noqa: F811
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(vocab_size=300, head_dim=8) | ({"n_embd": 16} if family == "gpt2" else {})
    ends = dict(bos_token_id=None, eos_token_id=1, pad_token_id=None)
    config = AutoConfig.for_model(family, num_key_value_heads=2, **sizes, **ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    assert "tokenizer" in refused(cli, sft, tmp_path / "m", tmp_path).lower()


def test_a_token_without_an_embedding_is_refused(cli, tmp_path):  # noqa: F811
    tokenizer = characters(ALL)
    tokenizer.add_tokens(["number"])
    folder = model_for(tokenizer, tmp_path / "m", size=len(tokenizer) - 1)
    for script in (sft, evaluate, reward_model):
        message = refused(cli, script, folder, tmp_path)
        assert "does not know 1 tokens" in message and "number" in message


def test_a_special_token_without_an_embedding_is_refused_only_where_it_is_used(cli, tmp_path):  # noqa: F811
    """Many folders have an additional padding token. The scripts never look it up."""
    tokenizer = characters(ALL)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    folder = str(model_for(tokenizer, tmp_path / "m", size=len(tokenizer) - 1))
    policy = common.Policy(folder, "cpu")
    problem = common.Problem("a", "How many <pad>?", Fraction(1))
    with pytest.raises(runtime.UserError, match="a token of the tokenizer that the model does not"):
        common.encode_prompts(policy, [problem])


def test_labels_and_end_tokens_are_not_part_of_the_text(nano, tmp_path):
    """The text of a sample has no labels of rcrl.py and no end-of-text token."""
    policy = common.Policy(nano, "cpu")
    rcrl.teach_labels(policy, "step")
    (good,) = policy.encode_prefix(policy.labels["good"])
    (bad,) = policy.encode_prefix(policy.labels["bad"])
    one, two = policy.encode_prefix("1+2=3\n"), policy.encode_solution("#### 3")
    assert policy.decode([good, *one, bad, *two]) == "1+2=3\n#### 3"
    policy.save(tmp_path / "m")
    assert common.Policy(str(tmp_path / "m"), "cpu").decode([bad, *two]) == "#### 3"


# ---- paths and links -----------------------------------------------------------------------------


def test_a_tilde_means_the_home_folder_in_every_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = "--model=~/m --dataset=~/d --out=~/o"
    for script, more in [
        (sft, ""),
        (evaluate, "--orm=~/r"),
        (expert_iteration, "--base=~/b --orm=~/r"),
        (rcrl, "--base=~/b --train-samples ~/x ~/y"),
        (reward_model, "--base=~/b --train-samples ~/x"),
        (ppo, "--reward orm --orm=~/r --select lowest --scores ~/x ~/y"),
    ]:
        args = vars(script.parse_args(f"{flags} {more}".split()))
        values = [
            v for value in args.values() for v in (value if isinstance(value, list) else [value])
        ]
        home = [v for v in values if isinstance(v, str) and v.startswith(str(tmp_path))]
        assert len(home) == f"{flags} {more}".count("~")
        assert not [v for v in values if isinstance(v, str) and "~" in v]


def test_a_run_does_not_replace_the_model_that_it_reads(cli, nano, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    copy_of(nano, tmp_path / "model")
    before = contents(tmp_path)
    code, message = cli(sft, *SHORT, "--model=~/model", "--out=~")
    assert code == 2 and "already holds a run" in message and contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model", "checkpoint", "samples"])
def test_a_part_of_a_run_may_be_a_link(name, cli, nano, tmp_path):  # noqa: F811
    """A linked model is replaced. Checkpoints and samples are written to the target of a link."""
    argv = [*SHORT, "--model", nano, "--batch-size", "12", "--epochs", "2", "--lr", "1e-2"]
    assert cli(sft, *argv, "--out", tmp_path / "plain")[0] == 0
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    copy_of(nano, elsewhere)
    run.mkdir()
    (run / name).symlink_to(elsewhere)
    assert cli(sft, *argv, "--out", run)[0] == 2
    runtime.write_json(
        run / "args.json", json.loads((tmp_path / "plain" / "args.json").read_text())
    )
    assert cli(sft, *argv, "--out", run, "--resume")[0] == 0
    assert cli(sft, *argv, "--out", run, "--resume")[0] == 0
    assert (run / name).is_symlink() == (name != "model")
    weights = [
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (run, tmp_path / "plain")
    ]
    assert weights[0] == weights[1]
    kept = (elsewhere / "model.safetensors").read_bytes()
    assert kept == (Path(nano) / "model.safetensors").read_bytes()


def test_the_error_names_a_link_without_a_target(cli, nano, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "gone")
    code, message = cli(sft, *SHORT, "--model", nano, "--out", tmp_path / "run")
    assert code == 2 and message.count("\n") == 1 and "samples" in message
    assert not (tmp_path / "run" / "args.json").exists()


# ---- Ctrl-C --------------------------------------------------------------------------------------


def run_into_closed_pipe(path: Path, argv: list) -> None:
    """Run `python script.py argv... 2>&1 | tee log` after tee has ended."""
    read, write = os.pipe()
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(read)
    os.close(write)
    run_in_process(path, argv)


@pytest.mark.parametrize("script, state", [
    ("sft", True), ("expert_iteration", False), ("ppo", True), ("rcrl", False), ("reward_model", False)
])  # fmt: skip
def test_ctrl_c_saves_even_if_nobody_reads_the_output(script, state, tmp_path):
    """Interrupt training (state) or sampling. Samples that were written are kept."""
    out = tmp_path / "run"
    argv = [*map(str, resumed(script, out))]
    process = FORKS.Process(target=run_into_closed_pipe, args=(ROOT / f"{script}.py", argv))
    process.start()
    seen = out / "checkpoint" / "state.pt" if state else out / "metrics.jsonl"
    while process.is_alive() and not seen.exists():
        time.sleep(0.002)
    # Wait until the process is ready for Ctrl-C.
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130
    assert (out / "args.json").exists() and not list(out.rglob("*.part"))
    if state:
        assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["run"]["lines"] > 0


def test_a_fork_without_the_reward_model_says_what_to_copy(cli, nano, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(sys.modules, "reward_model", None)
    argv = [*SHORT, "--model", nano, "--reward", "orm", "--orm", nano, "--out", tmp_path / "run"]
    code, message = cli(ppo, *argv)
    assert (
        code == 2
        and "reward_model" in message
        and "copy reward_model.py next to the script" in message
    )
    assert message.count("\n") == 1 and not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_refused_in_one_line(cli, nano, tmp_path):  # noqa: F811
    folder = copy_of(nano, tmp_path / "m", vocab_size=300)
    assert "have another shape" in refused(cli, evaluate, folder, tmp_path)


def test_weights_that_the_settings_leave_out_are_named(nano, tmp_path, capsys):
    common.Policy(str(copy_of(nano, tmp_path / "m", num_hidden_layers=1)), "cpu")
    assert "9 weights are not used" in capsys.readouterr().err


def test_an_empty_path_is_refused(cli, nano, tmp_path):  # noqa: F811
    code, message = cli(sft, *SHORT, "--model", nano, "--out", "")
    assert code == 2 and "--out is empty" in message
