"""Arguments that do not fit are refused by every backend with what was expected and found: never run, never a crash."""

import inspect
import random

import pytest
import torch

from dejavu.errors import ConfigError
from dejavu.kernels import backend, reference, shapes
from dejavu.kernels.quantized import RowFormat, quantize
from dejavu.kernels.reference import Tokens

B, C, G, R, D, S, I, V, P = 2, 12, 2, 2, 4, 8, 9, 7, 3  # noqa: E741 (the field's letter)
OPS = ("embed", "add_positions", "add_norm", "linear", "attn_qkv", "attend", "attn_out", "mlp", "select_threshold",
       "select_topk")  # fmt: skip


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good(op: str) -> dict:
    """Arguments that fit."""
    torch.manual_seed(0)
    tokens = Tokens(ints(0, 3), ints(1, 0), ints(1, 2))
    heads, kv = (ints(0, 3), ints(2)), {"k_cache": torch.randn(B, G, S, D), "v_cache": torch.randn(B, G, S, D)}
    return {
        "embed": {"tokens": tokens, "table": torch.randn(V, C)},
        "add_positions": {"x": torch.randn(B, C), "tokens": tokens, "table": torch.randn(V, C), "offset": 2},
        "add_norm": {"x": torch.randn(B, C), "partials": torch.randn(3, B, C), "partial_bias": torch.randn(C),
                     "weight": torch.randn(C), "bias": torch.randn(C), "tokens": tokens, "kind": "layer", "eps": 1e-5},
        "linear": {"x": torch.randn(B, C), "weight": torch.randn(V, C), "bias": torch.randn(V),
                   "tokens": tokens},
        "attn_qkv": {"x": torch.randn(B, C), "blocks": torch.randn(G, 2 * R + 2, D, C),
                     "bias": torch.randn(G, R + 2, D), "cos_sin": torch.randn(S, D), "tokens": tokens, **kv,
                     "heads": heads, "hidden": torch.randn(B, P, C), "kv_len": torch.zeros(B, G, dtype=torch.int32),
                     "pending": P, "attn_read": torch.zeros(3, dtype=torch.int64)},
        "attend": {"q": torch.randn(B, G * R, D), **kv, "tokens": tokens, "heads": heads, "scale": 0.5,
                   "window": 3},
        "attn_out": {"o": torch.randn(B, G * R, D), "blocks": torch.randn(G, 2 * R + 2, D, C), "heads": heads,
                     "tokens": tokens},
        "mlp": {"x": torch.randn(B, C), "rows": torch.randn(I, 3, C), "bias": torch.randn(I, 2),
                "neurons": (ints(1, 5), ints(2)), "tokens": tokens, "activation": "relu", "skip_zeros": True,
                "rows_read": torch.zeros(3, dtype=torch.int64)},
        "select_threshold": {"scores": torch.randn(B, V), "threshold": 0.0, "capacity": 4, "tokens": tokens},
        "select_topk": {"scores": torch.randn(B, V), "k": 3, "tokens": tokens},
    }[op]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_each_check_has_the_signature_of_its_op(op):
    names = list(inspect.signature(getattr(reference, op)).parameters)
    assert list(inspect.signature(getattr(shapes, op)).parameters) == names
    for name in ("cpu", "reference"):
        assert list(inspect.signature(getattr(backend(name), op)).parameters) == names


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("op", "argument", "value", "message"),
    [
        (
            "embed",
            "tokens",
            Tokens(torch.zeros(2), *2 * [ints(0, 0)]),
            "embed: ids: expected (N) int32, found (2) float32",
        ),
        ("attn_qkv", "k_cache", torch.zeros(B, G + 1, S, D), f"attn_qkv: k_cache: expected (R, {G}, S, {D})"),
        ("attn_qkv", "v_cache", torch.zeros(B, G, S - 1, D), f"attn_qkv: v_cache: expected ({B}, {G}, {S}, {D})"),
        ("attn_qkv", "hidden", torch.zeros(B, P, C + 1), f"attn_qkv: hidden: expected ({B}, Q, {C})"),
        ("attn_qkv", "kv_len", None, "attn_qkv: hidden and kv_len: expected both or neither"),
        ("attn_qkv", "tokens", Tokens(*2 * [ints(0, 0)], ints(1)), "positions: expected (2) int32, found (1) int32"),
        ("attn_qkv", "pending", P + 1, f"attn_qkv: pending: expected an integer of 1 to the ring's {P} places"),
        ("mlp", "tokens", Tokens(ints(0, 0), ints(0), ints(0, 0)), "mlp: rows: expected (2) int32, found (1) int32"),
        ("attn_qkv", "cos_sin", torch.zeros(S - 1, D), "a row for each of the cache's 8 positions, found 7 rows"),
        ("attend", "q", torch.zeros(B, 3, D), "attend: query heads: expected a multiple of the 2 key heads, found 3"),
        ("attend", "q", torch.zeros(B, G * R, D + 1), "attend: k_cache: expected (R, 2, S, 5)"),
        ("attend", "v_cache", torch.zeros(B, G, S, D).bfloat16(), "attend: v_cache: expected (2, 2, 8, 4) float32"),
        ("attend", "window", 0, "attend: window: expected positive, or None, found 0"),
        (
            "attn_out",
            "o",
            torch.zeros(B, G * R + 2, D),
            "attn_out: blocks: expected of 6 heads of 4 rows, found 4 of 4",
        ),
        ("mlp", "rows_read", torch.zeros(2, dtype=torch.int64), "mlp: rows_read: expected (3) int64, found (2) int64"),
        ("mlp", "neurons", (ints(1), ints(1, 1)), "mlp: neurons: count: expected (1) int32, found (2) int32"),
        ("mlp", "activation", "swish", "mlp: activation: expected one of relu"),
        ("select_topk", "k", 0, "select_topk: k: expected a positive integer, found 0"),
    ],
)
def test_expected_and_found_are_named(name, op, argument, value, message):
    arguments = good(op)
    getattr(backend(name), op)(**good(op))
    with pytest.raises(ConfigError) as error:
        getattr(backend(name), op)(**arguments | {argument: value})
    assert message in str(error.value)


