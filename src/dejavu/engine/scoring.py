"""Probabilities of given tokens, under what an engine reads for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dejavu.config import ZEROING_ACTIVATIONS
from dejavu.engine.engine import Engine
from dejavu.engine.step import Steps
from dejavu.errors import ConfigError
from dejavu.model.hooks import Hooks, TokenMasks

# steps: the decode steps that generation runs, token by token. masked: whole sequences at once, in which every token
# loses what its own selection would not have read; tested to give the same, up to rounding.
Path = Literal["steps", "masked"]

# Tokens of one masked pass: enough for full speed of the matrix products.
PASS_TOKENS = 1024
# A step's cache holds a multiple of so many tokens, so that few steps are captured.
CAPACITY_STEP = 128


@dataclass(frozen=True)
class Request:
    """Tokens to score: `ids[first:]`, each given all before it. 1 <= first < len(ids).

    The first token reads everything, as a prompt does; all others, those of the context too, read what decoding reads.
    """

    ids: tuple[int, ...]
    first: int

    def __post_init__(self):
        assert 1 <= self.first < len(self.ids)

    @property
    def length(self) -> int:
        """Tokens that are read: the last one is only predicted."""
        return len(self.ids) - 1

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


class Reads:
    """What was read while scoring: sums over tokens (with `steps`, over steps), by layer.

    `heads` and `neurons` (L,) int64 count units read; `active` (L,) the neurons that were not zero, and `found` (L,)
    those of them that were read, where the path sees both (masked, with an activation that gives zeros).
    """

    def __init__(self, engine: Engine):
        c = engine.config
        self._totals = c.num_attention_heads, c.intermediate_size
        self.tokens = 0
        self.heads, self.neurons, self.active, self.found = torch.zeros(4, c.num_hidden_layers, dtype=torch.int64)

    def add(self, tokens: int, heads: Tensor, neurons: Tensor, active: Tensor | int = 0, found: Tensor | int = 0):
        self.tokens += tokens
        self.heads += heads
        self.neurons += neurons
        self.active += active
        self.found += found

    def to_dict(self) -> dict:
        """Sums as plain integers; `add` takes them back as tensors."""
        names = ("heads", "neurons", "active", "found")
        return {"tokens": self.tokens, **{name: getattr(self, name).tolist() for name in names}}

    def densities(self) -> dict[str, list[float] | None]:
        """By layer: `heads`, `mlp`, and `mlp_recall`, the share of the non-zero neurons that were read, or None."""
        if self.tokens == 0:
            return {"heads": None, "mlp": None, "mlp_recall": None}
        heads, mlp = (
            (read / (self.tokens * total)).tolist()
            for read, total in zip((self.heads, self.neurons), self._totals, strict=True)
        )
        recall = (self.found / self.active.clamp(min=1)).tolist() if self.active.any() else None
        return {"heads": heads, "mlp": mlp, "mlp_recall": recall}


class Scorer:
    """Scores requests with one engine.

    Args:
        engine: its mode and selection say what a token reads.
        path: see Path.
        batch: with "steps", rows that decode together; above 1 they share the union of their selections.
    Raises: ConfigError for a path that does not exist, or a batch below 1, or above 1 where nothing decodes together.
    """

    def __init__(self, engine: Engine, path: Path = "masked", batch: int = 1):
        if path not in ("steps", "masked"):
            raise ConfigError(f"path {path!r} does not exist; choose one of: steps, masked")
        if batch < 1 or (batch > 1 and path != "steps"):
            raise ConfigError(f"batch must be 1, or more with path steps, found {batch}")
        self._engine, self._path, self._batch = engine, path, batch
        self._kept: Steps | None = None
        self._vocabulary = engine.config.vocab_size

    def logits(self, requests: Sequence[Request], reads: Reads | None = None) -> list[Tensor]:
        """The logits (scored, V) float32 of every request's scored tokens, on the CPU.

        Args:
            requests: few enough for memory: `passes` cuts a long list.
            reads: takes up what was read.
        """
        reads = reads or Reads(self._engine)
        if len({self._engine.config.stretch(r.length) for r in requests}) > 1:  # rows share their rotary angles
            return [logits for r in requests for logits in self.logits([r], reads)]
        if self._path == "masked":
            return self._masked(requests, reads)
        out: list[Tensor] = []
        for start in range(0, len(requests), self._batch):
            out += self._steps(requests[start : start + self._batch], reads)
        return out

    def _masked(self, requests: Sequence[Request], reads: Reads) -> list[Tensor]:
        engine, decoder = self._engine, self._engine.decoder
        cache = decoder.new_cache(len(requests), max(r.length for r in requests))
        hooks = _Active(engine) if engine.selector is None else _Masks(engine)
        starts = torch.tensor([0, *(r.length for r in requests)]).cumsum(0)
        wanted = [torch.arange(r.first - 1, r.length) + start for r, start in zip(requests, starts, strict=False)]
        ids = [torch.tensor(r.ids[:-1]) for r in requests]
        logits = decoder.forward(ids, cache, wanted=torch.cat(wanted), hooks=hooks).cpu()
        hooks.report(reads)
        return list(logits.split([r.scored for r in requests]))

    def _steps(self, requests: Sequence[Request], reads: Reads) -> list[Tensor]:
        longest, steps = max(r.length for r in requests), self._kept
        limit, stretch = self._engine.config.context, self._engine.config.stretch
        fits = steps is not None and steps.cache.rows >= len(requests) and steps.cache.capacity >= longest
        if not fits or stretch(steps.cache.capacity) != stretch(longest):
            capacity = min(limit, -(-longest // CAPACITY_STEP) * CAPACITY_STEP)
            capacity = capacity if stretch(capacity) == stretch(longest) else longest
            # A score is that of the selections, on every machine.
            self._kept = steps = self._engine.new_steps(len(requests), capacity, crossover=False)
        steps.restart()
        out = [torch.empty(r.scored, self._vocabulary) for r in requests]
        rows = [steps.cache.take() for _ in requests]
        try:
            for row, r, logits in zip(rows, requests, out, strict=True):
                first = self._engine.decoder.prefill(torch.tensor(r.ids[:1]), steps.cache, row)
                if r.first == 1:
                    logits[0] = first
            for at in range(1, longest):
                live = [i for i, r in enumerate(requests) if at < r.length]
                every = steps.run([requests[i].ids[at] for i in live], [rows[i] for i in live])
                for i, logits in zip(live, every, strict=True):
                    if requests[i].first <= at + 1:
                        out[i][at + 1 - requests[i].first] = logits
        finally:
            for row in rows:
                steps.cache.release(row)
        # Dense steps read all neurons; exact ones are told from them by the last rows of a neuron.
        kind = 0 if self._engine.mode == "sparse" else -1
        reads.add(longest - 1, steps.counts.heads_read.cpu(), steps.counts.rows_read[:, kind].cpu())
        return out


def passes(requests: Sequence[Request], tokens: int = PASS_TOKENS) -> Iterator[list[int]]:
    """Indices of requests that go through the model together: like lengths, long ones first, about `tokens` in all."""
    chunk: list[int] = []
    for i in sorted(range(len(requests)), key=lambda i: -requests[i].length):
        # The first of a chunk is its longest, and the cache has that length for all.
        if chunk and (len(chunk) + 1) * requests[chunk[0]].length > tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


class _Active(Hooks):
    """Counts the neurons that are not zero: what exact steps read of fc2, while dense ones read all."""

    def __init__(self, engine: Engine):
        self._mode, self._config = engine.mode, engine.config
        self._tokens, self._active = 0, torch.zeros(engine.config.num_hidden_layers, dtype=torch.int64)

    def neurons(self, layer: int, y: Tensor, h: Tensor) -> Tensor:
        self._tokens += len(h) if layer == 0 else 0
        self._active[layer] += int(h.count_nonzero())
        return h

    def report(self, reads: Reads) -> None:
        c, L = self._config, self._config.num_hidden_layers
        every = torch.full((L,), self._tokens * c.intermediate_size)
        read = self._active if self._mode == "exact" else every
        known = self._active if c.activation in ZEROING_ACTIVATIONS else torch.zeros_like(every)
        reads.add(self._tokens, torch.full((L,), self._tokens * c.num_attention_heads), read, known, known)


class _Masks(TokenMasks):
    """Masks that also count the neurons that are not zero, and those of them that are kept."""

    def __init__(self, engine: Engine):
        super().__init__(engine.selector, dense_prefix=1)
        self._zeroing = engine.config.activation in ZEROING_ACTIVATIONS
        self._active, self._found = torch.zeros(2, engine.config.num_hidden_layers, dtype=torch.int64)

    def neurons(self, layer: int, y: Tensor, h: Tensor) -> Tensor:
        kept = super().neurons(layer, y, h)
        if self._zeroing:
            for count, values in ((self._active, h), (self._found, kept)):
                count[layer] += int(values.count_nonzero())
                if self._all is not None:
                    count[layer] -= int(values[self._all].count_nonzero())
        return kept

    def report(self, reads: Reads) -> None:
        reads.add(self.tokens, self.kept[:, 0], self.kept[:, 1], self._active, self._found)
