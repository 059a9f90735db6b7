import pytest
import torch

from dejavu.kernels.reference import Tokens


def _same(both, name, *args):
    actual, expected, *_ = both(name, *args)
    count = expected[1].item()
    assert actual[1].item() == count
    assert torch.equal(actual[0][:count], expected[0][:count])
    return count


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("N", [1, 300])
@pytest.mark.parametrize("threshold, capacity", [(0.5, 300), (0.5, 4), (9.0, 8), (-9.0, 13)])
def test_threshold(both, B, N, threshold, capacity):
    _same(both, "select_threshold", torch.randn(B, N), threshold, capacity)


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("N, k", [(1, 1), (65, 1), (65, 64), (300, 131), (300, 300), (7, 9)])
def test_topk(both, B, N, k):
    assert _same(both, "select_topk", torch.randn(B, N), k) >= min(k, N)


def test_padding_chooses_nothing(both):
    rows = torch.tensor([2, 0, -1, -1], dtype=torch.int32)
    tokens, scores = Tokens(torch.zeros_like(rows), rows, torch.zeros_like(rows)), torch.randn(4, 300)
    scores[2:] += 5
    assert _same(both, "select_topk", scores, 20, tokens) <= 40
    _same(both, "select_threshold", scores, 0.5, 300, tokens)
    _same(both, "select_threshold", scores, 0.5, 7, tokens)


@pytest.mark.parametrize("k", [1, 149, 151])
def test_equal_scores_go_by_lower_index(both, k):
    scores = torch.randn(300)[None]
    scores[0, torch.randperm(300)[:150]] = 0.25
    _same(both, "select_topk", scores, k)
    _same(both, "select_topk", torch.full((2, 300), -2.0), k)


def test_zeros_are_one_score_and_extremes_keep_their_order(both):
    scores = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), 3e38, -3e38]])
    for k in range(1, 9):
        _same(both, "select_topk", scores, k)
    assert _same(both, "select_threshold", scores, -0.0, 8) == 5
    assert _same(both, "select_threshold", scores, 0.0, 8) == 5


def test_wide_layers(both):
    """More units than the search holds at once, and blocks without any that is selected."""
    N = 700
    scores = torch.randn(1, N)
    scores[0, 64:256] = -5
    _same(both, "select_threshold", scores, 1, N)
    _same(both, "select_topk", scores, 333)
    _same(both, "select_topk", torch.randn(3, N), 60)
