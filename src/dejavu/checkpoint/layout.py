"""How weights lie in memory: the rows that one unit needs stand side by side (docs/architecture.md).

One copy of the weights serves both decode, which streams whole units, and prefill, whose GEMMs read the
strided views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import ModelConfig

Alloc = Callable[[tuple[int, ...], torch.dtype], Tensor]


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

    blocks: Tensor
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

    rows: Tensor
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
    """

    embed: Tensor
    head: Tensor
    position_table: Tensor | None
    project_in: Tensor | None
    project_out: Tensor | None
    final_norm: Norm
    layers: list[Layer]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype


def allocate(config: ModelConfig, dtype: torch.dtype, alloc: Alloc) -> Weights:
    """Uninitialised weights in kernel layout.

    Args:
        dtype: of all matrices; norms and biases are float32.
        alloc: makes an uninitialised tensor of a shape and dtype on the wanted device.
    """
    C, inter, D = config.hidden_size, config.intermediate_size, config.head_dim
    G, r = config.num_key_value_heads, config.heads_per_group
    f32 = torch.float32
    norm_bias = config.norm == "layer"

    def norm(exists: bool = True) -> Norm:
        if not (exists and config.norm_affine):
            return Norm(None, None)
        return Norm(alloc((C,), f32), alloc((C,), f32) if norm_bias else None)

    def layer() -> Layer:
        return Layer(
            attn_norm=norm(),
            attn=Attention(
                blocks=alloc((G, 2 * r + 2, D, C), dtype),
                qkv_bias=alloc((G, r + 2, D), f32) if config.attention_bias else None,
                out_bias=alloc((C,), f32) if config.attention_out_bias else None,
            ),
            mlp_norm=norm(),
            mlp=Mlp(
                rows=alloc((inter, 3 if config.gated else 2, C), dtype),
                in_bias=alloc((inter, 2) if config.gated else (inter,), f32) if config.mlp_bias else None,
                out_bias=alloc((C,), f32) if config.mlp_bias else None,
            ),
        )

    E = config.embed_size
    embed = alloc((config.vocab_size, E), dtype)
    learned = config.rope is None
    return Weights(
        embed=embed,
        head=embed if config.tie_word_embeddings else alloc((config.vocab_size, E), dtype),
        position_table=alloc((config.max_position_embeddings + config.position_offset, C), dtype) if learned else None,
        project_in=alloc((C, E), dtype) if E != C else None,
        project_out=alloc((E, C), dtype) if E != C else None,
        final_norm=norm(config.final_norm),
        layers=[layer() for _ in range(config.num_hidden_layers)],
    )
