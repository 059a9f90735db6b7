"""One step over tokens of any rows of a cache, again and again in the same memory; and such steps of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dejavu.config import Mode
from dejavu.engine.crossover import whole_blocks
from dejavu.errors import ConfigError, NotFiniteError
from dejavu.kernels.base import Recording
from dejavu.kernels.reference import Tokens
from dejavu.model.cache import KVCache
from dejavu.model.counts import Counts
from dejavu.model.decoder import Decoder
from dejavu.model.finite import is_finite, not_finite, trace
from dejavu.selection import Selector
from dejavu.selection.block import HEADS, NEURONS, Block


class DecodeStep:
    """The decode step of up to `size` tokens; captured once, then replayed in one call.

    Args:
        decoder: the model.
        cache: whose rows the tokens stand in; other steps may use it between two runs.
        size: tokens that fit; those of a run that has fewer are followed by padding.
        mode: what is read.
        selector: chooses in mode "sparse"; used by this step alone, or by steps that take turns. One that is not
            capturable runs between the kernels of every step.
        counts: to which what is read is added; None: of its own.
        captured: record the step where it can be; False: call its ops one by one.
        shares: a step that never runs at the same time; memory may then serve both.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        size: int,
        mode: Mode,
        selector: Selector | None = None,
        counts: Counts | None = None,
        captured: bool = True,
        shares: DecodeStep | None = None,
    ):
        self._decoder, self.cache, self.size, self._mode, self._selector = decoder, cache, size, mode, selector
        self.counts = counts or Counts(decoder.config, decoder.device)
        self._host = Tokens(*torch.zeros(3, size, dtype=torch.int32))
        self._host.rows.fill_(-1)
        # Written through numpy: setting one element of a torch tensor takes microseconds.
        self._views = [tensor.numpy() for tensor in self._host]
        # On a GPU the step reads copies of them there.
        self._inputs = Tokens(*(tensor.to(decoder.device) for tensor in self._host))
        self._recording: Recording | None = None
        self._greedy: Recording | None = None
        if captured and can_capture(decoder, selector):
            self._capture(None if shares is None else shares._recording)

    def run(self, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Read tokens, each behind what its row holds; the rows then hold them too.

        Args:
            ids: 1 to `size` of them.
            rows: of each token; tokens of one row stand together, in their order.
        Returns: logits (N, V) float32 on the host, which the next run may overwrite.
        Raises: ConfigError for a row or token id that does not exist, or too many tokens; CapacityError where a row is
            full; NotFiniteError naming the layer where NaN or infinity begins. The rows then hold what they held.
        """
        n = len(ids)
        self._put(ids, rows)
        if self._selector is not None:
            self._selector.advance()
        self._feed()
        if self._recording is not None:
            self._recording.replay()
            logits = self._logits
        else:
            with torch.inference_mode():  # what runs between the kernels need not know padding
                logits = self._step(Tokens(*(tensor[:n] for tensor in self._inputs)))
        logits = logits[:n].cpu()
        if not is_finite(logits):
            self._settle(rows)
            raise self._trace(next(n for n in range(len(logits)) if not is_finite(logits[n])), ids, rows)
        for row, token in zip(rows, ids, strict=True):
            self.cache.append(row, (token,))
        self.counts.steps += 1
        self.counts.tokens += n
        return logits

    def greedy(self, ids: Sequence[int], rows: Sequence[int], most: int) -> Iterator[list[int]]:
        """Read a token of each row, then the likeliest next ones, again and again; yields those that each step chose.

        On a GPU choosing and feeding happen there, and a step begins before the host knows what the last one chose. At
        a yield the rows hold what was read up to that choice. Ends where a row is full; close it to end before.

        Args:
            ids, rows: as of `run`, every row once.
            most: steps, at least 1.
        Raises: as `run`.
        """
        if len(set(rows)) < len(rows):
            raise ConfigError(f"greedy steps read one token of each row, found rows {list(rows)}")
        if self._recording is not None and self._decoder.ops.records_torch:
            yield from self._greedy_on_device(ids, rows, most)
            return
        for _ in range(self._steps_left(rows, most)):
            ids = self.run(ids, rows).numpy().argmax(1).tolist()
            yield ids

    def _steps_left(self, rows: Sequence[int], most: int) -> int:
        """One at least, which says what is wrong where a row is full."""
        return max(1, min(most, self.cache.capacity - max(self.cache.length(row) for row in rows)))

    def _greedy_on_device(self, ids: Sequence[int], rows: Sequence[int], most: int) -> Iterator[list[int]]:
        n, ops = len(ids), self._decoder.ops
        self._put(ids, rows)
        if self._greedy is None:
            self._inputs.rows.fill_(-1)
            with torch.inference_mode():
                self._greedy = ops.record(self._choose, self._rehearsal, self._recording)
        self._feed()
        waiting = None
        try:
            for _ in range(self._steps_left(rows, most)):
                if self._selector is not None:
                    self._selector.advance()
                self._greedy.replay()
                self.counts.steps += 1
                self.counts.tokens += n
                before, waiting = waiting, ops.fetch(self._chosen)
                if before is not None:
                    ids = self._chosen_of(before, ids, rows)
                    yield ids
            yield self._chosen_of(waiting, ids, rows)
        finally:
            self._settle(rows)

    def _choose(self) -> None:
        self._chosen = self._decoder.ops.choose(self._step(self._inputs), self._inputs)

    def _chosen_of(self, result: Callable[[], Tensor], ids: Sequence[int], rows: Sequence[int]) -> list[int]:
        """What a step that read ids, which the rows then hold, chose."""
        chosen = result()[: len(ids)].tolist()
        if min(chosen) < 0:
            raise self._trace(chosen.index(-1), ids, rows)
        for row, token in zip(rows, ids, strict=True):
            self.cache.append(row, (token,))
        return chosen

    def _feed(self) -> None:
        for host, theirs in zip(self._host, self._inputs, strict=True):
            if host is not theirs:
                theirs.copy_(host)

    def op_seconds(self, ids: Sequence[int], rows: Sequence[int]) -> dict[str, float] | None:
        """Seconds by op of a run, whose tokens are then forgotten; None where that is not known."""
        self._put(ids, rows)
        try:
            return None if self._recording is None else self._recording.replay_timed()
        finally:
            self._settle(rows)

    def _put(self, ids: Sequence[int], rows: Sequence[int]) -> None:
        n, V = len(ids), self._decoder.config.vocab_size
        if not 1 <= n <= self.size or len(rows) != n:
            raise ConfigError(f"a step of this size takes 1 to {self.size} tokens, found {n} of {len(rows)} rows")
        for token in ids:
            if not 0 <= token < V:
                raise ConfigError(f"token ids must be in [0, {V}), found {token}")
        ours, theirs, positions = self._views
        begun: set[int] = set()
        count = 0
        for at, row in enumerate(rows):
            count = count + 1 if at and row == rows[at - 1] else 1
            if count == 1 and row in begun:
                raise ConfigError(f"the tokens of a row must stand together, found row {row} again")
            begun.add(row)
            self.cache.require_room(row, count)
            self.cache.require_burst(count)
            ours[at], theirs[at], positions[at] = ids[at], row, self.cache.length(row) + count - 1
        ours[n:], theirs[n:], positions[n:] = 0, -1, 0

    def _settle(self, rows: Sequence[int]) -> None:
        for row in set(rows):
            self.cache.settle(row)

    def _trace(self, bad: int, ids: Sequence[int], rows: Sequence[int]) -> NotFiniteError:
        """What is wrong with the logits of token `bad` of a run."""
        text = [*self.cache.tokens(rows[bad]), *(i for i, row in zip(ids, rows, strict=True) if row == rows[bad])]
        return trace(self._decoder, torch.tensor(text)) or not_finite(f"the {self._mode} step")

    def _capture(self, shares: Recording | None) -> None:
        logits: list[Tensor] = []
        with torch.inference_mode():
            work = lambda: logits.append(self._step(self._inputs))  # noqa: E731
            self._recording = self._decoder.ops.record(work, self._rehearsal, shares)
        self._logits = logits[-1]

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Inside, the step may run: its tokens are all padding, so the cache stays, and the counts are put back."""
        counts = self.counts.rows_read, self.counts.attn_read
        before = [count.clone() for count in counts]
        yield
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)

    def _step(self, tokens: Tokens) -> Tensor:
        return self._decoder.step(tokens, self.cache, mode=self._mode, selector=self._selector, counts=self.counts)


