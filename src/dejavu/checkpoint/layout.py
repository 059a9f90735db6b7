"""How weights lie in memory: the rows that one unit needs stand side by side (docs/architecture.md).

One copy of the weights serves both decode, which streams whole units, and prefill, whose GEMMs read the
strided views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.device import require_memory
from dejavu.errors import ConfigError
from dejavu.kernels.quantized import Quantized, RowFormat, Weight

# Of the weights' size: what lies in memory while they are read, pieces of files and a matrix to transpose included.
LOADING = 1.05

Alloc = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Quantization:
    """Which format the rows of a model's matrices have: attention, MLP and projections, and by choice embeddings.

    Position tables, norms and biases stay as they are. Raises: ConfigError for 1 bit.
    """

    weights: RowFormat
    embeddings: bool = False

    def __post_init__(self):
        if self.weights.bits == 1:
            raise ConfigError("weights of 1 bit cannot carry a model; choose int8 or int4")


def parse_quantization(weights: str | None, embeddings: bool = False) -> Quantization | None:
    """What a user asks for by the name of a format; None: plain weights. Raises: ConfigError."""
    if weights is not None:
        return Quantization(RowFormat.parse(weights), embeddings)
    if embeddings:
        raise ConfigError("embeddings are quantised only with a format for the weights: int8 or int4")
    return None


@dataclass
class Norm:
    """Affine parameters of one norm: (C,) float32 each, or None."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass
class Attention:
    """`blocks` (G, 2r+2, D, C) = q_0..q_{r-1}, k, v, o_0..o_{r-1} of each group; o is transposed.

    `qkv_bias` (G, r+2, D) and `out_bias` (C,) are float32, or None.
    """

    blocks: Weight
    qkv_bias: Tensor | None
    out_bias: Tensor | None

    @property
    def heads_per_group(self) -> int:
        return (self.blocks.shape[1] - 2) // 2


@dataclass
class Mlp:
    """`rows` (I, 2, C) = fc1 row, fc2 column; gated (I, 3, C) = gate, up, down.

    `in_bias` (I,), gated (I, 2), and `out_bias` (C,) are float32, or None.
    """

    rows: Weight
    in_bias: Tensor | None
    out_bias: Tensor | None


@dataclass
class Layer:
    attn_norm: Norm
    attn: Attention
    mlp_norm: Norm
    mlp: Mlp


@dataclass
class Weights:
    """All weights of a decoder. `head` is `embed` itself where the embeddings are tied.

    embed, head: (V, E). position_table: (N, C) or None. project_in: (C, E), project_out: (E, C), or None.
    `dtype` is that of all matrices that are not quantised, of the cache and of prefill.
    """

    dtype: torch.dtype
    quantization: Quantization | None
    embed: Weight
    head: Weight
    position_table: Tensor | None
    project_in: Weight | None
    project_out: Weight | None
    final_norm: Norm
    layers: list[Layer]


def allocate(
    config: ModelConfig, dtype: torch.dtype, alloc: Alloc, quantization: Quantization | None = None
) -> Weights:
    """Uninitialised weights in kernel layout.

    Args:
        dtype: of all matrices that are not quantised; norms and biases are float32.
        alloc: makes an uninitialised tensor of a shape and dtype on the wanted device.
    """
    C, inter, D = config.hidden_size, config.intermediate_size, config.head_dim
    G, r = config.num_key_value_heads, config.heads_per_group
    f32 = torch.float32
    norm_bias = config.norm == "layer"

    def rows(*shape: int, quantised: bool = True) -> Weight:
        if quantization is None or not quantised:
            return alloc(shape, dtype)
        format, width = quantization.weights, shape[-1]
        return Quantized(alloc((*shape[:-1], format.row_bytes(width)), torch.uint8), width, format)

    def norm(exists: bool = True) -> Norm:
        if not (exists and config.norm_affine):
            return Norm(None, None)
        return Norm(alloc((C,), f32), alloc((C,), f32) if norm_bias else None)

    def layer() -> Layer:
        return Layer(
            attn_norm=norm(),
            attn=Attention(
                blocks=rows(G, 2 * r + 2, D, C),
                qkv_bias=alloc((G, r + 2, D), f32) if config.attention_bias else None,
                out_bias=alloc((C,), f32) if config.attention_out_bias else None,
            ),
            mlp_norm=norm(),
            mlp=Mlp(
                rows=rows(inter, 3 if config.gated else 2, C),
                in_bias=alloc((inter, 2) if config.gated else (inter,), f32) if config.mlp_bias else None,
                out_bias=alloc((C,), f32) if config.mlp_bias else None,
            ),
        )

    E = config.embed_size
    embeddings = quantization is not None and quantization.embeddings
    embed = rows(config.vocab_size, E, quantised=embeddings)
    learned = config.rope is None
    return Weights(
        dtype=dtype,
        quantization=quantization,
        embed=embed,
        head=embed if config.tie_word_embeddings else rows(config.vocab_size, E, quantised=embeddings),
        position_table=alloc((config.max_position_embeddings + config.position_offset, C), dtype) if learned else None,
        project_in=rows(C, E) if E != C else None,
        project_out=rows(E, C) if E != C else None,
        final_norm=norm(config.final_norm),
        layers=[layer() for _ in range(config.num_hidden_layers)],
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None = None) -> int:
    """Memory that `allocate` would take."""
    sizes: list[int] = []

    def note(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        sizes.append(prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device="meta")

    allocate(config, dtype, note, quantization)
    return sum(sizes)


def require_weight_memory(
    config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None, device: str | torch.device, name: str
) -> None:
    """Raises: CapacityError where the weights, and what loading them takes beside, don't fit into the free memory."""
    needed = LOADING * weight_bytes(config, dtype, quantization)
    form = str(dtype).removeprefix("torch.") if quantization is None else quantization.weights.name
    smaller = "quantise them (weights int8 or int4)" if quantization is None else "use a smaller format"
    require_memory(needed, device, f"{name}: the weights in {form}", f"{smaller}, or a machine with more memory")