def spoil(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of another shape or dtype, or laid out in another way."""
    change = rng.randrange(6)
    if change == 0:
        return tensor[None]
    if change == 1 and tensor.dim():
        return tensor[0]
    if change == 2:
        return tensor.to(rng.choice([torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]))
    axis = rng.randrange(tensor.dim())
    if change == 3:
        return torch.cat([tensor, tensor], axis)
    if change == 4:
        return tensor.narrow(axis, 0, tensor.shape[axis] - 1)
    return torch.stack([tensor, tensor], -1)[..., 0]  # strided


@pytest.mark.parametrize("isa", backend("cpu").isas())
def test_any_arguments_run_rightly_or_are_refused(isa):
    """1,000 calls with some arguments spoiled: what is not refused gives what the reference gives."""
    rng, ours, theirs = random.Random(isa), backend("cpu"), backend("reference")
    before, refused = ours.isa(), 0
    ours.set_isa(isa)
    try:
        for _ in range(1000):
            op = rng.choice(OPS)
            arguments = good(op)
            for argument in rng.sample(sorted(arguments), rng.choice([1, 1, 2])):
                value = arguments[argument]
                if isinstance(value, torch.Tensor):
                    arguments[argument] = rng.choice([spoil(rng, value), spoil(rng, value), value, None])
                elif isinstance(value, tuple):
                    parts, at = list(value), rng.randrange(len(value))
                    parts[at] = spoil(rng, parts[at])
                    arguments[argument] = Tokens(*parts) if isinstance(value, Tokens) else tuple(parts)
                elif type(value) is int:
                    arguments[argument] = rng.choice([-1, 0, 1, 3])
            copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            try:
                result = getattr(ours, op)(**arguments)
            except (ConfigError, AttributeError):  # None where a tensor must be
                refused += 1
                continue
            if op == "attn_qkv":  # queries of heads that are not selected are undefined
                continue
            expected = getattr(theirs, op)(**copies)
            if op in ("mlp", "attn_out"):
                torch.testing.assert_close(result.sum(0), expected.sum(0), rtol=1e-3, atol=1e-3)
            elif op in ("embed", "linear", "add_norm"):
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    finally:
        ours.set_isa(before)
    assert 300 < refused < 1000


def test_quantised_weights_are_checked_by_the_shape_of_what_they_stand_for():
    weight = quantize(torch.randn(V, C), RowFormat.parse("int8"))
    backend("cpu").linear(torch.randn(1, C), weight)
    with pytest.raises(ConfigError, match=r"linear: weight: expected \(M, 13\) float32, found \(7, 12\)"):
        backend("cpu").linear(torch.randn(1, C + 1), weight)
