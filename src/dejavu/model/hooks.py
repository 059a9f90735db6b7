"""Looking into a forward pass over many tokens, and masking what each of them reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dejavu.selection import ScoreSelector

BlockName = Literal["attention", "mlp"]


class Hooks:
    """What `Decoder.prefill` calls, layer by layer, for each chunk of T tokens. Override what you need.

    `heads` and `neurons` may return something else than they are given, which then takes its place.
    """

    def begin(self, x: Tensor, positions: Tensor) -> None:
        """A chunk starts. x: (T, C) float32, the token embeddings, with learned positions added; positions: (T,)."""

    def heads(self, layer: int, y: Tensor, o: Tensor) -> Tensor:
        """Before the output projection. y: (T, C) float32, the normalised input; o: (T, H, D) float32."""
        return o

    def neurons(self, layer: int, y: Tensor, h: Tensor) -> Tensor:
        """Before fc2 (down). y: (T, C) float32, the normalised input; h: (T, I) float32, the activations (gated: times
        up)."""
        return h

    def block(self, layer: int, block: BlockName, x: Tensor, f: Tensor) -> None:
        """A block is done. x: (T, C) float32, the residual stream before it; f: (T, C) float32, what it adds."""


class TokenMasks(Hooks):
    """Every token loses the heads and neurons that its own selection would not have read.

    The result is that of sparse decode steps of batch 1, up to rounding, at the speed of a dense forward pass: keys
    and values of unselected heads are computed for both.

    `kept` (L, 2) counts the heads and neurons kept in each layer, over `tokens` tokens.

    Args:
        selector: a fresh one is made of it for this pass.
        dense_prefix: tokens at positions below it read everything, as a prompt does before decoding.
    """

    def __init__(self, selector: ScoreSelector, dense_prefix: int = 0):
        self._selector, self._dense = selector.fresh(), dense_prefix
        self._all: Tensor | None = None  # (T,) bool: tokens of this chunk that read everything; None: no token does
        self.tokens = 0
        self.kept = torch.zeros(len(selector.cuts), 2, dtype=torch.int64)

    def begin(self, x: Tensor, positions: Tensor) -> None:
        self._selector.begin(x, None)
        prefix = positions < self._dense
        self._all = prefix if prefix.any() else None
        self.tokens += len(x) - int(prefix.sum())

    def heads(self, layer: int, y: Tensor, o: Tensor) -> Tensor:
        return self._keep(layer, 0, self._selector.head_scores(layer, y, lambda: o), o)

    def neurons(self, layer: int, y: Tensor, h: Tensor) -> Tensor:
        return self._keep(layer, 1, self._selector.neuron_scores(layer, y), h)

    def _keep(self, layer: int, part: Literal[0, 1], scores: Tensor | None, values: Tensor) -> Tensor:
        """Zero the values (T, N, ...) of units that the scores (T, N) cut; None: all are kept."""
        whole = 0 if self._all is None else int(self._all.sum())
        if scores is None:
            self.kept[layer, part] += (len(values) - whole) * values.shape[1]
            return values
        mask = self._selector.cuts[layer][part].mask(scores)
        if self._all is not None:
            mask |= self._all[:, None]
        self.kept[layer, part] += int(mask.count_nonzero()) - whole * values.shape[1]
        return values * mask.view(*mask.shape, *(1,) * (values.dim() - 2))
