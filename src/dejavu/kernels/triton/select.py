"""Selections made on the device: exact, compacted in ascending order, without a sort or a synchronisation.

First, each row of scores is turned into integers of the same order, and those that reach the threshold are counted,
block by block; where they are too many, the last program of the row to finish finds the cut bit by bit. Of several
rows, the choices are then united. Last, every block knows from the counts where its units begin, and writes them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.tiles import begin, count_in, tickets

# Units that one program counts and writes; scores that the search for a cut holds in registers.
_BLOCK, _HELD = 1024, 32768


@triton.jit
def _order(score):
    """int32 in the order of float32; the two zeros are one."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _choose(block, keys_ptr, meta_ptr, ties_ptr, N: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Which units of a block a row chooses, as 0 and 1: all above its cut, and the first `ties` of those that equal it.

    Returns that and how many of `ties` earlier blocks have taken.
    """
    cut = tl.load(meta_ptr)
    ties = tl.load(meta_ptr + 1)
    blocks = tl.arange(0, triton.next_power_of_2(BLOCKS))
    taken = tl.minimum(tl.sum(tl.load(ties_ptr + blocks, mask=blocks < block, other=0), axis=0), ties)
    unit = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + unit, mask=unit < N, other=0)
    equal = ((key == cut) & (unit < N)).to(tl.int32)
    above = ((key > cut) & (unit < N)).to(tl.int32)
    return above + equal * (taken + tl.cumsum(equal, axis=0) <= ties).to(tl.int32), taken


@triton.jit
def _write(
    block,
    keys_ptr,
    meta_ptr,
    above_ptr,
    ties_ptr,
    idx_ptr,
    count_ptr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the units of a block that a row chooses to their places in the selection; the last block, their number."""
    chosen, taken = _choose(block, keys_ptr, meta_ptr, ties_ptr, N, BLOCK, BLOCKS)
    blocks = tl.arange(0, triton.next_power_of_2(BLOCKS))
    before = taken + tl.sum(tl.load(above_ptr + blocks, mask=blocks < block, other=0), axis=0)
    end = before + tl.cumsum(chosen, axis=0)
    tl.store(idx_ptr + end - 1, block * BLOCK + tl.arange(0, BLOCK), mask=chosen > 0)
    if block == BLOCKS - 1:
        tl.store(count_ptr, tl.max(end, axis=0))


