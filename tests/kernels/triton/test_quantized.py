"""Weights of 8 and 4 bits: every op equals the reference over the weights that the rows stand for."""

import pytest
import torch

from dejavu.errors import KernelUnavailable
from dejavu.kernels import triton as ops
from dejavu.kernels.quantized import RowFormat, quantize
from dejavu.kernels.reference import Tokens

FORMATS = ["int8", "int4", "int4-g32", "int4-g128z", "int4-g32z"]


@pytest.fixture(params=FORMATS)
def rows(request):
    """`rows(*shape)`: random quantised weights. The fixture `both` gives the reference what they stand for."""
    return lambda *shape: quantize(torch.randn(*shape) / shape[-1] ** 0.5, RowFormat.parse(request.param))


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("C", [129, 512])
def test_linear(both, close, rows, B, C):
    actual, expected, *_ = both("linear", torch.randn(B, C), rows(37, C), torch.randn(37))
    close(actual, expected)


def test_embed(both, close, rows):
    ids = torch.tensor([3, 0, 10], dtype=torch.int32)
    actual, expected, *_ = both("embed", Tokens.one_a_row(ids, ids), rows(11, 129))
    close(actual, expected)


@pytest.mark.parametrize("B, gated, exact, count", [(1, False, True, 20), (1, True, True, None), (3, False, False, 20)])
def test_mlp(both, close, selection, rows, B, gated, exact, count):
    C, inter = 129, 75
    neurons = None if count is None else selection(inter, count, inter)
    bias = torch.randn(inter, 2) if gated else torch.randn(inter)
    weights = rows(inter, 3 if gated else 2, C)
    counts = torch.zeros(3 if gated else 2, dtype=torch.int64)
    args = torch.randn(B, C), weights, bias, neurons
    actual, expected, mine, theirs = both("mlp", *args, activation="relu", skip_zeros=exact, rows_read=counts)
    close(actual.sum(0), expected.sum(0))
    assert torch.equal(mine[-1]["rows_read"], theirs[-1]["rows_read"])


@pytest.mark.parametrize("B", [1, 3])
def test_attn_out(both, close, selection, rows, B):
    heads = selection(4, 3, 4)
    o = torch.zeros(B, 4, 10)
    o[:, heads[0][:3].long()] = torch.randn(B, 3, 10)
    actual, *_ = both("attn_out", o, rows := rows(2, 6, 10, 192), heads)
    expected = torch.einsum("bhd,hdc->bc", o, rows.dequantize()[:, 4:].flatten(0, 1))
    close(actual.sum(0), expected)


@pytest.mark.parametrize("B, pending", [(1, 3), (1, 7), (2, 2)])
def test_attn_qkv(both, close, selection, rows, B, pending):
    G, D, C, S, P = 3, 10, 129, 20, 8
    heads = selection(G, 2, G)
    caches = torch.zeros(2, B, G, S, D)
    state = {"hidden": torch.randn(B, P, C), "kv_len": torch.full((B, G), 12 - pending, dtype=torch.int32)}
    state["pending"], tokens = P, Tokens.one_a_row(torch.full((B,), 11, dtype=torch.int32))
    actual, expected, mine, theirs = both(
        "attn_qkv", torch.randn(B, C), rows(G, 4, D, C), None, torch.randn(S, D), tokens, *caches, heads, **state
    )
    kept = heads[0][:2].tolist()
    close(actual[:, kept], expected[:, kept])
    close(mine[5], theirs[5])
    close(mine[6], theirs[6])


def test_one_bit_is_refused():
    with pytest.raises(KernelUnavailable, match="int8 or int4"):
        ops.linear(torch.randn(1, 64), quantize(torch.randn(3, 64), RowFormat.parse("signs")))
