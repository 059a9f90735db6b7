"""The native kernels on quantised rows against the reference: every format, op, instruction set; odd sizes."""

import pytest
import torch

from dejavu.kernels import cpu, reference
from dejavu.kernels.quantized import RowFormat, quantize
from dejavu.kernels.reference import Tokens

FORMATS = [RowFormat.parse(name) for name in ("int8", "int4", "int4-g32", "int4-g128", "int4-g32z", "int4-g128z")]


@pytest.fixture(params=("avx512", "avx2", "portable"))
def isa(request):
    before = cpu.isa()
    if request.param not in cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(params=FORMATS, ids=lambda f: f.name)
def make(request):
    """Random quantised rows of a shape."""
    torch.manual_seed(0)
    return lambda *shape: quantize(torch.randn(shape) / shape[-1] ** 0.5, request.param)


def floor() -> float:
    """Float32 sums in another order; offsets add a term of the inputs' sum to each group. On AVX-512 inputs are 16-bit
    multiples of a scale (native/fixed.h), off by 2^-16 of the largest of 64. Inputs in bfloat16 would be off by 2^-9 of
    each, and miss this by far."""
    return 3e-4 if cpu.isa() == "avx512" else 2e-5


def close(ours, exact):
    assert torch.allclose(ours, exact, rtol=1e-5, atol=floor())


def pick(count, total):
    idx = torch.full((total,), 2**30, dtype=torch.int32)
    idx[:count] = torch.randperm(total)[:count].sort().values
    return idx, torch.tensor([count], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [1, 36, 128, 200])
