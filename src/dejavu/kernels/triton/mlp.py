"""The MLP over the selected neurons: activations in one launch, sums of fc2 rows in another (sum_rows.py).

Two launches, not one, because the halves want different grids: the first shares out neurons, each over all of C; the
second shares out columns and neurons, or its partial sums would outweigh a sparse layer's weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.quantized import Weight
from dejavu.kernels.reference import Selection, Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.rows import bits_of, project, row_args, spread
from dejavu.kernels.triton.sum_rows import sum_rows
from dejavu.kernels.triton.tiles import begin, padded_batch, selection_args


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)  # what is not a number stays so, which tl.maximum would hide
    elif ACTIVATION == "fatrelu":
        return tl.where(x <= THRESHOLD, 0.0, x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh(u)) / 2 = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _mlp_in(
    x_ptr,
    w_ptr,
    bias_ptr,
    idx_ptr,
    count_ptr,
    cache_rows_ptr,
    rows_read_ptr,
    h_ptr,
    CAPACITY,
    N,
    B: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ACTIVATE_UP: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    STRIDE: tl.constexpr,
    FORM: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    b = tl.arange(0, BP)
    real = b < B
    if cache_rows_ptr is not None:
        real = tl.load(cache_rows_ptr + b, mask=b < B, other=-1) >= 0
    total = tl.minimum(CAPACITY, CAPACITY if count_ptr is None else tl.load(count_ptr))
    up_rows = tl.zeros((), tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(total, BN), tl.num_programs(0)):
        slot = tile * BN + tl.arange(0, BN)
        live = slot < total
        neuron = slot if idx_ptr is None else tl.load(idx_ptr + slot, mask=live, other=0)
        rows = neuron.to(tl.int64) * (PARTS * STRIDE)
        h = project(x_ptr, w_ptr, rows, live, B, C, FORM, BP, BN, BC, SPLIT, STAGES)
        if bias_ptr is not None:
            h += tl.load(bias_ptr + neuron * (PARTS - 1), mask=live, other=0.0)[None, :]
        mask = (b < B)[:, None] & live[None, :]
        h = tl.where(real[:, None] & live[None, :], _activate(h, ACTIVATION, THRESHOLD), 0.0)
        if PARTS == 3:
            if SKIP_ZEROS:
                live = live & (tl.max((h != 0).to(tl.int32), axis=0) > 0)
            opened = tl.sum(live.to(tl.int64), axis=0)
            up_rows += opened
            if opened > 0:
                up = project(
                    x_ptr, w_ptr, rows + STRIDE, live, B, C,
                    FORM, BP, BN, BC, SPLIT, STAGES,
                )  # fmt: skip
                if bias_ptr is not None:
                    up += tl.load(bias_ptr + neuron * 2 + 1, mask=live, other=0.0)[None, :]
                if ACTIVATE_UP:
                    up = _activate(up, ACTIVATION, THRESHOLD)
                h = tl.where(real[:, None], h * up, 0.0)
        tl.store(h_ptr + b[:, None] * N + neuron[None, :], h, mask=mask)
    if rows_read_ptr is not None:
        if tl.program_id(0) == 0:
            tl.atomic_add(rows_read_ptr, total.to(tl.int64), sem="relaxed")
        if PARTS == 3:
            tl.atomic_add(rows_read_ptr + 1, up_rows, sem="relaxed")


def mlp(
    x: Tensor,
    rows: Weight,
    bias: Tensor | None,
    neurons: Selection = None,
    tokens: Tokens | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
    activate_up: bool = False,
    skip_zeros: bool = False,
    rows_read: Tensor | None = None,
) -> Tensor:
    """See reference.mlp."""
    (B, C), (N, parts, _) = x.shape, rows.shape
    data, form = row_args(rows)
    tiles = tuning.pick("mlp_in", B, bits_of(form))
    idx, count, capacity = selection_args(neurons, N)
    h = torch.empty(B, N, dtype=torch.float32, device=x.device)
    _mlp_in[(max(1, min(triton.cdiv(capacity, tiles["BN"]), tuning.PROGRAMS)),)](
        spread(x, form),
        data,
        bias,
        idx,
        count,
        None if tokens is None or B == 1 else tokens.rows,
        rows_read,
        h,
        capacity,
        N,
        B=B,
        C=C,
        PARTS=parts,
        ACTIVATION=activation,
        THRESHOLD=threshold,
        ACTIVATE_UP=activate_up,
        SKIP_ZEROS=skip_zeros,
        BP=padded_batch(B),
        **form,
        **tiles,
        **tuning.overlap(),
    )
    return sum_rows(
        "mlp_out",
        h,
        rows,
        neurons,
        group_rows=parts,
        first=parts - 1,
        skip_zeros=skip_zeros,
        rows_read=None if rows_read is None else rows_read[parts - 1 :],
    )