class Steps:
    """Decode steps of 1, 2, 4, 8 ... tokens over one cache, each made when it is first needed; they take turns.

    `counts` are of all of them, and a GPU's memory for what lies between the kernels serves them all.

    Args:
        decoder, cache, mode, captured: as DecodeStep takes them.
        selector: a copy of its own is made of it.
        crossover: in steps of several tokens read those parts whole that are measured to be faster so
            (engine.crossover); with a selector that is captured.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        mode: Mode,
        selector: Selector | None = None,
        *,
        crossover: bool = False,
        captured: bool = True,
    ):
        self._decoder, self.cache, self._mode, self._captured = decoder, cache, mode, captured
        self._origin, self._selector = selector, None if selector is None else selector.fresh()
        self._crossover = crossover and selector is not None and can_capture(decoder, selector)
        self.counts = Counts(decoder.config, decoder.device)
        self._steps: dict[int, DecodeStep] = {}
        self._whole: dict[int, frozenset[Block]] = {}

    def run(self, ids: Sequence[int], rows: Sequence[int], size: int | None = None) -> Tensor:
        """As DecodeStep.run, by the step of `size` tokens; None: by the smallest that holds them."""
        return self.step(size or bucket(len(ids))).run(ids, rows)

    def step(self, size: int) -> DecodeStep:
        """The step of one size."""
        if size not in self._steps:
            selector = self._selector
            if whole := self._whole_blocks(size):
                selector = selector.without(whole)
            settings = self._decoder, self.cache, size, self._mode, selector, self.counts, self._captured
            self._steps[size] = DecodeStep(*settings, next(iter(self._steps.values()), None))
        return self._steps[size]

    def restart(self) -> None:
        """New texts begin: counts start again, and selections that are drawn are drawn as before."""
        self.counts.reset()
        if self._selector is not None:
            self._selector.restart()

    def whole(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers that the step of a size reads whole, since selecting does not pay: of heads, of neurons."""
        blocks = sorted(self._whole_blocks(size))
        return tuple(tuple(layer for layer, p in blocks if p == part) for part in (HEADS, NEURONS))

    def predictor_bytes(self, size: int) -> int:
        """What the selector reads in a step of a size to choose, where it says so."""
        whole = self._whole_blocks(size)
        return 0 if self._selector is None else getattr(self._selector.without(whole), "nbytes", 0)

    def _whole_blocks(self, size: int) -> Collection[Block]:
        if not self._crossover or size == 1:
            # A single row reads what was asked for, on every machine; what a union holds nobody asked for.
            return frozenset()
        if size not in self._whole:
            self._whole[size] = whole_blocks(self._decoder, size, self.cache.pending or None, self._origin)
        return self._whole[size]


def bucket(tokens: int) -> int:
    """The size of the smallest step that holds so many tokens: 1, 2, 4, 8 ..."""
    return 1 << (tokens - 1).bit_length()


def can_capture(decoder: Decoder, selector: Selector | None) -> bool:
    """Whether a step is recorded once and replayed."""
    return decoder.ops.can_record and (selector is None or selector.capturable)
