"""Selections that ignore the context: the baselines that show what contextual selection is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.kernels.reference import Selection


def fixed_selection(units: Tensor) -> Selection:
    """A selection that holds the given units, in any order."""
    return units.sort().values.int().contiguous(), torch.tensor([units.numel()], dtype=torch.int32, device=units.device)


class _Buffers:
    """Selections that lie ready in buffers."""

    capturable = True

    def __init__(self, heads: list[Selection], neurons: list[Selection]):
        self._heads, self._neurons = heads, neurons

    def advance(self) -> None:
        """Nothing changes between steps."""

    def begin(self, x: Tensor) -> None:
        """The token doesn't matter."""

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        return self._heads[layer]

    def neurons(self, layer: int, y: Tensor) -> Selection:
        return self._neurons[layer]


class StaticSelector(_Buffers):
    """The same units for every token: of each layer the most important ones.

    Args:
        counts: heads and neurons to keep, for each layer.
        importance: of each head (H,) and each neuron (I,), for each layer.
    """

    def __init__(self, counts: Sequence[tuple[int, int]], importance: Sequence[tuple[Tensor, Tensor]]):
        def best(layer: int, part: int) -> Selection:
            scores, k = importance[layer][part], counts[layer][part]
            return None if k >= scores.numel() else fixed_selection(scores.topk(k).indices)

        super().__init__(*([best(layer, part) for layer in range(len(counts))] for part in range(2)))


class RandomSelector(_Buffers):
    """New random units for every token, drawn on the host before each step."""

    def __init__(self, counts: Sequence[tuple[int, int]], config: ModelConfig, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._totals = config.num_attention_heads, config.intermediate_size
        super().__init__(
            *(
                [self._draw(k[part], total) if k[part] < total else None for k in counts]
                for part, total in enumerate(self._totals)
            )
        )

    def advance(self) -> None:
        for selections, total in zip((self._heads, self._neurons), self._totals, strict=True):
            for selection in selections:
                if selection is not None:
                    idx = selection[0]
                    idx.copy_(self._draw(idx.numel(), total)[0])

    def _draw(self, k: int, total: int) -> Selection:
        return fixed_selection(torch.randperm(total, generator=self._generator)[:k])
