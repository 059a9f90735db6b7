"""Watches forward passes and feeds every accumulator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.checkpoint.layout import Weights
from dejavu.config import ZEROING_ACTIVATIONS, ModelConfig
from dejavu.kernels.quantized import dequantized
from dejavu.model.hooks import BlockName, Hooks
from dejavu.profile.accumulator import Accumulator
from dejavu.profile.activity import Activity
from dejavu.profile.oracle import Contribution, OracleDensity, fewest
from dejavu.profile.settings import ProfileConfig
from dejavu.profile.states import Norms, Similarity


@dataclass
class Statistics:
    """All accumulators of a profile. `fired` is None where no activation is ever exactly zero."""

    oracle_heads: OracleDensity
    oracle_neurons: OracleDensity
    contribution: Contribution
    fired: Activity | None
    head_sets: Activity
    neuron_sets: Activity
    norms: Norms
    similarity: Similarity

    @classmethod
    def empty(cls, config: ModelConfig, bounds: int) -> Statistics:
        L, H, neurons = config.num_hidden_layers, config.num_attention_heads, config.intermediate_size
        return cls(
            oracle_heads=OracleDensity(bounds, L),
            oracle_neurons=OracleDensity(bounds, L),
            contribution=Contribution(L, H, neurons),
            fired=Activity(L, neurons) if config.activation in ZEROING_ACTIVATIONS else None,
            head_sets=Activity(L, H),
            neuron_sets=Activity(L, neurons),
            norms=Norms(L),
            similarity=Similarity(L),
        )

    def parts(self) -> dict[str, Accumulator]:
        return {name: part for name, part in vars(self).items() if part is not None}


class Observer(Hooks):
    """Feeds statistics from prefills of one window each. A window's first token is never counted: it has no context.

    Args:
        settings: which error bounds; their first one makes the sets.
    """

    def __init__(self, config: ModelConfig, weights: Weights, settings: ProfileConfig, statistics: Statistics):
        self._layers, self._settings, self._statistics = weights.layers, settings, statistics
        self._last = config.num_hidden_layers - 1
        self._neuron_norms = [dequantized(layer.mlp.rows[:, -1]).norm(dim=1) for layer in weights.layers]
        self._run = slice(1, None)
        self._states: list[Tensor] = []

    def at(self, window: int, size: int) -> None:
        """Choose the run of the window that comes next, by its number in the text."""
        settings = self._settings
        length = min(settings.run, size - 1)
        generator = torch.Generator().manual_seed(settings.seed + window)
        start = int(torch.randint(1, size - length + 1, (), generator=generator))
        self._run, self._states = slice(start, start + length), []

    def heads(self, layer: int, y: Tensor, o: Tensor) -> Tensor:
        attn, s = self._layers[layer].attn, self._statistics
        out = dequantized(attn.blocks[:, attn.heads_per_group + 2 :]).flatten(0, 1)  # (H, D, C)
        # ||o W||^2 = o (W W^T) o^T, which needs D instead of C numbers a head.
        gram = out @ out.transpose(1, 2)
        squares = torch.einsum("thd,hde,the->th", o, gram, o).clamp(min=0)
        s.contribution.heads[layer] += squares[1:].sum(0)
        kept = self._fewest(squares[self._run].sqrt(), o[self._run], out, attn.out_bias)
        s.oracle_heads.add(layer, kept)
        s.head_sets.add(layer, kept[0])
        return o

    def neurons(self, layer: int, y: Tensor, h: Tensor) -> Tensor:
        mlp, s = self._layers[layer].mlp, self._statistics
        scores = h.abs() * self._neuron_norms[layer]
        s.contribution.neurons[layer] += scores[1:].square().sum(0)
        if s.fired is not None:
            s.fired.add(layer, h[1:] != 0)
        kept = self._fewest(scores[self._run], h[self._run, :, None], dequantized(mlp.rows[:, -1:]), mlp.out_bias)
        s.oracle_neurons.add(layer, kept)
        s.neuron_sets.add(layer, kept[0])
        return h

    def block(self, layer: int, block: BlockName, x: Tensor, f: Tensor) -> None:
        self._statistics.norms.add(layer, block, x[1:], f[1:])
        if block == "attention":
            self._states.append(x[self._run])
            if layer == self._last:
                self._statistics.similarity.add(self._states)

    def _fewest(self, scores: Tensor, values: Tensor, out: Tensor, bias: Tensor | None) -> list[Tensor]:
        """For each error bound the fewest units (masks (T, N)) that keep the block's output within it.

        values (T, N, D) enter the output rows out (N, D, C); the bias (C,) is part of the output, and always kept.
        """
        matrix = out.flatten(0, 1)
        terms = values.flatten(1) @ matrix
        size = (terms if bias is None else terms + bias).norm(dim=1)

        def error(kept: Tensor) -> Tensor:
            lost = torch.where(kept[:, :, None], 0.0, values).flatten(1) @ matrix
            return lost.norm(dim=1) / size

        found = fewest(scores, error, self._settings.errors)
        return [found[bound] for bound in self._settings.errors]
