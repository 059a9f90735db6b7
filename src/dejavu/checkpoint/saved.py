"""A saved quantised model: a folder that holds the kernel layout itself, beside its tokenizer.

`config.json` is the base checkpoint's with one key more, `dejavu_quantization`: schema_version, weights (the format's
name), embeddings, dtype (of what is not quantised, and of the cache) and base_hash. `model.safetensors` holds every
tensor of checkpoint.layout.Weights by its place there, such as `layers.0.mlp.rows`; quantised ones are bytes, as
kernels.quantized lays them out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from torch import Tensor

from dejavu.artifacts import check_new as nothing_there
from dejavu.artifacts import write_json, write_tensors
from dejavu.checkpoint.layout import Quantization, Weights
from dejavu.checkpoint.slots import Slot
from dejavu.checkpoint.source import CONFIG, SMALL_FILES, WEIGHT_FILES, Checkpoint
from dejavu.errors import CheckpointError, ConfigError
from dejavu.kernels.quantized import Quantized, RowFormat

KEY = "dejavu_quantization"
SCHEMA_VERSION = 1


def saved_settings(checkpoint: Checkpoint) -> tuple[Quantization, str] | None:
    """Quantization and dtype of a saved quantised model; None for an ordinary checkpoint.

    Raises: CheckpointError where the key is not what `save_quantized` writes.
    """
    saved = checkpoint.config.get(KEY)
    if saved is None:
        return None
    file = checkpoint.path / CONFIG
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION:
        found = saved.get("schema_version") if isinstance(saved, dict) else saved
        raise CheckpointError(f"{file}: {KEY} must have schema_version {SCHEMA_VERSION}, found {found!r}")
    kinds = {"weights": str, "embeddings": bool, "dtype": str, "base_hash": str}
    if bad := [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]:
        raise CheckpointError(f"{file}: {KEY}: {bad[0]} is missing or wrong; quantise the model again")
    try:
        return Quantization(RowFormat.parse(saved["weights"]), saved["embeddings"]), saved["dtype"]
    except ConfigError as error:
        raise CheckpointError(f"{file}: {KEY}: {error}") from error


def hashes(checkpoint: Checkpoint) -> Iterator[str]:
    """The hashes of weights for which a pack may have been made: those that this was quantised from, and its own.

    Raises: CheckpointError as saved_settings does.
    """
    if saved_settings(checkpoint) is not None:
        yield checkpoint.config[KEY]["base_hash"]
    yield checkpoint.hash


def saved_slots(weights: Weights) -> dict[str, Slot]:
    """Where each tensor of a saved quantised model goes."""
    return {name: Slot(tensor) for name, tensor in _named(weights)}


def save_quantized(checkpoint: Checkpoint, weights: Weights, out: Path) -> None:
    """Fill a folder with a quantised model.

    Args:
        checkpoint: what the weights were read from; its small files are copied.
        weights: quantised.
        out: an empty folder (see artifacts.new_folder).
    Raises: ConfigError where it cannot be written.
    """
    assert weights.quantization is not None
    saved = {
        "schema_version": SCHEMA_VERSION,
        "weights": weights.quantization.weights.name,
        "embeddings": weights.quantization.embeddings,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "base_hash": checkpoint.hash,
    }
    for pattern in SMALL_FILES:
        for file in checkpoint.path.glob(pattern):
            shutil.copyfile(file, out / file.name)
    write_json(out / CONFIG, checkpoint.config | {KEY: saved})
    write_tensors(out / WEIGHT_FILES[0], dict(_named(weights)), {"format": "pt"})


def check_new(out: Path) -> None:
    """Raises: ConfigError where a folder cannot be made at `out`."""
    nothing_there(out)
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it first")


def _named(part: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor below a part of the layout, by its place."""
    if isinstance(part, Quantized):
        yield name, part.data
    elif isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, list):
        for i, item in enumerate(part):
            yield from _named(item, f"{name}.{i}")
    elif isinstance(part, Weights):
        tied = part.head is part.embed
        for field in ("embed", *(() if tied else ("head",)), "position_table", "project_in", "project_out"):
            yield from _named(getattr(part, field), field)
        yield from _named(part.final_norm, "final_norm")
        yield from _named(part.layers, "layers")
    elif is_dataclass(part):
        for field in fields(part):
            yield from _named(getattr(part, field.name), f"{name}.{field.name}")
