"""A predictor of random weights: what looking ahead costs, not how well it sees."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dejavu.bench.shapes import fill_noise, fill_quantized
from dejavu.config import ModelConfig, SelectionConfig
from dejavu.kernels import beside
from dejavu.kernels.quantized import Quantized, RowFormat, Weight
from dejavu.kernels.reference import Selection


class RandomPredictor:
    """Low-rank scores of a layer's neurons from its attention's input, scores of the next layer's heads from its
    MLP's input; the best of each, so that a single token's densities are those asked for.

    Args:
        rank: of the neurons' predictor. `bytes`: of all predictors together.
        quantized: the format of the predictors; None: bfloat16.
    """

    capturable = True

    def __init__(
        self, config: ModelConfig, ops: ModuleType, selection: SelectionConfig, rank: int, quantized: RowFormat | None
    ):
        self._ops, self._layers = ops, config.num_hidden_layers
        self._heads_kept, self._neurons_kept = selection.counts(0, config)
        C, shapes = config.hidden_size, []
        for _ in range(config.num_hidden_layers):
            shapes += [(rank, C), (config.intermediate_size, rank), (config.num_attention_heads, C)]
        flat = [_random(shape, ops, quantized) for shape in shapes]
        self._weights = [flat[i : i + 3] for i in range(0, len(flat), 3)]
        self.bytes = sum(w.nbytes for w in flat)

    def advance(self) -> None:
        """All is in the step."""

    def begin(self, x: Tensor) -> None:
        self._heads = self._neurons = None

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        ops, (down, up, heads) = self._ops, self._weights[layer]
        # The first layer's heads have no earlier input to be seen from.
        selected = self._score(heads, self._heads_kept, y) if layer == 0 else self._heads()
        self._neurons = beside(ops, lambda: self._score(up, self._neurons_kept, ops.linear(y, down)), y)
        return selected

    def neurons(self, layer: int, y: Tensor) -> Selection:
        selected = self._neurons()
        if layer + 1 < self._layers:
            heads = self._weights[layer + 1][2]
            self._heads = beside(self._ops, lambda: self._score(heads, self._heads_kept, y), y)
        return selected

    def _score(self, weight: Weight, kept: int, x: Tensor) -> Selection:
        return self._ops.select_topk(self._ops.linear(x, weight), kept)


def _random(shape: tuple[int, int], ops: ModuleType, form: RowFormat | None) -> Weight:
    if form is not None:
        weight = Quantized(ops.empty((shape[0], form.row_bytes(shape[1])), torch.uint8), shape[1], form)
        fill_quantized(weight, shape[1] ** -0.5)
    else:
        weight = ops.empty(shape, torch.bfloat16)
        fill_noise([(weight, shape[1] ** -0.5)], seed=shape[0])
    return weight
