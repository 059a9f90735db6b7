"""Neurons by the signs of their input weights alone: a sixteenth of the bytes of bf16, and no training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dejavu.checkpoint.layout import Weights
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Quantized, RowFormat, dequantized, quantize
from dejavu.selection.selector import Cuts, ScoreSelector


class SignsSelector(ScoreSelector):
    """The k neurons whose (gate) pre-activation is largest with every weight replaced by its sign times the row's mean
    size: `linear(y, signs, bias)`."""

    def __init__(self, cuts: Cuts, weights: Weights, ops: Backend):
        super().__init__(cuts, ops)
        self._rows: list[tuple[Quantized, Tensor | None] | None] = []
        for (_, cut), layer in zip(cuts, weights.layers, strict=True):
            if cut is None:
                self._rows.append(None)
                continue
            rows, bias = quantize(dequantized(layer.mlp.rows[:, 0]), RowFormat(1)), layer.mlp.in_bias
            self._rows.append((rows, None if bias is None else bias.view(len(rows), -1)[:, 0].contiguous()))

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> None:
        return None

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        if self.cuts[layer][1] is None:
            return None
        rows, bias = self._rows[layer]
        return self._ops.linear(y, rows, bias, self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes that one step reads to choose."""
        return sum(entry[0].nbytes for entry, (_, cut) in zip(self._rows, self.cuts, strict=True) if cut is not None)
