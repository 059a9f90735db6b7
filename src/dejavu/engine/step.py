"""One row of tokens through the model, again and again over the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dejavu.config import Mode
from dejavu.kernels.reference import Selection
from dejavu.model.decoder import Decoder
from dejavu.selection import Selector


class DecodeStep:
    """The decode step of a batch over a cache of its own; captured once, then replayed in one call.

    `rows_read` (L, R) int64 counts the rows of each kind that the MLPs have read, and `heads_read` (L,) int64 the query
    heads; `reset_counts` zeroes both.

    Args:
        decoder: the model.
        batch, capacity: rows of the cache, and tokens in each.
        mode: what is read.
        selector: chooses in mode "sparse"; one that is not capturable runs between the kernels of every step.
        pending: tokens that may wait in a head, with lazy keys and values; None: not lazy.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        capacity: int,
        mode: Mode,
        selector: Selector | None = None,
        pending: int | None = None,
    ):
        self._decoder, self._mode = decoder, mode
        self._selector = None if selector is None else _Watched(selector, decoder.config.num_hidden_layers)
        self.cache = decoder.new_cache(batch, capacity, pending)
        self._ids = torch.zeros(batch, dtype=torch.int32)
        self._positions = torch.zeros(batch, dtype=torch.int32)
        # Written through numpy: setting one element of a torch tensor takes microseconds.
        self._ids_view, self._positions_view = self._ids.numpy(), self._positions.numpy()
        self.rows_read = torch.zeros(
            decoder.config.num_hidden_layers, 3 if decoder.config.gated else 2, dtype=torch.int64
        )
        self.heads_read = torch.zeros(decoder.config.num_hidden_layers, dtype=torch.int64)
        self._heads_view = self.heads_read.numpy()
        self._graph = None
        if hasattr(decoder.ops, "capture") and (selector is None or selector.capturable):
            with torch.inference_mode(), decoder.ops.capture() as capture:
                self._logits = self._step()
            self._graph = capture.graph

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache of each row."""
        return (self._positions_view + 1).tolist()

    def reset_counts(self) -> None:
        self.rows_read.zero_()
        self.heads_read.zero_()

    def prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        """Put a prompt of at most `capacity` tokens into a row; returns the logits (V,) after its last token."""
        self._ids_view[row], self._positions_view[row] = ids[-1], len(ids) - 1
        return self._decoder.prefill(torch.tensor(ids), self.cache, row)

    def feed(self, row: int, token_id: int) -> None:
        """Set the next token of a row. A row that is not fed repeats its last token in place, to no effect."""
        self._ids_view[row] = token_id
        self._positions_view[row] += 1

    def run(self) -> Tensor:
        """Read the tokens fed; returns logits (B, V) float32, which the next run overwrites."""
        if self._selector is not None:
            self._selector.advance()
        if self._graph is not None:
            self._graph.replay()
            logits = self._logits
        else:
            with torch.inference_mode():
                logits = self._step()
        H, counts = self._decoder.config.num_attention_heads, None if self._selector is None else self._selector.counts
        for layer in range(len(self._heads_view)):
            count = None if counts is None else counts[layer]
            self._heads_view[layer] += H if count is None else count[0]
        return logits

    def _step(self) -> Tensor:
        return self._decoder.step(
            self._ids,
            self._positions,
            self.cache,
            mode=self._mode,
            selector=self._selector,
            rows_read=self.rows_read,
        )


class _Watched:
    """A selector, and how many heads it selected last: `counts` holds for each layer its count, or None for all."""

    def __init__(self, selector: Selector, layers: int):
        self._selector, self.capturable = selector, selector.capturable
        self.advance, self.begin, self.neurons = selector.advance, selector.begin, selector.neurons
        self.counts: list[np.ndarray | None] = [None] * layers

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        selection = self._selector.heads(layer, y, attend)
        # Through numpy, as above; a captured count is a buffer that every replay renews.
        self.counts[layer] = None if selection is None else selection[1].numpy()
        return selection
