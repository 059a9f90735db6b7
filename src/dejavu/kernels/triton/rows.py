"""Device code that reads rows of weights, plain or quantised (kernels/quantized.py), and multiplies with them.

Activations are float32 and stay so. A batch of one multiplies and adds in float32; a larger batch goes to the
tensor cores, where each activation is split into two numbers of the weights' type whose sum holds it (16 bits of
mantissa for bfloat16), so that a result is rounded by its accumulation and not by its inputs.

A row is found by an offset: of elements for plain weights, of bytes for quantised ones; STRIDE lies between two rows.
Four bits are read as levels u = 0 .. 15 with `w = scale * u + offset`. Without a zero point the sign bits are
flipped, which makes the offset -8 scales.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dejavu.errors import KernelUnavailable
from dejavu.kernels.quantized import LINE, Quantized

_LINE, _HALF = tl.constexpr(LINE), tl.constexpr(LINE // 2)


def row_args(weight: Tensor | Quantized) -> tuple[Tensor, dict[str, int]]:
    """What a kernel needs to read rows: their memory, and constants of their format.

    Raises: KernelUnavailable for rows of one bit.
    """
    if not isinstance(weight, Quantized):
        return weight, {"STRIDE": weight.shape[-1], "BITS": 0, "GROUP": 0, "VALUES": 0, "SCALES": 0, "ZERO": False}
    form = weight.format
    if form.bits == 1:
        raise KernelUnavailable("the GPU kernels read weights of 4 bits and more; use format int8 or int4")
    values, scales, stride = form.layout(weight.width)
    sizes = {"STRIDE": stride, "VALUES": values, "SCALES": scales, "ZERO": form.zero_point}
    return weight.data, sizes | {"BITS": form.bits, "GROUP": form.group}


@triton.jit
def load_once(pointers, mask):
    """A tile of weights: each is read once, so it is the first to leave the cache."""
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def int8_values(tile):
    """float32 of bytes that hold signed numbers."""
    return tile.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def row_scales(w_ptr, rows, mask, VALUES: tl.constexpr):
    """The scale of each row of 8 bits."""
    return tl.load((w_ptr + rows + VALUES).to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)


@triton.jit
def group_scales(w_ptr, rows, group, mask, VALUES: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr):
    """Scale and offset, float32, of groups of 4-bit values."""
    at = (w_ptr + rows + VALUES).to(tl.pointer_type(tl.float16)) + group
    scale = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if ZERO:
        return scale, tl.load(at + SCALES // 2, mask=mask, other=0.0).to(tl.float32)
    else:
        return scale, -8.0 * scale


@triton.jit
def load_lines(w_ptr, rows, line, mask, ZERO: tl.constexpr):
    """Levels of whole lines of 4-bit values: their first halves and their second ones, float32.

    rows, line, mask: of shapes that broadcast to (rows, lines, 1); the result has a last dimension of half a line.
    """
    packed = load_once(w_ptr + rows + line * _HALF + tl.arange(0, _HALF)[None, None, :], mask)
    if not ZERO:
        packed ^= 0x88
    return (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)


@triton.jit
def values(
    w_ptr,
    rows,
    cols,
    mask,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Weights one by one, as float32; for where speed doesn't matter."""
    if BITS == 0:
        return load_once(w_ptr + rows + cols, mask).to(tl.float32)
    elif BITS == 8:
        return int8_values(load_once(w_ptr + rows + cols, mask)) * row_scales(w_ptr, rows + 0 * cols, mask, VALUES)
    else:
        packed = tl.load(w_ptr + rows + cols // _LINE * _HALF + cols % _HALF, mask=mask, other=0).to(tl.int32)
        if not ZERO:
            packed ^= 0x88
        level = (packed >> (cols % _LINE // _HALF * 4)) & 15
        scale, offset = group_scales(w_ptr, rows, cols // GROUP, mask, VALUES, SCALES, ZERO)
        return tl.where(mask, level.to(tl.float32) * scale + offset, 0.0)


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
def _add_lines(
    acc, low, high, x_ptr, line, end, low_scale, high_scale, low_offset, high_offset, GROUP: tl.constexpr
):  # fmt: skip
    """acc (BN, lines) + the products of lines of 4-bit levels with one row of activations.

    Activations from `end` on count for nothing, whatever the padding of the weights.
    """
    cols = line[None, :, None] * _LINE + tl.arange(0, _HALF)[None, None, :]
    x_low = tl.load(x_ptr + cols, mask=cols < end, other=0.0)
    x_high = tl.load(x_ptr + cols + _HALF, mask=cols + _HALF < end, other=0.0)
    if GROUP >= _LINE:
        acc += low_scale * tl.sum(low * x_low + high * x_high, axis=2)
        return acc + low_offset * tl.sum(x_low + x_high, axis=2)
    else:
        acc += low_scale * tl.sum(low * x_low, axis=2) + low_offset * tl.sum(x_low, axis=2)
        return acc + high_scale * tl.sum(high * x_high, axis=2) + high_offset * tl.sum(x_high, axis=2)


@triton.jit
def project_few(
    x0,
    x1,
    x2,
    x3,
    live,
    w_ptr,
    rows,
    row_mask,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
    FEW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of FEW rows of activations, 1 or 4, with BN rows of weights: (FEW, BN) float32, without tensor cores.

    x0 .. x3: pointers to the rows of activations, of which the first `live` are read; rows: (BN,) offsets.
    """
    if BITS == 4:
        LINES: tl.constexpr = BC // _LINE
        s0 = tl.zeros((BN, LINES), tl.float32)
        s1, s2, s3 = s0, s0, s0
        for c in tl.range(0, C, BC, num_stages=STAGES):
            line = c // _LINE + tl.arange(0, LINES)
            inside = line < (C + _LINE - 1) // _LINE
            mask = row_mask[:, None] & inside[None, :]
            low, high = load_lines(
                w_ptr, rows[:, None, None], line[None, :, None], row_mask[:, None, None] & inside[None, :, None], ZERO
            )
            at = rows[:, None]
            low_scale, low_offset = group_scales(w_ptr, at, line[None, :] * _LINE // GROUP, mask, VALUES, SCALES, ZERO)
            high_scale, high_offset = low_scale, low_offset
            if GROUP < _LINE:
                high_scale, high_offset = group_scales(
                    w_ptr, at, (line[None, :] * _LINE + _HALF) // GROUP, mask, VALUES, SCALES, ZERO
                )
            s0 = _add_lines(s0, low, high, x0, line, C, low_scale, high_scale, low_offset, high_offset, GROUP)
            if FEW > 1:
                s1 = _add_lines(
                    s1,
                    low,
                    high,
                    x1,
                    line,
                    tl.where(live > 1, C, 0),
                    low_scale,
                    high_scale,
                    low_offset,
                    high_offset,
                    GROUP,
                )
                s2 = _add_lines(
                    s2,
                    low,
                    high,
                    x2,
                    line,
                    tl.where(live > 2, C, 0),
                    low_scale,
                    high_scale,
                    low_offset,
                    high_offset,
                    GROUP,
                )
                s3 = _add_lines(
                    s3,
                    low,
                    high,
                    x3,
                    line,
                    tl.where(live > 3, C, 0),
                    low_scale,
                    high_scale,
                    low_offset,
                    high_offset,
                    GROUP,
                )
    else:
        s0 = tl.zeros((BN, BC), tl.float32)
        s1, s2, s3 = s0, s0, s0
        for c in tl.range(0, C, BC, num_stages=STAGES):
            cols = c + tl.arange(0, BC)[None, :]
            inside = cols < C
            tile = load_once(w_ptr + rows[:, None] + cols, row_mask[:, None] & inside)
            w = int8_values(tile) if BITS == 8 else tile.to(tl.float32)
            s0 = tl.fma(w, tl.load(x0 + cols, mask=inside, other=0.0), s0)
            if FEW > 1:
                s1 = tl.fma(w, tl.load(x1 + cols, mask=cols < tl.where(live > 1, C, 0), other=0.0), s1)
                s2 = tl.fma(w, tl.load(x2 + cols, mask=cols < tl.where(live > 2, C, 0), other=0.0), s2)
                s3 = tl.fma(w, tl.load(x3 + cols, mask=cols < tl.where(live > 3, C, 0), other=0.0), s3)
    y = tl.sum(s0, axis=1)[None, :]
    if FEW > 1:
        pairs = tl.join(
            tl.join(tl.sum(s0, axis=1), tl.sum(s2, axis=1)), tl.join(tl.sum(s1, axis=1), tl.sum(s3, axis=1))
        )
        y = tl.trans(tl.reshape(pairs, (BN, FEW)))
    if BITS == 8:
        y *= row_scales(w_ptr, rows, row_mask, VALUES)[None, :]
    return y


@triton.jit
def project_many(
    x_rows,
    live,
    w_ptr,
    rows,
    row_mask,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of M rows of activations with BN rows of weights: (M, BN) float32, on the tensor cores.

    x_rows: (M,) pointers to float32 rows, of which `live` ones are read; rows: (BN,) offsets. The columns are
    multiplied in SPLIT parts, one a warp, so that no warp splits activations that another has split.
    """
    # With 4 bits a part then lies within one group, so that levels are multiplied and one scale serves the part.
    tl.static_assert(BITS != 4 or BC == _HALF)
    acc = tl.zeros((SPLIT, M, BN), tl.float32)
    for c in tl.range(0, C, SPLIT * BC, num_stages=STAGES):
        first = c + tl.arange(0, SPLIT)[:, None, None] * BC
        cols = first + tl.arange(0, BC)[None, None, :]
        mask = row_mask[None, :, None] & (cols < C)
        x = tl.load(x_rows[None, :, None] + cols, mask=live[None, :, None] & (cols < C), other=0.0)
        if BITS == 4:
            packed = load_once(w_ptr + rows[None, :, None] + cols // _LINE * _HALF + cols % _HALF, mask)
            if not ZERO:
                packed ^= 0x88
            level = (packed >> (first % _LINE // _HALF * 4).to(tl.uint8)) & 15
            w = tl.permute(level.to(tl.float32).to(tl.bfloat16), (0, 2, 1))
            part = matmul(x, w, tl.zeros((SPLIT, M, BN), tl.float32))
            scale, offset = group_scales(
                w_ptr, rows[None, None, :], first // GROUP, row_mask[None, None, :] & (first < C), VALUES, SCALES, ZERO
            )
            acc += part * scale + tl.sum(x, axis=2)[:, :, None] * offset
        else:
            tile = load_once(w_ptr + rows[None, :, None] + cols, mask)
            w = int8_values(tile).to(tl.bfloat16) if BITS == 8 else tile
            acc = matmul(x, tl.permute(w, (0, 2, 1)), acc)
    y = tl.sum(acc, axis=0)
    if BITS == 8:
        y *= row_scales(w_ptr, rows, row_mask, VALUES)[None, :]
    return y


@triton.jit
def project(
    x_ptr,
    w_ptr,
    rows,
    row_mask,
    B: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of the B rows of x (B, C) with BN rows of weights: (BP, BN) float32."""
    if B == 1:
        return project_few(
            x_ptr, x_ptr, x_ptr, x_ptr, 1, w_ptr, rows, row_mask, C,
            BITS, GROUP, VALUES, SCALES, ZERO, 1, BN, BC, STAGES,
        )  # fmt: skip
    else:
        b = tl.arange(0, BP)
        return project_many(
            x_ptr + b * C, b < B, w_ptr, rows, row_mask, C,
            BITS, GROUP, VALUES, SCALES, ZERO, BP, BN, BC, SPLIT, STAGES,
        )  # fmt: skip
