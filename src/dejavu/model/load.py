"""Loads a checkpoint of any supported family into the kernel layout."""

from __future__ import annotations

from types import ModuleType

import torch

from dejavu.checkpoint.layout import Weights, allocate
from dejavu.checkpoint.load import Progress, fill, match, stored_dtype
from dejavu.checkpoint.source import Checkpoint
from dejavu.config import ModelConfig
from dejavu.device import choose_dtype
from dejavu.model import family


def load_weights(
    checkpoint: Checkpoint,
    *,
    ops: ModuleType,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[ModelConfig, Weights]:
    """Read a model's weights; peak memory stays under 1.15 times their size.

    Args:
        ops: the kernel backend, whose `empty` allocates on `device`.
        dtype: of the matrices: "fp32", "bf16", "fp16", or "auto" (device.choose_dtype). Norms and biases are
            float32 always.
        progress: called with (bytes done, bytes in all) as tensors are read.
    Raises: CheckpointError for an unsupported or damaged checkpoint, before memory is taken; ConfigError and
        KernelUnavailable for a dtype that does not exist or cannot run here.
    """
    module = family(checkpoint.config.get("model_type"))
    config = module.parse(checkpoint.config)

    # The shapes are checked against a layout without memory, so a wrong config.json costs nothing.
    plan = allocate(config, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
    tied = (r"^lm_head\.weight$",) if plan.head is plan.embed else ()
    names = match(
        checkpoint, module.slots(config, plan), prefixes=module.PREFIXES, ignored=(*module.IGNORED, *tied)
    )
    weights = allocate(config, choose_dtype(dtype, stored_dtype(checkpoint, names), device), ops.empty)
    fill(checkpoint, module.slots(config, weights), names, progress)
    return config, weights
