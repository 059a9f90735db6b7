"""The timed loop: one token after another, for our engine and its peers alike."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import torch

from dejavu.config import Mode, SamplingParams
from dejavu.engine.bytes import step_bytes
from dejavu.engine.sampling import Sampler
from dejavu.engine.step import DecodeStep
from dejavu.model.decoder import Decoder


class Decoding(Protocol):
    """One sequence being decoded greedily."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Start afresh with a prompt; returns the most likely next token."""

    def step(self, token: int) -> int:
        """Read a token; returns the most likely next one."""


class Dejavu:
    """Our engine's own step, batch 1, with the bytes that it reads."""

    def __init__(self, decoder: Decoder, capacity: int, mode: Mode):
        self._decoder, self._step = decoder, DecodeStep(decoder, 1, capacity, mode)
        self._choose = Sampler(SamplingParams(), (), decoder.config.vocab_size)
        self._steps = self._attended = 0

    def prefill(self, ids: Sequence[int]) -> int:
        return self._choose(self._step.prefill(0, ids))[0]

    def step(self, token: int) -> int:
        self._step.feed(0, token)
        token, _ = self._choose(self._step.run()[0])
        self._steps += 1
        self._attended += self._step.lengths[0]
        return token

    def bytes_per_token(self) -> dict[str, float]:
        """Mean bytes read by a step so far, by part."""
        config, weights = self._decoder.config, self._decoder.weights
        read = self._step.rows_read / self._steps
        return step_bytes(config, weights, attended=self._attended / self._steps, rows_read=read)

    def mlp_density(self) -> float:
        """Mean share of the fc2 (down) rows that the steps so far have read."""
        read = self._step.rows_read[:, -1].double().mean()
        return float(read) / self._steps / self._decoder.config.intermediate_size


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
