"""The end of a block: its partial sums join the residual stream, which is then normalised, in one launch.

The columns of a row are added up by many programs; the last of them to finish normalises the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.tiles import count_in, tickets


@triton.jit
def _add_norm(
    x_ptr,
    partials_ptr,
    partial_bias_ptr,
    weight_ptr,
    bias_ptr,
    ticket_ptr,
    y_ptr,
    B,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    b = tl.program_id(1)
    last = True
    if partials_ptr is not None:
        cols = tl.program_id(0) * BC + tl.arange(0, BC)
        mask = cols < C
        total = tl.zeros((BC,), tl.float32)
        for s in range(0, S, BS):
            part = s + tl.arange(0, BS)
            at = (part[:, None] * B + b) * C + cols[None, :]
            total += tl.sum(tl.load(partials_ptr + at, mask=(part < S)[:, None] & mask[None, :], other=0.0), axis=0)
        if partial_bias_ptr is not None:
            total += tl.load(partial_bias_ptr + cols, mask=mask, other=0.0)
        total += tl.load(x_ptr + b * C + cols, mask=mask, other=0.0)
        tl.store(x_ptr + b * C + cols, total, mask=mask)
        last = count_in(ticket_ptr + b, tl.num_programs(0))
    if last:
        row = tl.arange(0, CP)
        inside = row < C
        y = tl.load(x_ptr + b * C + row, mask=inside, other=0.0)
        if KIND == "layer":
            y = tl.where(inside, y - tl.sum(y, axis=0) / C, 0.0)
        if KIND != "none":
            y *= tl.rsqrt(tl.sum(y * y, axis=0) / C + EPS)
            if weight_ptr is not None:
                y *= tl.load(weight_ptr + row, mask=inside, other=0.0)
            if bias_ptr is not None:
                y += tl.load(bias_ptr + row, mask=inside, other=0.0)
        tl.store(y_ptr + b * C + row, y, mask=inside)


def add_norm(
    x: Tensor,
    partials: Tensor | None,
    partial_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
) -> Tensor:
    """See reference.add_norm."""
    B, C = x.shape
    tiles = tuning.pick("add_norm", B)
    y = torch.empty_like(x)
    blocks = 1 if partials is None else triton.cdiv(C, tiles["BC"])
    _add_norm[(blocks, B)](
        x,
        partials,
        partial_bias,
        weight,
        bias if kind == "layer" else None,
        tickets("add_norm", B, x.device),
        y,
        B,
        EPS=eps,
        KIND=kind,
        S=0 if partials is None else partials.shape[0],
        C=C,
        CP=triton.next_power_of_2(C),
        **tiles,
    )
    return y
