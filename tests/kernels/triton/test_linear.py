import pytest
import torch


@pytest.mark.parametrize("B, N, biased", [(1, 37, True), (2, 1, False), (5, 37, True)])
def test_linear(both, close, size, B, N, biased):
    C, dtype = size
    bias = torch.randn(N) if biased else None
    actual, expected, *_ = both("linear", torch.randn(B, C), torch.randn(N, C).to(dtype), bias)
    close(actual, expected)


def test_batch_above_one_tile(both, close):
    actual, expected, *_ = both("linear", torch.randn(19, 40), torch.randn(21, 40).bfloat16())
    close(actual, expected)
