"""The map from a checkpoint's tensors to the layout, and the reading of config.json fields.

A family file is written with these few words: each names tensors once and says where they go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Attention, Mlp, Norm
from dejavu.config import ACTIVATIONS
from dejavu.errors import CheckpointError
from dejavu.kernels.quantized import Quantized, Weight, quantize


@dataclass
class Slot:
    """Where one checkpoint tensor goes: `view.copy_(tensor.reshape(view.shape))`, in pieces of rows; quantised
    on the way where the view is.

    `shape` is the shape that the checkpoint must have; the view's own where not given.
    """

    view: Weight
    shape: tuple[int, ...] = ()

    def __post_init__(self):
        self.shape = self.shape or tuple(self.view.shape)

    @property
    def unit(self) -> int:
        """How many of the tensor's rows one row of the view takes."""
        return self.shape[0] // self.view.shape[0]

    def fill(self, rows: Tensor, first: int = 0) -> None:
        """Copy rows `first`.. (multiples of `unit`) of a checked tensor into their place, converting the dtype."""
        view = self.view[first // self.unit : (first + rows.shape[0]) // self.unit]
        _write(view, rows.reshape(view.shape))


class TransposedSlot(Slot):
    """A slot of quantised rows that are the tensor's columns. A row's scale needs the whole row, so the pieces are
    gathered first: one matrix at a time lies in memory besides the model."""

    @property
    def unit(self) -> int:
        return 1

    def fill(self, rows: Tensor, first: int = 0) -> None:
        if first == 0:
            self._gathered = torch.empty(self.shape, dtype=rows.dtype)
        self._gathered[first : first + rows.shape[0]] = rows
        if first + rows.shape[0] == self.shape[0]:
            _write(self.view, self._gathered.T.reshape(self.view.shape))
            del self._gathered


def transposed_slot(view: Weight, shape: tuple[int, ...]) -> Slot:
    """The slot of a tensor (C, ...) whose columns are the rows (..., C) of a view."""
    if isinstance(view, Quantized):
        return TransposedSlot(view, shape)
    return Slot(view.permute(-1, *range(view.dim() - 1)), shape)


def _write(view: Weight, weights: Tensor) -> None:
    if isinstance(view, Quantized):
        view.data.copy_(quantize(weights, view.format).data)
    else:
        view.copy_(weights)


def norm_slots(name: str, norm: Norm) -> dict[str, Slot]:
    pairs = {"weight": norm.weight, "bias": norm.bias}
    return {f"{name}.{key}": Slot(t) for key, t in pairs.items() if t is not None}


def attention_slots(prefix: str, attn: Attention, *, out: str) -> dict[str, Slot]:
    """Slots of `{q,k,v}_proj` and the output projection `out`, weights and biases."""
    G, _, D, C = attn.blocks.shape
    r = attn.heads_per_group
    spans = {"q_proj": slice(0, r), "k_proj": slice(r, r + 1), "v_proj": slice(r + 1, r + 2)}
    slots = {}
    for name, span in spans.items():
        rows = G * (span.stop - span.start) * D
        slots[f"{prefix}{name}.weight"] = Slot(attn.blocks[:, span], (rows, C))
        if attn.qkv_bias is not None:
            slots[f"{prefix}{name}.bias"] = Slot(attn.qkv_bias[:, span], (rows,))
    slots[f"{prefix}{out}.weight"] = transposed_slot(attn.blocks[:, r + 2 :], (C, G * r * D))
    if attn.out_bias is not None:
        slots[f"{prefix}{out}.bias"] = Slot(attn.out_bias)
    return slots


def mlp_slots(prefix: str, mlp: Mlp, names: tuple[str, ...]) -> dict[str, Slot]:
    """Slots of the MLP's matrices in row order: (fc1, fc2), or (gate, up, down)."""
    slots = {f"{prefix}{name}.weight": Slot(mlp.rows[:, i]) for i, name in enumerate(names[:-1])}
    slots[f"{prefix}{names[-1]}.weight"] = transposed_slot(mlp.rows[:, -1], (mlp.rows.shape[2], mlp.rows.shape[0]))
    if mlp.in_bias is not None:
        columns = mlp.in_bias.view(mlp.rows.shape[0], -1)
        slots |= {f"{prefix}{name}.bias": Slot(columns[:, i]) for i, name in enumerate(names[:-1])}
        slots[f"{prefix}{names[-1]}.bias"] = Slot(mlp.out_bias)
    return slots


class Fields:
    """Typed reads of a config.json; a missing or wrong field is a CheckpointError that names it."""

    def __init__(self, config: dict):
        self.config = config

    def _get(self, name: str, default, kind: type, what: str):
        value = self.config.get(name, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"config.json: {name} must be {what}, found {value!r}")
        return value

    def int(self, name: str, default: int | None = None) -> int:
        return self._get(name, default, int, "an integer")

    def float(self, name: str, default: float | None = None, low: float = -1e30) -> float:
        """A number in [low, 1e30]: JSON as Python reads it has NaN and Infinity too, and integers of any size."""
        value = self._get(name, default, (int, float), "a number")
        if not low <= value <= 1e30:
            raise CheckpointError(f"config.json: {name} must be a number in [{low:g}, 1e30], found {value!r}")
        return float(value)

    def bool(self, name: str, default: bool | None = None) -> bool:
        return self._get(name, default, bool, "true or false")

    def require(self, name: str, value: bool) -> None:
        """A switch whose other way is not supported; left out, it is as wanted."""
        if self.bool(name, value) != value:
            raise CheckpointError(f"config.json: {name} {str(not value).lower()} is not supported")

    def optional_int(self, name: str):
        return None if self.config.get(name) is None else self.int(name)

    def token_ids(self, name: str) -> tuple:
        """One token id, a list of them, or null."""
        value = self.config.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(type(i) is int and i >= 0 for i in ids):
            raise CheckpointError(f"config.json: {name} must be a token id or a list of them, found {value!r}")
        return ids

    def activation(self, name: str) -> str:
        aliases = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
        value = self.config.get(name)
        value = aliases.get(str(value), value)
        if value not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json: {name} {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        return value

    def divisible(self, name: str, by: str) -> None:
        if self.int(by) < 1 or self.int(name) % self.int(by):
            raise CheckpointError(f"config.json: {name} ({self.int(name)}) must be a multiple of {by} ({self.int(by)})")
