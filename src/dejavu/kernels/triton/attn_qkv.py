"""Queries of the selected heads, and the keys and values that they need.

A program makes BN rows of one part (a query head, a key or a value) of one group: half of them from the first half
of the head and half from the second, so that rotary pairs meet in it.

Lazy keys and values take a second launch. The first makes the queries, and of a single sequence the keys and values of
groups in which the newest token alone is pending; few registers serve these, so many programs fit. The second works
through what else is pending: all rows of the batch are one list of tokens, cut into chunks of SLOTS, each an item of
its own, so that a group with many pending tokens keeps no program busy for longer than others. A single sequence mostly
has few of them, which need no tensor cores: its chunks are of FEW. The second launch begins while the first one ends.
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
    FEW,
    PLANES,
    bits_of,
    few_pending,
    project,
    project_few,
    project_many,
    row_args,
    spread,
    words_of,
)
from dejavu.kernels.triton.tiles import (
    begin,
    count_in,
    let_next_begin,
    padded_batch,
    selection_args,
    tickets,
)

# Pending tokens that one reading of a group's weights serves on the tensor cores, of one sequence and of several, and
# columns that they multiply at a time. More at once would be less work, but the longest item of a launch.
_SLOTS, _SLOT_BC = (8, 16), 32
_COPY = 256


@triton.jit
def _finish(
    acc,
    n,
    cache_row,
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
        query = (n * G + group) * R + part
        tl.store(q_ptr + query[:, None] * D + d[None, :], acc, mask=mask)
    else:
        at = ((cache_row * G + group).to(tl.int64) * S + token)[:, None] * D + d[None, :]
        tl.store(tl.where(part == R, k_ptr, v_ptr) + at, acc.to(k_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pending(token, newest, x_ptr, planes_ptr, ring_ptr, Q, C: tl.constexpr, PLANES: tl.constexpr):
    """The normalised input of a token of the only sequence. The newest is still in x: others write it to the ring."""
    if planes_ptr is not None:
        return planes_ptr + tl.maximum(newest - token, 0) * PLANES
    source = tl.where(token >= newest, x_ptr, ring_ptr + (token % Q).to(tl.int64) * C)
    if C % 4 == 0:
        source = tl.multiple_of(source, 16)
    return source


@triton.jit
def _rows(group, part, tile, R: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr):
    """The rows (BN,) of one tile of a part of a group: places in the head, whether they exist, and their offsets."""
    HALF: tl.constexpr = (D + 1) // 2
    row = tl.arange(0, BN)
    pair = tile * (BN // 2) + row % (BN // 2)
    d = pair + row // (BN // 2) * HALF
    return d, (pair < HALF) & (d < D), ((group * (2 * R + 2) + part) * D + d).to(tl.int64) * STRIDE


@triton.jit
def _selected(idx_ptr, count_ptr, groups, R: tl.constexpr, CAPACITY: tl.constexpr):
    """Which groups have a selected head."""
    if idx_ptr is None:
        return groups >= 0
    else:
        slot = tl.arange(0, triton.next_power_of_2(CAPACITY))
        live = (slot < tl.load(count_ptr)) & (slot < CAPACITY)
        group = tl.where(live, tl.load(idx_ptr + slot, mask=live, other=0) // R, -1)
        return tl.max((group[:, None] == groups[None, :]).to(tl.int32), axis=0) > 0


@triton.jit
def _count(read_ptr, count_ptr, selected, projected, G: tl.constexpr, R: tl.constexpr):
    """Add to attn_read (3,): the heads read, the groups with one, and the groups projected. By one program alone."""
    heads = tl.full((), G * R, tl.int64) if count_ptr is None else tl.load(count_ptr).to(tl.int64)
    groups = tl.sum((selected & (tl.arange(0, triton.next_power_of_2(G)) < G)).to(tl.int64), axis=0)
    # Not loaded, added and stored: nobody waits for these.
    tl.atomic_add(read_ptr, heads, sem="relaxed")
    tl.atomic_add(read_ptr + 1, groups, sem="relaxed")
    tl.atomic_add(read_ptr + 2, projected, sem="relaxed")


@triton.jit
def _attn_qkv(
    x_ptr,
    planes_ptr,
    w_ptr,
    bias_ptr,
    cos_sin_ptr,
    cache_rows_ptr,
    positions_ptr,
    k_ptr,
    v_ptr,
    idx_ptr,
    count_ptr,
    hidden_ptr,
    kv_len_ptr,
    read_ptr,
    q_ptr,
    S,
    Q,
    B: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    CAPACITY: tl.constexpr,
    STRIDE: tl.constexpr,
    FORM: tl.constexpr,
    BP: tl.constexpr,
    COPY: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    if hidden_ptr is not None:
        let_next_begin(PDL)
    tile = tl.program_id(0)
    item = tl.program_id(1)
    n = tl.arange(0, BP)
    positions = tl.load(positions_ptr + n, mask=n < B, other=0)
    cache_rows = tl.load(cache_rows_ptr + n, mask=n < B, other=-1)
    if hidden_ptr is not None:
        # The slot that a token takes in the ring is not pending, so no program reads it meanwhile.
        program = item * tl.num_programs(0) + tile
        for i in range(program * COPY, B * C, tl.num_programs(0) * tl.num_programs(1) * COPY):
            at = i + tl.arange(0, COPY)
            of = at // C
            into = tl.load(cache_rows_ptr + of, mask=of < B, other=-1)
            slot = tl.load(positions_ptr + of, mask=of < B, other=0) % Q
            value = tl.load(x_ptr + at, mask=of < B, other=0.0)
            tl.store(hidden_ptr + (into * Q + slot).to(tl.int64) * C + at % C, value, mask=into >= 0)

    # Which part of which group. Lazy: what each selected head needs; else queries, then every group's key and value.
    if hidden_ptr is not None or item < CAPACITY:
        PARTS: tl.constexpr = 1 if hidden_ptr is None or B > 1 else 3
        slot = item // PARTS
        head = slot
        active = slot < CAPACITY
        if idx_ptr is not None:
            active = slot < tl.load(count_ptr)
            head = tl.load(idx_ptr + slot, mask=active, other=0)
        group = head // R
        part = head % R
        if PARTS == 3:  # noqa: SIM102 - settled while compiling, as an `and` would not be
            if item % 3 > 0:
                part = R + item % 3 - 1
                # Of the group's selected heads the first sees to it, where the newest token alone is pending.
                if R > 1:
                    before = slot - 1
                    if idx_ptr is not None:
                        before = tl.load(idx_ptr + before, mask=active & (slot > 0), other=-R)
                    active = active & ((slot == 0) | (before // R != group))
                known = tl.load(kv_len_ptr + tl.load(cache_rows_ptr) * G + group)
                active = active & (tl.load(positions_ptr) == known)
    else:
        group = (item - CAPACITY) // 2
        part = R + (item - CAPACITY) % 2
        active = item >= 0
    if active:
        d, row_mask, rows = _rows(group, part, tile, R, D, STRIDE, BN)
        source = x_ptr if planes_ptr is None else planes_ptr
        acc = project(source, w_ptr, rows, row_mask, B, C, FORM, BP, BN, BC, SPLIT, STAGES)
        _finish(
            acc, n, cache_rows, positions, cache_rows >= 0, group, part, tile, d, row_mask,
            bias_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, S, G, R, D, BP, BN,
        )  # fmt: skip
    if hidden_ptr is None:  # noqa: SIM102 - settled while compiling, as an `and` would not be
        if read_ptr is not None:  # noqa: SIM102
            if (tile == 0) & (item == 0):
                groups = tl.arange(0, triton.next_power_of_2(G))
                chosen = _selected(idx_ptr, count_ptr, groups, R, CAPACITY)
                _count(read_ptr, count_ptr, chosen, tl.full((), G, tl.int64), G, R)


@triton.jit
def _attn_pending(
    x_ptr,
    planes_ptr,
    w_ptr,
    bias_ptr,
    cos_sin_ptr,
    cache_rows_ptr,
    positions_ptr,
    k_ptr,
    v_ptr,
    idx_ptr,
    count_ptr,
    hidden_ptr,
    kv_len_ptr,
    read_ptr,
    ticket_ptr,
    q_ptr,
    S,
    Q,
    P,
    B: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    CAPACITY: tl.constexpr,
    STRIDE: tl.constexpr,
    FORM: tl.constexpr,
    BP: tl.constexpr,
    FEW: tl.constexpr,
    FEW_PENDING: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_BC: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # Nothing that the launch before this one writes is read: what came before that one, it has waited for.
    b = tl.arange(0, BP)
    positions = tl.load(positions_ptr + b, mask=b < B, other=0)
    cache_rows = tl.load(cache_rows_ptr + b, mask=b < B, other=-1)
    # Of the tokens of a row the first in the step also sees to those that have waited.
    first_of_row = cache_rows >= 0
    newest_of_row = positions
    if B > 1:
        of_row = (cache_rows[:, None] == cache_rows[None, :]) & (b < B)[None, :]
        newest_of_row = tl.max(tl.where(of_row, positions[None, :], 0), axis=1)
        first_of_row = first_of_row & (tl.min(tl.where(of_row, b[None, :], B), axis=1) == b)
    groups = tl.arange(0, triton.next_power_of_2(G))
    inside = (cache_rows >= 0)[:, None] & (groups < G)[None, :]
    known = tl.load(kv_len_ptr + cache_rows[:, None] * G + groups[None, :], mask=inside, other=0)
    pending = tl.where(first_of_row[:, None], positions[:, None] + 1 - known, 1)
    chosen = _selected(idx_ptr, count_ptr, groups, R, CAPACITY)
    wanted = inside & (chosen[None, :] | (newest_of_row[:, None] + 1 - known >= P))
    pending = tl.where(wanted, tl.maximum(pending, 0), 0)
    total = tl.sum(pending, axis=0)
    chunks = tl.cdiv(total, SLOTS)
    if B == 1:
        chunks = tl.where(total <= FEW_PENDING, tl.cdiv(total, FEW), chunks)
        # A token that alone is pending in a selected head's group, the first launch sees to.
        chunks = tl.where((total == 1) & chosen, 0, chunks)
    ends = tl.cumsum(chunks, axis=0)
    TILES: tl.constexpr = ((D + 1) // 2 + BN // 2 - 1) // (BN // 2)
    for item in range(tl.program_id(0), tl.max(ends, axis=0) * 2 * TILES, tl.num_programs(0)):
        tile = item % TILES
        part = R + item // TILES % 2
        at = item // (2 * TILES)
        group = tl.sum((ends <= at).to(tl.int32), axis=0)
        mine = groups == group
        n = tl.sum(tl.where(mine, total, 0), axis=0)
        chunk = at - tl.sum(tl.where(mine, ends - chunks, 0), axis=0)
        # Of each row of the batch: its pending tokens, and the first of them.
        row_n = tl.sum(tl.where(mine[None, :], pending, 0), axis=1)
        first = positions + 1 - row_n
        d, row_mask, rows = _rows(group, part, tile, R, D, STRIDE, BN)
        few = n <= FEW_PENDING if B == 1 else False
        if few:
            start = tl.sum(first, axis=0) + chunk * FEW
            newest = tl.sum(positions, axis=0)
            cache_row = tl.sum(cache_rows, axis=0)
            ring_ptr = hidden_ptr + cache_row.to(tl.int64) * Q * C
            live = tl.minimum(n - chunk * FEW, FEW)
            acc = project_few(
                _pending(start, newest, x_ptr, planes_ptr, ring_ptr, Q, C, PLANES),
                _pending(start + 1, newest, x_ptr, planes_ptr, ring_ptr, Q, C, PLANES),
                _pending(start + 2, newest, x_ptr, planes_ptr, ring_ptr, Q, C, PLANES),
                _pending(start + 3, newest, x_ptr, planes_ptr, ring_ptr, Q, C, PLANES),
                live, w_ptr, rows, row_mask, C,
                FORM, FEW, BN, BC, STAGES,
            )  # fmt: skip
            slot = tl.arange(0, FEW)
            _finish(
                acc, slot * 0, slot * 0 + cache_row, start + slot, slot < live, group, part, tile, d, row_mask,
                bias_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, S, G, R, D, FEW, BN,
            )  # fmt: skip
        else:
            row_ends = tl.cumsum(row_n, axis=0)
            place = chunk * SLOTS + tl.arange(0, SLOTS)
            there = place < n
            slot_b = tl.sum((place[:, None] >= row_ends[None, :]).to(tl.int32), axis=1)
            ours = slot_b[:, None] == b[None, :]
            token = place + tl.sum(tl.where(ours, (first - (row_ends - row_n))[None, :], 0), axis=1)
            slot_row = tl.sum(tl.where(ours, cache_rows[None, :], 0), axis=1)
            # The step's own tokens are still in x: other programs are writing them to the ring.
            source = tl.where(
                token == tl.sum(tl.where(ours, positions[None, :], 0), axis=1),
                x_ptr + slot_b * C,
                hidden_ptr + (slot_row * Q + token % Q).to(tl.int64) * C,
            )
            if C % 4 == 0:
                source = tl.multiple_of(source, 16)
            sums = project_many(
                source, there, w_ptr, rows, row_mask, C,
                FORM, SLOTS, BN, SLOT_BC, SPLIT, STAGES,
            )  # fmt: skip
            _finish(
                sums, slot_b, slot_row, token, there, group, part, tile, d, row_mask,
                bias_ptr, cos_sin_ptr, q_ptr, k_ptr, v_ptr, S, G, R, D, SLOTS, BN,
            )  # fmt: skip
    # Whoever waits for this launch waits for the one before it, whose programs read kv_len too.
    begin(PDL)
    if count_in(ticket_ptr, tl.num_programs(0)):
        at = cache_rows[:, None] * G + groups[None, :]
        newest = (positions == newest_of_row)[:, None]
        tl.store(kv_len_ptr + at, positions[:, None] + tl.zeros_like(at) + 1, mask=(pending > 0) & newest)
        if read_ptr is not None:
            _count(read_ptr, count_ptr, chosen, tl.sum((total > 0).to(tl.int64), axis=0), G, R)


def attn_qkv(
    x: Tensor,
    blocks: Weight,
    bias: Tensor | None,
    cos_sin: Tensor | None,
    tokens: Tokens,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Selection = None,
    *,
    hidden: Tensor | None = None,
    kv_len: Tensor | None = None,
    pending: int = 0,
    attn_read: Tensor | None = None,
) -> Tensor:
    """See reference.attn_qkv."""
    (B, C), (G, parts, D, _) = x.shape, blocks.shape
    r = (parts - 2) // 2
    data, form = row_args(blocks)
    idx, count, capacity = selection_args(heads, G * r)
    planes = spread(x, form, hidden, tokens)
    q = torch.empty(B, G * r, D, dtype=torch.float32, device=x.device)
    sources = (x, None if planes is x else planes, data, bias, cos_sin, tokens.rows, tokens.positions)
    sizes = {"B": B, "G": G, "R": r, "D": D, "C": C, "CAPACITY": capacity, "BP": padded_batch(B)}
    sizes |= {"S": k_cache.shape[2], "Q": 0 if hidden is None else hidden.shape[1]} | form | tuning.overlap()

    def tiles_of(rows: int) -> int:
        return triton.cdiv((D + 1) // 2, rows // 2)

    tiles = tuning.pick("attn_qkv", B, bits_of(form))
    items = capacity + 2 * G if hidden is None else 3 * capacity if B == 1 else capacity
    _attn_qkv[(tiles_of(tiles["BN"]), items)](
        *sources, k_cache, v_cache, idx, count, hidden, kv_len, attn_read, q, COPY=_COPY, **sizes, **tiles
    )
    if hidden is not None:
        tiles = tuning.pick("attn_pending", B, bits_of(form))
        _attn_pending[(min(tiles_of(tiles["BN"]) * 2 * G, tiles.pop("PROGRAMS")),)](
            *sources,
            k_cache,
            v_cache,
            idx,
            count,
            hidden,
            kv_len,
            attn_read,
            tickets("attn_pending", 1, x.device),
            q,
            P=pending,
            FEW=FEW,
            FEW_PENDING=few_pending(form),
            PLANES=PLANES * words_of(form),
            SLOTS=_SLOTS[B > 1],
            SLOT_BC=_SLOT_BC,
            **sizes,
            **tiles,
        )
    return q
