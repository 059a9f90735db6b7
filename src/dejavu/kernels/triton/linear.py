"""Dense rows: the LM head, the projections around the embeddings, and predictors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.rows import bits_of, project, row_args, spread
from dejavu.kernels.triton.tiles import begin, padded_batch


@triton.jit
def _linear(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    N,
    B: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    FORM: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    b = tl.arange(0, BP)
    for tile in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        n = tile * BN + tl.arange(0, BN)
        y = project(
            x_ptr, w_ptr, n.to(tl.int64) * STRIDE, n < N, B, C,
            FORM, BP, BN, BC, SPLIT, STAGES,
        )  # fmt: skip
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
        tl.store(y_ptr + b[:, None] * N + n[None, :], y, mask=(b < B)[:, None] & (n < N)[None, :])


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
    """See reference.linear."""
    (B, C), N = x.shape, weight.shape[0]
    data, form = row_args(weight)
    tiles = tuning.pick("linear", B, bits_of(form))
    if B == 1:
        # Short rows, as a predictor's: as many weights in a tile, in more rows.
        width = max(64, min(tiles["BC"], triton.next_power_of_2(C)))
        tiles |= {"BC": width, "BN": min(32, tiles["BN"] * tiles["BC"] // width)}
        # Few rows: one to a program, so that they keep more multiprocessors busy.
        while tiles["BN"] > 1 and tiles["BN"] * 264 > N:
            tiles["BN"] //= 2
    y = torch.empty(B, N, dtype=torch.float32, device=x.device)
    grid = (min(triton.cdiv(N, tiles["BN"]), tuning.PROGRAMS),)
    _linear[grid](
        spread(x, form), data, bias, y, N, B=B, C=C, BP=padded_batch(B), **form, **tiles, **tuning.overlap()
    )  # fmt: skip
    return y
