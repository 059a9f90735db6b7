"""Device code that the kernels share: how they follow one another, whom they select, how they count in."""

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
def begin(PDL: tl.constexpr):
    """Wait for the kernels before this one; every program calls it before it reads what another has written.

    With programmatic dependent launch a kernel is made ready while the one before it ends. As a rule none lets the next
    one come before its own end: programs that only wait take the place of others (docs/log.md, 2026-11-24).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Let the next kernel begin when all programs of this one have: one that has work to do before it waits."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


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
