"""Selections that ignore the context: the baselines that show what contextual selection is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from dejavu.kernels.base import Backend
from dejavu.kernels.reference import Selection
from dejavu.selection.selector import Cuts, ScoreSelector


def fixed_selection(units: Tensor) -> Selection:
    """A selection that holds the given units, in any order."""
    return units.sort().values.int().contiguous(), torch.tensor([units.numel()], dtype=torch.int32, device=units.device)


class _Buffers(ScoreSelector):
    """Selections that lie ready in buffers, made from the scores of a single token.

    Args:
        totals: heads and neurons of a layer.
        device: of the model.
    """

    def __init__(self, cuts: Cuts, ops: Backend, totals: tuple[int, int], device: torch.device):
        super().__init__(cuts, ops)
        self._totals, self._device = totals, device
        self._buffers = [
            tuple(None if cut is None else self._draw(layer, part) for part, cut in enumerate(pair))
            for layer, pair in enumerate(self.cuts)
        ]

    def scores(self, layer: int, part: int, tokens: int) -> Tensor:
        """(tokens, N) float32 of the heads (part 0) or neurons (part 1)."""
        raise NotImplementedError

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        return None if self.cuts[layer][0] is None else self.scores(layer, 0, len(y))

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        return None if self.cuts[layer][1] is None else self.scores(layer, 1, len(y))

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        return None if self.cuts[layer][0] is None else self._buffers[layer][0]

    def neurons(self, layer: int, y: Tensor) -> Selection:
        return None if self.cuts[layer][1] is None else self._buffers[layer][1]

    def _draw(self, layer: int, part: int) -> Selection:
        return fixed_selection(self.cuts[layer][part].mask(self.scores(layer, part, 1))[0].nonzero().flatten())


class StaticSelector(_Buffers):
    """The same units for every token: of each layer the most important ones.

    Args:
        importance: of each head (H,) and each neuron (I,), for each layer.
    """

    def __init__(self, cuts: Cuts, ops: Backend, importance: Sequence[tuple[Tensor, Tensor]], device: torch.device):
        self._importance = importance
        super().__init__(cuts, ops, (importance[0][0].numel(), importance[0][1].numel()), device)

    def scores(self, layer: int, part: int, tokens: int) -> Tensor:
        return self._importance[layer][part].to(self._device).float().expand(tokens, -1)


class RandomSelector(_Buffers):
    """New random units for every token, drawn on the host before each step. `totals`: heads and neurons of a layer.

    The n-th step of every text draws the same.
    """

    def __init__(self, cuts: Cuts, ops: Backend, totals: tuple[int, int], seed: int, device: torch.device):
        self._seed, self._generator = seed, torch.Generator().manual_seed(seed)
        super().__init__(cuts, ops, totals, device)

    def fresh(self) -> Self:
        return RandomSelector(self.cuts, self._ops, self._totals, self._seed, self._device)

    def restart(self) -> None:
        self._generator.manual_seed(self._seed)

    def scores(self, layer: int, part: int, tokens: int) -> Tensor:
        return torch.rand(tokens, self._totals[part], generator=self._generator).to(self._device)

    def advance(self) -> None:
        for layer, pair in enumerate(self._buffers):
            for part, selection in enumerate(pair):
                if self.cuts[layer][part] is not None:
                    selection[0].copy_(self._draw(layer, part)[0])
