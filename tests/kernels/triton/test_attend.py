import pytest
import torch

from dejavu.kernels.reference import Tokens

S = 150


@pytest.mark.parametrize(
    "G, r, D, window, count",
    [
        (3, 1, 10, None, None),
        (3, 1, 10, 40, 1),
        (3, 1, 10, 1, 0),
        (2, 2, 20, None, 1),
        (2, 2, 20, 40, "all"),
        (1, 4, 8, 1, None),
    ],
)
def test_attend(both, close, selection, size, G, r, D, window, count):
    _, dtype = size
    H = G * r
    tokens = Tokens.one_a_row(torch.tensor([0, 77, S - 1], dtype=torch.int32))
    k, v = torch.randn(2, 3, G, S, D).to(dtype)
    # What lies after the position is not memory of this sequence.
    k[1, :, 78:] = v[1, :, 78:] = float("nan")
    heads = None if count is None else selection(H, H if count == "all" else count, H)
    actual, expected, *_ = both("attend", torch.randn(3, H, D), k, v, tokens, heads, scale=0.3, window=window)
    kept = list(range(H)) if heads is None else heads[0][: heads[1]].tolist()
    close(actual[:, kept], expected[:, kept])


def test_head_size_that_is_no_power_of_two(both, close):
    q, k, v = torch.randn(1, 2, 80), torch.randn(1, 2, 33, 80), torch.randn(1, 2, 33, 80)
    tokens = Tokens.one_a_row(torch.tensor([32], dtype=torch.int32))
    actual, expected, *_ = both("attend", q, k, v, tokens, scale=0.1)
    close(actual, expected)
