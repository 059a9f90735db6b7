"""The mathematics of a layer over many tokens at once, by matrix products: prompts, scoring, the oracle, the profile.

What a family may vary stands in ModelConfig; kernels/reference.py says the same for the ops of a decode step. All
activations are float32, of N tokens. Quantised weights are unpacked for the products, a block at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.checkpoint.layout import Attention, Mlp, Norm, Weights
from dejavu.config import ModelConfig
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import dequantized
from dejavu.kernels.reference import activate, rotate


class Blocks:
    """A model's blocks as functions.

    Args:
        dtype: of the weights, which products of a GPU take.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, ops: Backend):
        self.config, self._dtype, self._ops = config, dtype, ops

    def embed(self, ids: Tensor, positions: Tensor, weights: Weights) -> Tensor:
        """(N, C) for tokens ids (N,) int64 at positions (N,) int64; learned positions are added."""
        x = dequantized(weights.embed[ids])
        if weights.project_in is not None:
            x = self._product(x, weights.project_in)
        if weights.position_table is not None:
            x = x + weights.position_table[positions + self.config.position_offset].float()
        return x

    def norm(self, x: Tensor, norm: Norm, exists: bool = True) -> Tensor:
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
        blocks = self._ops.plain(attn.blocks, self._dtype)
        G, _, D, C = blocks.shape
        r, N = attn.heads_per_group, len(y)
        # One batched product over the groups reads q, k and v in place: (G, N, (r+2) D).
        qkv = self._ops.matmul(y, blocks[:, : r + 2].view(G, (r + 2) * D, C).transpose(1, 2)).view(G, N, r + 2, D)
        if attn.qkv_bias is not None:
            qkv = qkv + attn.qkv_bias[:, None]
        q, k, v = qkv[:, :, :r], qkv[:, :, r], qkv[:, :, r + 1]
        if angles is not None:
            q, k = rotate(q, angles[:, None]), rotate(k, angles)
        return q, k, v

    def attention_out(self, o: Tensor, attn: Attention) -> Tensor:
        """(N, C): the output projection of the heads' outputs o (N, H, D), with its bias."""
        blocks = self._ops.plain(attn.blocks, self._dtype)
        rows = blocks[:, attn.heads_per_group + 2 :].reshape(-1, blocks.shape[-1])  # (H D, C)
        out = self._ops.matmul(o.flatten(1), rows)
        return out if attn.out_bias is None else out + attn.out_bias

    def activations(self, y: Tensor, mlp: Mlp) -> Tensor:
        """(N, I): what enters fc2 (down), for normalised inputs y (N, C): gated, the product of gate and up."""
        c, rows = self.config, self._ops.plain(mlp.rows, self._dtype)
        bias = None if mlp.in_bias is None else mlp.in_bias.view(rows.shape[0], -1)

        def up(part: int) -> Tensor:
            out = self._ops.matmul(y, rows[:, part].T)
            return out if bias is None else out + bias[:, part]

        h = activate(up(0), c.activation, c.activation_threshold)
        if not c.gated:
            return h
        gate, h = h, up(1)
        return gate * (activate(h, c.activation, c.activation_threshold) if c.activate_up else h)

    def mlp_out(self, h: Tensor, mlp: Mlp) -> Tensor:
        """(N, C): fc2 (down) of activations h (N, I), with its bias."""
        out = self._ops.matmul(h, self._ops.plain(mlp.rows, self._dtype)[:, -1])
        return out if mlp.out_bias is None else out + mlp.out_bias

    def logits(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, V) of the residual stream x (N, C) behind the last layer."""
        y = self.norm(x, weights.final_norm, self.config.final_norm)
        y = y if weights.project_out is None else self._product(y, weights.project_out)
        return self._product(y, weights.head)

    def _product(self, x: Tensor, weight) -> Tensor:
        return self._ops.matmul(x, self._ops.plain(weight, self._dtype).T)
