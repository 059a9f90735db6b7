"""One decoder, built from a config; one file a family.

To add a family: write a file with `parse(config) -> ModelConfig`, `slots(config, weights) -> dict[str, Slot]`,
PREFIXES (what may stand before a tensor's name) and IGNORED (patterns of tensors that are not read), and add
its row here.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from dejavu.errors import CheckpointError

# HF model_type -> module of this package
FAMILIES = {
    "opt": "opt",
    "llama": "llama",
    "sparsellama": "llama",
    "mistral": "mistral",
    "bamboo": "mistral",
}


def family(model_type: str | None) -> ModuleType:
    """The family module of an HF model_type.

    Raises: CheckpointError naming the supported types.
    """
    if str(model_type) not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return import_module(f"dejavu.model.{FAMILIES[model_type]}")
