"""How few units give a block's output: the paper's oracle density (Figures 1(1) and 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dejavu.profile.accumulator import Accumulator


def fewest(scores: Tensor, error: Callable[[Tensor], Tensor], bounds: Sequence[float]) -> dict[float, Tensor]:
    """For each token the smallest set of its best units whose error is within a bound.

    The number of units is found by bisection, in log2(N) evaluations a bound: with it the error is within the bound,
    with one unit fewer it is not.

    Args:
        scores: (T, N) float32; units are kept in falling order of it. Units of score 0 are never needed.
        error: of masks (T, N) bool of what is kept, gives (T,) float32; 0 where every unit of score above 0 is kept.
        bounds: on the error, above 0.
    Returns: bound -> masks (T, N) bool.
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    enough = (scores > 0).sum(1)
    found = {}
    for bound in sorted(bounds):
        low = torch.full_like(enough, -1)  # too few; `enough` is never
        while (enough - low > 1).any():
            middle = (low + enough) // 2
            within = (error(rank < middle[:, None]) <= bound) & (enough - low > 1)
            enough, low = torch.where(within, middle, enough), torch.where(within, low, middle)
        found[bound] = rank < enough[:, None]
    return found


class OracleDensity(Accumulator):
    """Units needed for each error bound, layer by layer. `units` (E, L) int64 is summed over `tokens` (L,) tokens."""

    def __init__(self, bounds: int, layers: int):
        self.units = torch.zeros(bounds, layers, dtype=torch.int64)
        self.tokens = torch.zeros(layers, dtype=torch.int64)

    def add(self, layer: int, kept: Sequence[Tensor]) -> None:
        """kept: for each bound the masks (T, N) bool of T tokens."""
        for bound, mask in enumerate(kept):
            self.units[bound, layer] += mask.sum()
        self.tokens[layer] += len(kept[0])

    def density(self, units: int) -> Tensor:
        """(E, L) float64: the mean fraction of a layer's `units`."""
        return self.units.double() / (self.tokens * units)


class Contribution(Accumulator):
    """How much each unit matters: the sum over tokens of its squared output norm. heads (L, H), neurons (L, I)."""

    def __init__(self, layers: int, heads: int, neurons: int):
        self.heads = torch.zeros(layers, heads)
        self.neurons = torch.zeros(layers, neurons)
