import pytest
import torch

S = 20


def _weights(G, r, D, C, dtype, rotary):
    blocks = (torch.randn(G, 2 * r + 2, D, C) / C**0.5).to(dtype)
    return blocks, (None if rotary else torch.randn(G, r + 2, D)), (torch.randn(S, D) if rotary else None)


def _kept(heads, H):
    return list(range(H)) if heads is None else heads[0][: heads[1]].tolist()


@pytest.mark.parametrize(
    "B, G, r, D, rotary, count",
    [
        (1, 3, 1, 10, False, None),
        (1, 3, 1, 10, True, 1),
        (3, 3, 1, 10, True, 0),
        (1, 2, 2, 36, True, "all"),
        (3, 2, 2, 36, False, 1),
        (2, 1, 4, 8, True, 1),
    ],
)
def test_full(both, close, close_rounded, selection, size, B, G, r, D, rotary, count):
    C, dtype = size
    H = G * r
    blocks, bias, cos_sin = _weights(G, r, D, C, dtype, rotary)
    heads = None if count is None else selection(H, H if count == "all" else count, H)
    if heads is not None:
        kept = torch.zeros(H, dtype=torch.bool)
        kept[_kept(heads, H)] = True
        blocks[:, :r][~kept.view(G, r)] = float("nan")
    caches = torch.zeros(2, B, G, S, D).to(dtype)
    positions = torch.randperm(S)[:B].int()
    actual, expected, mine, theirs = both(
        "attn_qkv", torch.randn(B, C), blocks, bias, cos_sin, positions, caches[0], caches[1], heads
    )
    close(actual[:, _kept(heads, H)], expected[:, _kept(heads, H)])
    close_rounded(mine[5], theirs[5])
    close_rounded(mine[6], theirs[6])


@pytest.mark.parametrize(
    "dtype, B, G, r, D, P",
    [
        (torch.bfloat16, 1, 3, 1, 10, 3),
        (torch.float16, 3, 2, 2, 36, 4),
        (torch.float32, 1, 1, 4, 8, 8),
        (torch.float32, 2, 3, 1, 10, 1),
    ],
    ids=str,
)
def test_lazy_keys_and_values_follow_the_reference_and_end_as_the_full_ones(
    both, close, close_rounded, selection, dtype, B, G, r, D, P
):
    C, H = 48, G * r
    blocks, _, cos_sin = _weights(G, r, D, C, dtype, True)
    full_k, full_v, k, v = torch.zeros(4, B, G, S, D).to(dtype)
    hidden, kv_len = torch.zeros(B, P, C), torch.randint(0, 3, (B, 1), dtype=torch.int32).repeat(1, G)
    start, steps = kv_len[:, 0].clone(), 6
    for step in range(steps):
        args = torch.randn(B, C), blocks, None, cos_sin, start + step
        # The last step selects every head, so that nothing stays pending.
        heads = None if step == steps - 1 else selection(H, torch.randint(0, 2, ()).item(), H)
        full_k, full_v = both("attn_qkv", *args, full_k, full_v)[2][5:7]
        actual, expected, mine, theirs = both("attn_qkv", *args, k, v, heads, hidden=hidden, kv_len=kv_len)
        close(actual[:, _kept(heads, H)], expected[:, _kept(heads, H)])
        *_, k, v, _, state = mine
        hidden, kv_len = state["hidden"], state["kv_len"]
        assert torch.equal(hidden, theirs[-1]["hidden"])
        assert torch.equal(kv_len, theirs[-1]["kv_len"])
        close_rounded(k, theirs[5])
        close_rounded(v, theirs[6])
    close_rounded(k, full_k)
    close_rounded(v, full_v)


def test_many_pending_tokens_take_several_passes(both, close_rounded):
    """40 tokens of two rows are more than one pass holds."""
    blocks, bias, _ = _weights(2, 1, 10, 48, torch.float16, False)
    caches = torch.zeros(2, 2, 2, 40, 10).half()
    _, _, mine, theirs = both(
        "attn_qkv",
        torch.randn(2, 48),
        blocks,
        bias,
        None,
        torch.tensor([24, 14], dtype=torch.int32),
        caches[0],
        caches[1],
        hidden=torch.randn(2, 30, 48),
        kv_len=torch.tensor([[0, 3], [1, 0]], dtype=torch.int32),
    )
    close_rounded(mine[5], theirs[5])
    close_rounded(mine[6], theirs[6])
    assert torch.equal(mine[-1]["kv_len"], torch.tensor([[25, 25], [15, 15]], dtype=torch.int32))
