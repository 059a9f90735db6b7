"""Rotary positions: reading them from config.json, and the table that the kernels look angles up in.

Two published kinds change their frequencies with the length of the text (`dynamic` past the context that the
model was trained for, `longrope` past the original one). Changed in mid-text they would leave cached keys
turned by angles that no longer fit, and decode would not equal a forward over the whole text. So a table has
one set of frequencies, that of its own `length`: the longest text that its cache can hold. A text that fills
the cache gets exactly the angles of a forward over it. Rows of a batch share a cache, and so are refused where
they would be turned differently alone (RopeConfig.stretch).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dejavu.checkpoint.slots import Fields
from dejavu.config import RopeConfig
from dejavu.errors import CheckpointError

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def parse_rope(config: dict, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, of a config.json.

    Raises: CheckpointError for an unknown kind, a missing or senseless parameter, or partial rotation.
    """
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(params, dict):
        raise CheckpointError(f"config.json: rope_parameters must be an object, found {params!r}")
    original = "original_max_position_embeddings"
    scaling = params | {original: config.get(original) or params.get(original) or max_position_embeddings}
    fields = Fields(config | scaling)
    part = fields.float("partial_rotary_factor", 1.0)
    if part != 1.0 or head_dim % 2 or head_dim < 2:
        raise CheckpointError(
            "config.json: rotary positions are supported over whole heads of even size, "
            f"found head_dim {head_dim} and partial_rotary_factor {part}"
        )
    kind = params.get("rope_type", params.get("type", "default"))
    rope = RopeConfig(fields.float("rope_theta", 10_000.0, low=1e-30), kind, scaling)
    if (kind in KINDS and params.get("factor") is not None) or kind in ("linear", "dynamic", "llama3"):
        fields.float("factor", low=1e-3)
    fields.float(original, low=1)
    try:
        table = rope_table(rope, head_dim, 2, max_position_embeddings)
    except (ArithmeticError, ValueError):
        table = torch.tensor(math.nan)
    if not table.isfinite().all():
        raise CheckpointError(f"config.json: these rotary parameters give no finite angles: {params}")
    return rope


def rope_table(rope: RopeConfig, head_dim: int, length: int, max_position_embeddings: int) -> Tensor:
    """The angles of positions 0 .. length-1, as kernels.reference.rotate takes them.

    Computed in float32 like the models were trained; the attention factor of a kind that has one is folded in.

    Args:
        length: positions in the table, and the text length that the frequencies are chosen for.
        max_position_embeddings: the context of config.json.
    Returns: (length, head_dim) float32: cosines (head_dim / 2), then sines.
    Raises: CheckpointError for an unknown kind or a missing parameter.
    """
    p, theta, scale = Fields(rope.scaling), rope.theta, 1.0
    if rope.kind == "dynamic":
        stretch = p.float("factor") * (max(length / max_position_embeddings, 1.0) - 1.0) + 1.0
        theta *= stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / p.float("factor")
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, p)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn(frequencies, p, theta, max_position_embeddings)
    elif rope.kind == "longrope":
        frequencies, scale = _longrope(frequencies, p, length, max_position_embeddings)
    elif rope.kind not in KINDS:
        raise CheckpointError(f"config.json: rope_type {rope.kind!r} is not supported; supported: {', '.join(KINDS)}")
    angles = torch.arange(length).float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1) * scale


def _llama3(frequencies: Tensor, p: Fields) -> Tensor:
    """Divide long waves by the factor, keep short ones, and blend in between (Llama 3.1)."""
    low, high = p.float("low_freq_factor"), p.float("high_freq_factor")
    turns = p.float("original_max_position_embeddings") * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / p.float("factor"))


def _yarn(frequencies: Tensor, p: Fields, theta: float, max_positions: int) -> tuple[Tensor, float]:
    """Interpolate the slow dimensions, keep the fast ones, with a ramp between them (arXiv 2309.00071)."""
    original, count = p.float("original_max_position_embeddings"), frequencies.numel()
    factor = p.float("factor", max_positions / original)

    def dimension(turns: float) -> float:
        """The dimension that turns this often over the original context."""
        return count * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(p.float("beta_fast", 32.0)), dimension(p.float("beta_slow", 1.0))
    if p.bool("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = ((torch.arange(count).float() - first) / max(last - first, 1e-3)).clamp(0, 1)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = p.float("mscale", 0.0), p.float("mscale_all_dim", 0.0)
    scale = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return frequencies * (1 - ramp + ramp / factor), p.float("attention_factor", scale)


def _longrope(frequencies: Tensor, p: Fields, length: int, max_positions: int) -> tuple[Tensor, float]:
    """Divide each dimension by a searched factor, one list for short texts and one for long (arXiv 2402.13753)."""
    original, lists = p.float("original_max_position_embeddings"), {}
    for name in ("short_factor", "long_factor"):
        value = p.config.get(name)
        if not (
            isinstance(value, list)
            and len(value) == frequencies.numel()
            and all(isinstance(x, (int, float)) for x in value)
        ):
            raise CheckpointError(
                f"config.json: {name} must be a list of {frequencies.numel()} numbers, found {value!r}"
            )
        lists[name] = torch.tensor(value).float()
    factor = p.float("factor", max_positions / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    chosen = lists["long_factor" if length > original else "short_factor"]
    return frequencies / chosen, p.float("attention_factor", scale)
