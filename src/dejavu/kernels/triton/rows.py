"""Device code that reads rows of weights, plain or quantised (kernels/quantized.py), and multiplies with them.

Activations are float32 and stay so. A batch of one multiplies and adds in float32; a larger batch goes to the
tensor cores, where each activation is split into two numbers of the weights' type whose sum holds it (16 bits of
mantissa for bfloat16), so that a result is rounded by its accumulation and not by its inputs.

A row is found by an offset: of elements for plain weights, of bytes for quantised ones.
Four bits are read as levels u = 0 .. 15 with `w = scale * u + offset`. Without a zero point the sign bits are
flipped, which makes the offset -8 scales. A batch of one reads words of eight levels, and turns a level into a float32
without a conversion, by placing it among the bits of a power of two that is taken off again (`level`); the eight
activations that a word meets are then gathered from planes, where `spread` has put them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dejavu.errors import KernelUnavailable
from dejavu.kernels.quantized import LINE, Quantized
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning
from dejavu.kernels.triton.tiles import begin

# Tokens of one sequence that one reading of weights serves without tensor cores.
FEW = 4
# Planes of spread activations, and words that one program spreads.
PLANES, _BLOCK = 10, 256

_LINE, _HALF = tl.constexpr(LINE), tl.constexpr(LINE // 2)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def row_args(weight: Tensor | Quantized) -> tuple[Tensor, dict[str, Any]]:
    """What a kernel needs to read rows: their memory, and constants: STRIDE lies between two rows, and FORM is what
    quantised ones are like (bits, group, bytes of values, bytes of scales, zero point), of 0 bits where they are plain.

    Raises: KernelUnavailable for rows of one bit.
    """
    if not isinstance(weight, Quantized):
        return weight, {"STRIDE": weight.shape[-1], "FORM": (0, 0, 0, 0, False)}
    form = weight.format
    if form.bits == 1:
        raise KernelUnavailable("the GPU kernels read weights of 4 bits and more; use format int8 or int4")
    values, scales, stride = form.layout(weight.width)
    return weight.data, {"STRIDE": stride, "FORM": (form.bits, form.group, values, scales, form.zero_point)}


def bits_of(form: dict[str, Any]) -> int:
    """Of rows whose constants are given; 0: they are plain."""
    return form["FORM"][0]


def words_of(form: dict[str, Any]) -> int:
    """Words of eight 4-bit values in a row."""
    return 2 * form["FORM"][2] // 8


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
def load_words(w_ptr, rows, word, mask, ZERO: tl.constexpr):
    """Words of eight 4-bit levels each. rows, word: of shapes that broadcast to (words, rows).

    Words come first, for Triton lays the loads of scales, which are no neighbours, along the first dimension.
    """
    words = load_once((w_ptr + rows).to(tl.pointer_type(tl.int32)) + word, mask)
    return words if ZERO else words ^ -0x77777778


@triton.jit
def level(words, BYTE: tl.constexpr, HALF: tl.constexpr):
    """float32 of a level of each word: 256 + u for byte BYTE's low half, 16 + u for its high one.

    Two of a float32's 23 bits of mantissa after the exponent of 256, or none after that of 16, stand above the level:
    what the added power costs in precision is small beside float32's.
    """
    if BYTE == 0:
        moved = words << 15
    elif BYTE == 1:
        moved = words << 7
    elif BYTE == 2:
        moved = words >> 1
    else:
        moved = words >> 9
    MASK: tl.constexpr = 0x00780000 if HALF == 1 else 0x00078000
    POWER: tl.constexpr = 0x41800000 if HALF == 1 else 0x43800000
    if _INTERPRETED:
        bits = (moved & MASK) | POWER
    else:
        # One instruction, of which ptxas makes two by itself.
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [moved, tl.full(moved.shape, MASK, tl.int32), tl.full(moved.shape, POWER, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _spread(
    x_ptr,
    hidden_ptr,
    cache_rows_ptr,
    positions_ptr,
    planes_ptr,
    Q,
    C: tl.constexpr,
    WORDS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    back = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = x_ptr
    if hidden_ptr is not None:  # noqa: SIM102 - settled while compiling, as an `and` would not be
        if back > 0:
            token = tl.maximum(tl.load(positions_ptr) - back, 0)
            source = hidden_ptr + (tl.load(cache_rows_ptr) * Q + token % Q).to(tl.int64) * C
    col = word // 8 * _LINE + word % 8 * 4
    out = planes_ptr + back * PLANES * WORDS + word
    low_sum = tl.zeros((BLOCK,), tl.float32)
    high_sum = low_sum
    for BYTE in tl.static_range(4):
        low = tl.load(source + col + BYTE, mask=col + BYTE < C, other=0.0)
        high = tl.load(source + col + _HALF + BYTE, mask=col + _HALF + BYTE < C, other=0.0)
        tl.store(out + 2 * BYTE * WORDS, low, mask=word < WORDS)
        tl.store(out + (2 * BYTE + 1) * WORDS, high, mask=word < WORDS)
        low_sum += low
        high_sum += high
    tl.store(out + 8 * WORDS, low_sum, mask=word < WORDS)
    tl.store(out + 9 * WORDS, high_sum, mask=word < WORDS)


def few_pending(form: dict[str, Any]) -> int:
    """Up to how many pending tokens of one sequence are taken FEW at a time; 4 bits are slow on the tensor cores."""
    return 64 if bits_of(form) == 4 else 8


def spread(x: Tensor, form: dict[str, Any], hidden: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
    """Activations as a batch of one meets words of 4-bit levels; x itself for other rows and batches.

    Args:
        x: (1, C) float32.
        form: the constants of row_args.
        hidden, tokens: the ring of lazy keys and values, for the tokens before x's too.
    Returns: (1 or few_pending, PLANES, C / 8) float32, the newest token first: for each word, of byte 0 to 3 the
        activations of its low and its high half, then the sums over the low and the high ones.
    """
    if bits_of(form) != 4 or len(x) > 1:
        return x
    words, rows = words_of(form), 1 if hidden is None else few_pending(form)
    planes = x.new_empty(rows, PLANES, words)
    places = (None, None, 0) if hidden is None else (tokens.rows, tokens.positions, hidden.shape[1])
    sizes = {"C": x.shape[1], "WORDS": words, "PLANES": PLANES, "BLOCK": _BLOCK}
    _spread[(triton.cdiv(words, _BLOCK), rows)](x, hidden, *places[:2], planes, places[2], **sizes, **tuning.overlap())
    return planes


@triton.jit
def values(
    w_ptr,
    rows,
    cols,
    mask,
    FORM: tl.constexpr,
):
    """Weights one by one, as float32; for where speed doesn't matter."""
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    VALUES: tl.constexpr = FORM[2]
    SCALES: tl.constexpr = FORM[3]
    ZERO: tl.constexpr = FORM[4]
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
def _add_words(
    acc, words, planes, word, end, low_scale, high_scale, low_offset, high_offset,
    WORDS: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """acc (words, BN) + the products of words of levels, those before `end`, with one row of spread activations."""
    inside = word < end
    low_sum = tl.load(planes + 8 * WORDS + word, mask=inside, other=0.0)
    high_sum = tl.load(planes + 9 * WORDS + word, mask=inside, other=0.0)
    # The powers of two that the levels come with; the offset of -8 scales too.
    low = low_sum * (-256.0 if ZERO else -264.0)
    high = high_sum * (-16.0 if ZERO else -24.0)
    for BYTE in tl.static_range(4):
        low += level(words, BYTE, 0) * tl.load(planes + 2 * BYTE * WORDS + word, mask=inside, other=0.0)
        high += level(words, BYTE, 1) * tl.load(planes + (2 * BYTE + 1) * WORDS + word, mask=inside, other=0.0)
    acc += low * low_scale + high * high_scale
    return acc + low_sum * low_offset + high_sum * high_offset if ZERO else acc


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
    FORM: tl.constexpr,
    FEW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of FEW rows of activations, 1 or 4, with BN rows of weights: (FEW, BN) float32, without tensor cores.

    x0 .. x3: pointers to the rows of activations, of which the first `live` are read, with 4 bits as `spread` has put
    them; rows: (BN,) offsets.
    """
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    VALUES: tl.constexpr = FORM[2]
    SCALES: tl.constexpr = FORM[3]
    ZERO: tl.constexpr = FORM[4]
    if BITS == 4:
        WORDS: tl.constexpr = VALUES // 4
        s0 = tl.zeros((BC // 8, BN), tl.float32)
        s1, s2, s3 = s0, s0, s0
        for c in tl.range(0, WORDS, BC // 8, num_stages=STAGES):
            word = c + tl.arange(0, BC // 8)[:, None]
            inside = word < WORDS
            mask = row_mask[None, :] & inside
            words = load_words(w_ptr, rows[None, :], word, mask, ZERO)
            scale, offset = group_scales(w_ptr, rows[None, :], word // 8 * _LINE // GROUP, mask, VALUES, SCALES, ZERO)
            high_scale, high_offset = scale, offset
            if GROUP < _LINE:
                high_scale, high_offset = group_scales(
                    w_ptr, rows[None, :], (word // 8 * _LINE + _HALF) // GROUP, mask, VALUES, SCALES, ZERO
                )
            s0 = _add_words(s0, words, x0, word, WORDS, scale, high_scale, offset, high_offset, WORDS, ZERO)
            if FEW > 1:
                end1 = tl.where(live > 1, WORDS, 0)
                end2 = tl.where(live > 2, WORDS, 0)
                end3 = tl.where(live > 3, WORDS, 0)
                s1 = _add_words(s1, words, x1, word, end1, scale, high_scale, offset, high_offset, WORDS, ZERO)
                s2 = _add_words(s2, words, x2, word, end2, scale, high_scale, offset, high_offset, WORDS, ZERO)
                s3 = _add_words(s3, words, x3, word, end3, scale, high_scale, offset, high_offset, WORDS, ZERO)
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
    AXIS: tl.constexpr = 0 if BITS == 4 else 1
    y = tl.sum(s0, axis=AXIS)[None, :]
    if FEW > 1:
        pairs = tl.join(
            tl.join(tl.sum(s0, axis=AXIS), tl.sum(s2, axis=AXIS)), tl.join(tl.sum(s1, axis=AXIS), tl.sum(s3, axis=AXIS))
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
    FORM: tl.constexpr,
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
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    VALUES: tl.constexpr = FORM[2]
    SCALES: tl.constexpr = FORM[3]
    ZERO: tl.constexpr = FORM[4]
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
    FORM: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of the B rows of x (B, C) with BN rows of weights: (BP, BN) float32. x_ptr: what `spread` returns."""
    if B == 1:
        return project_few(
            x_ptr, x_ptr, x_ptr, x_ptr, 1, w_ptr, rows, row_mask, C,
            FORM, 1, BN, BC, STAGES,
        )  # fmt: skip
    else:
        b = tl.arange(0, BP)
        return project_many(
            x_ptr + b * C, b < B, w_ptr, rows, row_mask, C,
            FORM, BP, BN, BC, SPLIT, STAGES,
        )  # fmt: skip
