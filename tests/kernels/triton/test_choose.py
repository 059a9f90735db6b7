import pytest
import torch

from dejavu.kernels import backend
from dejavu.kernels import triton as ops
from dejavu.kernels.base import Backend
from dejavu.kernels.reference import Tokens


@pytest.mark.parametrize("V", [1, 61, 20_000])
def test_the_first_of_the_likeliest_is_chosen_and_fed(V):
    logits = torch.randn(5, V)
    logits[1] = 0.25
    logits[2, V // 2] = logits[2, -1] = 9.0
    logits[3, V // 3] = float("nan")
    logits[4, V // 4] = -float("inf")
    rows, positions = torch.tensor([2, 0, 1, -1, 4], dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    device = backend("triton").device
    fed = []
    for choose in (ops.choose, Backend().choose):
        tokens = Tokens(*(t.clone().to(device) for t in (torch.zeros_like(rows), rows, positions)))
        chosen = choose(logits.to(device), tokens).cpu()
        assert chosen.tolist()[:3] == [int(logits[0].argmax()), 0, V // 2]
        assert chosen.tolist()[3:] == [-1, -1]
        fed.append((tokens.ids.cpu()[:3], tokens.positions.cpu()))
        assert torch.equal(fed[-1][0], chosen[:3]) and ((tokens.ids >= 0) & (tokens.ids < V)).all()
    assert fed[0][1].tolist() == fed[1][1].tolist() == [1, 2, 3, 3, 5]
