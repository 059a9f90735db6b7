import pytest
import torch

from dejavu.config import ACTIVATIONS
from dejavu.kernels.reference import Tokens

I = 75  # noqa: E741


def _make(C, dtype, gated):
    rows = (torch.randn(I, 3 if gated else 2, C) / C**0.5).to(dtype)
    return rows, torch.randn(I, 2) if gated else torch.randn(I)


@pytest.mark.parametrize(
    "gated, B, exact, count",
    [
        (False, 1, True, 20),
        (False, 2, False, 1),
        (False, 1, False, 0),
        (False, 3, True, "all"),
        (True, 1, True, None),
        (True, 1, False, 20),
        (True, 3, True, 20),
    ],
)
def test_mlp(both, close, selection, size, gated, B, exact, count):
    C, dtype = size
    rows, bias = _make(C, dtype, gated)
    neurons = None if count is None else selection(I, I if count == "all" else count, I)
    actual, expected, mine, theirs = both(
        "mlp",
        torch.randn(B, C),
        rows,
        bias,
        neurons,
        activation="relu",
        skip_zeros=exact,
        rows_read=torch.ones(3 if gated else 2, dtype=torch.int64),
    )
    close(actual.sum(0), expected.sum(0))
    assert torch.equal(mine[-1]["rows_read"], theirs[-1]["rows_read"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("activate_up", [False, True])
def test_activations(both, close, activation, activate_up):
    rows, _ = _make(48, torch.float32, gated=True)
    actual, expected, *_ = both(
        "mlp", torch.randn(1, 48), rows, None, activation=activation, threshold=0.4, activate_up=activate_up
    )
    close(actual.sum(0), expected.sum(0))


@pytest.mark.parametrize("B, gated", [(1, False), (2, True)])
def test_exact_reads_no_row_of_a_closed_neuron(both, close, size, B, gated):
    C, dtype = size
    rows, bias = _make(C, dtype, gated)
    x = torch.randn(B, C)
    gate = x @ rows[:, 0].float().T + bias.view(I, -1)[:, 0]
    # No activation so near to zero that the order of a sum could decide it.
    assert gate.abs().min() > 1e-4
    closed = (gate <= 0).all(0)
    assert 0 < closed.sum() < I
    clean = rows.clone()
    rows[closed, 1:] = float("nan")
    actual, *_ = both("mlp", x, rows, bias, activation="relu", skip_zeros=True)
    _, expected, *_ = both("mlp", x, clean, bias, activation="relu", skip_zeros=True)
    close(actual.sum(0), expected.sum(0))


@pytest.mark.parametrize("gated", [False, True])
def test_padding_opens_no_row(both, close, gated):
    rows, bias = _make(48, torch.float32, gated)
    where = torch.tensor([4, 0, -1, -1], dtype=torch.int32)
    tokens = Tokens(torch.zeros_like(where), where, torch.zeros_like(where))
    kw = {"activation": "relu", "skip_zeros": True, "rows_read": torch.zeros(3 if gated else 2, dtype=torch.int64)}
    actual, expected, mine, theirs = both("mlp", torch.randn(4, 48), rows, bias, None, tokens, **kw)
    close(actual.sum(0)[:2], expected.sum(0)[:2])
    assert torch.equal(mine[-1]["rows_read"], theirs[-1]["rows_read"])


@pytest.mark.parametrize("B", [1, 2])
def test_unselected_neurons_are_not_read(both, close, selection, size, B):
    C, dtype = size
    rows, bias = _make(C, dtype, False)
    idx, count = selection(I, 21, 40)
    kept = torch.zeros(I, dtype=torch.bool)
    kept[idx[:21].long()] = True
    rows[~kept] = float("nan")
    actual, expected, *_ = both("mlp", torch.randn(B, C), rows, bias, (idx, count), activation="relu")
    close(actual.sum(0), expected.sum(0))
