"""The likeliest next token of each row, chosen and fed to the next step where the logits lie: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.tiles import begin

_BLOCK = 8192


@triton.jit
def _choose(logits_ptr, ids_ptr, rows_ptr, positions_ptr, chosen_ptr, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    n = tl.program_id(0)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    poison = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        token = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + n.to(tl.int64) * V + token, mask=token < V, other=-float("inf"))
        poison += tl.where(token < V, logit, 0.0) * 0.0  # not a number where the logit is none or infinite
        better = logit > best
        best = tl.where(better, logit, best)
        at = tl.where(better, token, at)
    top = tl.max(best, axis=0)
    chosen = tl.min(tl.where(best == top, at, V), axis=0)
    chosen = tl.minimum(chosen, V - 1)
    finite = tl.sum(poison, axis=0) == 0.0
    tl.store(chosen_ptr + n, tl.where(finite, chosen, -1))
    tl.store(ids_ptr + n, chosen)
    tl.store(positions_ptr + n, tl.load(positions_ptr + n) + (tl.load(rows_ptr + n) >= 0).to(tl.int32))


def choose(logits: Tensor, tokens: Tokens) -> Tensor:
    """See Backend.choose."""
    chosen = torch.empty_like(tokens.ids)
    N, V = logits.shape
    _choose[(N,)](logits, *tokens, chosen, V, BLOCK=_BLOCK, num_warps=16, **tuning.overlap())
    return chosen
