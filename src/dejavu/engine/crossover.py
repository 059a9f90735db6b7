"""Which parts of a layer are faster read whole than by the union of what several tokens select, measured where it runs.

A step of several tokens reads the union of their selections, and past some density reading all is faster. Two things
are measured once for each size of a step, and stay: what the parts of a layer cost, and how dense unions are. The
layers of a model have one shape, so a few of them, together larger than the caches, stand for all; times grow linearly
with what is read, so few measurements give the time at any density. Unions are those of texts that the model itself
writes, drawn with a fixed seed. So no text changes how the next one is read.
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
from dejavu.kernels.reference import Selection, Tokens
from dejavu.model.counts import Counts
from dejavu.model.decoder import Decoder
from dejavu.selection import Selector
from dejavu.selection.block import HEADS, NEURONS, Block
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

# Tokens that each of the model's own texts has, and how many of them come before unions are counted.
_WRITTEN, _BEFORE = 24, 8

_remembered: WeakKeyDictionary[Selector, dict[tuple, frozenset[Block]]] = WeakKeyDictionary()


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

    def heads_faster_whole(self, density: float) -> bool:
        """Whether attention is faster whole than with this share of the heads."""
        return self.choosing[0] + self.heads[0] + self.heads[1] * density > self.heads_whole

    def neurons_faster_whole(self, density: float, output: float) -> bool:
        """Whether the MLP is faster whole than with this share of first rows, of output rows."""
        sparse = self.choosing[1] + self.neurons[0] + self.neurons[1] * density + self.neurons[2] * output
        return sparse > self.neurons_whole[0] + self.neurons_whole[1] * output


def whole_blocks(decoder: Decoder, size: int, pending: int | None, selector: Selector) -> frozenset[Block]:
    """The blocks that a step of `size` tokens reads whole: measured once for each size, setting and number of threads.

    Args:
        pending: of the cache, as Decoder.new_cache takes it.
        selector: capturable.
    """
    known = _remembered.setdefault(selector, {})
    key = id(decoder), size, pending, decoder.ops.num_threads()
    if key not in known:
        with torch.inference_mode():
            costs = measure_costs(decoder, size, pending, selector)
            known[key] = too_dense(costs, union_densities(decoder, size, pending, selector), selector)
    return known[key]


def too_dense(
    costs: Costs, densities: tuple[Sequence[float], Sequence[Sequence[float]]], selector: Selector
) -> frozenset[Block]:
    """The blocks that are selected and would cost less whole. densities: as union_densities returns them."""
    heads, rows = densities
    blocks = set()
    for layer, (head_cut, neuron_cut) in enumerate(selector.cuts):
        if head_cut is not None and costs.heads_faster_whole(heads[layer]):
            blocks.add(Block(layer, HEADS))
        first, *output = rows[layer]
        if neuron_cut is not None and costs.neurons_faster_whole(first, sum(output) / len(output)):
            blocks.add(Block(layer, NEURONS))
    return frozenset(blocks)


def union_densities(
    decoder: Decoder, size: int, pending: int | None, selector: Selector
) -> tuple[list[float], list[list[float]]]:
    """By layer, the shares of the heads, and of the rows of each kind, that steps of `size` texts read."""
    c, generator = decoder.config, torch.Generator().manual_seed(0)
    written = min(_WRITTEN, c.context)
    cache, selector = decoder.new_cache(size, written, pending), selector.fresh()
    counts, rows = Counts(c, decoder.device), torch.arange(size, dtype=torch.int32, device=decoder.device)
    ids = torch.randint(c.vocab_size, (size,), generator=generator)
    for position in range(written):
        if position == min(_BEFORE, written - 1):
            counts.reset()
        selector.advance()
        tokens = Tokens(ids.int().to(decoder.device), rows, torch.full_like(rows, position))
        logits = decoder.step(tokens, cache, mode="sparse", selector=selector, counts=counts).cpu()
        counts.steps += 1
        # What is not a number is not this function's to report.
        likely = logits.nan_to_num().softmax(1)
        ids = torch.multinomial(likely, 1, generator=generator)[:, 0]
    heads = counts.heads_read / (counts.steps * c.num_attention_heads)
    return heads.tolist(), (counts.rows_read / (counts.steps * c.intermediate_size)).tolist()


def measure_costs(decoder: Decoder, size: int, pending: int | None, selector: Selector) -> Costs:
    """The costs of a decoder's layers in steps of `size` tokens. Args: as of whole_blocks."""
    return _Meter(decoder, size, pending).costs(selector)


