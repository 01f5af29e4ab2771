import os
import sys
from pathlib import Path

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several processes with all cores each run many times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import sft  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def pytest_collection_modifyitems(items) -> None:
    """Those that start programs take longest: they come first, so that no worker ends alone with one of them."""
    items.sort(key=lambda item: item.path.name not in ("test_processes.py", "test_scripts.py"))


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> str:
    """A folder with a random Llama of 30,000 parameters and the tokenizer of tiny/: everything runs, nothing is learned."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("nano")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny() -> "common.Policy":
    return common.Policy("tiny", device="cpu")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder that holds GSM8K and SVAMP in the layout of the hub, beside the repository or in $DATA_FOLDER."""
    folder = Path(os.environ.get("DATA_FOLDER", ROOT.parent / "shared" / "data"))
    if not (folder / "openai" / "gsm8k").is_dir():
        pytest.skip(f"GSM8K and SVAMP are not in {folder} (set DATA_FOLDER to their folder)")
    return folder


def train_step(policy, optimizer, examples, lr: float, token_budget: int) -> tuple[float, float]:
    """One step of supervised fine-tuning: the loss and the norm of the gradient."""
    optimizer.param_groups[0]["lr"] = lr
    return sft.train_step(policy, optimizer, examples, token_budget)
