"""What quantised rows keep of the weights, and how they lie in memory."""

import pytest
import torch

from dejavu.errors import ConfigError
from dejavu.kernels.quantized import RowFormat, dequantized, quantize

# Relative error of normal weights: int8 about 0.7 %, int4 about 8 to 10 %.
BOUNDS = {"int8": 0.012, "int4-g32": 0.1, "int4": 0.11, "int4-g128": 0.115, "int4-g32z": 0.1, "int4-g128z": 0.115}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("C", [1, 36, 50, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_and_views(name, C, dtype):
    torch.manual_seed(0)
    format, w = RowFormat.parse(name), (torch.randn(40, 3, C) * 0.02).to(dtype)
    rows = quantize(w, format)
    back = rows.dequantize()
    assert (back - w.float()).norm() <= BOUNDS[name] * w.float().norm()
    assert (
        rows.shape == w.shape
        and rows.row_bytes % (16 if rows.row_bytes <= 256 else 64) == 0
        and rows.nbytes == rows.data.numel()
    )
    assert torch.equal(rows[:, 1].dequantize(), back[:, 1])
    assert torch.equal(dequantized(rows, torch.bfloat16), back.bfloat16())
    # Quantising what was quantised changes nothing more than a rounding of the scales.
    assert torch.allclose(quantize(back, format).dequantize(), back, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_padding_is_zero(bits):
    rows = quantize(torch.full((2, 36), -1.0), RowFormat(bits, 64 if bits == 4 else 0))
    values = rows.parts()[0]
    if bits == 8:
        assert (values[:, 36:] == 0).all()
    else:  # byte j holds values j and j + 32
        assert (values[:, 4:32] >> 4 == 0).all() and (values[:, :4] >> 4 != 0).all()


def test_nibbles_and_signs_lie_as_documented():
    levels = torch.arange(64) % 16 - 8.0
    values, scales, _ = quantize(levels[None], RowFormat(4, 64)).parts()
    low, high = values[0] & 15, values[0] >> 4
    assert torch.equal(torch.cat((low, high)).int(), levels.int() & 15) and scales.item() == 1
    w = torch.ones(1, 64)
    w[0, [0, 9]] = -1
    bits, scale, _ = quantize(w, RowFormat(1)).parts()
    assert bits[0].tolist() == [1, 2, 0, 0, 0, 0, 0, 0] and scale.item() == 1


def test_signs_keep_the_mean_size():
    w = torch.randn(5, 50)
    expected = torch.where(w < 0, -1.0, 1.0) * w.abs().mean(1, keepdim=True)
    assert torch.allclose(quantize(w, RowFormat(1)).dequantize(), expected)


@pytest.mark.parametrize("name", ["int5", "int4-g48", "int4z", "int8-g32", "", "int4-g"])
def test_unknown_names(name):
    with pytest.raises(ConfigError):
        RowFormat.parse(name)


def test_wrong_formats_and_weights():
    for settings in ({"bits": 3}, {"bits": 4}, {"bits": 8, "group": 32}, {"bits": 1, "zero_point": True}):
        with pytest.raises(ConfigError):
            RowFormat(**settings)
    with pytest.raises(ConfigError, match="infinite"):
        quantize(torch.tensor([[1.0, float("inf")]]), RowFormat(8))
    with pytest.raises(ConfigError, match="65504"):
        quantize(torch.full((1, 64), 1e9), RowFormat(4, 64))
