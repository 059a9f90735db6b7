"""The timed loop: one token after another, for our engine and its peers alike."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from dejavu.config import Mode, SamplingParams
from dejavu.engine.bytes import step_bytes
from dejavu.engine.crossover import measure_costs
from dejavu.engine.sampling import Sampler
from dejavu.engine.step import DecodeStep, can_capture
from dejavu.model.decoder import Decoder
from dejavu.selection import Selector

# Steps whose time is told by op.
PROFILED = 5


class Decoding(Protocol):
    """One sequence being decoded greedily."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Start afresh with a prompt; returns the most likely next token."""

    def step(self, token: int) -> int:
        """Read a token; returns the most likely next one."""


class Dejavu:
    """Our engine's own step, with the bytes that it reads.

    Args:
        batch: rows. With more than one, `prefill` takes a prompt for each row, and `step` a token, and both return
            a list.
        selector, pending: as DecodeStep takes them.
        crossover: in a batch, with a selector that is captured: read whole what that was measured to make faster.
    """

    def __init__(
        self,
        decoder: Decoder,
        capacity: int,
        mode: Mode,
        *,
        batch: int = 1,
        selector: Selector | None = None,
        pending: int | None = None,
        crossover: bool = False,
    ):
        self._decoder, self._batch = decoder, batch
        costs = None
        if crossover and batch > 1 and selector is not None and can_capture(decoder, selector):
            costs = measure_costs(decoder, batch, pending, selector)
        self._step = DecodeStep(decoder, batch, capacity, mode, selector, pending, costs)
        self._choose = Sampler(SamplingParams(), (), decoder.config.vocab_size)
        self._steps = self._attended = 0

    def prefill(self, ids):
        if isinstance(ids[0], int):
            return self._choose(self._step.prefill(0, ids))[0]
        return [self._choose(self._step.prefill(row, prompt))[0] for row, prompt in enumerate(ids)]

    def step(self, token):
        self._feed([token] if isinstance(token, int) else token)
        self._chosen = [self._choose(logits)[0] for logits in self._step.run()]
        self._steps += 1
        window = self._decoder.config.sliding_window or self._step.cache.capacity
        self._attended += sum(min(n, window) for n in self._step.lengths) / self._batch
        return self._chosen[0] if isinstance(token, int) else self._chosen

    def _feed(self, tokens: Sequence[int]) -> None:
        for row, token in enumerate(tokens):
            self._step.feed(row, token)

    def bytes_per_token(self) -> dict[str, float]:
        """Mean bytes read by a step so far, by part; a step makes a token for every row of the batch."""
        return step_bytes(
            self._decoder.config,
            self._decoder.weights,
            attended=self._attended / self._steps,
            batch=self._batch,
            rows_read=self._step.rows_read / self._steps,
            attn_read=self._step.attn_read / self._steps,
            predictor_bytes=self._step.predictor_bytes,
        )

    @property
    def whole(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As DecodeStep says it."""
        return self._step.whole

    def op_ms(self) -> dict[str, float] | None:
        """Milliseconds of a step by op, the median of PROFILED more steps; None where that is not known.

        What they read is not counted, so `bytes_per_token` comes before.
        """
        runs = []
        for _ in range(PROFILED):
            self._feed(self._chosen)
            seconds = self._step.op_seconds()
            if seconds is None:
                return None
            runs.append(seconds)
        return {op: 1e3 * median(run[op] for run in runs) for op in runs[0]}

    def mlp_density(self) -> float:
        """Mean share of the fc2 (down) rows that the steps so far have read."""
        read = self._step.rows_read[:, -1].double().mean()
        return float(read) / self._steps / self._decoder.config.intermediate_size

    def attn_density(self) -> float:
        """Mean share of the query heads that the steps so far have read."""
        return float(self._step.heads_read.double().mean()) / self._steps / self._decoder.config.num_attention_heads


def decode_times(peer: Decoding, prompt: Sequence[int], new_tokens: int, skip: int) -> list[float]:
    """Seconds of each decode step after a prompt, the choice of the token included.

    Args:
        skip: first steps that don't count: they find caches cold and buffers not yet made.
    """
    token, times = peer.prefill(prompt), []
    for _ in range(skip + new_tokens):
        began = perf_counter()
        token = peer.step(token)
        times.append(perf_counter() - began)
    return times[skip:]


def greedy(peer: Decoding, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The `new_tokens` most likely tokens after a prompt, one after the other."""
    tokens = [peer.prefill(prompt)]
    while len(tokens) < new_tokens:
        tokens.append(peer.step(tokens[-1]))
    return tokens


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts share before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Token ids for a timing run, where only their number matters."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