@torch.inference_mode()
def choosing_ms(decoder: Decoder, size: int, selector: Selector) -> float:
    """Milliseconds of a step that a selector takes, measured alone: what it sees of the attention is given to it."""
    beside = []
    for _ in range(_ROUNDS):
        began = perf_counter()
        selector.advance()
        beside.append(perf_counter() - began)
    work = _choosing(decoder, size, selector)
    return 1e3 * min(beside) + _milliseconds(decoder, [work], 1, captured=selector.capturable)[0]


def _choosing(decoder: Decoder, size: int, selector: Selector) -> Work:
    c, device = decoder.config, decoder.device
    x, o = torch.randn(size, c.hidden_size, device=device), torch.randn(size, c.num_attention_heads, c.head_dim)
    o, tokens = o.to(device), Tokens.one_a_row(torch.zeros(size, dtype=torch.int32, device=device))

    def work() -> None:
        selector.begin(x, tokens)
        for layer in range(c.num_hidden_layers):
            selector.heads(layer, x, lambda: o)
            selector.neurons(layer, x)

    return work, lambda: None


class _Meter:
    def __init__(self, decoder: Decoder, size: int, pending: int | None):
        self._decoder, self._ops, self._size, self._pending = decoder, decoder.ops, size, pending
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
        c, x = self._decoder.config, self._random(self._size, self._decoder.config.hidden_size)
        layers = self._layers(lambda layer: layer.mlp.rows)
        chosen = [self._some(c.intermediate_size, share) for _ in layers]
        how = {"activation": c.activation, "threshold": c.activation_threshold, "activate_up": c.activate_up}
        if threshold is not None:
            how |= {"activation": "fatrelu", "threshold": threshold, "skip_zeros": True}

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
        cache = d.new_cache(self._size, 2 * waiting, self._pending)
        cache.k.zero_(), cache.v.zero_()
        y = self._random(self._size, c.hidden_size)
        tokens = Tokens.one_a_row(torch.full((self._size,), waiting - 1, dtype=torch.int32, device=d.device))
        if cache.hidden is not None:
            cache.hidden.zero_()

        def work() -> None:
            for i, (layer, heads) in enumerate(zip(layers, chosen, strict=True)):
                d.attention_block(y, layer, tokens, cache, i, heads)

        return work, (lambda: None) if cache.kv_len is None else cache.kv_len.zero_

    def _choosing(self, selector: Selector) -> tuple[float, float]:
        """Of the heads and of the neurons of a layer, each measured with the other read whole."""
        blocks = Block.all(self._decoder.config.num_hidden_layers)
        works, chosen = [], []
        for part in (HEADS, NEURONS):
            alone = selector.without({block for block in blocks if block.part != part})
            chosen.append(sum(pair[part] is not None for pair in selector.cuts))
            works.append(_choosing(self._decoder, self._size, alone))
        total = _milliseconds(self._decoder, works, 1)
        return tuple(ms / max(1, count) for ms, count in zip(total, chosen, strict=True))


def _milliseconds(decoder: Decoder, works: Sequence[Work], layers: int, captured: bool = True) -> list[float]:
    """The best time of each, by layer, taken in turns: the best, since other programs only ever add to it."""
    runs = [decoder.ops.record(work, partial(_after, before)).replay if captured else work for work, before in works]
    best = [float("inf")] * len(works)
    for _ in range(_ROUNDS):
        for i, (run, (_, before)) in enumerate(zip(runs, works, strict=True)):
            before()
            decoder.ops.wait()
            began = perf_counter()
            run()
            decoder.ops.wait()
            best[i] = min(best[i], perf_counter() - began)
    return [seconds * 1e3 / layers for seconds in best]


@contextmanager
def _after(before: Callable[[], object]) -> Iterator[None]:
    before()
    yield
