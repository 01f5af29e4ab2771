"""Decode fast. Optional: `common.generate` works without this folder.

decode.py   The loop over the steps of a batch.
cache.py    The keys and values, in prompt slots and pages.
kernel.py   The attention that reads them, with PyTorch or as one GPU kernel.
graphs.py   CUDA graphs, packed weights and fused norms.
"""

import transformers

from .decode import Output, Request, generate_tokens
from .graphs import fuse_norms

__all__ = ["Output", "Request", "fuse_norms", "generate_tokens", "supports"]

# Families whose greedy output equals `model.generate` in the tests.
FAMILIES = set(
    "cohere2 gemma gemma3_text gemma4_text glm4 gpt2 gpt_neox granite llama mistral mixtral "
    "nanochat olmo2 opt phi3 qwen2 qwen3 smollm3 starcoder2".split()
)


def supports(config) -> bool:
    """Return whether `generate_tokens` decodes models of this config correctly."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    plain = kinds <= {"full_attention", "sliding_attention"}
    # Gemma 4 shares its keys between layers. This works from transformers 5.24 on.
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    known = config.model_type in FAMILIES
    return known and plain and (config.model_type != "gemma4_text" or version >= (5, 24))