def test_rows_are_unpacked_wherever_they_lie(isa, make, C, dtype):
    store = make(5, 4, 3, C)
    for rows in (store, store[:, :3], store[:, 3:], store[:, 1], store[2:4, 1:3], store.flatten(0, 1)[:7]):
        out = torch.full((rows.numel() // C, C), float("nan"), dtype=dtype)
        cpu.unpack(rows, out)
        # One rounding of difference, where a multiplication and an addition are fused.
        torch.testing.assert_close(out, rows.dequantize(dtype).view(-1, C), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("B", "C", "N"), [(1, 1, 1), (1, 36, 21), (2, 50, 64), (1, 512, 203), (5, 100, 17)])
def test_linear(isa, make, B, C, N):
    x, w, bias = torch.randn(B, C), make(N, C), torch.randn(N)
    close(cpu.linear(x, w, bias), reference.linear(x, w, bias))


@pytest.mark.parametrize(("B", "C", "N"), [(1, 1, 1), (1, 36, 21), (2, 50, 64), (1, 512, 203), (5, 1100, 17)])
def test_linear_of_signs(isa, B, C, N):
    torch.manual_seed(0)
    x, w, bias = torch.randn(B, C), quantize(torch.randn(N, C) / C**0.5, RowFormat(1)), torch.randn(N)
    close(cpu.linear(x, w, bias), reference.linear(x, w, bias))


@pytest.mark.parametrize("C", [36, 50, 128])
def test_embed(isa, make, C):
    ids = torch.tensor([0, 10, 3], dtype=torch.int32)
    table, tokens = make(11, C), Tokens.one_a_row(ids, ids)
    close(cpu.embed(tokens, table), reference.embed(tokens, table))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [None, 0, 1, 50, "all"])
@pytest.mark.parametrize(("B", "C", "inter"), [(1, 36, 70), (3, 100, 53)])
def test_mlp(isa, make, gated, count, B, C, inter):
    x, rows = torch.randn(B, C), make(inter, 3 if gated else 2, C)
    bias = torch.randn(inter, 2) if gated else torch.randn(inter)
    neurons = None if count is None else pick(inter if count == "all" else count, inter)
    dense = cpu.mlp(x, rows, bias, neurons, activation="relu")
    close(dense.sum(0), reference.mlp(x, rows, bias, neurons, activation="relu").sum(0))
    read = torch.zeros(rows.shape[1], dtype=torch.int64)
    exact = cpu.mlp(x, rows, bias, neurons, activation="relu", skip_zeros=True, rows_read=read)
    assert torch.equal(dense, exact)
    # For one row of relu, some neurons are shut.
    assert read[-1] < read[0] or B > 1 or read[0] <= 1


@pytest.mark.parametrize("count", [None, 0, 1, 3, "all"])
@pytest.mark.parametrize("shape", [(3, 2, 2, 16, 48, True), (1, 3, 1, 5, 36, False), (2, 1, 4, 16, 100, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(isa, make, count, shape, dtype):
    B, G, r, D, C, rotary = shape
    S, H = 20, G * r
    args = (
        *(torch.randn(B, C), make(G, 2 * r + 2, D, C), torch.randn(G, r + 2, D)),
        torch.randn(S, D) if rotary else None,
        Tokens.one_a_row(torch.tensor([(7 * b + 5) % S for b in range(B)], dtype=torch.int32)),
    )
    caches = torch.randn(2, B, G, S, D).to(dtype)
    heads = None if count is None else pick(H if count == "all" else min(count, H), H)
    k, v, k2, v2 = *caches.clone(), *caches.clone()
    q, q2 = cpu.attn_qkv(*args, k, v, heads), reference.attn_qkv(*args, k2, v2, heads)
    chosen = range(H) if heads is None else heads[0][: int(heads[1])].tolist()
    for h in chosen:
        close(q[:, h], q2[:, h])
    # A value between two bf16 numbers may fall to either side.
    for ours, theirs in ((k, k2), (v, v2)):
        assert torch.allclose(ours.float(), theirs.float(), rtol=0 if dtype == torch.float32 else 2**-7, atol=floor())
    o = torch.randn(B, H, D)
    close(cpu.attn_out(o, args[1], heads).sum(0), reference.attn_out(o, args[1], heads).sum(0))


def test_lazy_keys_and_values_equal_full(isa, make):
    B, G, r, D, C, S, pending = 2, 3, 2, 16, 36, 16, 4
    blocks, bias = make(G, 2 * r + 2, D, C), torch.randn(G, r + 2, D)
    full, lazy = torch.zeros(2, B, G, S, D), torch.zeros(2, B, G, S, D)
    hidden, kv_len = torch.zeros(B, pending, C), torch.zeros(B, G, dtype=torch.int32)
    for step in range(S):
        x, tokens = torch.randn(B, C), Tokens.one_a_row(torch.full((B,), step, dtype=torch.int32))
        heads = pick(step % 3, G * r)
        cpu.attn_qkv(x, blocks, bias, None, tokens, *full)
        cpu.attn_qkv(x, blocks, bias, None, tokens, *lazy, heads, hidden=hidden, kv_len=kv_len, pending=pending)
        for g in {h // r for h in heads[0][: int(heads[1])].tolist()}:
            assert torch.equal(lazy[:, :, g, : step + 1], full[:, :, g, : step + 1])


def test_a_row_does_not_depend_on_its_batch_or_on_threads(isa, make):
    x, rows, head = torch.randn(7, 200), make(300, 2, 200), make(77, 200)

    def run(x):
        return cpu.mlp(x, rows, None, activation="relu").transpose(0, 1), cpu.linear(x, head)

    together, threads = run(x), cpu.num_threads()
    try:
        for n in (1, 3):
            cpu.set_threads(n)
            for b in range(7):
                for alone, whole in zip(run(x[b : b + 1].clone()), together, strict=True):
                    assert torch.equal(alone[0], whole[b])
    finally:
        cpu.set_threads(threads)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_no_number_shows(isa, make, bad):
    """Fixed point has no such values, and must not turn them into numbers."""
    x, head = torch.randn(1, 100), make(9, 100)
    x[0, 70] = bad
    assert not cpu.linear(x, head).isfinite().any()
    o = torch.randn(1, 3, 16)
    o[0, 1, 5] = bad
    assert not cpu.attn_out(o, make(3, 4, 16, 100)).sum(0).isfinite().any()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20])
def test_inputs_of_any_size(isa, make, size):
    x, head = torch.randn(1, 100), make(9, 100)
    assert torch.allclose(cpu.linear(size * x, head), size * cpu.linear(x, head), rtol=1e-3, atol=1e-3 * size + 1e-33)


def test_ops_without_signs_say_so():
    with pytest.raises(ValueError, match="does not exist for weights of this format"):
        cpu.mlp(torch.randn(1, 64), quantize(torch.randn(4, 2, 64), RowFormat(1)), None, activation="relu")
