"""One file a family: what its config.json says and where its tensors go; no family adds code to the decoder.

To add a family: write a file with `parse(config) -> ModelConfig`, `slots(config, weights) -> dict[str, Slot]`,
PREFIXES (what may stand before a tensor's name), EMBEDDINGS (their tensor's name without it) and IGNORED (patterns
of tensors that are not read), and add its row here.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from dejavu.config import ModelConfig
from dejavu.errors import CheckpointError

# HF model_type -> module of this package
FAMILIES = {
    "opt": "opt",
    "llama": "llama",
    "sparsellama": "llama",
    "mistral": "mistral",
    "bamboo": "mistral",
    "gpt2": "gpt2",
}


def family(model_type: str | None) -> ModuleType:
    """The family module of an HF model_type.

    Raises: CheckpointError naming the supported types.
    """
    if str(model_type) not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return import_module(f"dejavu.families.{FAMILIES[model_type]}")


def parse(config: dict[str, Any]) -> ModelConfig:
    """The decoder's configuration of a config.json.

    Raises: CheckpointError for an unsupported model_type or field, and for weights that another tool has quantised.
    """
    elsewhere = config.get("quantization_config")
    if elsewhere is not None:
        found = elsewhere if isinstance(elsewhere, dict) else {}
        bits = next((f"bitsandbytes, {b} bits" for b in (4, 8) if found.get(f"load_in_{b}bit")), None)
        method = found.get("quant_method") or bits or "an unknown method"
        raise CheckpointError(
            f"config.json: the weights are quantised already, by {method} (quantization_config), which is not "
            "supported; take the checkpoint that they were made from, and quantise it here: weights int8 or int4"
        )
    return family(config.get("model_type")).parse(config)
