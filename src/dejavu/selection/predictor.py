"""Selections by small trained networks that read an earlier hidden state: the paper's predictors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.kernels import reference
from dejavu.kernels.base import Backend
from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Selection
from dejavu.selection.block import HEADS, NEURONS, Block
from dejavu.selection.selector import Cuts, ScoreSelector


@dataclass(frozen=True)
class Lookahead:
    """How many blocks before its own a predictor reads the input of; at the model's start, the first block's.

    1 is the paper's Figure 2: the neurons of a layer from the input of its attention, the heads of a layer from the
    input of the MLP before it. 0 reads the input of the block itself, sees most, and overlaps with nothing.
    """

    heads: int = 1
    neurons: int = 1

    def source(self, block: Block) -> Block:
        """The block whose input the predictor of `block` reads."""
        return Block.of(max(0, block.number - (self.neurons if block.part == NEURONS else self.heads)))


@dataclass
class Predictor:
    """Scores of a block's units: `up @ (down @ y) + bias`, or without `down`, `up @ y + bias`.

    Args:
        down: (R, C), or None for a single linear layer; like `up`, plain or quantised.
        up: (N, R), or (N, C) without `down`.
        bias: (N,) float32.
    """

    down: Weight | None
    up: Weight
    bias: Tensor

    def scores(self, linear: Callable[..., Tensor], y: Tensor) -> Tensor:
        """(T, N) float32 for inputs y (T, C) float32. linear: the op, of a backend or of kernels.reference."""
        return linear(y if self.down is None else linear(y, self.down), self.up, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes that one prediction reads."""
        return sum(t.nbytes for t in (self.down, self.up, self.bias) if t is not None)


class PredictorSelector(ScoreSelector):
    """Every block's units by a predictor that reads the input of an earlier block, beside the blocks in between.

    Args:
        predictors: by block; a block without one needs no cut.
        cuts: see ScoreSelector.
    """

    def __init__(
        self,
        predictors: Mapping[Block, Predictor],
        lookahead: Lookahead,
        cuts: Cuts,
        config: ModelConfig,
        ops: Backend,
    ):
        super().__init__(cuts, ops)
        self._predictors, self._lookahead, self._blocks = predictors, lookahead, Block.all(config.num_hidden_layers)
        self._plan()

    def _plan(self) -> None:
        # Of each block whose input is read: the blocks that are predicted from it.
        self._targets: dict[Block, list[Block]] = {}
        for block in self._blocks:
            if self.cuts[block.layer][block.part] is not None:
                self._targets.setdefault(self._lookahead.source(block), []).append(block)
        self._scores: dict[Block, Tensor] = {}
        self._pending: dict[Block, Callable[[], tuple[Tensor, Tensor]]] = {}
        self._collected: dict[Block, tuple[Tensor, Tensor]] = {}

    def without(self, blocks: Collection[Block]) -> Self:
        other = super().without(blocks)
        other._plan()
        return other

    def fresh(self) -> Self:
        return self.without(())

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        return self._score(Block(layer, HEADS), y)

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        return self._score(Block(layer, NEURONS), y)

    def collect(self, layer: int, part: int) -> None:
        block = Block(layer, part)
        if block in self._pending:
            self._collected[block] = self._pending.pop(block)()

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        return self._select(Block(layer, HEADS), y)

    def neurons(self, layer: int, y: Tensor) -> Selection:
        return self._select(Block(layer, NEURONS), y)

    @property
    def nbytes(self) -> int:
        """Bytes that the predictors of one step read."""
        return sum(self._predictors[block].nbytes for targets in self._targets.values() for block in targets)

    def _score(self, block: Block, y: Tensor) -> Tensor | None:
        for target in self._targets.get(block, ()):
            # Many tokens at once: matrix products, as in prefill.
            self._scores[target] = self._predictors[target].scores(reference.linear, y)
        return self._scores.pop(block, None)

    def _select(self, block: Block, y: Tensor) -> Selection:
        for target in self._targets.get(block, ()):
            # Bound now: the closure runs at once, but on another stream.
            def predict(target: Block = target) -> tuple[Tensor, Tensor]:
                cut = self.cuts[target.layer][target.part]
                linear = partial(self._ops.linear, tokens=self._tokens)
                return cut.select(self._ops, self._predictors[target].scores(linear, y), self._tokens)

            self._pending[target] = self._ops.beside(predict, y)
        self.collect(*block)
        return self._collected.pop(block, None)
