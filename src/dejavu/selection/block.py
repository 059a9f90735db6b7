"""The blocks of a model: a layer's attention, of which heads are selected, and its MLP, of which neurons are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

HEADS, NEURONS = 0, 1


class Block(NamedTuple):
    """What is read by selection or whole: the heads (part 0) or the neurons (part 1) of a layer."""

    layer: int
    part: int

    @property
    def number(self) -> int:
        """Its place in the order through the model, by which files and packs call it."""
        return 2 * self.layer + self.part

    @classmethod
    def of(cls, number: int) -> Block:
        return cls(*divmod(number, 2))

    @classmethod
    def all(cls, layers: int) -> list[Block]:
        """Those of a model of so many layers, in order."""
        return [cls.of(number) for number in range(2 * layers)]

    @staticmethod
    def pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
        """Values of all blocks, in order, as those of the heads and the neurons of each layer."""
        return list(zip(values[::2], values[1::2], strict=True))
