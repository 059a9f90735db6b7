"""Mistral: Llama without biases and with a sliding window. Bamboo and TurboSparse-Mistral are Mistrals with dReLU."""

from __future__ import annotations

from dataclasses import replace

from dejavu.checkpoint.slots import Fields
from dejavu.config import ModelConfig
from dejavu.families import llama
from dejavu.families.llama import EMBEDDINGS, PREFIXES, slots

__all__ = ["EMBEDDINGS", "IGNORED", "PREFIXES", "parse", "slots"]

# TurboSparse ships a predictor beside each MLP; ours are made by `fit`.
IGNORED = (*llama.IGNORED, r"\.mlp\.predictor\.")


def parse(config: dict) -> ModelConfig:
    """Build the decoder's configuration from a Mistral or Bamboo config.json."""
    config = {"sliding_window": 4096, **config, "attention_bias": False, "mlp_bias": False}
    return replace(
        llama.parse(config),
        sliding_window=Fields(config).optional_int("sliding_window"),
        activate_up=config["model_type"] == "bamboo",
    )
