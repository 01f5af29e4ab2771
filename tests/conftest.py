import os
import sys
from pathlib import Path

# If several processes use all cores, each of them is many times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
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
    """Start with the tests that start programs. They take the longest."""
    slow = ("test_processes.py", "test_scripts.py", "test_fork.py")
    items.sort(key=lambda item: item.path.name not in slow)


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> str:
    """Return a folder with a random Llama of 30,000 parameters and the tokenizer of tiny/.

    Every script runs with it, but learns nothing.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("nano")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny() -> "common.Policy":
    return common.Policy("tiny", device="cpu")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder with GSM8K and SVAMP, laid out as on the hub. $DATA_FOLDER may name it."""
    folder = Path(os.environ.get("DATA_FOLDER", ROOT.parent / "shared" / "data"))
    if not (folder / "openai" / "gsm8k").is_dir():
        pytest.skip(f"GSM8K and SVAMP are not in {folder} (set DATA_FOLDER to their folder)")
    return folder


def train_step(policy, optimizer, examples, lr: float, token_budget: int) -> tuple[float, float]:
    """Make one step of supervised fine-tuning. Return the loss and the norm of the gradient."""
    optimizer.param_groups[0]["lr"] = lr
    return sft.train_step(policy, optimizer, examples, token_budget)
