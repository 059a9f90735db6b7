"""From logits to the next token of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dejavu.config import SamplingParams

# A nucleus is looked for among this many tokens first, which takes 0.2 ms of 50,272 logits on one core.
NUCLEUS_GUESS = 256
# Temperatures that float32 can divide by. At the first, tokens that differ at all differ by more than e^80.
COLDEST, HOTTEST = 1e-30, 1e30


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position, under the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, likeliest first


class Sampler:
    """Chooses the tokens of one row. Rows share nothing, so what a row draws depends on no other.

    Args:
        params: as the request says.
        prompt_ids: what the repetition penalty counts as said already.
        vocab_size: V.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int):
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._said = None
        if params.repetition_penalty != 1:
            self._said = torch.zeros(vocab_size, dtype=torch.bool)
            self._said[list(prompt_ids)] = True

    def __call__(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log-probabilities where asked for. logits: (V,) float32, finite, not changed."""
        scores = logits if self._said is None else penalise(logits, self._said, self._params.repetition_penalty)
        if self._params.temperature == 0:
            token = int(scores.numpy().argmax())  # 10 times as fast as torch's for one row
        else:
            probs, ids = candidates(scores, self._params)
            at = draw(probs, self._generator)
            token = at if ids is None else int(ids[at])
        if self._said is not None:
            self._said[token] = True
        return token, None if self._params.logprobs is None else _logprob(logits, token, self._params.logprobs)


def penalise(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens said before (Keskar et al. 2019, arXiv 1909.05858).

    logits: (V,) float32; said: (V,) bool. Returns (V,).
    """
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    most = torch.finfo(logits.dtype).max  # where logits are that large, the change may not make them infinite
    return torch.where(said, changed.clamp(-most, most), logits)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn and their weights: temperature, then top-k, top-p, min-p in this order.

    Args:
        logits: (V,) float32.
        params: temperature above 0.
    Returns: weights (n,) float32, not normalised, and ids (n,) int64; ids None means all V in order. Of equally likely
        tokens at the edge, a wide nucleus keeps those with lower ids.
    """
    # Differences to the largest: so the quotients cannot overflow upwards, and a temperature close to 0 is greedy.
    temperature = min(max(params.temperature, COLDEST), HOTTEST)
    scores = (logits - logits.max()) / temperature
    if params.top_k is None and params.top_p == 1 and params.min_p == 0:
        return torch.softmax(scores, -1), None
    size = min(scores.numel(), params.top_k or scores.numel())
    if size <= NUCLEUS_GUESS or params.top_k is None:
        values, ids = torch.topk(scores, min(size, NUCLEUS_GUESS))
        probs = torch.exp(values - torch.logsumexp(scores if params.top_k is None else values, -1))
        kept = _kept(probs, params)
        if kept < len(probs) or len(probs) == size:
            return probs[:kept], ids[:kept]
    # A wide nucleus: what counts is its least likely token. Values alone are sorted, which numpy does in vector code.
    ordered = torch.from_numpy(np.sort(scores.numpy())[::-1][:size].copy())
    total = torch.logsumexp(ordered, -1)
    kept = _kept(torch.exp(ordered - total), params)
    keep = scores > ordered[kept - 1]
    ties = (scores == ordered[kept - 1]).nonzero().flatten()
    keep[ties[: kept - int(keep.sum())]] = True
    ids = keep.nonzero().flatten()
    return torch.exp(scores[ids] - total), ids


def _kept(probs: Tensor, params: SamplingParams) -> int:
    """How many of tokens, likeliest first, top-p and min-p keep: every filter keeps a beginning, and one at least."""
    keep = probs >= params.min_p * probs[0]
    if params.top_p < 1:
        keep &= probs.cumsum(-1) - probs < params.top_p
    return max(1, int(keep.sum()))


def draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index drawn in proportion to `weights` (n,): one uniform number looked up in their running sum."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    at = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
    # Rounding may lift the number to the very sum: then it is the last one with a weight.
    return int(torch.searchsorted(sums, at, right=True) if at < sums[-1] else torch.searchsorted(sums, sums[-1]))


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = torch.log_softmax(logits, -1)
    values, ids = torch.topk(logprobs, min(count, logprobs.numel()))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
