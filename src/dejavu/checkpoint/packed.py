"""A saved quantised model: a folder that holds the kernel layout itself, beside its tokenizer.

`config.json` is the base checkpoint's with one key more, `dejavu_quantization`: schema_version, weights (the format's
name), embeddings, dtype (of what is not quantised, and of the cache) and base_hash. `model.safetensors` holds every
tensor of checkpoint.layout.Weights by its place there, such as `layers.0.mlp.rows`; quantised ones are bytes, as
kernels.quantized lays them out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import mkdtemp

from torch import Tensor

from dejavu.checkpoint.layout import Quantization, Weights
from dejavu.checkpoint.slots import Slot
from dejavu.checkpoint.source import CONFIG, SMALL_FILES, WEIGHT_FILES, Checkpoint
from dejavu.errors import CheckpointError, ConfigError
from dejavu.kernels.quantized import Quantized, RowFormat

KEY = "dejavu_quantization"
SCHEMA_VERSION = 1


def packed_settings(checkpoint: Checkpoint) -> tuple[Quantization, str] | None:
    """Quantization and dtype of a saved quantised model; None for an ordinary checkpoint.

    Raises: CheckpointError where the key is not what `save_packed` writes.
    """
    saved = checkpoint.config.get(KEY)
    if saved is None:
        return None
    file = checkpoint.path / CONFIG
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION:
        found = saved.get("schema_version") if isinstance(saved, dict) else saved
        raise CheckpointError(f"{file}: {KEY} must have schema_version {SCHEMA_VERSION}, found {found!r}")
    kinds = {"weights": str, "embeddings": bool, "dtype": str}
    if bad := [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]:
        raise CheckpointError(f"{file}: {KEY}: {bad[0]} is missing or wrong; quantise the model again")
    try:
        return Quantization(RowFormat.parse(saved["weights"]), saved["embeddings"]), saved["dtype"]
    except ConfigError as error:
        raise CheckpointError(f"{file}: {KEY}: {error}") from error


def packed_slots(weights: Weights) -> dict[str, Slot]:
    """Where each tensor of a saved quantised model goes."""
    return {name: Slot(tensor) for name, tensor in _named(weights)}


def save_packed(checkpoint: Checkpoint, weights: Weights, out: Path) -> None:
    """Write a quantised model; the folder appears complete or not at all.

    Args:
        checkpoint: what the weights were read from; its small files are copied.
        weights: quantised.
        out: must not exist; its parent must.
    Raises: ConfigError where it cannot be written.
    """
    from safetensors.torch import save_file

    check_new(out)
    assert weights.quantization is not None
    saved = {
        "schema_version": SCHEMA_VERSION,
        "weights": weights.quantization.weights.name,
        "embeddings": weights.quantization.embeddings,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "base_hash": checkpoint.hash,
    }
    folder = None
    try:
        folder = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        for pattern in SMALL_FILES:
            for file in checkpoint.path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        (folder / CONFIG).write_text(json.dumps(checkpoint.config | {KEY: saved}, indent=2) + "\n", encoding="utf-8")
        save_file(dict(_named(weights)), folder / WEIGHT_FILES[0], metadata={"format": "pt"})
        (folder / WEIGHT_FILES[0]).chmod(0o644)
        folder.chmod(0o755)  # made for its owner alone
        os.rename(folder, out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def check_new(out: Path) -> None:
    """Raises: ConfigError where a folder cannot be made at `out`."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already, and nothing is overwritten; choose another place")
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
