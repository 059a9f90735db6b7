"""The native backend against the reference: every op, instruction set, dtype; odd sizes; counts 0, 1 and all."""

import gc
import inspect
import os
import shutil
import subprocess
import sys

import pytest
import torch

from dejavu.config import ACTIVATIONS, NORMS
from dejavu.errors import ConfigError, KernelUnavailable
from dejavu.kernels import backend, cpu, reference
from dejavu.kernels.quantized import RowFormat, quantize
from dejavu.kernels.reference import Tokens

OPS = ("embed", "add_positions", "add_norm", "linear", "attn_qkv", "attend", "attn_out", "mlp")
ISAS = ("avx512", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.isa()
    if request.param not in cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pick(count: int, total: int):
    """A random selection of `count` of `total`; what lies past the count must never be used."""
    idx = torch.full((total,), 2**30, dtype=torch.int32)
    idx[:count] = torch.randperm(total)[:count].sort().values
    return idx, torch.tensor([count], dtype=torch.int32)


def check(ours: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor | None = None):
    """Our error is at most twice that of `plain`, PyTorch in the same precision, plus a few float32 roundings."""
    floor = 3e-6 * exact.abs().max().clamp(min=1).item()
    allowed = floor if plain is None else 2 * (plain.float() - exact).abs().max().item() + floor
    assert (ours - exact).abs().max().item() <= allowed


def weights(*shape, dtype):
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


@pytest.mark.parametrize("op", OPS)
def test_signature_is_the_reference(op):
    assert inspect.signature(getattr(cpu, op)) == inspect.signature(getattr(reference, op))


def test_names_are_those_of_every_backend():
    """One table says what a family may vary; kernels.shapes refuses all else."""
    assert sorted(cpu._native.ACTIVATIONS) == sorted(ACTIVATIONS)
    assert sorted(cpu._native.NORMS) == sorted(NORMS)
    for name in ACTIVATIONS:
        reference.activate(torch.zeros(1), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "C", "N"), [(1, 1, 1), (1, 48, 5), (2, 129, 64), (3, 512, 203), (9, 100, 7)])
