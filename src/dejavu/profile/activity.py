"""Which units are active for which token: how often each fires, what tokens share, what a batch needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dejavu.profile.accumulator import Accumulator

# Masks of this many tokens, drawn evenly from the whole text, stand for all in the union of a batch.
SAMPLE = 256
# So many random batches are averaged for one union density.
BATCHES = 64


class Activity(Accumulator):
    """Sums over masks of active units.

    `fired` (L, N) int64 counts for each unit the tokens it was active for, of `tokens` (L,). Over tokens that follow
    another one, `following` (L,) sums their active units and `shared` (L,) those active for the token before, too.
    `sample` (L, SAMPLE, N / 8) uint8 holds packed masks of tokens, each token of the text with the same chance.
    """

    def __init__(self, layers: int, units: int):
        self._units = units
        self.tokens = torch.zeros(layers, dtype=torch.int64)
        self.fired = torch.zeros(layers, units, dtype=torch.int64)
        self.following = torch.zeros(layers, dtype=torch.int64)
        self.shared = torch.zeros(layers, dtype=torch.int64)
        self.sample = torch.zeros(layers, SAMPLE, -(-units // 8), dtype=torch.uint8)

    def add(self, layer: int, mask: Tensor) -> None:
        """mask: (T, N) bool, of tokens that follow one another."""
        self.fired[layer] += mask.sum(0)
        self.following[layer] += mask[1:].sum()
        self.shared[layer] += (mask[1:] & mask[:-1]).sum()
        self._draw(layer, mask.numpy())
        self.tokens[layer] += len(mask)

    def _draw(self, layer: int, mask: np.ndarray) -> None:
        """Reservoir sampling. Seeded by the tokens seen: the same in all layers, and when a run is resumed."""
        seen = int(self.tokens[layer])
        arrival = np.arange(seen, seen + len(mask))
        slots = np.random.default_rng(seen).integers(0, arrival + 1)
        slots = np.where(arrival < SAMPLE, arrival, slots)
        kept = slots < SAMPLE
        packed = torch.from_numpy(np.packbits(mask[kept], axis=1))
        for slot, row in zip(slots[kept], packed, strict=True):
            self.sample[layer, slot] = row

    def density(self) -> Tensor:
        """(L,) float64: the mean fraction of units that are active."""
        return self.fired.double().mean(1) / self.tokens

    def overlap(self) -> Tensor:
        """(L,) float64: the share of a token's active units that the token before had, too; 0 without any."""
        return self.shared.double() / self.following.clamp(min=1)

    def frequency(self) -> Tensor:
        """(L, N) float64: the fraction of tokens that each unit is active for, in falling order."""
        return (self.fired.double() / self.tokens[:, None]).sort(1, descending=True).values

    def union(self, sizes: Sequence[int]) -> Tensor:
        """(B, L) float64: the mean fraction of units active for any of so many random tokens together.

        NaN for a size larger than the number of tokens in the sample.
        """
        layers, rows = len(self.tokens), min(SAMPLE, int(self.tokens.min()))
        out = torch.full((len(sizes), layers), torch.nan, dtype=torch.float64)
        for layer in range(layers):
            masks = np.unpackbits(self.sample[layer, :rows].numpy(), axis=1, count=self._units)
            for at, size in enumerate(sizes):
                if size <= rows:
                    random = np.random.default_rng(size)
                    batches = [masks[random.choice(rows, size, replace=False)].max(0).mean() for _ in range(BATCHES)]
                    out[at, layer] = float(np.mean(batches))
        return out
