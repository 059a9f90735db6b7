import pytest
import torch

from dejavu.kernels.reference import Tokens

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
    tokens = Tokens.one_a_row(torch.randperm(S)[:B].int())
    actual, expected, mine, theirs = both(
        "attn_qkv", torch.randn(B, C), blocks, bias, cos_sin, tokens, caches[0], caches[1], heads
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
        args = torch.randn(B, C), blocks, None, cos_sin, Tokens.one_a_row(start + step)
        # The last step selects every head, so that nothing stays pending.
        heads = None if step == steps - 1 else selection(H, torch.randint(0, 2, ()).item(), H)
        full_k, full_v = both("attn_qkv", *args, full_k, full_v)[2][5:7]
        actual, expected, mine, theirs = both("attn_qkv", *args, k, v, heads, hidden=hidden, kv_len=kv_len, pending=P)
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
        Tokens.one_a_row(torch.tensor([24, 14], dtype=torch.int32)),
        caches[0],
        caches[1],
        hidden=torch.randn(2, 30, 48),
        kv_len=torch.tensor([[0, 3], [1, 0]], dtype=torch.int32),
        pending=30,
    )
    close_rounded(mine[5], theirs[5])
    close_rounded(mine[6], theirs[6])
    assert torch.equal(mine[-1]["kv_len"], torch.tensor([[25, 25], [15, 15]], dtype=torch.int32))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("r", [1, 2])
def test_tokens_of_any_rows_and_padding(both, close, close_rounded, selection, lazy, r):
    """Several tokens of a row, rows in any order, rows without a token, padding behind: as the reference does it."""
    R, G, D, C = 5, 2, 10, 48
    blocks, _, cos_sin = _weights(G, r, D, C, torch.float32, True)
    k, v = torch.zeros(2, R, G, S, D)
    state = {"hidden": torch.zeros(R, 8, C), "kv_len": torch.zeros(R, G, dtype=torch.int32)} if lazy else {}
    read = torch.zeros(3, dtype=torch.int64)
    lengths = [0] * R
    for step in range(7):
        counts = [(step + 2 * row) % 4 for row in range(R)] if step < 6 else [0, 0, 1, 0, 0]
        where = [(row, lengths[row] + i) for row in (3, 0, 4, 2, 1) for i in range(counts[row])]
        lengths = [n + count for n, count in zip(lengths, counts, strict=True)]
        padding = 0 if step == 6 else 2
        rows, positions = torch.tensor([*where, *[(-1, 0)] * padding], dtype=torch.int32).T.contiguous()
        tokens = Tokens(torch.zeros_like(rows), rows, positions)
        heads = selection(G * r, step % 3, G * r)
        x = torch.randn(len(rows), C)
        more = {**state, "pending": 3 if lazy else 0, "attn_read": read}
        actual, expected, mine, theirs = both("attn_qkv", x, blocks, None, cos_sin, tokens, k, v, heads, **more)
        kept, n = _kept(heads, G * r), len(where)
        close(actual[:n, kept], expected[:n, kept])
        k, v, read = mine[5], mine[6], mine[-1]["attn_read"]
        close_rounded(k, theirs[5])
        close_rounded(v, theirs[6])
        assert torch.equal(read, theirs[-1]["attn_read"])
        state = {name: mine[-1][name] for name in state}
        for name in state:
            assert torch.equal(state[name], theirs[-1][name])
        actual, expected, *_ = both("attend", expected, k, v, tokens, heads, scale=0.3)
        close(actual[:n, kept], expected[:n, kept])
