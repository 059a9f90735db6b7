"""Queries of the selected heads, and the keys and values that they need, in one launch.

A program makes BN rows of one part (a query head, a key or a value) of one group: half of them from the first half
of the head and half from the second, so that rotary pairs meet in it. Lazy keys and values of all rows of the batch
are one list of pending tokens, worked through SLOTS at a time: as a rule the weights are read once. A single sequence
mostly has few of them, which need no tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Selection
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.rows import project, project_few, project_many, row_args
from dejavu.kernels.triton.tiles import begin, count_in, group_selected, padded_batch, selection_args, tickets

# Pending tokens that one reading of a group's weights serves: of one sequence without tensor cores, and with them,
# which multiply SLOT_BC columns a warp.
_FEW = 4
_SLOTS, _SLOT_BC = 16, 32
_COPY = 256


@triton.jit
def _finish(
    acc,
    b,
    token,
    live,
    group,
    part,
    tile,
    d,
    row_mask,
    bias_ptr,
    cos_sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    S,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
):
    """Add the bias to projected rows (M, BN), rotate queries and keys, and store them where they belong."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + (group * (R + 2) + part) * D + d, mask=row_mask, other=0.0)[None, :]
    if cos_sin_ptr is not None:
        PAIRS: tl.constexpr = BN // 2
        first, second = tl.split(tl.permute(tl.reshape(acc, (M, 2, PAIRS)), (0, 2, 1)))
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        mask = live[:, None] & (pair < D // 2)[None, :]
        angle = token[:, None] * D + pair[None, :]
        cos = tl.load(cos_sin_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(cos_sin_ptr + angle + D // 2, mask=mask, other=0.0)
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(tl.permute(turned, (0, 2, 1)), (M, BN))
        acc = tl.where(part <= R, turned, acc)
    mask = live[:, None] & row_mask[None, :]
    if part < R:
        query = (b * G + group) * R + part
        tl.store(q_ptr + query[:, None] * D + d[None, :], acc, mask=mask)
    else:
        at = ((b * G + group).to(tl.int64) * S + token)[:, None] * D + d[None, :]
        if part == R:
            tl.store(k_ptr + at, acc.to(k_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(v_ptr + at, acc.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pending(token, newest, x_ptr, hidden_ptr, P, C: tl.constexpr):
    """The normalised input of a token of the only sequence. The newest is still in x: others write it to the ring."""
    source = tl.where(token >= newest, x_ptr, hidden_ptr + (token % P).to(tl.int64) * C)
    if C % 4 == 0:
        source = tl.multiple_of(source, 16)
    return source


@triton.jit
def _attn_qkv(
    x_ptr,
    w_ptr,
    bias_ptr,
    cos_sin_ptr,
    positions_ptr,
    k_ptr,
    v_ptr,
    idx_ptr,
    count_ptr,
    hidden_ptr,
    kv_len_ptr,
    ticket_ptr,
    q_ptr,
    S,
    P,
    B: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    CAPACITY: tl.constexpr,
    STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
    BP: tl.constexpr,
    FEW: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_BC: tl.constexpr,
    COPY: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    FEW_BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tile = tl.program_id(0)
    item = tl.program_id(1)
    b = tl.arange(0, BP)
    positions = tl.load(positions_ptr + b, mask=b < B, other=0)
    if hidden_ptr is not None:
        # The slot that a token takes in the ring is not pending, so no program reads it meanwhile.
        program = item * tl.num_programs(0) + tile
        for i in range(program * COPY, B * C, tl.num_programs(0) * tl.num_programs(1) * COPY):
            at = i + tl.arange(0, COPY)
            row = at // C
            slot = tl.load(positions_ptr + row, mask=row < B, other=0) % P
            value = tl.load(x_ptr + at, mask=row < B, other=0.0)
            tl.store(hidden_ptr + (row * P + slot) * C + at % C, value, mask=row < B)

    HALF: tl.constexpr = (D + 1) // 2
    row = tl.arange(0, BN)
    pair = tile * (BN // 2) + row % (BN // 2)
    d = pair + row // (BN // 2) * HALF
    row_mask = (pair < HALF) & (d < D)

    # Which part of which group: first the selected heads' queries, then every group's key and value.
    if item < CAPACITY:
        if idx_ptr is None:
            head = item
            active = item >= 0
        else:
            active = item < tl.load(count_ptr)
            head = tl.load(idx_ptr + item, mask=active, other=0)
        group = head // R
        part = head % R
    else:
        group = (item - CAPACITY) // 2
        part = R + (item - CAPACITY) % 2
        active = item >= 0
    rows = ((group * (2 * R + 2) + part) * D + d).to(tl.int64) * STRIDE

    pending_kv = part >= R if hidden_ptr is not None else part < 0
    total = 0
    if hidden_ptr is not None:
        known = tl.load(kv_len_ptr + b * G + group, mask=b < B, other=0)
        pending = positions + 1 - known
        wanted = group_selected(idx_ptr, count_ptr, group, R, CAPACITY) | (pending >= P)
        n = tl.where((b < B) & wanted & pending_kv, tl.maximum(pending, 0), 0)
        total = tl.sum(n, axis=0)
        if B == 1:
            # The token alone is no different from a query's.
            active = active & (~pending_kv | (total == 1))
            pending_kv = pending_kv & (total != 1)
    if active and not pending_kv:
        acc = project(x_ptr, w_ptr, rows, row_mask, B, C, BITS, GROUP, VALUES, SCALES, ZERO, BP, BN, BC, SPLIT, STAGES)
        _finish(
            acc, b, positions, b < B, group, part, tile, d, row_mask,
            bias_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, S, G, R, D, BP, BN,
        )  # fmt: skip
    if hidden_ptr is not None:
        if pending_kv:
            ends = tl.cumsum(n, axis=0)
            slots_from = 0
            SLOT_SPLIT: tl.constexpr = 4 if B == 1 else SPLIT
            if B == 1:  # noqa: SIM102 - settled while compiling, as an `and` would not be
                if (total > 0) & (total <= FEW):
                    slots_from = total
                    start = tl.sum(known, axis=0)
                    newest = tl.sum(positions, axis=0)
                    acc = project_few(
                        _pending(start, newest, x_ptr, hidden_ptr, P, C),
                        _pending(start + 1, newest, x_ptr, hidden_ptr, P, C),
                        _pending(start + 2, newest, x_ptr, hidden_ptr, P, C),
                        _pending(start + 3, newest, x_ptr, hidden_ptr, P, C),
                        total, w_ptr, rows, row_mask, C,
                        BITS, GROUP, VALUES, SCALES, ZERO, FEW, BN, FEW_BC, STAGES,
                    )  # fmt: skip
                    slot = tl.arange(0, FEW)
                    _finish(
                        acc, slot * 0, start + slot, slot < total, group, part, tile, d, row_mask,
                        bias_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, S, G, R, D, FEW, BN,
                    )  # fmt: skip
            for t in range(slots_from, total, SLOTS):
                slot = t + tl.arange(0, SLOTS)
                live = slot < total
                slot_b = tl.sum((slot[:, None] >= ends[None, :]).to(tl.int32), axis=1)
                mine = slot_b[:, None] == b[None, :]
                token = slot + tl.sum(tl.where(mine, (known - (ends - n))[None, :], 0), axis=1)
                # The newest token is still in x: other programs are writing it to the ring.
                source = tl.where(
                    token == tl.sum(tl.where(mine, positions[None, :], 0), axis=1),
                    x_ptr + slot_b * C,
                    hidden_ptr + (slot_b * P + token % P).to(tl.int64) * C,
                )
                if C % 4 == 0:
                    source = tl.multiple_of(source, 16)
                acc = project_many(
                    source, live, w_ptr, rows, row_mask, C,
                    BITS, GROUP, VALUES, SCALES, ZERO, SLOTS, BN, SLOT_BC, SLOT_SPLIT, STAGES,
                )  # fmt: skip
                _finish(
                    acc, slot_b, token, live, group, part, tile, d, row_mask,
                    bias_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, S, G, R, D, SLOTS, BN,
                )  # fmt: skip
        # All programs of the group must have read kv_len before it changes.
        if total > 0:  # noqa: SIM102 - an `and` would evaluate both sides
            if count_in(ticket_ptr + group, 2 * tl.num_programs(0)):
                tl.store(kv_len_ptr + b * G + group, positions + 1, mask=n > 0)


def attn_qkv(
    x: Tensor,
    blocks: Weight,
    bias: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Selection = None,
    *,
    hidden: Tensor | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """See reference.attn_qkv."""
    (B, C), (G, parts, D, _) = x.shape, blocks.shape
    r = (parts - 2) // 2
    data, form = row_args(blocks)
    tiles = tuning.pick("attn_qkv", B, form["BITS"])
    idx, count, capacity = selection_args(heads, G * r)
    q = torch.empty(B, G * r, D, dtype=torch.float32, device=x.device)
    _attn_qkv[(triton.cdiv((D + 1) // 2, tiles["BN"] // 2), capacity + 2 * G)](
        x,
        data,
        bias,
        cos_sin,
        positions,
        k_cache,
        v_cache,
        idx,
        count,
        hidden,
        kv_len,
        None if hidden is None else tickets("attn_qkv", G, x.device),
        q,
        k_cache.shape[2],
        0 if hidden is None else hidden.shape[1],
        B=B,
        G=G,
        R=r,
        D=D,
        C=C,
        CAPACITY=capacity,
        BP=padded_batch(B),
        FEW=_FEW,
        SLOTS=_SLOTS,
        SLOT_BC=_SLOT_BC,
        COPY=_COPY,
        **form,
        **tiles,
        **tuning.overlap(),
    )
    return q
