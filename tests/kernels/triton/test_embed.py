import torch


def test_embed(both, size):
    C, dtype = size
    table = torch.randn(11, C).to(dtype)
    actual, expected, *_ = both("embed", torch.tensor([3, 0, 10], dtype=torch.int32), table)
    assert torch.equal(actual, expected)


def test_add_positions(both, size):
    C, dtype = size
    positions = torch.tensor([0, 8], dtype=torch.int32)
    _, _, mine, theirs = both("add_positions", torch.randn(2, C), positions, torch.randn(11, C).to(dtype), 2)
    assert torch.equal(mine[0], theirs[0])
