"""Past which density a part of a layer is faster read whole, measured on the machine that runs it.

The layers of a model have one shape, so a few of them, together larger than the caches, stand for all. Times grow
linearly with what is read, so few measurements give the time at any density; which densities a layer really has is
counted while decoding (engine.step), since the union of a batch depends on the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from weakref import WeakKeyDictionary

import torch

from dejavu.checkpoint.layout import Layer
from dejavu.config import ZEROING_ACTIVATIONS
from dejavu.kernels.reference import Selection
from dejavu.model.decoder import Decoder
from dejavu.selection import Selector
from dejavu.selection.fixed import fixed_selection

# Weights that one timing reads: more than caches hold.
_MEASURED_BYTES = 256 << 20
_ROUNDS = 5
# The lower of the two densities between which times are taken for linear.
_LOW = 0.25
# Ops to time, and what must be done before each time.
Work = tuple[Callable[[], None], Callable[[], object]]

# A FATReLU threshold at which no neuron, or every neuron, is zero.
_ALL, _NONE = -1e30, 1e30

_remembered: WeakKeyDictionary[Decoder, dict[tuple, Costs]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the parts of one layer, for one batch size.

    Args:
        heads: at density 0, and how much more at density 1, choosing not included.
        heads_whole: read whole.
        neurons: at density 0; for reading all first rows; for reading all output rows (gated: up and down).
        neurons_whole: all first rows; how much more with all output rows. One that does not skip them has 0 for the
            latter.
        choosing: heads, neurons: what the selector takes.
    """

    heads: tuple[float, float]
    heads_whole: float
    neurons: tuple[float, float, float]
    neurons_whole: tuple[float, float]
    choosing: tuple[float, float] = (0.0, 0.0)

    def heads_dense(self, density: float) -> bool:
        """Whether attention is faster whole than with this share of the heads."""
        return self.choosing[0] + self.heads[0] + self.heads[1] * density > self.heads_whole

    def neurons_dense(self, density: float, output: float) -> bool:
        """Whether the MLP is faster whole than with this share of first rows, of output rows."""
        sparse = self.choosing[1] + self.neurons[0] + self.neurons[1] * density + self.neurons[2] * output
        return sparse > self.neurons_whole[0] + self.neurons_whole[1] * output


def measure_costs(decoder: Decoder, batch: int, pending: int | None, selector: Selector) -> Costs:
    """The costs of a decoder's layers; measured once for each batch size, setting and number of threads.

    Args:
        pending: as DecodeStep takes it.
        selector: capturable.
    """
    known = _remembered.setdefault(decoder, {})
    key = batch, pending, decoder.ops.num_threads(), tuple(map(tuple, selector.cuts)), getattr(selector, "nbytes", 0)
    if key not in known:
        with torch.inference_mode():
            known[key] = _Meter(decoder, batch, pending).costs(selector)
    return known[key]


@torch.inference_mode()
def choosing_ms(decoder: Decoder, batch: int, selector: Selector) -> float:
    """Milliseconds of a step that a selector which is captured takes, measured alone."""
    return _milliseconds(decoder, [_choosing(decoder, batch, selector)], 1)[0]


def _choosing(decoder: Decoder, batch: int, selector: Selector) -> Work:
    x = torch.randn(batch, decoder.config.hidden_size, device=decoder.device)

    def work() -> None:
        selector.begin(x)
        for layer in range(decoder.config.num_hidden_layers):
            selector.heads(layer, x, _no_attention)
            selector.neurons(layer, x)

    return work, lambda: None


