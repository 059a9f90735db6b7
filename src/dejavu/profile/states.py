"""How the residual stream changes from layer to layer (Figure 5 of the paper, and its appendix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.model.hooks import BlockName
from dejavu.profile.accumulator import Accumulator

BLOCKS: tuple[BlockName, ...] = ("attention", "mlp")


class Norms(Accumulator):
    """Around each block, sums over `tokens` (L, 2) of ||X||, ||F(X)||, their ratio, and the cosine of X and X + F(X):
    `sums` (L, 2, 4) float64; the second axis is BLOCKS."""

    def __init__(self, layers: int):
        self.sums = torch.zeros(layers, len(BLOCKS), 4, dtype=torch.float64)
        self.tokens = torch.zeros(layers, len(BLOCKS), dtype=torch.int64)

    def add(self, layer: int, block: BlockName, x: Tensor, f: Tensor) -> None:
        """x, f: (T, C) float32, the residual stream before the block and what the block adds."""
        before, added = x.norm(dim=1), f.norm(dim=1)
        cosine = F.cosine_similarity(x, x + f, dim=1)
        at = BLOCKS.index(block)
        self.sums[layer, at] += torch.stack((before, added, added / before, cosine)).double().sum(1)
        self.tokens[layer, at] += len(x)

    def means(self) -> Tensor:
        """(L, 2, 4) float64."""
        return self.sums / self.tokens[:, :, None]


class Similarity(Accumulator):
    """Cosine similarity of every two layers' inputs: `cosine` (L, L) float64, summed over `tokens` ()."""

    def __init__(self, layers: int):
        self.cosine = torch.zeros(layers, layers, dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def add(self, states: Sequence[Tensor]) -> None:
        """states: the input of each layer, (T, C) float32, for the same tokens."""
        unit = F.normalize(torch.stack(tuple(states)), dim=2)
        self.cosine += torch.einsum("atc,btc->ab", unit, unit).double()
        self.tokens += states[0].shape[0]

    def mean(self) -> Tensor:
        """(L, L) float64."""
        return self.cosine / self.tokens
