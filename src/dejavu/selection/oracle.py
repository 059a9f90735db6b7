"""Selections by what each unit would contribute, measured in a first pass over everything.

A unit's score is the norm of its output: |activation| * ||fc2 column|| of a neuron, and of a head the norm of its
output after the output projection, which is a quadratic form in the D-vector that enters it:
||o W||^2 = o (W W^T) o^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Layer, Weights
from dejavu.config import ModelConfig
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import dense
from dejavu.kernels.reference import activate
from dejavu.selection.selector import Cuts, ScoreSelector


class OutputNorms:
    """The norms of what one layer's units contribute."""

    def __init__(self, layer: Layer, config: ModelConfig):
        self._config, self._mlp = config, layer.mlp
        self._columns = dense(layer.mlp.rows[:, -1]).norm(dim=1)
        r = layer.attn.heads_per_group
        out = dense(layer.attn.blocks[:, r + 2 :]).flatten(0, 1)  # (H, D, C)
        self._gram = out @ out.transpose(1, 2)  # (H, D, D)

    def heads(self, o: Tensor) -> Tensor:
        """(T, H) for the heads' outputs o (T, H, D) before the projection."""
        return torch.einsum("bhd,hde,bhe->bh", o, self._gram, o).clamp(min=0).sqrt()

    def neurons(self, h: Tensor) -> Tensor:
        """(T, I) for the activations h (T, I) that enter fc2 (down)."""
        return h.abs() * self._columns

    def neurons_of_input(self, y: Tensor) -> Tensor:
        """(T, I) for the MLP's normalised inputs y (T, C)."""
        c, rows, bias = self._config, self._mlp.rows, self._mlp.in_bias
        columns = None if bias is None else bias.view(len(self._columns), -1).T
        pre = [y @ dense(rows[:, i]).T for i in range(rows.shape[1] - 1)]
        pre = pre if columns is None else [p + columns[i] for i, p in enumerate(pre)]
        h = activate(pre[0], c.activation, c.activation_threshold)
        if c.gated:
            h = h * (activate(pre[1], c.activation, c.activation_threshold) if c.activate_up else pre[1])
        return self.neurons(h)


class OracleSelector(ScoreSelector):
    """The units with the largest output norm, found by computing all of them first. Not captured: it is two passes."""

    capturable = False

    def __init__(self, cuts: Cuts, config: ModelConfig, weights: Weights, ops: Backend):
        super().__init__(cuts, ops)
        self._config = config
        self._norms = [OutputNorms(layer, config) for layer in weights.layers]

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        return None if self.cuts[layer][0] is None else self._norms[layer].heads(attend())

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        return None if self.cuts[layer][1] is None else self._norms[layer].neurons_of_input(y)


class NonContextualSelector(OracleSelector):
    """What the oracle would choose if the token stood alone: its normalised embedding takes the hidden state's place,
    and it attends to nothing but itself."""

    def __init__(self, cuts: Cuts, config: ModelConfig, weights: Weights, ops: Backend):
        super().__init__(cuts, config, weights, ops)
        self._layers = weights.layers

    def begin(self, x: Tensor) -> None:
        self._x = x.clone()

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        if self.cuts[layer][0] is None:
            return None
        attn = self._layers[layer].attn
        G, _, D, _ = attn.blocks.shape
        r = attn.heads_per_group
        y = self._normalised(self._layers[layer].attn_norm)
        values = torch.einsum("bc,gdc->bgd", y, dense(attn.blocks[:, r + 1]))
        if attn.qkv_bias is not None:
            values = values + attn.qkv_bias[:, r + 1]
        alone = values[:, :, None].expand(-1, G, r, D).reshape(-1, G * r, D)
        return super().head_scores(layer, y, lambda: alone)

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        if self.cuts[layer][1] is None:
            return None
        return super().neuron_scores(layer, self._normalised(self._layers[layer].mlp_norm))

    def _normalised(self, norm) -> Tensor:
        c = self._config
        if not c.norm_before:
            return self._x
        return self._ops.add_norm(self._x, None, None, norm.weight, norm.bias, kind=c.norm, eps=c.norm_eps)


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
        self.total[layer][1].add_(self._norms[layer].neurons_of_input(y).pow(2).sum(0))
