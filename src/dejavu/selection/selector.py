"""Who chooses what a decode step reads: the protocol the decoder knows, and the base of the policies that score."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from dejavu.kernels.base import Backend
from dejavu.kernels.reference import Selection, Tokens
from dejavu.selection.block import HEADS, NEURONS, Block

Cuts = Sequence[tuple["Cut | None", "Cut | None"]]


class Selector(Protocol):
    """Makes the selections of one decode step, layer by layer, in the order the decoder asks.

    `begin`, `heads` and `neurons` are part of the step: they call ops of the kernel backend, or, where `capturable` is
    False, anything at all. A captured step records them once; what they return are buffers whose contents the
    replayed ops renew. `advance` runs before every step, outside of it.

    A look-ahead selector starts early by computing inside `heads` (given the input of the attention) what `neurons`
    of the same layer will return, and inside `neurons` what `heads` of the next layer will.
    """

    capturable: bool
    cuts: Cuts  # None: the block is read whole, and nothing is selected

    def fresh(self) -> Self:
        """The same selector for one step or pass: what it remembers from call to call is its own, so that threads and
        engines may share the one that it was made from."""

    def restart(self) -> None:
        """A new text begins: what follows depends on nothing that came before it."""

    def advance(self) -> None:
        """Prepare the next step. Called on the host, before the step runs or is replayed."""

    def begin(self, x: Tensor, tokens: Tokens | None) -> None:
        """Start a step. x: (N, C) float32, the token embeddings, with learned positions added; tokens: whose padding
        selects nothing; None: all are real."""

    def collect(self, layer: int, part: int) -> None:
        """Wait for the heads (part 0) or neurons (1) of a layer, if they are being chosen already.

        Called before the norm that precedes their use: on a GPU the kernel after a norm then follows that alone, and
        begins 3 microseconds earlier than one that has to wait for two.
        """

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        """The query heads that a layer reads; None for all.

        Args:
            y: (N, C) float32, the normalised input of the layer's attention.
            attend: computes all heads' outputs (N, H, D) float32 and the token's keys and values; for selectors that
                look at what they choose from.
        """

    def neurons(self, layer: int, y: Tensor) -> Selection:
        """The neurons that a layer reads; None for all. y: (N, C) float32, the normalised input of the layer's MLP."""

    def without(self, blocks: Collection[Block]) -> Self:
        """The same selector with these blocks read whole, and nothing spent on choosing for them."""


@dataclass(frozen=True)
class Cut:
    """Which of U scored units a token keeps: those that reach `threshold` (None: any score does), the best `k` at most.

    The tokens of a step share the union of what they keep; with a threshold the union holds at most N * k.
    """

    k: int
    threshold: float | None = None

    def select(self, ops: Backend, scores: Tensor, tokens: Tokens | None = None) -> Selection:
        """The selection of a step. scores: (N, U) float32, no NaN."""
        if self.threshold is None:
            return ops.select_topk(scores, self.k, tokens)
        return ops.select_threshold(scores, self.threshold, min(len(scores) * self.k, scores.shape[1]), tokens)

    def mask(self, scores: Tensor) -> Tensor:
        """(T, N) bool: what each of T tokens would keep if it were alone, equal scores by lower index."""
        if self.threshold is not None:
            mask = scores >= self.threshold
            over = mask.sum(1) > self.k
            if over.any():
                mask[over] = Cut(self.k).mask(scores[over])
            return mask
        last = scores.topk(min(self.k, scores.shape[1]), dim=1, sorted=False).values.amin(1, keepdim=True)
        mask = scores >= last
        over = mask.sum(1) > self.k
        if over.any():
            above, ties = scores[over] > last[over], scores[over] == last[over]
            mask[over] = above | (ties & (ties.cumsum(1) <= self.k - above.sum(1, keepdim=True)))
        return mask


class ScoreSelector:
    """Scores every unit of a layer and keeps what a cut leaves.

    `head_scores` and `neuron_scores` are called once a layer, in order, with the inputs that `Selector.heads` and
    `.neurons` get; they also serve many tokens at once (model.hooks.TokenMasks). None: the layer reads all.

    Args:
        cuts: of the heads and the neurons of each layer; None reads all.
        ops: the kernel backend.
    """

    capturable = True
    _tokens: Tokens | None = None  # of the step, since `begin`

    def __init__(self, cuts: Cuts, ops: Backend):
        self.cuts, self._ops = list(cuts), ops

    def without(self, blocks: Collection[Block]) -> Self:
        other = copy(self)
        other.cuts = [
            tuple(None if Block(layer, part) in blocks else cut for part, cut in enumerate(pair))
            for layer, pair in enumerate(self.cuts)
        ]
        return other

    def fresh(self) -> Self:
        return copy(self)

    def restart(self) -> None:
        """Most policies remember nothing beyond a step."""

    def advance(self) -> None:
        """Most policies look at nothing but the step itself."""

    def begin(self, x: Tensor, tokens: Tokens | None) -> None:
        """Most policies don't need the embedding."""
        self._tokens = tokens

    def collect(self, layer: int, part: int) -> None:
        """Most policies begin nothing early."""

    def head_scores(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Tensor | None:
        """(T, H) float32, or None; see Selector.heads."""
        raise NotImplementedError

    def neuron_scores(self, layer: int, y: Tensor) -> Tensor | None:
        """(T, I) float32, or None; see Selector.neurons."""
        raise NotImplementedError

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        scores = self.head_scores(layer, y, attend)
        return None if scores is None else self.cuts[layer][HEADS].select(self._ops, scores, self._tokens)

    def neurons(self, layer: int, y: Tensor) -> Selection:
        scores = self.neuron_scores(layer, y)
        return None if scores is None else self.cuts[layer][NEURONS].select(self._ops, scores, self._tokens)
