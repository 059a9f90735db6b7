"""Who chooses what a decode step reads: the protocol that the decoder knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dejavu.kernels.reference import Selection


class Selector(Protocol):
    """Makes the selections of one decode step, layer by layer, in the order the decoder asks.

    `begin`, `heads` and `neurons` are part of the step: they call ops of the kernel backend, or, where `capturable` is
    False, anything at all. A captured step records them once; what they return are buffers whose contents the
    replayed ops renew. `advance` runs before every step, outside of it.

    A look-ahead selector starts early by computing inside `heads` (given the input of the attention) what `neurons`
    of the same layer will return, and inside `neurons` what `heads` of the next layer will.
    """

    capturable: bool

    def advance(self) -> None:
        """Prepare the next step. Called on the host, before the step runs or is replayed."""

    def begin(self, x: Tensor) -> None:
        """Start a step. x: (B, C) float32, the token embeddings, with learned positions added."""

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        """The query heads that a layer reads; None for all.

        Args:
            y: (B, C) float32, the normalised input of the layer's attention.
            attend: computes all heads' outputs (B, H, D) float32 and the token's keys and values; for selectors that
                look at what they choose from.
        """

    def neurons(self, layer: int, y: Tensor) -> Selection:
        """The neurons that a layer reads; None for all. y: (B, C) float32, the normalised input of the layer's MLP."""
