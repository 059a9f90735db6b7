"""The mathematics of a layer over many tokens at once, by matrix products: prompts, scoring, the oracle, the profile.

What a family may vary stands in ModelConfig; kernels/reference.py says the same for the ops of a decode step.
Quantised weights are unpacked for the products, a matrix at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Attention, Mlp, Norm, Weights
from dejavu.config import ModelConfig
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Weight, dequantized
from dejavu.kernels.reference import activate, rotate


class Blocks:
    """A model's blocks as functions of N tokens.

    Args:
        dtype: of the weights.
        narrow: activations are rounded to what the device multiplies fastest (Backend.product_dtype) before each
            product and behind it, as PyTorch's own models do. Otherwise all activations are float32. The residual
            stream is float32 either way.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, ops: Backend, *, narrow: bool = False):
        self.config, self._ops = config, ops
        self.dtype = ops.product_dtype(dtype) if narrow else torch.float32

    def embed(self, ids: Tensor, positions: Tensor, weights: Weights) -> Tensor:
        """(N, C) float32 for tokens ids (N,) int64 at positions (N,) int64; learned positions are added."""
        x = dequantized(weights.embed[ids])
        if weights.project_in is not None:
            x = self._linear(x, weights.project_in).float()
        if weights.position_table is not None:
            x = x + weights.position_table[positions + self.config.position_offset].float()
        return x

    def norm(self, x: Tensor, norm: Norm, exists: bool = True) -> Tensor:
        """(N, C) float32 of a residual stream (N, C) float32."""
        if not exists:
            return x
        if self.config.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], norm.weight, self.config.norm_eps)
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.config.norm_eps)

    def qkv(self, y: Tensor, attn: Attention, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (G, N, r, D), keys and values (G, N, D) of normalised inputs y (N, C).

        Args:
            angles: (N, D), the rows of the rotary table at the tokens' positions; None for learned positions.
        """
        G, _, D, _ = attn.blocks.shape
        r = attn.heads_per_group
        bias = None if attn.qkv_bias is None else attn.qkv_bias.flatten()
        qkv = self._linear(y, attn.blocks[:, : r + 2], bias).view(-1, G, r + 2, D).transpose(0, 1)
        q, k, v = qkv[:, :, :r], qkv[:, :, r], qkv[:, :, r + 1]
        if angles is not None:
            q, k = rotate(q.float(), angles[:, None]), rotate(k.float(), angles)
        return q, k, v

    def attention_out(self, o: Tensor, attn: Attention) -> Tensor:
        """(N, C): the output projection of the heads' outputs o (N, H, D), with its bias."""
        return self._sum(o.flatten(1), attn.blocks[:, attn.heads_per_group + 2 :], attn.out_bias)

    def activations(self, y: Tensor, mlp: Mlp) -> Tensor:
        """(N, I): what enters fc2 (down), for normalised inputs y (N, C): gated, the product of gate and up."""
        c, y = self.config, y.to(self.dtype)
        bias = None if mlp.in_bias is None else mlp.in_bias.view(len(mlp.rows), -1)

        def up(part: int) -> Tensor:
            return self._linear(y, mlp.rows[:, part], None if bias is None else bias[:, part])

        h = up(0)
        h = h.relu_() if c.activation == "relu" else activate(h, c.activation, c.activation_threshold)
        if not c.gated:
            return h
        gate, h = h, up(1)
        return gate * (activate(h, c.activation, c.activation_threshold) if c.activate_up else h)

    def mlp_out(self, h: Tensor, mlp: Mlp) -> Tensor:
        """(N, C): fc2 (down) of activations h (N, I), with its bias."""
        return self._sum(h, mlp.rows[:, -1], mlp.out_bias)

    def logits(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, V) float32 of the residual stream x (N, C) behind the last layer."""
        y = self.norm(x, weights.final_norm, self.config.final_norm)
        y = y if weights.project_out is None else self._linear(y, weights.project_out)
        return self._linear(y, weights.head).float()

    def _linear(self, x: Tensor, rows: Weight, bias: Tensor | None = None) -> Tensor:
        """The products (N, M) of x (N, K) with each of M rows (..., K)."""
        return self._ops.matmul(x.to(self.dtype), self._ops.matrix(rows, self.dtype).T, bias)

    def _sum(self, x: Tensor, rows: Weight, bias: Tensor | None = None) -> Tensor:
        """The sums (N, K) of M rows (..., K), each times its factor in x (N, M)."""
        return self._ops.matmul(x.to(self.dtype), self._ops.matrix(rows, self.dtype), bias)
