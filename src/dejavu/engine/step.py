"""One row of tokens through the model, again and again over the same memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import Mode
from dejavu.engine.crossover import Costs
from dejavu.errors import CapacityError, ConfigError, NotFiniteError
from dejavu.kernels.base import Recording
from dejavu.kernels.reference import Selection
from dejavu.model.cache import KVCache
from dejavu.model.decoder import Decoder
from dejavu.model.finite import is_finite, not_finite, trace
from dejavu.selection import Selector
from dejavu.selection.selector import Cuts, Part

# Counts of so many steps, and of every doubling of them, decide which parts are read whole.
FIRST_LOOK = 4


class DecodeStep:
    """The decode step of a batch over a cache of its own; captured once, then replayed in one call.

    `rows_read` (L, R) int64 counts the rows of each kind that the MLPs have read, `attn_read` what attention has;
    `restart` zeroes both.

    Args:
        decoder: the model.
        batch, capacity: rows of the cache, and tokens in each.
        mode: what is read.
        selector: chooses in mode "sparse"; one that is not capturable runs between the kernels of every step.
        pending: tokens that may wait in a head, with lazy keys and values; None: not lazy.
        costs: for this batch size, with a selector that is captured: a part whose selections were, after a few steps,
            larger than pays is read whole from then on. None: selections are always obeyed.
        captured: record the step where it can be; False: call its ops one by one.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        capacity: int,
        mode: Mode,
        selector: Selector | None = None,
        pending: int | None = None,
        costs: Costs | None = None,
        captured: bool = True,
    ):
        self._decoder, self._mode, self._costs = decoder, mode, costs
        self.cache = decoder.new_cache(batch, capacity, pending)
        self._ids = torch.zeros(batch, dtype=torch.int32)
        self._positions = torch.zeros(batch, dtype=torch.int32)
        self._read: list[list[int]] = [[] for _ in range(batch)]  # what each row has read, to trace NaN by
        # Written through numpy: setting one element of a torch tensor takes microseconds.
        self._ids_view, self._positions_view = self._ids.numpy(), self._positions.numpy()
        # On a GPU the step reads copies of them there.
        self._inputs = self._ids.to(decoder.device), self._positions.to(decoder.device)
        L, kinds = decoder.config.num_hidden_layers, 3 if decoder.config.gated else 2
        self.rows_read = torch.zeros(L, kinds, dtype=torch.int64, device=decoder.device)
        self._steps = 0
        watched = None
        if selector is not None:
            watched = Watched(selector.fresh(), decoder, self.cache)
        self._now = self._obedient = _Recorded(watched, frozenset())
        if captured and can_capture(decoder, selector):
            self._now = self._obedient = self._capture(watched, frozenset())
        assert costs is None or self._now.graph is not None

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache of each row."""
        return (self._positions_view + 1).tolist()

    @property
    def _selector(self) -> Watched | None:
        return self._now.selector

    @property
    def attn_read(self) -> Tensor:
        """Since the last restart, by layer: query heads read, groups whose cache was read, groups whose keys and values
        were projected: (3, L) int64."""
        if self._selector is None:
            c = self._decoder.config
            every = torch.tensor([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads])
            return (self._steps * every)[:, None].expand(-1, c.num_hidden_layers)
        return self._selector.attn_read

    @property
    def heads_read(self) -> Tensor:
        """Query heads read since the last reset, by layer: (L,) int64."""
        return self.attn_read[0]

    @property
    def whole(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers whose selections did not pay: of heads, of neurons."""
        return tuple(tuple(sorted(layer for layer, p in self._now.whole if p == part)) for part in (0, 1))

    @property
    def predictor_bytes(self) -> int:
        """What the selector reads in a step to choose, where it says so."""
        return 0 if self._selector is None else self._selector.nbytes

    def restart(self) -> None:
        """A new text begins in every row: counts start again, and selections that are drawn are drawn as before."""
        self._steps, self._now = 0, self._obedient
        self.rows_read.zero_()
        if self._selector is not None:
            self._selector.reset()

    def prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        """Put a prompt into a row; returns the logits (V,) after its last token.

        Raises: ConfigError for a row or token id that does not exist, or no token; CapacityError for more tokens than
            `capacity`; NotFiniteError as Decoder.prefill.
        """
        self._check(row, *ids)
        if not 1 <= len(ids) <= self.cache.capacity:
            raise CapacityError(f"the cache holds 1 to {self.cache.capacity} tokens a row, found {len(ids)}")
        self._read[row] = list(ids)
        self._ids_view[row], self._positions_view[row] = ids[-1], len(ids) - 1
        return self._decoder.prefill(torch.tensor(ids), self.cache, row).cpu()

    def feed(self, row: int, token_id: int) -> None:
        """Set the next token of a row. A row that is not fed repeats its last token in place, to no effect.

        Raises: ConfigError for a row or token id that does not exist; CapacityError where the row is full.
        """
        self._check(row, token_id)
        if self._positions_view[row] + 1 >= self.cache.capacity:
            raise CapacityError(f"row {row} is full: the cache holds {self.cache.capacity} tokens a row")
        self._read[row].append(token_id)
        self._ids_view[row] = token_id
        self._positions_view[row] += 1

    def run(self) -> Tensor:
        """Read the tokens fed; returns logits (B, V) float32 on the host, which the next run may overwrite.

        Raises: NotFiniteError naming the layer where NaN or infinity begins.
        """
        if self._selector is not None:
            self._selector.advance()
            if not self._selector.in_step:
                self._selector.start()
        for ours, theirs in zip((self._ids, self._positions), self._inputs, strict=True):
            if ours is not theirs:
                theirs.copy_(ours)
        if self._now.graph is not None:
            self._now.graph.replay()
            logits = self._now.logits
        else:
            with torch.inference_mode():
                logits = self._step(self._selector)
        self._steps += 1
        if self._selector is not None and not self._selector.in_step:
            self._selector.count()
        logits = logits.cpu()
        if not is_finite(logits):
            raise self._trace(logits)
        if self._costs is not None and self._steps >= FIRST_LOOK and self._steps & (self._steps - 1) == 0:
            self._look()
        return logits

    def _check(self, row: int, *ids: int) -> None:
        if not 0 <= row < self.cache.batch:
            raise ConfigError(f"row must be in [0, {self.cache.batch}), found {row}")
        V = self._decoder.config.vocab_size
        for token in ids:
            if not 0 <= token < V:
                raise ConfigError(f"token ids must be in [0, {V}), found {token}")

    def _trace(self, logits: Tensor) -> NotFiniteError:
        row = next(row for row in range(len(logits)) if not is_finite(logits[row]))
        error = trace(self._decoder, torch.tensor(self._read[row])) if self._read[row] else None
        return error or not_finite(f"the {self._mode} step")

    def op_seconds(self) -> dict[str, float] | None:
        """Seconds by op of one more run over the tokens fed; None where that is not known."""
        return None if self._now.graph is None else self._now.graph.replay_timed()

    def _capture(self, selector: Watched | None, whole: frozenset[Part]) -> _Recorded:
        logits: list[Tensor] = []
        with torch.inference_mode():
            graph = self._decoder.ops.record(lambda: logits.append(self._step(selector)), self._unchanged)
        return _Recorded(selector, whole, graph, logits[-1])

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Inside, the last step may be repeated in place; then cache and counts are as before."""
        counts = [self.rows_read] if self._selector is None else [self.rows_read, self._selector.totals]
        before = [count.clone() for count in counts]
        try:
            with self.cache.unchanged(self._inputs[1].long()):
                yield
        finally:
            for count, value in zip(counts, before, strict=True):
                count.copy_(value)

    def _look(self) -> None:
        """Read whole what costs less so, by the mean of what was selected since the last reset.

        Until the text ends there is no way back: what a part would select is no longer known.
        """
        c, cuts = self._decoder.config, self._selector.cuts
        heads = (self.heads_read / (self._steps * c.num_attention_heads)).tolist()
        rows = (self.rows_read.cpu() / (self._steps * c.intermediate_size)).tolist()
        more = {
            (layer, 0)
            for layer, pair in enumerate(cuts)
            if pair[0] is not None and self._costs.heads_dense(heads[layer])
        } | {
            (layer, 1)
            for layer, pair in enumerate(cuts)
            if pair[1] is not None
            and self._costs.neurons_dense(rows[layer][0], sum(rows[layer][1:]) / (len(rows[layer]) - 1))
        }
        if more:
            # All that changes is made first and then put in place at once, so that an interrupt leaves all as it was.
            selector = copy(self._selector)
            selector.read_whole(more)
            self._now = self._capture(selector, self._now.whole | more)

    def _step(self, selector: Watched | None) -> Tensor:
        if selector is not None and selector.in_step:
            selector.start()
        logits = self._decoder.step(
            *self._inputs, self.cache, mode=self._mode, selector=selector, rows_read=self.rows_read
        )
        if selector is not None and selector.in_step:
            selector.count()
        return logits


def can_capture(decoder: Decoder, selector: Selector | None) -> bool:
    """Whether a step is recorded once and replayed."""
    return decoder.ops.can_record and (selector is None or selector.capturable)


@dataclass(frozen=True)
class _Recorded:
    """A way to run the step: who selects, the parts that are read whole, and where it is captured, graph and logits."""

    selector: Watched | None
    whole: frozenset[Part]
    graph: Recording | None = None
    logits: Tensor | None = None


class Watched:
    """A selector, and what attention has read of each layer under it: `totals` (3, L) int64, as DecodeStep.attn_read.

    `start` stands before a step and `count` adds what it read: both are part of the step where PyTorch's ops are
    recorded with it, so that a GPU never waits for the host; else they run around it, through numpy.

    Args:
        cache: of the steps; with lazy keys and values it tells which groups were projected, by a full ring too.
    """

    def __init__(self, selector: Selector, decoder: Decoder, cache: KVCache):
        config, device, self.in_step = decoder.config, cache.k.device, decoder.ops.records_torch
        self._heads, self._groups, self._kv_len = config.num_attention_heads, config.num_key_value_heads, cache.kv_len
        self.totals = torch.zeros(3, config.num_hidden_layers, dtype=torch.int64, device=device)
        self._before = None if cache.kv_len is None else cache.kv_len.clone()
        self._every = torch.tensor([self._heads], dtype=torch.int32, device=device)
        self._places: dict[tuple[tuple[int, int], ...], tuple[Tensor, ...]] = {}
        self._lead(selector)

    def _lead(self, selector: Selector) -> None:
        self._selector, self.capturable = selector, selector.capturable
        self.advance, self.begin, self.neurons = selector.advance, selector.begin, selector.neurons
        self.collect = selector.collect
        self.nbytes = getattr(selector, "nbytes", 0)
        # By layer that selects; captured selections are buffers that every replay renews.
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def cuts(self) -> Cuts:
        return self._selector.cuts

    def read_whole(self, parts: Collection[Part]) -> None:
        """Select no longer in these parts; a captured step is then to be captured anew."""
        self._lead(self._selector.without(parts))

    def heads(self, layer: int, y: Tensor, attend: Callable[[], Tensor]) -> Selection:
        selection = self._selector.heads(layer, y, attend)
        if selection is not None:
            self._chosen[layer] = selection if self.in_step else tuple(part.numpy() for part in selection)
        return selection

    def start(self) -> None:
        if self._before is not None:
            self._before.copy_(self._kv_len)

    def count(self) -> None:
        if self.in_step:
            self._count_in_step()
            return
        heads, groups, projected = self.totals.numpy()
        r = self._heads // self._groups
        for layer in range(len(heads)):
            if layer not in self._chosen:
                heads[layer] += self._heads
                groups[layer] += self._groups
                continue
            idx, count = self._chosen[layer]
            n = int(count[0])
            heads[layer] += n
            groups[layer] += n if r == 1 else len(set((idx[:n] // r).tolist()))
        if self._before is None:
            projected += self._groups
        else:
            projected += (self._kv_len.numpy() != self._before.numpy()).any(1).sum(1)

    def _count_in_step(self) -> None:
        heads, groups, projected = self.totals
        layers = range(len(heads))
        counts = torch.cat([self._chosen[i][1] if i in self._chosen else self._every for i in layers])
        heads += counts
        groups += counts if self._heads == self._groups else self._groups_of(counts)
        projected += self._groups if self._before is None else (self._kv_len != self._before).any(1).sum(1)

    def _groups_of(self, counts: Tensor) -> Tensor:
        """(L,) groups with a selected head, all layers in a few kernels: counts (L,) says how many heads are valid."""
        G, r, chosen = self._groups, self._heads // self._groups, sorted(self._chosen.items())
        sizes = tuple((layer, idx.numel()) for layer, (idx, _) in chosen)
        if sizes not in self._places:  # made in the step before the capture, which may not copy from the host
            layer = torch.tensor([i for i, n in sizes for _ in range(n)], dtype=torch.int64)
            place = torch.tensor([at for _, n in sizes for at in range(n)], dtype=torch.int64)
            every = torch.ones(len(counts), G, dtype=torch.int32)
            every[[i for i, _ in sizes]] = 0
            self._places[sizes] = tuple(t.to(counts.device) for t in (layer, place, every))
        layer, place, every = self._places[sizes]
        heads = torch.cat([idx for _, (idx, _) in chosen]).clamp(0, self._heads - 1)  # undefined behind the count
        seen = every.flatten().scatter_add(0, layer * G + heads // r, (place < counts[layer]).int())
        return (seen.view(-1, G) > 0).sum(1)

    def reset(self) -> None:
        self.totals.zero_()
        self._selector.restart()

    @property
    def attn_read(self) -> Tensor:
        """(3, L) int64 on the CPU."""
        return self.totals.cpu().clone()
