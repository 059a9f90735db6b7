"""Token embeddings and learned positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.rows import row_args, values
from dejavu.kernels.triton.tiles import begin

_BLOCK = 1024


@triton.jit
def _gather(
    ids_ptr,
    table_ptr,
    x_ptr,
    offset,
    C: tl.constexpr,
    ADD: tl.constexpr,
    BC: tl.constexpr,
    STRIDE: tl.constexpr,
    FORM: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    b = tl.program_id(1)
    mask = cols < C
    row = (tl.load(ids_ptr + b) + offset).to(tl.int64) * STRIDE
    value = values(table_ptr, row, cols, mask, FORM)
    if ADD:
        value += tl.load(x_ptr + b * C + cols, mask=mask, other=0.0)
    tl.store(x_ptr + b * C + cols, value, mask=mask)


def _launch(ids: Tensor, table: Weight, x: Tensor, offset: int, add: bool) -> None:
    (N, C), (data, form) = x.shape, row_args(table)
    grid = (triton.cdiv(C, _BLOCK), N)
    _gather[grid](ids, data, x, offset, C=C, ADD=add, BC=_BLOCK, **form, **tuning.overlap())


def embed(tokens: Tokens, table: Weight) -> Tensor:
    """See reference.embed."""
    x = torch.empty(tokens.ids.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    _launch(tokens.ids, table, x, 0, add=False)
    return x


def add_positions(x: Tensor, tokens: Tokens, table: Tensor, offset: int) -> None:
    """See reference.add_positions."""
    _launch(tokens.positions, table, x, offset, add=True)
