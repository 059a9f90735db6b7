"""The timed loop: one token after another, for our engine and its peers alike."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple, Protocol

import torch

from dejavu.config import Mode, SamplingParams
from dejavu.engine.bytes import step_bytes
from dejavu.engine.sampling import Sampler
from dejavu.engine.step import Steps, bucket
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
        selector: as Steps takes it.
        pending: as Decoder.new_cache takes it.
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
        self._decoder, self._batch, self._size = decoder, batch, bucket(batch)
        cache = decoder.new_cache(batch, capacity, pending)
        self._steps = Steps(decoder, cache, mode, selector, crossover=crossover)
        self._rows = [cache.take() for _ in range(batch)]
        self._choose = Sampler(SamplingParams(), (), decoder.config.vocab_size)
        self._attended = 0
        self._steps.step(self._size)  # what is measured and captured once is no part of a prompt's time

    def prefill(self, ids):
        one = isinstance(ids[0], int)
        chosen = []
        for row, prompt in zip(self._rows, [ids] if one else ids, strict=True):
            self._steps.cache.truncate(row, 0)
            chosen.append(
                self._choose(self._decoder.prefill(torch.tensor(prompt), self._steps.cache, row, narrow=True).cpu())[0]
            )
        return chosen[0] if one else chosen

    def step(self, token):
        tokens = [token] if isinstance(token, int) else token
        self._chosen = [self._choose(logits)[0] for logits in self._steps.run(tokens, self._rows, self._size)]
        window = self._decoder.config.sliding_window or self._steps.cache.capacity
        self._attended += sum(min(self._steps.cache.length(row), window) for row in self._rows)
        return self._chosen[0] if isinstance(token, int) else self._chosen

    def bytes_per_token(self) -> dict[str, float]:
        """Mean bytes read by a step so far, by part; a step makes a token for every row of the batch."""
        counts = self._steps.counts
        return step_bytes(
            self._decoder.config,
            self._decoder.weights,
            attended=self._attended / counts.tokens,
            batch=self._batch,
            rows_read=counts.rows_read.cpu() / counts.steps,
            attn_read=counts.attn_read.cpu() / counts.steps,
            predictor_bytes=self._steps.predictor_bytes(self._size),
        )

    @property
    def whole(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers whose heads, whose neurons are read whole, since their selections did not pay."""
        return self._steps.whole(self._size)

    def op_ms(self) -> dict[str, float] | None:
        """Milliseconds of a step by op, the median of PROFILED more steps; None where that is not known.

        What they read is counted, so `bytes_per_token` comes before.
        """
        runs = []
        for _ in range(PROFILED):
            seconds = self._steps.step(self._size).op_seconds(self._chosen, self._rows)
            if seconds is None:
                return None
            runs.append(seconds)
        return {op: 1e3 * median(run[op] for run in runs) for op in runs[0]}

    def mlp_density(self) -> float:
        """Mean share of the fc2 (down) rows that the steps so far have read."""
        read = self._steps.counts.rows_read[:, -1].double().mean()
        return float(read) / self._steps.counts.steps / self._decoder.config.intermediate_size

    def attn_density(self) -> float:
        """Mean share of the query heads that the steps so far have read."""
        heads = float(self._steps.counts.heads_read.double().mean())
        return heads / self._steps.counts.steps / self._decoder.config.num_attention_heads


class Times(NamedTuple):
    """Seconds: of a prompt to its first token, and of each step after it."""

    prefill_s: float
    steps_s: list[float]


def decode_times(peer: Decoding, prompt: Sequence[int], new_tokens: int, skip: int) -> Times:
    """Times a prompt and the decode steps after it, the choice of the token included.

    Args:
        skip: first steps that don't count: they find caches cold and buffers not yet made.
    """
    began, times = perf_counter(), []
    token = peer.prefill(prompt)
    prefill_s = perf_counter() - began
    for _ in range(skip + new_tokens):
        began = perf_counter()
        token = peer.step(token)
        times.append(perf_counter() - began)
    return Times(prefill_s, times[skip:])


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