@triton.jit
def _rank(
    scores_ptr,
    cache_rows_ptr,
    threshold,
    most,
    keys_ptr,
    meta_ptr,
    above_ptr,
    ties_ptr,
    ticket_ptr,
    idx_ptr,
    count_ptr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HELD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Keys, cut and counts of one row of choices, which stands for the maximum over JOINED rows of scores."""
    begin(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    scores_ptr += row * N
    keys_ptr += row * N
    meta_ptr += row * 2
    above_ptr += row * BLOCKS
    ties_ptr += row * BLOCKS
    unit = block * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + unit, mask=unit < N, other=0.0)
    for b in range(1, JOINED):
        other = tl.load(scores_ptr + b * N + unit, mask=unit < N, other=0.0)
        if cache_rows_ptr is not None:
            other = tl.where(tl.load(cache_rows_ptr + b) >= 0, other, -float("inf"))
        score = tl.maximum(score, other)
    key = _order(score)
    floor = _order(threshold)
    if cache_rows_ptr is not None:
        # Padding chooses nothing: below every floor. Of joined rows the first is real.
        key = tl.where(tl.load(cache_rows_ptr + row) >= 0, key, -(2**31))
    tl.store(keys_ptr + unit, key, mask=unit < N)
    tl.store(above_ptr + block, tl.sum(((key >= floor) & (unit < N)).to(tl.int32), axis=0))
    tl.store(ties_ptr + block, 0)
    if count_in(ticket_ptr + row, BLOCKS):
        blocks = tl.arange(0, triton.next_power_of_2(BLOCKS))
        total = tl.sum(tl.load(above_ptr + blocks, mask=blocks < BLOCKS, other=0), axis=0)
        cut = floor - 1
        ties = 0
        if total > most:
            # The `most`-th largest key: the largest that so many keys reach, bit by bit from the highest down, as far
            # as it takes to divide the keys.
            held = tl.arange(0, HELD)
            keys = tl.load(keys_ptr + held, mask=held < N, other=-(2**31))
            cut = tl.full((), -(2**31), tl.int32)
            reached = N + 0
            shift = 31
            while (shift >= 0) & (reached != most):
                trial = cut + (tl.full((), 1, tl.int32) << shift)
                reach = tl.sum((keys >= trial).to(tl.int32), axis=0)
                for more in range(HELD, N, HELD):
                    rest = tl.load(keys_ptr + more + held, mask=more + held < N, other=-(2**31))
                    reach += tl.sum((rest >= trial).to(tl.int32), axis=0)
                if reach >= most:
                    cut = trial
                    reached = reach
                shift -= 1
            ties = most
            for more in range(0, N, HELD):
                of = more // BLOCK + tl.arange(0, HELD // BLOCK)
                at = of[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
                every = tl.load(keys_ptr + at, mask=at < N, other=-(2**31))
                above = tl.sum((every > cut).to(tl.int32), axis=1)
                ties -= tl.sum(above, axis=0)
                tl.store(above_ptr + of, above, mask=of < BLOCKS)
                tl.store(ties_ptr + of, tl.sum(((every == cut) & (at < N)).to(tl.int32), axis=1), mask=of < BLOCKS)
        tl.store(meta_ptr, cut)
        tl.store(meta_ptr + 1, ties)
        if ROWS * BLOCKS == 1:
            tl.debug_barrier()
            _write(0, keys_ptr, meta_ptr, above_ptr, ties_ptr, idx_ptr, count_ptr, N, BLOCK, BLOCKS)


@triton.jit
def _unite(
    keys_ptr,
    meta_ptr,
    ties_ptr,
    united_ptr,
    united_meta_ptr,
    united_above_ptr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of choices out of several: its keys are 1 where any of them chooses, its cut is 0."""
    begin(PDL)
    block = tl.program_id(0)
    unit = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.zeros((BLOCK,), tl.int32)
    for row in range(ROWS):
        of_row, _ = _choose(block, keys_ptr + row * N, meta_ptr + row * 2, ties_ptr + row * BLOCKS, N, BLOCK, BLOCKS)
        chosen |= of_row
    tl.store(united_ptr + unit, chosen, mask=unit < N)
    tl.store(united_above_ptr + block, tl.sum(chosen, axis=0))
    if block == 0:
        tl.store(united_meta_ptr, 0)
        tl.store(united_meta_ptr + 1, 0)


@triton.jit
def _compact(
    keys_ptr,
    meta_ptr,
    above_ptr,
    ties_ptr,
    idx_ptr,
    count_ptr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    _write(tl.program_id(0), keys_ptr, meta_ptr, above_ptr, ties_ptr, idx_ptr, count_ptr, N, BLOCK, BLOCKS)


def _select(
    scores: Tensor, rows: int, threshold: float, most: int, capacity: int, tokens: Tokens | None
) -> tuple[Tensor, Tensor]:
    """Select, for each of `rows` rows of choices, the `most` best that reach the threshold; unite the rows."""
    B, N = scores.shape
    blocks = triton.cdiv(N, _BLOCK)
    sizes = {"N": N, "BLOCK": min(_BLOCK, triton.next_power_of_2(N)), "BLOCKS": blocks, **tuning.overlap()}
    held = min(_HELD, triton.next_power_of_2(N))

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=scores.device)

    idx, count = ints(capacity), ints(1)
    keys, meta, above, ties = ints(rows, N), ints(rows, 2), ints(rows, blocks), ints(rows, blocks)
    _rank[(blocks, rows)](
        scores,
        None if tokens is None or B == 1 else tokens.rows,
        threshold,
        most,
        keys,
        meta,
        above,
        ties,
        tickets("select", rows, scores.device),
        idx,
        count,
        JOINED=B // rows,
        ROWS=rows,
        HELD=held,
        **sizes,
        num_warps=8 if held > 4096 else 4,
    )
    if rows > 1:
        united = ints(N), ints(2), ints(blocks)
        _unite[(blocks,)](keys, meta, ties, *united, ROWS=rows, **sizes)
        keys, meta, above = united
        ties = above  # Any counts will do: of the keys that equal this cut, none is taken.
    if rows * blocks > 1:
        _compact[(blocks,)](keys, meta, above, ties, idx, count, **sizes)
    return idx, count


def select_threshold(
    scores: Tensor, threshold: float, capacity: int, tokens: Tokens | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.select_threshold."""
    return _select(scores, 1, float(threshold), capacity, capacity, tokens)


def select_topk(scores: Tensor, k: int, tokens: Tokens | None = None) -> tuple[Tensor, Tensor]:
    """See reference.select_topk."""
    B, N = scores.shape
    return _select(scores, B, -math.inf, k, min(B * k, N), tokens)
