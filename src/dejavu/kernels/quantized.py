"""Weights in 8, 4 or 1 bits: how a row lies in memory, and how it is made and read back.

A row is self-contained, so that whatever selects rows needs to know nothing of their format:

    [values][scales][offsets, with a zero point][zeros up to a multiple of 64 bytes, in short rows of 16]

Values are padded with zeros to a multiple of 64, a *line*. A row below 256 bytes is short: a predictor's, which is read
beside its neighbours, so that a cache line of its own would only be longer.

- 8 bits: one signed byte a value, and one float32 scale: `w = q * scale`.
- 4 bits: 32 bytes a line; byte `j` holds value `j` in its low nibble and value `j + 32` in its high one, so that one
  load and one shift give runs of neighbours. A float16 scale for each group of 32, 64 or 128 values. Nibbles are
  two's complement, `w = q * scale`; with a zero point they are 0 .. 15, and a float16 offset belongs to each group:
  `w = q * scale + offset`.
- 1 bit: set for a negative value, the lowest bit of a byte first; one float32 scale, the mean of |w|: `w = +-scale`.

Scales may be negative: a group's largest value by magnitude then lands on -8, the one level without a counterpart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dejavu.errors import ConfigError

LINE = 64  # values
GROUPS = (32, 64, 128)

# Shares of a group's range that int4 tries. The group keeps the one with the smallest squared error.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# Values quantised at a time: a handful of float32 copies of them stay small.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class RowFormat:
    """The format of a row.

    Args:
        bits: 8, 4 or 1.
        group: values that share a scale, with 4 bits; 0 otherwise: the whole row does.
        zero_point: with 4 bits: an offset for each group.
    Raises: ConfigError for a combination that does not exist.
    """

    bits: int
    group: int = 0
    zero_point: bool = False

    def __post_init__(self):
        if self.bits not in (8, 4, 1):
            raise ConfigError(f"quantised weights have 8, 4 or 1 bits, found {self.bits!r}")
        if self.bits == 4 and self.group not in GROUPS:
            raise ConfigError(f"int4 needs groups of {', '.join(map(str, GROUPS))} values, found {self.group!r}")
        if self.bits != 4 and (self.group or self.zero_point):
            raise ConfigError(f"groups and zero points exist with 4 bits only, found {self.bits} bits")

    @classmethod
    def parse(cls, name: str) -> RowFormat:
        """The format called "int8", "int4" (groups of 64), "int4-g32", "int4-g128z" (with zero point) or "signs"."""
        if name in ("int8", "signs"):
            return cls(8 if name == "int8" else 1)
        found = re.fullmatch(r"int4(?:-g(\d{1,9})(z?))?", name)
        if found is None:
            raise ConfigError(f"weights format {name!r} does not exist; choose int8, int4, int4-g32 or int4-g128z")
        return cls(4, int(found[1] or 64), found[2] == "z")

    @property
    def name(self) -> str:
        """What `parse` reads."""
        if self.bits != 4:
            return "int8" if self.bits == 8 else "signs"
        return "int4" if self == RowFormat(4, 64) else f"int4-g{self.group}{'z' * self.zero_point}"

    def layout(self, width: int) -> tuple[int, int, int]:
        """Bytes of a row's values, of its scales (its offsets take as many), and of the row."""
        padded = -(-width // LINE) * LINE
        values = padded * self.bits // 8
        scales = 2 * -(-padded // self.group) if self.bits == 4 else 4
        used = values + scales * (1 + self.zero_point)
        align = 16 if used < 256 else 64
        return values, scales, -(-used // align) * align

    def row_bytes(self, width: int) -> int:
        return self.layout(width)[2]


@dataclass(frozen=True)
class Quantized:
    """Quantised rows. Indexing selects among the leading dimensions and copies nothing that a Tensor would not.

    `data` is (..., row_bytes) uint8 with contiguous rows, `width` the number of values in a row.
    """

    data: Tensor
    width: int
    format: RowFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., C): of the weights, not of the bytes."""
        return *self.data.shape[:-1], self.width

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def row_bytes(self) -> int:
        return self.data.shape[-1]

    def numel(self) -> int:
        return prod(self.shape)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key) -> Quantized:
        return Quantized(self.data[key], self.width, self.format)

    def flatten(self, start: int, end: int) -> Quantized:
        """Merge leading dimensions, as Tensor.flatten does."""
        return Quantized(self.data.flatten(start, end), self.width, self.format)

    def transpose(self, first: int, second: int) -> Quantized:
        """Swap two leading dimensions, as Tensor.transpose does."""
        return Quantized(self.data.transpose(first, second), self.width, self.format)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of the values (uint8), the scales and the offsets (None without a zero point)."""
        values, scales, _ = self.format.layout(self.width)
        kind = torch.float16 if self.format.bits == 4 else torch.float32
        offsets = self.data[..., values + scales : values + 2 * scales].view(kind) if self.format.zero_point else None
        return self.data[..., :values], self.data[..., values : values + scales].view(kind), offsets

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The weights (..., C) that the rows stand for, computed in float32 and rounded once, maybe to the dtype of
        `out`, where they are put."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        rows, flat = self.data.reshape(-1, self.row_bytes), out.view(-1, self.width)
        for first in range(0, len(rows), step := max(1, _CHUNK // self.width)):
            part = Quantized(rows[first : first + step], self.width, self.format)
            flat[first : first + step] = _decode(part)
        return out


Weight = Tensor | Quantized


def dequantized(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights as a plain tensor of a dtype, whatever format they are stored in."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight.to(dtype)


def quantize(weights: Tensor, format: RowFormat) -> Quantized:
    """Quantise rows to the nearest level.

    Args:
        weights: (..., C) floating point.
    Raises: ConfigError for weights that are not finite, or too large for a float16 scale.
    """
    width, rows = weights.shape[-1], weights.reshape(-1, weights.shape[-1])
    out = torch.zeros(len(rows), format.row_bytes(width), dtype=torch.uint8, device=weights.device)
    for first in range(0, len(rows), step := max(1, _CHUNK // max(1, width))):
        _encode(rows[first : first + step].float(), Quantized(out[first : first + step], width, format))
    return Quantized(out.view(*weights.shape[:-1], -1), width, format)


def _encode(w: Tensor, out: Quantized) -> None:
    if not w.isfinite().all():
        raise ConfigError("weights that are infinite or not a number cannot be quantised")
    bits, group = out.format.bits, out.format.group
    values, scales, offsets = out.parts()
    if bits == 8:
        scale = w.abs().amax(1, keepdim=True) / 127
        values[:, : out.width] = (w / _nonzero(scale)).round().to(torch.int8).view(torch.uint8)
        scales.copy_(scale)
        return
    if bits == 1:
        scales.copy_(w.abs().mean(1, keepdim=True))
        bit = 1 << torch.arange(8, dtype=torch.uint8, device=w.device)
        values.copy_(((_pad(w, LINE) < 0).unflatten(1, (-1, 8)) * bit).sum(2))
        return
    padded = _pad(w, max(LINE, group)).unflatten(1, (-1, group))
    # Padding repeats the group's first value, so that it widens no group's range; its levels are cleared below.
    valid = torch.arange(padded[0].numel(), device=w.device).view(padded.shape[1:]) < out.width
    q, scale, offset = _nearest_levels(torch.where(valid, padded, padded[..., :1]), out.format.zero_point)
    q = (q * valid).flatten(1)[:, : 2 * values.shape[1]].to(torch.uint8).unflatten(1, (-1, 2, LINE // 2)) & 15
    values.copy_((q[:, :, 0] | q[:, :, 1] << 4).flatten(1))
    scales.copy_(scale[:, : scales.shape[1], 0])
    if offsets is not None:
        offsets.copy_(offset[:, : offsets.shape[1], 0])


def _nearest_levels(groups: Tensor, zero_point: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (N, groups, group) int8 and scale and offset (N, groups, 1) of the clip with the smallest error."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    middle = (low + high) / 2
    best = None
    for clip in _CLIPS:
        if zero_point:
            scale, offset = (high - low) * (clip / 15), middle - (high - low) * (clip / 2)
            first, last = 0, 15
        else:
            scale, offset = extreme * (-clip / 8), torch.zeros_like(extreme)
            first, last = -8, 7
        # The levels are chosen for the scale as it is stored.
        scale, offset = scale.half().float(), offset.half().float()
        if not (scale.isfinite().all() and offset.isfinite().all()):
            raise ConfigError("weights beyond 65504 cannot be quantised to int4: its scales are float16")
        q = ((groups - offset) / _nonzero(scale)).round().clamp(first, last)
        error = (q * scale + offset - groups).square().sum(-1, keepdim=True)
        if best is None:
            best = error, q, scale, offset
        else:
            better = error < best[0]
            best = tuple(
                torch.where(better, new, old) for new, old in zip((error, q, scale, offset), best, strict=True)
            )
    return best[1].to(torch.int8), best[2], best[3]


def _decode(rows: Quantized) -> Tensor:
    values, scales, offsets = rows.parts()
    width, group = rows.width, rows.format.group
    if rows.format.bits == 8:
        return values[:, :width].view(torch.int8).float() * scales
    if rows.format.bits == 1:
        shifts = torch.arange(8, dtype=torch.uint8, device=values.device)
        negative = (values[:, :, None] >> shifts & 1).flatten(1)[:, :width].bool()
        return torch.where(negative, -scales, scales)
    bytes_ = values.unflatten(1, (-1, 1, LINE // 2))
    q = torch.cat((bytes_ & 15, bytes_ >> 4), 2).flatten(1)[:, :width].float()
    if offsets is None:
        q = torch.where(q > 7, q - 16, q)

    def per_value(x: Tensor) -> Tensor:
        return x.float().repeat_interleave(group, 1)[:, :width]

    q = q * per_value(scales)
    return q if offsets is None else q + per_value(offsets)


def _pad(w: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(w, (0, -w.shape[1] % multiple))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
