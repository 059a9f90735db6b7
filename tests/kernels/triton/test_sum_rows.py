import pytest
import torch


@pytest.mark.parametrize(
    "B, G, r, D, count",
    [(1, 3, 1, 10, None), (1, 2, 2, 8, 1), (1, 3, 1, 10, 0), (1, 1, 4, 5, "all"), (3, 3, 1, 10, 1), (5, 2, 2, 8, None)],
)
def test_attn_out_reads_the_selected_heads(both, close, selection, size, B, G, r, D, count):
    C, dtype = size
    blocks = torch.randn(G, 2 * r + 2, D, C).to(dtype)
    o = torch.randn(B, G * r, D)
    heads = None
    if count is not None:
        heads = selection(G * r, G * r if count == "all" else count, G * r + 1)
        kept = torch.zeros(G * r, dtype=torch.bool)
        kept[heads[0][: heads[1]].long()] = True
        # Reading a head that is not selected would spoil the sum.
        blocks.view(G, 2 * r + 2, -1)[:, r + 2 :][~kept.view(G, r)] = float("nan")
        o[:, ~kept] = float("nan")
    actual, *_ = both("attn_out", o, blocks, heads)
    rows = blocks[:, r + 2 :].float().nan_to_num().reshape(G * r, D, C)
    expected = torch.einsum("hdc,bhd->bc", rows, o.nan_to_num())
    close(actual.sum(0), expected)
