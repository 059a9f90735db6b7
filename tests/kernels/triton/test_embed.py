import torch

from dejavu.kernels.reference import Tokens


def test_embed(both, size):
    C, dtype = size
    table, ids = torch.randn(11, C).to(dtype), torch.tensor([3, 0, 10], dtype=torch.int32)
    actual, expected, *_ = both("embed", Tokens.one_a_row(ids, ids), table)
    assert torch.equal(actual, expected)


def test_add_positions(both, size):
    C, dtype = size
    tokens = Tokens.one_a_row(torch.tensor([0, 8], dtype=torch.int32))
    _, _, mine, theirs = both("add_positions", torch.randn(2, C), tokens, torch.randn(11, C).to(dtype), 2)
    assert torch.equal(mine[0], theirs[0])
