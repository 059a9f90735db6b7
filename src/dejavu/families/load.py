"""Loads a checkpoint of any supported family into the kernel layout."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType

import torch

from dejavu.checkpoint.layout import Quantization, Weights, allocate, require_weight_memory
from dejavu.checkpoint.load import fill, match, stored_dtype
from dejavu.checkpoint.saved import saved_settings, saved_slots
from dejavu.checkpoint.source import BYTES, DTYPE_NAMES, Checkpoint
from dejavu.config import ModelConfig
from dejavu.device import choose_dtype, warn_once
from dejavu.errors import CheckpointError, ConfigError
from dejavu.families import family, parse
from dejavu.kernels.base import Backend
from dejavu.progress import Progress, silent

# The output matrix, by its name in every family.
HEAD = "lm_head.weight"


def plan_weights(
    checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "cpu", quantization: Quantization | None = None
) -> tuple[ModelConfig, Weights, dict[str, str]]:
    """Check a model from config.json and the tensors' headers, and lay its weights out without memory.

    Returns: the configuration, the weights on the meta device, and tensor name -> slot name.
    Raises: as load_weights does.
    """
    config = parse(checkpoint.config)
    module = family(config.model_type)
    if config.num_hidden_layers > len(checkpoint.headers):
        raise CheckpointError(
            f"{checkpoint.path}: config.json says {config.num_hidden_layers} layers, but there are only "
            f"{len(checkpoint.headers)} tensors; the two do not belong together"
        )
    saved = saved_settings(checkpoint)
    if saved is not None:
        if quantization is not None:
            raise ConfigError(f"{checkpoint.path}: is quantised already ({saved[0].weights.name}); ask for no format")
        dtype = choose_dtype(dtype, saved[1], device)
        if "head" in checkpoint.headers:  # though config.json says that it is the embeddings
            config = replace(config, tie_word_embeddings=False)
        plan = allocate(config, dtype, _no_memory, saved[0])
        slots = saved_slots(plan)
        names = match(checkpoint, slots, dtypes=(*DTYPE_NAMES.values(), BYTES))
        for name, slot in slots.items():
            if (checkpoint.headers[name].dtype == BYTES) != (slot.view.dtype == torch.uint8):
                raise CheckpointError(f"{checkpoint.headers[name].file}: {name} has the wrong dtype; quantise it again")
        return config, plan, names
    if config.tie_word_embeddings and _head_differs(checkpoint, module):
        warn_once(
            f"{checkpoint.path}: config.json ties the LM head to the embeddings, but {HEAD} has values of its own; "
            "they are used"
        )
        config = replace(config, tie_word_embeddings=False)
    slots = module.slots(config, allocate(config, torch.float32, _no_memory))
    alone = config.tie_word_embeddings and HEAD in checkpoint.headers and not _embeddings(checkpoint, module)
    names = match(
        checkpoint,
        slots,
        prefixes=module.PREFIXES,
        ignored=(*module.IGNORED, rf"^{re.escape(HEAD)}$") if not alone else module.IGNORED,
        renamed={HEAD: module.EMBEDDINGS} if alone else {},
    )
    dtype = choose_dtype(dtype, stored_dtype(checkpoint, names), device)
    return config, allocate(config, dtype, _no_memory, quantization), names


def load_weights(
    checkpoint: Checkpoint,
    *,
    ops: Backend,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    progress: Progress = silent,
) -> tuple[ModelConfig, Weights]:
    """Read a model's weights; peak memory stays under 1.15 times their size, or
    quantised, their size and one matrix.

    Args:
        ops: the backend, on whose device the weights lie.
        dtype: of the matrices: "fp32", "bf16", "fp16", or "auto" (device.choose_dtype). Norms and biases are
            float32 always.
        quantization: quantise the matrices as they are read; None: not.
        progress: in bytes, told as tensors are read.
    Raises: CheckpointError for an unsupported or damaged checkpoint, and CapacityError for one larger than the free
        memory, before memory is taken; ConfigError and KernelUnavailable for a dtype that does not exist or cannot run.
    """
    config, plan, names = plan_weights(checkpoint, dtype=dtype, device=ops.device.type, quantization=quantization)
    require_weight_memory(config, plan.dtype, plan.quantization, ops.device, checkpoint.name)
    weights = allocate(config, plan.dtype, ops.empty, plan.quantization)
    saved = saved_settings(checkpoint) is not None
    slots = saved_slots(weights) if saved else family(config.model_type).slots(config, weights)
    fill(checkpoint, slots, names, progress)
    return config, weights


def _embeddings(checkpoint: Checkpoint, module: ModuleType) -> str | None:
    """The name of the embeddings' tensor, if it is there."""
    return next((p + module.EMBEDDINGS for p in module.PREFIXES if p + module.EMBEDDINGS in checkpoint.headers), None)


def _head_differs(checkpoint: Checkpoint, module: ModuleType) -> bool:
    """Whether the file holds an LM head other than the embeddings; reads both up to the first difference."""
    embeddings, headers = _embeddings(checkpoint, module), checkpoint.headers
    if embeddings is None or HEAD not in headers:
        return False
    if headers[embeddings].shape != headers[HEAD].shape:
        return True
    pieces = zip(checkpoint.tensors({embeddings: 1}), checkpoint.tensors({HEAD: 1}), strict=True)
    return any(not torch.equal(ours, theirs) for (_, _, ours), (_, _, theirs) in pieces)


def _no_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device="meta")
    except (RuntimeError, TypeError) as error:  # negative, or past 64 bits
        raise CheckpointError(
            f"config.json: its sizes ask for a tensor of shape {shape}, which cannot exist"
        ) from error
