"""Selections by what each unit would contribute, measured in a first pass over everything.

A unit's score is the norm of its output: |activation| * ||fc2 column|| of a neuron, and of a head the norm of its
output after the output projection, which is a quadratic form in the D-vector that enters it:
||o W||^2 = o (W W^T) o^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Layer, Norm, Weights
from dejavu.config import ModelConfig
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import dequantized
from dejavu.kernels.reference import Tokens
from dejavu.model.blocks import Blocks
from dejavu.selection.selector import Cuts, ScoreSelector


class OutputNorms:
    """The norms of what one layer's units contribute."""

    def __init__(self, layer: Layer):
        self._columns = dequantized(layer.mlp.rows[:, -1]).norm(dim=1)
        r = layer.attn.heads_per_group
        out = dequantized(layer.attn.blocks[:, r + 2 :]).flatten(0, 1)  # (H, D, C)
        self._gram = out @ out.transpose(1, 2)  # (H, D, D)

    def heads(self, o: Tensor) -> Tensor:
        """(T, H) for the heads' outputs o (T, H, D) before the projection."""
        return torch.einsum("bhd,hde,bhe->bh", o, self._gram, o).clamp(min=0).sqrt()

    def neurons(self, h: Tensor) -> Tensor:
        """(T, I) for the activations h (T, I) that enter fc2 (down)."""
        return h.abs() * self._columns


class OracleSelector(ScoreSelector):
    """The units with the largest output norm, found by computing all of them first. Not captured: it is two passes."""

    capturable = False

    def __init__(self, cuts: Cuts, config: ModelConfig, weights: Weights, ops: Backend):
        super().__init__(cuts, ops)
        self._layers, self._blocks = weights.layers, Blocks(config, weights.dtype, ops)
        self._norms = [OutputNorms(layer) for layer in weights.layers]

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        return None if self.cuts[layer][0] is None else self._norms[layer].heads(attend())

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        return None if self.cuts[layer][1] is None else self._neuron_norms(layer, y)

    def _neuron_norms(self, layer: int, y: Tensor) -> Tensor:
        return self._norms[layer].neurons(self._blocks.activations(y, self._layers[layer].mlp))


class NonContextualSelector(OracleSelector):
    """What the oracle would choose if the token stood alone: its normalised embedding takes the hidden state's place,
    and it attends to nothing but itself."""

    def begin(self, x: Tensor, tokens: Tokens | None) -> None:
        super().begin(x, tokens)
        self._x = x.clone()

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        if self.cuts[layer][0] is None:
            return None
        weights = self._layers[layer]
        # A token that attends to itself alone has its own value for an output, wherever it stands.
        _, _, values = self._blocks.qkv(self._normalised(weights.attn_norm), weights.attn, None)
        alone = values.transpose(0, 1).repeat_interleave(weights.attn.heads_per_group, 1)
        return super().head_scores(layer, y, lambda: alone)

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        if self.cuts[layer][1] is None:
            return None
        return super().neuron_scores(layer, self._normalised(self._layers[layer].mlp_norm))

    def _normalised(self, norm: Norm) -> Tensor:
        return self._blocks.norm(self._x, norm, self._blocks.config.norm_before)


class Importance(OracleSelector):
    """Watches dense steps, selects everything, and adds up how much each unit contributed.

    `total` holds for each layer the sums over tokens of the squared norms of heads (H,) and neurons (I,).
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Backend):
        super().__init__([(None, None)] * len(weights.layers), config, weights, ops)
        device = weights.embed.device
        self.total = [
            tuple(torch.zeros(n, device=device) for n in (config.num_attention_heads, config.intermediate_size))
            for _ in weights.layers
        ]

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> None:
        self.total[layer][0].add_(self._norms[layer].heads(attend()).pow(2).sum(0))

    def neuron_scores(self, layer: int, y: Tensor) -> None:
        self.total[layer][1].add_(self._neuron_norms(layer, y).pow(2).sum(0))