class _Meter:
    def __init__(self, decoder: Decoder, batch: int, pending: int | None):
        self._decoder, self._ops, self._batch, self._pending = decoder, decoder.ops, batch, pending
        self._generator = torch.Generator().manual_seed(0)

    def costs(self, selector: Selector) -> Costs:
        c = self._decoder.config
        heads = [self._attention(share) for share in (_LOW, 1.0, None)]
        zeroing = c.activation in ZEROING_ACTIVATIONS
        runs = [(_LOW, _ALL), (1.0, _ALL), (None, _ALL)] + [(1.0, _NONE), (None, _NONE)] * zeroing
        low, full, whole = _milliseconds(self._decoder, heads, len(self._layers(lambda layer: layer.attn.blocks)))
        times = [self._mlp(share, threshold if zeroing else None) for share, threshold in runs]
        times = _milliseconds(self._decoder, times, len(self._layers(lambda layer: layer.mlp.rows)))
        slope = (times[1] - times[0]) / (1 - _LOW)
        output = times[1] - times[3] if zeroing else 0.0
        skipped = times[2] - times[4] if zeroing else 0.0
        return Costs(
            (full - (full - low) / (1 - _LOW), (full - low) / (1 - _LOW)),
            whole,
            (times[1] - slope, slope - output, output),
            (times[2] - skipped, skipped),
            self._choosing(selector),
        )

    def _layers(self, weight: Callable[[Layer], object]) -> Sequence[Layer]:
        layers = self._decoder.weights.layers
        return layers[: max(1, _MEASURED_BYTES // weight(layers[0]).nbytes)]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._decoder.device)

    def _some(self, total: int, share: float | None) -> Selection:
        if share is None:
            return None
        order = torch.randperm(total, generator=self._generator).to(self._decoder.device)
        return fixed_selection(order[: max(1, round(share * total))])

    def _mlp(self, share: float | None, threshold: float | None) -> Work:
        c, x = self._decoder.config, self._random(self._batch, self._decoder.config.hidden_size)
        layers = self._layers(lambda layer: layer.mlp.rows)
        chosen = [self._some(c.intermediate_size, share) for _ in layers]
        how = {"activation": c.activation, "threshold": c.activation_threshold, "activate_up": c.activate_up}
        if threshold is not None:
            how |= {"activation": "fatrelu", "threshold": threshold, "exact": True}

        def work() -> None:
            for layer, neurons in zip(layers, chosen, strict=True):
                self._ops.mlp(x, layer.mlp.rows, layer.mlp.in_bias, neurons, **how)

        return work, lambda: None

    def _attention(self, share: float | None) -> Work:
        """q, k, v, attention over few tokens and the output projection: sparse attention saves the more the longer the
        context, so this never makes it look better than it is."""
        d, c = self._decoder, self._decoder.config
        layers = self._layers(lambda layer: layer.attn.blocks)
        chosen = [self._some(c.num_attention_heads, share) for _ in layers]
        # A head that is read every n-th step finds n tokens waiting.
        waiting = 1 if share is None or self._pending is None else min(round(1 / share), self._pending)
        cache = d.new_cache(self._batch, 2 * waiting, self._pending)
        cache.k.zero_(), cache.v.zero_()
        y = self._random(self._batch, c.hidden_size)
        positions = torch.full((self._batch,), waiting - 1, dtype=torch.int32, device=d.device)
        if cache.hidden is not None:
            cache.hidden.zero_()

        def work() -> None:
            for i, (layer, heads) in enumerate(zip(layers, chosen, strict=True)):
                d.attention_block(y, layer, positions, cache, i, heads)

        return work, (lambda: None) if cache.kv_len is None else cache.kv_len.zero_

    def _choosing(self, selector: Selector) -> tuple[float, float]:
        """Of the heads and of the neurons of a layer, each measured with the other read whole."""
        L = self._decoder.config.num_hidden_layers
        works, chosen = [], []
        for part in (0, 1):
            alone = selector.without({(layer, 1 - part) for layer in range(L)})
            chosen.append(sum(pair[part] is not None for pair in selector.cuts))
            works.append(_choosing(self._decoder, self._batch, alone))
        total = _milliseconds(self._decoder, works, 1)
        return tuple(ms / max(1, count) for ms, count in zip(total, chosen, strict=True))


def _no_attention() -> None:
    raise AssertionError("a selector that is captured does not look at the attention")


def _milliseconds(decoder: Decoder, works: Sequence[Work], layers: int) -> list[float]:
    """The best time of each, by layer, taken in turns: the best, since other programs only ever add to it."""
    graphs = [decoder.ops.record(work, partial(_after, before)) for work, before in works]
    best = [float("inf")] * len(works)
    for _ in range(_ROUNDS):
        for i, (graph, (_, before)) in enumerate(zip(graphs, works, strict=True)):
            before()
            decoder.ops.wait()
            began = perf_counter()
            graph.replay()
            decoder.ops.wait()
            best[i] = min(best[i], perf_counter() - began)
    return [seconds * 1e3 / layers for seconds in best]


@contextmanager
def _after(before: Callable[[], object]) -> Iterator[None]:
    before()
    yield
