"""Dense rows: the LM head and the projections around the embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.tiles import padded_batch, project


@triton.jit
def _linear(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    N,
    B: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.arange(0, BP)
    for tile in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        n = tile * BN + tl.arange(0, BN)
        y = project(x_ptr + b * C, b < B, w_ptr, n.to(tl.int64) * C, n < N, C, BP, BN, BC, SPLIT, STAGES)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
        tl.store(y_ptr + b[:, None] * N + n[None, :], y, mask=(b < B)[:, None] & (n < N)[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See reference.linear."""
    (B, C), N = x.shape, weight.shape[0]
    tiles = tuning.pick("linear", B)
    y = torch.empty(B, N, dtype=torch.float32, device=x.device)
    grid = (min(triton.cdiv(N, tiles["BN"]), tuning.PROGRAMS),)
    _linear[grid](x, weight, bias, y, N, B=B, C=C, BP=padded_batch(B), **tiles)
    return y
