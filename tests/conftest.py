"""Fixtures that every test may use: tiny random checkpoints, as Hugging Face itself saves them."""

import os
from collections.abc import Callable
from pathlib import Path

# Threads that spin at barriers make a busy machine many times slower: loading int4 took 45 s instead of 5 s on two
# cores under load 6. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tempfile

# Hashes of checkpoints are remembered in the user's cache, which is no place for a test's; subprocesses inherit this.
os.environ["DEJAVU_CACHE"] = tempfile.mkdtemp(prefix="dejavu-tests-")

import pytest
import torch
import transformers

# Odd sizes on purpose: nothing may depend on multiples of a vector's width.
TINY = {
    "opt": {"vocab_size": 101, "hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 50, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": 64},
    "llama": {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2,
              "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64, "hidden_act": "relu"},
}  # fmt: skip


def tiny_model(model_type: str, **overrides) -> transformers.PreTrainedModel:
    """A Hugging Face model of TINY's sizes whose weights are all random, norms and biases too."""
    config = transformers.AutoConfig.for_model(model_type, **TINY[model_type] | overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def make_checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`make_checkpoint(model_type, dtype=..., max_shard_size=..., **config)`: the folder of a saved tiny_model."""

    def make(model_type: str = "opt", *, dtype=torch.float32, max_shard_size: str = "1GB", **overrides) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        tiny_model(model_type, **overrides).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make
