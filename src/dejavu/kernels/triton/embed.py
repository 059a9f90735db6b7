"""Token embeddings and learned positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gather(ids_ptr, table_ptr, x_ptr, offset, C: tl.constexpr, ADD: tl.constexpr, BC: tl.constexpr):
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    b = tl.program_id(1)
    mask = cols < C
    row = (tl.load(ids_ptr + b) + offset).to(tl.int64)
    value = tl.load(table_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(x_ptr + b * C + cols, mask=mask, other=0.0)
    tl.store(x_ptr + b * C + cols, value, mask=mask)


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """See reference.embed."""
    x = torch.empty(ids.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    _gather[(triton.cdiv(x.shape[1], _BLOCK), x.shape[0])](ids, table, x, 0, C=x.shape[1], ADD=False, BC=_BLOCK)
    return x


def add_positions(x: Tensor, positions: Tensor, table: Tensor, offset: int) -> None:
    """See reference.add_positions."""
    _gather[(triton.cdiv(x.shape[1], _BLOCK), x.shape[0])](
        positions, table, x, offset, C=x.shape[1], ADD=True, BC=_BLOCK
    )