def test_linear(isa, dtype, B, C, N):
    x, w, bias = torch.randn(B, C), weights(N, C, dtype=dtype), torch.randn(N)
    plain = torch.nn.functional.linear(x.to(dtype), w, bias.to(dtype))
    check(cpu.linear(x, w, bias), reference.linear(x, w, bias), plain)
    check(cpu.linear(x, w), reference.linear(x, w), torch.nn.functional.linear(x.to(dtype), w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_and_positions(isa, dtype):
    table, ids = weights(11, 37, dtype=dtype), torch.tensor([0, 10, 3], dtype=torch.int32)
    tokens = Tokens.one_a_row(torch.tensor([0, 8, 3], dtype=torch.int32), ids)
    x = cpu.embed(tokens, table)
    assert torch.equal(x, reference.embed(tokens, table))
    y = x.clone()
    cpu.add_positions(x, tokens, table, 2)
    reference.add_positions(y, tokens, table, 2)
    assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
@pytest.mark.parametrize(("B", "C", "S"), [(1, 1, 1), (2, 48, 3), (3, 129, 0), (1, 1100, 32)])
def test_add_norm(isa, kind, B, C, S):
    x = torch.randn(B, C) + 3
    partials = torch.randn(S, B, C) if S else None
    bias, weight, shift = torch.randn(C), torch.randn(C), torch.randn(C) if kind == "layer" else None
    x2 = x.clone()
    y = cpu.add_norm(x, partials, bias, weight, shift, kind=kind, eps=1e-5)
    y2 = reference.add_norm(x2, partials, bias, weight, shift, kind=kind, eps=1e-5)
    check(x, x2)
    # With a single element the layer norm divides rounding noise by sqrt(eps).
    assert torch.allclose(y, y2, atol=2e-3 if C == 1 else 2e-5)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [None, 0, 1, 50, "all"])
@pytest.mark.parametrize(("B", "C", "inter"), [(1, 48, 70), (2, 129, 203), (5, 64, 1)])
def test_mlp(isa, dtype, gated, count, B, C, inter):
    x, rows = torch.randn(B, C), weights(inter, 3 if gated else 2, C, dtype=dtype)
    bias = torch.randn(inter, 2) if gated else torch.randn(inter)
    neurons = None if count is None else pick(inter if count == "all" else min(count, inter), inter)
    for activation, threshold, activate_up in [("relu", 0, gated), ("fatrelu", 0.3, False), ("silu", 0, False)]:
        for exact in (False, True) if activation != "silu" else (False,):
            read, read2 = torch.zeros(2, rows.shape[1], dtype=torch.int64)
            kw = {"activation": activation, "threshold": threshold, "activate_up": activate_up, "skip_zeros": exact}
            ours = cpu.mlp(x, rows, bias, neurons, rows_read=read, **kw).sum(0)
            check(ours, reference.mlp(x, rows, bias, neurons, rows_read=read2, **kw).sum(0))
            assert torch.equal(read, read2)
            if not exact:
                assert (read == (inter if neurons is None else int(neurons[1]))).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_smooth_activations(isa, activation):
    x, rows = torch.randn(2, 32) * 3, weights(40, 2, 32, dtype=torch.float32)
    ours = cpu.mlp(x, rows, None, activation=activation).sum(0)
    check(ours, reference.mlp(x, rows, None, activation=activation).sum(0))


def test_exact_equals_dense_bit_for_bit(isa):
    x, rows, bias = torch.randn(3, 96), weights(500, 2, 96, dtype=torch.bfloat16), torch.randn(500) - 1
    dense = cpu.mlp(x, rows, bias, activation="relu")
    assert torch.equal(dense, cpu.mlp(x, rows, bias, activation="relu", skip_zeros=True))
    everything = torch.arange(500, dtype=torch.int32), torch.tensor([500], dtype=torch.int32)
    assert torch.equal(dense, cpu.mlp(x, rows, bias, everything, activation="relu", skip_zeros=True))


def attention_case(dtype, *, B=3, G=2, r=2, D=16, C=48, S=40, rotary=True):
    case = {
        "x": torch.randn(B, C),
        "blocks": weights(G, 2 * r + 2, D, C, dtype=dtype),
        "bias": torch.randn(G, r + 2, D),
        "cos_sin": torch.randn(S, D) if rotary else None,
        "tokens": Tokens.one_a_row(torch.tensor([(11 * b + 5) % S for b in range(B)], dtype=torch.int32)),
    }
    caches = [weights(B, G, S, D, dtype=dtype) for _ in range(2)]
    return case, caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [None, 0, 1, 3, "all"])
@pytest.mark.parametrize(
    "shape", [{}, {"r": 1, "rotary": False, "D": 5}, {"G": 1, "r": 4, "B": 1}, {"C": 600, "D": 64, "r": 1, "G": 5}]
)
def test_attention(isa, dtype, count, shape):
    case, (k, v) = attention_case(dtype, **shape)
    k2, v2 = k.clone(), v.clone()
    H = case["blocks"].shape[0] * (case["blocks"].shape[1] - 2) // 2
    heads = None if count is None else pick(H if count == "all" else min(count, H), H)
    chosen = range(H) if heads is None else heads[0][: int(heads[1])].tolist()
    q = cpu.attn_qkv(**case, k_cache=k, v_cache=v, heads=heads)
    q2 = reference.attn_qkv(**case, k_cache=k2, v_cache=v2, heads=heads)
    # The cache rounds to its dtype: a value between two bf16 numbers may fall to either side.
    for ours, theirs in ((k, k2), (v, v2)):
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=2e-5)
    for window in (None, 7):
        kw = {"heads": heads, "scale": 0.3, "window": window}
        o = cpu.attend(q2, k2, v2, case["tokens"], **kw)
        o2 = reference.attend(q2, k2, v2, case["tokens"], **kw)
        for h in chosen:
            check(q[:, h], q2[:, h])
            check(o[:, h], o2[:, h])
    check(cpu.attn_out(o2, case["blocks"], heads).sum(0), reference.attn_out(o2, case["blocks"], heads).sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "pending"), [(1, 1), (1, 5), (3, 4)])
