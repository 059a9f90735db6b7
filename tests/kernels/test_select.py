"""Selection on the CPU against the reference: ties, unions, overflow, negative scores."""

import pytest
import torch

from dejavu.kernels import cpu, reference


def chosen(selection):
    idx, count = selection
    return idx[: int(count)].tolist()


@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("N", [1, 7, 300, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_topk(B, N, ties):
    torch.manual_seed(N + B)
    scores = torch.randn(B, N)
    if ties:
        scores = scores.round()
        scores[scores == 0] *= -1  # both zeros are equal
    for k in {1, 2, N // 3, N - 1, N, N + 5} - {0, -1}:
        ours, theirs = cpu.select_topk(scores, k), reference.select_topk(scores, k)
        assert chosen(ours) == chosen(theirs)
        assert ours[0].shape == theirs[0].shape
        if B == 1:
            assert len(chosen(ours)) == min(k, N)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("capacity", [1, 20, 300])
@pytest.mark.parametrize("threshold", [-10.0, 0.0, 0.5, 10.0])
def test_threshold(B, capacity, threshold):
    torch.manual_seed(3)
    scores = (torch.randn(B, 300) * 4).round() / 4
    ours = cpu.select_threshold(scores, threshold, capacity)
    assert chosen(ours) == chosen(reference.select_threshold(scores, threshold, capacity))


def test_selection_follows_its_scores_when_replayed():
    scores = torch.randn(1, 100)
    with cpu.capture() as captured:
        selection = cpu.select_topk(scores, 9)
    for _ in range(3):
        scores.copy_(torch.randn(1, 100))
        captured.graph.replay()
        assert chosen(selection) == scores[0].topk(9).indices.sort().values.tolist()
