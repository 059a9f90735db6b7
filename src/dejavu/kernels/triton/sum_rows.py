"""Weighted sums of weight rows as partial sums: the output projection of attention and the last rows of an MLP.

A program owns a block of columns and one of S equal slices of the rows, so that few rows still keep many programs
busy. With `skip_zeros` it reads only the rows whose coefficients are not all zero: out of everything it first lists
those of its slice, in order; in a selection most rows are needed, and those that are not are skipped where they stand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Selection, Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.rows import (
    bits_of,
    group_scales,
    int8_values,
    level,
    load_once,
    load_words,
    matmul,
    row_args,
    row_scales,
    values,
)
from dejavu.kernels.triton.tiles import begin, padded_batch, selection_args

# Coefficients looked at together while listing.
_LISTED = 256


@triton.jit
def _row_ids(idx_ptr, slot, live, UNIT: tl.constexpr):
    """Ids of the rows at places `slot` of the selection: UNIT rows a selected unit."""
    if idx_ptr is None:
        return slot
    else:
        return tl.load(idx_ptr + slot // UNIT, mask=live, other=0) * UNIT + slot % UNIT


@triton.jit
def _list_rows(
    coef_ptr,
    idx_ptr,
    list_ptr,
    first,
    end,
    N,
    B: tl.constexpr,
    BP: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Write the ids of rows first .. end with a coefficient that is not zero to list_ptr; returns how many."""
    b = tl.arange(0, BP)
    n = 0
    for at in range(first, end, LISTED):
        slot = at + tl.arange(0, LISTED)
        ids = _row_ids(idx_ptr, slot, slot < end, UNIT)
        mask = (b < B)[:, None] & (slot < end)[None, :]
        coef = tl.load(coef_ptr + b[:, None] * N + ids[None, :], mask=mask, other=0.0)
        keep = tl.max((coef != 0).to(tl.int32), axis=0)
        tl.store(list_ptr + n + tl.cumsum(keep, axis=0) - 1, ids, mask=keep > 0)
        n += tl.sum(keep, axis=0)
    tl.debug_barrier()
    return n


@triton.jit
def _store_words(out_ptr, col, sums, C: tl.constexpr):
    """Store the sums over rows of one half byte of each word, (words, BN), to its columns (words, 1)."""
    tl.store(out_ptr + col, tl.sum(sums, axis=1)[:, None], mask=col < C)