def test_lazy_keys_and_values_equal_full(isa, dtype, r, pending):
    """Whatever is selected when, the cache that a selected head sees is the one of computing everything."""
    B, G, S, C = 2, 3, 30, 48
    case, (full_k, full_v) = attention_case(dtype, B=B, G=G, r=r, S=S, C=C)
    lazy_k, lazy_v = torch.zeros_like(full_k), torch.zeros_like(full_v)
    hidden, kv_len = torch.zeros(B, pending, C), torch.zeros(B, G, dtype=torch.int32)
    for step in range(S - 3):
        case["x"] = torch.randn(B, C)
        # Rows of a batch stand at different positions.
        positions = torch.tensor([step, max(0, step - 3)], dtype=torch.int32)
        case["tokens"] = Tokens.one_a_row(positions)
        if step <= 3:
            kv_len[1] = 0
        heads = pick(int(torch.randint(0, G * r + 1, ())), G * r)
        cpu.attn_qkv(**case, k_cache=full_k, v_cache=full_v)
        lazy = {"hidden": hidden, "kv_len": kv_len, "pending": pending}
        cpu.attn_qkv(**case, k_cache=lazy_k, v_cache=lazy_v, heads=heads, **lazy)
        for g in {h // r for h in heads[0][: int(heads[1])].tolist()}:
            for b in range(B):
                assert kv_len[b, g] == positions[b] + 1
                done = slice(0, int(kv_len[b, g]))
                assert torch.equal(lazy_k[b, g, done], full_k[b, g, done])
                assert torch.equal(lazy_v[b, g, done], full_v[b, g, done])
        assert (positions[:, None] + 1 - kv_len < pending).all()


def places(*where: tuple[int, int]) -> Tokens:
    """Tokens at (row, position) each."""
    rows, positions = torch.tensor(where, dtype=torch.int32).T.contiguous()
    return Tokens(torch.zeros_like(rows), rows, positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pending", [None, 3])
def test_several_tokens_of_a_row_equal_one_at_a_time(isa, dtype, pending):
    """Keys, values and outputs bit for bit, padding behind them or not, in rows of any order."""
    R, G, r, C, S = 4, 3, 2, 48, 30
    case, (k, v) = attention_case(dtype, B=R, G=G, r=r, C=C, S=S)
    state = {"hidden": torch.zeros(R, 8, C), "kv_len": torch.zeros(R, G, dtype=torch.int32), "pending": pending}
    state = {} if pending is None else state
    k2, v2 = k.clone(), v.clone()
    state2 = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    lengths = [0] * R
    for step in range(9):
        counts = torch.randint(0, 4, (R,)).tolist() if step < 8 else [1] * R
        order = torch.randperm(R).tolist()
        where = [(row, lengths[row] + i) for row in order for i in range(counts[row])]
        padding = int(torch.randint(0, 3, ()))
        if not where:
            continue
        x = torch.randn(len(where) + padding, C)
        x[len(where) :] = torch.nan
        case["x"], case["tokens"] = x, places(*where, *[(-1, 0)] * padding)
        # Every head at last: then nothing waits.
        heads = None if step == 8 or pending is None else pick(int(torch.randint(0, 3, ())), G * r)
        read = torch.zeros(3, dtype=torch.int64)
        q = cpu.attn_qkv(**case, k_cache=k, v_cache=v, heads=heads, attn_read=read, **state)
        o = cpu.attend(q, k, v, case["tokens"], heads, scale=0.3)
        chosen = list(range(G * r)) if heads is None else heads[0][: int(heads[1])].tolist()
        assert read[:2].tolist() == [len(chosen), len({h // r for h in chosen})]
        for n, place in enumerate(where):
            case["x"], case["tokens"] = x[n : n + 1].clone(), places(place)
            q2 = cpu.attn_qkv(**case, k_cache=k2, v_cache=v2, heads=heads, **state2)
            o2 = cpu.attend(q2, k2, v2, case["tokens"], heads, scale=0.3)
            assert torch.equal(q[n, chosen], q2[0, chosen])
            assert torch.equal(o[n, chosen], o2[0, chosen])
            lengths[place[0]] += 1
    assert torch.equal(k, k2) and torch.equal(v, v2)


def test_padding_costs_and_changes_nothing(isa):
    x, rows, head = torch.randn(5, 64), weights(203, 2, 64, dtype=torch.float32), weights(9, 64, dtype=torch.float32)
    tokens, alone = places((3, 1), (0, 7), *[(-1, 0)] * 3), places((3, 1), (0, 7))
    read, read2 = torch.zeros(2, 2, dtype=torch.int64)
    bias = torch.randn(203) - 1
    padded = cpu.mlp(x, rows, bias, None, tokens, activation="relu", skip_zeros=True, rows_read=read)[:, :2]
    whole = cpu.mlp(x[:2].clone(), rows, bias, None, alone, activation="relu", skip_zeros=True, rows_read=read2)
    assert torch.equal(padded, whole) and torch.equal(read, read2)
    assert torch.equal(cpu.linear(x, head, None, tokens)[:2], cpu.linear(x[:2].clone(), head))
    scores = torch.randn(5, 300)
    for select in (lambda s, t: cpu.select_topk(s, 20, t), lambda s, t: cpu.select_threshold(s, 1.5, 30, t)):
        (idx, count), (idx2, count2) = select(scores, tokens), select(scores[:2].clone(), alone)
        assert int(count) == int(count2) and torch.equal(idx[: int(count)], idx2[: int(count)])


def test_a_row_does_not_depend_on_its_batch_or_on_threads(isa):
    x = torch.randn(7, 200)
    rows, head = weights(300, 2, 200, dtype=torch.bfloat16), weights(77, 200, dtype=torch.bfloat16)

    def run(x):
        return cpu.mlp(x, rows, None, activation="relu").transpose(0, 1), cpu.linear(x, head)

    together = run(x)
    threads = cpu.num_threads()
    try:
        for n in (1, 3):
            cpu.set_threads(n)
            for b in range(7):
                for alone, whole in zip(run(x[b : b + 1].clone()), together, strict=True):
                    assert torch.equal(alone[0], whole[b])
    finally:
        cpu.set_threads(threads)


def test_graph_equals_eager_and_keeps_its_tensors():
    table, rows = weights(9, 64, dtype=torch.float32), weights(128, 2, 64, dtype=torch.float32)
    ids = torch.zeros(1, dtype=torch.int32)

    def step():
        x = cpu.embed(Tokens.one_a_row(torch.zeros_like(ids), ids), table)
        partials = cpu.mlp(x, rows, None, activation="relu")
        return cpu.linear(cpu.add_norm(x, partials, None, None, None, kind="rms", eps=1e-5), table)

    with cpu.capture() as captured:
        out = step()
    for i in range(9):
        ids[0] = i
        gc.collect()
        captured.graph.replay()
        assert torch.equal(out, step())


def test_no_python_code_runs_inside_of_the_library(monkeypatch):
    """It takes an exception for a failed conversion, and tries another: a Ctrl-C in there would be lost."""

    def struck(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "__dlpack__", struck)
    x, weight = torch.ones(1, 32), torch.ones(4, 32)
    assert cpu.linear(x, weight, torch.zeros(4)).tolist() == [[32.0] * 4]
    torch.testing.assert_close(cpu.linear(x, quantize(weight, RowFormat.parse("int8"))), torch.full((1, 4), 32.0))


def test_capture_runs_nothing():
    x = torch.randn(1, 8)
    before = x.clone()
    with cpu.capture() as captured:
        cpu.add_norm(x, torch.ones(1, 1, 8), None, None, None, kind="none", eps=0.0)
    assert torch.equal(x, before)
    captured.graph.replay()
    assert torch.equal(x, before + 1)


def test_empty_is_lazy_and_typed():
    big = cpu.empty((1 << 20, 4096), torch.bfloat16)  # 8 GB of address space, no memory
    assert big.shape == (1 << 20, 4096) and big.dtype == torch.bfloat16 and big.data_ptr() % 64 == 0
    big[0] = 1
    assert cpu.empty((0, 3), torch.float32).shape == (0, 3)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        cpu.linear(torch.randn(1, 8), torch.randn(4, 7))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        cpu.linear(torch.randn(1, 8), torch.randn(4, 8).half())
    with pytest.raises(ValueError, match="contiguous"):
        cpu.linear(torch.randn(1, 8), torch.randn(8, 4).T)
    with pytest.raises(ConfigError, match="from 1 to"):
        cpu.set_threads(0)
    with pytest.raises(KernelUnavailable, match="portable"):
        cpu.set_isa("sse9")
    with pytest.raises(ConfigError, match="choose one of: auto, cpu"):
        backend("gpu9")


def test_environment_forces_an_instruction_set():
    def run(isa):
        code = "from dejavu.kernels import cpu; print(cpu.isa())"
        return subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "DEJAVU_ISA": isa}, capture_output=True, text=True
        )

    assert run("portable").stdout.strip() == "portable"
    assert "cannot run here" in run("mmx").stderr


def test_read_bandwidth_is_plausible():
    assert 1e8 < cpu.read_bandwidth(64 << 20, 2) < 1e13


@pytest.mark.parametrize("activation", ["relu", "fatrelu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kinds", [2, 3])
def test_what_is_not_a_number_is_not_hidden(isa, activation, weights, kinds):
    """Zero in its place would hide a broken layer, and skipping it too."""
    x, rows = torch.randn(2, 64), torch.randn(50, kinds, 64)
    x[0, 3] = torch.nan
    rows = rows.to(getattr(torch, weights)) if "float" in weights else quantize(rows, RowFormat.parse(weights))
    for exact in (False, True):
        ours = cpu.mlp(x, rows, None, activation=activation, skip_zeros=exact).sum(0)
        assert ours[0].isnan().all() and ours[1].isfinite().all()
    assert reference.mlp(x, rows, None, activation=activation).sum(0)[0].isnan().all()


def test_attention_to_what_is_not_a_number_is_not_a_number(isa):
    q, (k, v) = torch.randn(1, 2, 8), torch.randn(2, 1, 2, 16, 8)
    tokens = Tokens.one_a_row(torch.tensor([9], dtype=torch.int32))
    k[0, 0, 3, 2] = torch.nan
    out = cpu.attend(q, k, v, tokens, scale=0.3)
    assert out[0, 0].isnan().all() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("count", [-5, 2**31 - 1, -(2**31)])
def test_counts_are_clamped_to_the_buffer(isa, count):
    x, rows, blocks = torch.randn(1, 12), torch.randn(9, 2, 12), torch.randn(3, 4, 4, 12)
    idx = torch.arange(3, dtype=torch.int32)
    wild, held = (idx, torch.tensor([count], dtype=torch.int32)), (idx, torch.tensor([0 if count < 0 else 3]).int())
    assert torch.equal(cpu.mlp(x, rows, None, wild, activation="relu"), cpu.mlp(x, rows, None, held, activation="relu"))
    o = torch.randn(1, 3, 4)
    assert torch.equal(cpu.attn_out(o, blocks, wild), cpu.attn_out(o, blocks, held))


LIMITED = """
import resource
from dejavu.errors import CapacityError
from dejavu.kernels import cpu

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

cpu.set_threads(2)
before = status("Threads:")
# Room for the stacks of a few threads.
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize:") * 1024 + (100 << 20),) * 2)
try:
    cpu._native.set_threads(64)
except RuntimeError as error:
    print("refused", status("Threads:") - before, cpu.num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the number of threads from /proc")
def test_threads_that_cannot_be_started_give_the_others_back():
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "refused 0 2", run.stderr


def test_a_number_of_threads_has_a_bound():
    for n in (0, -1, 8 * os.cpu_count() + 1, 100_000, 1.5, True):
        with pytest.raises(ConfigError, match=f"threads must be an integer from 1 to {8 * os.cpu_count()} "):
            cpu.set_threads(n)


def test_another_build_of_the_library_is_really_used(tmp_path):
    """What `make sanitize` runs; an editable installation would find its own build first."""
    shutil.copy(cpu._native.__file__, tmp_path)
    command = [sys.executable, "-c", "from dejavu.kernels import backend, cpu; print(cpu._native.__file__)"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DEJAVU_NATIVE": str(tmp_path)})
    assert os.path.dirname(run.stdout.strip()) == str(tmp_path), run.stderr
    missing = os.environ | {"DEJAVU_NATIVE": str(tmp_path / "missing")}
    run = subprocess.run(command, capture_output=True, text=True, env=missing)
    assert "KernelUnavailable: DEJAVU_NATIVE: expected the library" in run.stderr
