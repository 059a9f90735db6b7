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
def load_rows(pointers, mask):
    """A tile of weights: each is read once, so it is the first to leave the cache."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def matmul(a, w, acc):
    """acc + a @ w on the tensor cores. a: (.., M, K) float32; w: (.., K, N) weights; acc: (.., M, N) float32."""
    if w.dtype == tl.float32:
        return tl.dot(a, w, acc, input_precision="ieee")
    else:
        if w.dtype == tl.bfloat16:
            # Cutting off is an integer operation; rounding here would take a slow conversion for every element.
            high = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        else:
            high = a.to(w.dtype).to(tl.float32)
        return tl.dot(high.to(w.dtype), w, tl.dot((a - high).to(w.dtype), w, acc))


@triton.jit
def project(
    x_rows,
    live,
    w_ptr,
    rows,
    row_mask,
    C: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of M rows of activations with BN rows of weights, both C long: (M, BN) float32.

    x_rows: (M,) pointers to float32 rows, of which `live` ones are read; rows: (BN,) element offsets. More than one row
    is multiplied in SPLIT parts of the columns, one a warp, so that no warp splits activations that another has split.
    """
    if M == 1:
        acc = tl.zeros((BN, BC), tl.float32)
        for c in tl.range(0, C, BC, num_stages=STAGES):
            cols = c + tl.arange(0, BC)
            w = load_rows(w_ptr + rows[:, None] + cols[None, :], row_mask[:, None] & (cols < C)[None, :])
            x = tl.load(x_rows[:, None] + cols[None, :], mask=live[:, None] & (cols < C)[None, :], other=0.0)
            acc = tl.fma(w.to(tl.float32), x, acc)
        return tl.sum(acc, axis=1)[None, :]
    else:
        acc = tl.zeros((SPLIT, M, BN), tl.float32)
        for c in tl.range(0, C, SPLIT * BC, num_stages=STAGES):
            cols = c + tl.arange(0, SPLIT)[:, None, None] * BC + tl.arange(0, BC)[None, None, :]
            w = load_rows(w_ptr + rows[None, :, None] + cols, row_mask[None, :, None] & (cols < C))
            x = tl.load(x_rows[None, :, None] + cols, mask=live[None, :, None] & (cols < C), other=0.0)
            acc = matmul(x, tl.permute(w, (0, 2, 1)), acc)
        return tl.sum(acc, axis=0)


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