@triton.jit
def _sum_rows(
    coef_ptr,
    w_ptr,
    idx_ptr,
    count_ptr,
    list_ptr,
    rows_read_ptr,
    out_ptr,
    N,
    CAPACITY,
    B: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    R: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    STRIDE: tl.constexpr,
    FORM: tl.constexpr,
    BP: tl.constexpr,
    LISTED: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    VALUES: tl.constexpr = FORM[2]
    SCALES: tl.constexpr = FORM[3]
    ZERO: tl.constexpr = FORM[4]
    begin(PDL)
    block = tl.program_id(0)
    cols = block * BC + tl.arange(0, BC)
    total = tl.minimum(CAPACITY, CAPACITY if count_ptr is None else tl.load(count_ptr) * UNIT)
    share = tl.cdiv(total, tl.num_programs(1))
    first = tl.minimum(tl.program_id(1) * share, total)
    end = tl.minimum(first + share, total)
    n = end - first
    if list_ptr is not None:
        list_ptr += block * CAPACITY + first
        n = _list_rows(coef_ptr, idx_ptr, list_ptr, first, end, N, B, BP, UNIT, LISTED)

    b = tl.arange(0, BP)
    rows_read = tl.zeros((), tl.int64)
    if BITS == 4 and BP == 1:
        word = (block * (BC // 8) + tl.arange(0, BC // 8))[:, None]
        word_mask = word < VALUES // 4
        low0 = tl.zeros((BC // 8, BN), tl.float32)
        low1, low2, low3, high0, high1, high2, high3 = low0, low0, low0, low0, low0, low0, low0
        low_base, high_base = low0, low0
    acc = tl.zeros((BN if BP == 1 else BP, BC), tl.float32)
    for t in tl.range(0, n, BN, num_stages=STAGES):
        at = t + tl.arange(0, BN)
        live = at < n
        if list_ptr is None:
            ids = _row_ids(idx_ptr, first + at, live, UNIT)
        else:
            ids = tl.load(list_ptr + at, mask=live, other=0)
        coef = tl.load(coef_ptr + b[:, None] * N + ids[None, :], mask=(b < B)[:, None] & live[None, :], other=0.0)
        if SKIP_ZEROS and list_ptr is None:
            live = live & (tl.max((coef != 0).to(tl.int32), axis=0) > 0)
        if rows_read_ptr is not None:
            rows_read += tl.sum(live.to(tl.int64), axis=0)
        unit = ids // UNIT
        rows = (unit // R * GROUP_ROWS + (FIRST + unit % R) * UNIT + ids % UNIT).to(tl.int64) * STRIDE
        mask = live[:, None] & (cols < C)[None, :]
        if BP > 1:
            if BITS == 0:
                acc = matmul(coef, load_once(w_ptr + rows[:, None] + cols[None, :], mask), acc)
            elif BITS == 8:
                w = int8_values(load_once(w_ptr + rows[:, None] + cols[None, :], mask)).to(tl.bfloat16)
                acc = matmul(coef * row_scales(w_ptr, rows, live, VALUES)[None, :], w, acc)
            else:
                w = values(w_ptr, rows[:, None], cols[None, :], mask, FORM)
                acc = matmul(coef, w, acc)
        elif BITS == 4:
            one = tl.sum(coef, axis=0)[None, :]
            inside = live[None, :] & word_mask
            words = load_words(w_ptr, rows[None, :], word, inside, ZERO)
            low, offset = group_scales(w_ptr, rows[None, :], word // 8 * 64 // GROUP, inside, VALUES, SCALES, ZERO)
            low *= one
            # The powers of two that the levels come with (rows.level); the offset of -8 scales too.
            low_base += low * (-256.0) + one * offset if ZERO else low * (-264.0)
            if GROUP < 64:
                high, offset = group_scales(
                    w_ptr, rows[None, :], (word // 8 * 64 + 32) // GROUP, inside, VALUES, SCALES, ZERO
                )
                high *= one
            else:
                high = low
            high_base += high * (-16.0) + one * offset if ZERO else high * (-24.0)
            low0 += level(words, 0, 0) * low
            low1 += level(words, 1, 0) * low
            low2 += level(words, 2, 0) * low
            low3 += level(words, 3, 0) * low
            high0 += level(words, 0, 1) * high
            high1 += level(words, 1, 1) * high
            high2 += level(words, 2, 1) * high
            high3 += level(words, 3, 1) * high
        else:
            tile = load_once(w_ptr + rows[:, None] + cols[None, :], mask)
            one = tl.sum(coef, axis=0)
            if BITS == 8:
                acc = tl.fma((one * row_scales(w_ptr, rows, live, VALUES))[:, None], int8_values(tile), acc)
            else:
                acc = tl.fma(one[:, None], tile.to(tl.float32), acc)
    if rows_read_ptr is not None:  # noqa: SIM102 - settled while compiling, as an `and` would not be
        if block == 0:
            tl.atomic_add(rows_read_ptr, rows_read, sem="relaxed")
    out_ptr += tl.program_id(1) * B * C
    if BITS == 4 and BP == 1:
        col = word // 8 * 64 + word % 8 * 4
        _store_words(out_ptr, col, low0 + low_base, C)
        _store_words(out_ptr, col + 1, low1 + low_base, C)
        _store_words(out_ptr, col + 2, low2 + low_base, C)
        _store_words(out_ptr, col + 3, low3 + low_base, C)
        _store_words(out_ptr, col + 32, high0 + high_base, C)
        _store_words(out_ptr, col + 33, high1 + high_base, C)
        _store_words(out_ptr, col + 34, high2 + high_base, C)
        _store_words(out_ptr, col + 35, high3 + high_base, C)
    else:
        if BP == 1:
            acc = tl.sum(acc, axis=0)[None, :]
        tl.store(out_ptr + b[:, None] * C + cols[None, :], acc, mask=(b < B)[:, None] & (cols < C)[None, :])


def sum_rows(
    op: str,
    coef: Tensor,
    weights: Weight,
    selection: Selection,
    *,
    unit: int = 1,
    units_per_group: int = 1,
    group_rows: int,
    first: int,
    skip_zeros: bool = False,
    rows_read: Tensor | None = None,
) -> Tensor:
    """`sum_i coef[b, i] * row_i` over the rows of the selected units.

    Row `i` is row `i % unit` of unit `i // unit`; unit `u` begins at weight row
    `u // units_per_group * group_rows + (first + u % units_per_group) * unit`.

    Args:
        op: the entry of the tuning table.
        coef: (B, N) float32; not read where not selected.
        weights: rows of C, contiguous.
        selection: over the N / unit units.
        skip_zeros: never read a row whose coefficients are all zero.
        rows_read: (1,) int64, mutated: the rows read are added.
    Returns: partials (S, B, C) float32.
    """
    (B, N), C = coef.shape, weights.shape[-1]
    data, form = row_args(weights)
    tiles = tuning.pick(op, B, bits_of(form))
    blocks = triton.cdiv(C, tiles["BC"])
    slices = max(1, tiles.pop("SPLITS") // blocks)
    idx, count, capacity = selection_args(selection, N // unit)
    out = coef.new_empty(slices, B, C)
    listed = None
    if skip_zeros and idx is None:
        listed = torch.empty(blocks, capacity * unit, dtype=torch.int32, device=coef.device)
    _sum_rows[(blocks, slices)](
        coef,
        data,
        idx,
        count,
        listed,
        rows_read,
        out,
        N,
        capacity * unit,
        B=B,
        C=C,
        UNIT=unit,
        R=units_per_group,
        GROUP_ROWS=group_rows,
        FIRST=first,
        SKIP_ZEROS=skip_zeros,
        BP=padded_batch(B),
        LISTED=_LISTED,
        **form,
        **tiles,
        **tuning.overlap(),
    )
    return out


def attn_out(o: Tensor, blocks: Weight, heads: Selection = None, tokens: Tokens | None = None) -> Tensor:
    """See reference.attn_out."""
    _, parts, D, _ = blocks.shape
    r = (parts - 2) // 2
    return sum_rows(
        "attn_out", o.flatten(1), blocks, heads, unit=D, units_per_group=r, group_rows=parts * D, first=r + 2
    )
