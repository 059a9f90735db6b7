import pytest
import torch


@pytest.mark.parametrize("C", [48, 600])
@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
@pytest.mark.parametrize("B, slices, affine", [(1, 5, True), (3, 1, True), (2, None, False)])
def test_add_norm(both, close, C, kind, B, slices, affine):
    partials = None if slices is None else torch.randn(slices, B, C)
    args = (torch.randn(C), torch.randn(C), torch.randn(C)) if affine else (None, None, None)
    actual, expected, mine, theirs = both("add_norm", torch.randn(B, C) + 2, partials, *args, kind=kind, eps=1e-5)
    close(actual, expected)
    close(mine[0], theirs[0])


def test_row_tickets_are_ready_for_the_next_call(both, close):
    C = 129
    for B in (2, 3, 2):
        actual, expected, *_ = both(
            "add_norm", torch.randn(B, C), torch.randn(4, B, C), None, None, None, kind="rms", eps=1e-6
        )
        close(actual, expected)
