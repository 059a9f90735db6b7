"""The end of a block: its partial sums join the residual stream, which is then normalised, in one launch.

One program a row: the few partial sums of sum_rows.py are less to read than a second round of programs would cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.tiles import begin


@triton.jit
def _add_norm(
    x_ptr,
    partials_ptr,
    partial_bias_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    B,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    b = tl.program_id(0)
    cols = tl.arange(0, CP)
    inside = cols < C
    begin(PDL)
    y = tl.load(x_ptr + b * C + cols, mask=inside, other=0.0)
    # Asked for early: they arrive while the sums are taken.
    weight = 1.0 if weight_ptr is None else tl.load(weight_ptr + cols, mask=inside, other=0.0)
    bias = 0.0 if bias_ptr is None else tl.load(bias_ptr + cols, mask=inside, other=0.0)
    if partials_ptr is not None:
        total = tl.zeros((CP,), tl.float32)
        # Unrolled by the compiler, so that several loads are on their way at once.
        for s in tl.range(0, S, loop_unroll_factor=UNROLL):
            total += tl.load(partials_ptr + (s * B + b) * C + cols, mask=inside, other=0.0)
        if partial_bias_ptr is not None:
            total += tl.load(partial_bias_ptr + cols, mask=inside, other=0.0)
        y += total
        tl.store(x_ptr + b * C + cols, y, mask=inside)
    if KIND == "layer":
        y = tl.where(inside, y - tl.sum(y, axis=0) / C, 0.0)
    if KIND != "none":
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / C + EPS) * weight + bias
    tl.store(y_ptr + b * C + cols, y, mask=inside)


def add_norm(
    x: Tensor,
    partials: Tensor | None,
    partial_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tokens | None = None,
    *,
    kind: str,
    eps: float,
) -> Tensor:
    """See reference.add_norm."""
    B, C = x.shape
    y = torch.empty_like(x)
    _add_norm[(B,)](
        x,
        partials,
        partial_bias,
        weight,
        bias if kind == "layer" else None,
        y,
        B,
        EPS=eps,
        KIND=kind,
        S=0 if partials is None else partials.shape[0],
        C=C,
        CP=triton.next_power_of_2(C),
        **tuning.pick("add_norm", B),
        **tuning.overlap(),
    )
    return y
