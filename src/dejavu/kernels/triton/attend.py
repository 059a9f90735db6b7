"""Attention of a token's queries over its row of the cache: split over the context, put together in a fixed order, one
launch.

The context is cut by the cache's capacity, not by the position, so one grid is right for every step: a program whose
part lies past the position, before the window, or in a group without a selected head, ends at once. The heads of a
group share the reading of its keys and values.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.reference import Selection, Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.rows import matmul
from dejavu.kernels.triton.tiles import begin, count_in, group_selected, selection_args, tickets

# Partial results of one head to put together at the end, at most.
_MAX_SPLITS = 64


@triton.jit
def _one_head(
    q_ptr, k_ptr, v_ptr, first, last, start, D: tl.constexpr, SCALE: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr
):
    """Softmax over the tokens first .. last, from `start` on, of one head: its maximum, sum and weighted values."""
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + d, mask=d < D, other=0.0) * SCALE
    top = -float("inf")
    norm = 0.0
    acc = tl.zeros((BT, DP), tl.float32)
    for t in range(first, last, BT):
        token = t + tl.arange(0, BT)
        live = (token >= start) & (token < last)
        at = token[:, None] * D + d[None, :]
        mask = live[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        score = tl.where(live, tl.sum(q[None, :] * k.to(tl.float32), axis=1), -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        p = tl.exp2(score - new_top)
        shrink = tl.exp2(top - new_top)
        norm = norm * shrink + tl.sum(p, axis=0)
        acc = acc * shrink + p[:, None] * v.to(tl.float32)
        top = new_top
    return tl.full((1,), 0.0, tl.float32) + top, tl.full((1,), 0.0, tl.float32) + norm, tl.sum(acc, axis=0)[None, :]


@triton.jit
def _heads(
    q_ptr,
    k_ptr,
    v_ptr,
    first,
    last,
    start,
    R: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    RP: tl.constexpr,
    DP: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """_one_head for the R heads of a group, on the tensor cores."""
    d = tl.arange(0, DP)
    r = tl.arange(0, RP)
    q = tl.load(q_ptr + r[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0) * SCALE
    top = tl.full((RP,), -float("inf"), tl.float32)
    norm = tl.zeros((RP,), tl.float32)
    acc = tl.zeros((RP, DP), tl.float32)
    for t in tl.range(first, last, BT, num_stages=STAGES):
        token = t + tl.arange(0, BT)
        live = (token >= start) & (token < last)
        at = token[:, None] * D + d[None, :]
        mask = live[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        score = matmul(q, tl.trans(k), tl.zeros((RP, BT), tl.float32))
        score = tl.where(live[None, :], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        norm = norm * shrink + tl.sum(p, axis=1)
        acc = matmul(p, v, acc * shrink[:, None])
        top = new_top
    return top, norm, acc


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    cache_rows_ptr,
    positions_ptr,
    idx_ptr,
    count_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    ticket_ptr,
    out_ptr,
    S,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    RP: tl.constexpr,
    DP: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    split = tl.program_id(0)
    group = tl.program_id(1)
    b = tl.program_id(2)
    cache_row = tl.load(cache_rows_ptr + b)
    end = tl.load(positions_ptr + b) + 1
    start = 0
    if WINDOW is not None:
        start = tl.maximum(end - WINDOW, 0)
    first_split = start // CHUNK
    last_split = (end - 1) // CHUNK
    here = (cache_row >= 0) & (split >= first_split) & (split <= last_split)
    if here & group_selected(idx_ptr, count_ptr, group, R, CAPACITY):
        d = tl.arange(0, DP)
        r = tl.arange(0, RP)
        pair = b * tl.num_programs(1) + group
        cache = (cache_row * tl.num_programs(1) + group).to(tl.int64) * S * D
        # The first tile starts at a multiple of BT, and so has a token to attend to.
        first = tl.maximum(split * CHUNK, start // BT * BT)
        last = tl.minimum((split + 1) * CHUNK, end)
        if RP == 1:
            top, norm, acc = _one_head(
                q_ptr + pair * D, k_ptr + cache, v_ptr + cache, first, last, start, D, SCALE, DP, BT
            )
        else:
            top, norm, acc = _heads(
                q_ptr + pair * R * D, k_ptr + cache, v_ptr + cache, first, last, start, R, D, SCALE, RP, DP, BT, STAGES
            )
        heads = pair * R + r
        d_mask = (d < D)[None, :]
        part = heads * SPLITS + split
        tl.store(max_ptr + part, top, mask=r < R)
        tl.store(sum_ptr + part, norm, mask=r < R)
        tl.store(acc_ptr + part[:, None] * D + d[None, :], acc, mask=(r < R)[:, None] & d_mask)

        if count_in(ticket_ptr + pair, last_split - first_split + 1):
            splits = tl.arange(0, triton.next_power_of_2(SPLITS))
            done = (splits >= first_split) & (splits <= last_split)
            for j in range(R):
                parts = (pair * R + j) * SPLITS + splits
                top_j = tl.load(max_ptr + parts, mask=done, other=-float("inf"))
                weight = tl.exp2(top_j - tl.max(top_j, axis=0))
                total = tl.sum(weight * tl.load(sum_ptr + parts, mask=done, other=0.0), axis=0)
                rows = parts[:, None] * D + d[None, :]
                accs = tl.load(acc_ptr + rows, mask=done[:, None] & d_mask, other=0.0)
                out = tl.sum(weight[:, None] * accs, axis=0) / total
                tl.store(out_ptr + (pair * R + j) * D + d, out, mask=d < D)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tokens,
    heads: Selection = None,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See reference.attend."""
    (B, H, D), (_, G, S, _) = q.shape, k_cache.shape
    r = H // G
    tiles = tuning.pick("attend", B)
    idx, count, capacity = selection_args(heads, H)
    chunk = max(tiles["BT"], triton.next_power_of_2(triton.cdiv(S, _MAX_SPLITS)))
    splits = triton.cdiv(S, chunk)
    out = torch.empty_like(q)
    _attend[(splits, G, B)](
        q,
        k_cache,
        v_cache,
        tokens.rows,
        tokens.positions,
        idx,
        count,
        q.new_empty(B, H, splits),
        q.new_empty(B, H, splits),
        q.new_empty(B, H, splits, D),
        tickets("attend", B * G, q.device),
        out,
        S,
        SCALE=scale * math.log2(math.e),
        WINDOW=window,
        R=r,
        D=D,
        CAPACITY=capacity,
        CHUNK=chunk,
        SPLITS=splits,
        RP=1 if r == 1 else max(16, triton.next_power_of_2(r)),
        DP=max(16, triton.next_power_of_2(D)),
        **tiles,
        **tuning.overlap(),
    )
    return out
