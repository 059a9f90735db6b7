"""Device code that the kernels share: reading weight rows, products of tiles, counting in.

Activations are float32 and stay so. A batch of one multiplies and adds in float32; a larger batch goes to the
tensor cores, where each activation is split into two numbers of the weights' type whose sum holds it (16 bits of
mantissa for bfloat16), so that a result is rounded by its accumulation and not by its inputs.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.errors import KernelUnavailable


def padded_batch(batch: int) -> int:
    """Rows of a tile that holds the batch: 1, or what a tensor core multiplies."""
    return 1 if batch == 1 else max(16, triton.next_power_of_2(batch))


def selection_args(selection: tuple[Tensor, Tensor] | None, total: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Pointers of a selection (None for everything) and the most units it can hold."""
    return (None, None, total) if selection is None else (*selection, selection[0].shape[0])


@cache
def tickets(op: str, n: int, device: torch.device) -> Tensor:
    """`n` int32 zeros for count_in, of one op alone: two runs of an op may not overlap on two streams.

    Raises: KernelUnavailable inside a graph capture, where they could not be set to zero.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelUnavailable(f"{op} was first called inside capture(); run the same step once before capturing it")
    return torch.zeros(n, dtype=torch.int32, device=device)


@triton.jit
def load_rows(w_ptr, rows, cols, mask):
    """Weights at element offsets `rows[:, None] + cols[None, :]`: read once, so the first to leave the cache."""
    return tl.load(w_ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def matmul(a, w, acc):
    """acc + a @ w on the tensor cores. a: (M, K) float32; w: (K, N) weights; acc: (M, N) float32."""
    if w.dtype == tl.float32:
        return tl.dot(a, w, acc, input_precision="ieee")
    else:
        high = a.to(w.dtype)
        low = (a - high.to(tl.float32)).to(w.dtype)
        return tl.dot(high, w, tl.dot(low, w, acc))


@triton.jit
def project(
    x_ptr,
    w_ptr,
    rows,
    row_mask,
    B: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x @ w[rows].T as a (BP, BN) float32 tile. x: (B, C) float32; rows: (BN,) element offsets."""
    if BP == 1:
        acc = tl.zeros((BN, BC), tl.float32)
        for c in tl.range(0, C, BC, num_stages=STAGES):
            cols = c + tl.arange(0, BC)
            w = load_rows(w_ptr, rows, cols, row_mask[:, None] & (cols < C)[None, :])
            acc += w.to(tl.float32) * tl.load(x_ptr + cols, mask=cols < C, other=0.0)[None, :]
        return tl.sum(acc, axis=1)[None, :]
    else:
        b = tl.arange(0, BP)
        acc = tl.zeros((BP, BN), tl.float32)
        for c in tl.range(0, C, BC, num_stages=STAGES):
            cols = c + tl.arange(0, BC)
            w = load_rows(w_ptr, rows, cols, row_mask[:, None] & (cols < C)[None, :])
            x = tl.load(x_ptr + b[:, None] * C + cols[None, :], mask=(b < B)[:, None] & (cols < C)[None, :], other=0.0)
            acc = matmul(x, tl.trans(w), acc)
        return acc


@triton.jit
def group_selected(idx_ptr, count_ptr, group, R: tl.constexpr, CAPACITY: tl.constexpr):
    """Whether any of the R heads of a group is selected."""
    if idx_ptr is None:
        return group >= 0
    else:
        slot = tl.arange(0, triton.next_power_of_2(CAPACITY))
        live = (slot < tl.load(count_ptr)) & (slot < CAPACITY)
        heads = tl.load(idx_ptr + slot, mask=live, other=0)
        return tl.max((live & (heads // R == group)).to(tl.int32), axis=0) > 0


@triton.jit
def count_in(ticket_ptr, expected):
    """True in the last of `expected` programs to come here, which then sees all that the others have stored.

    No program waits. The ticket is back at zero afterwards.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
