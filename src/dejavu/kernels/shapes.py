"""Whether an op's arguments fit each other: checked when the op is called or recorded, not when a step is replayed.

One function an op, with the arguments of reference.py. What tensors hold (ids, positions, indices, counts) is not
looked at: the engine checks it where it comes in. All raise ConfigError with what was expected and what was found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.config import ACTIVATIONS, NORMS
from dejavu.errors import ConfigError
from dejavu.kernels.quantized import Quantized, Weight
from dejavu.kernels.reference import Selection, Tokens

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def embed(tokens: Tokens, table: Weight) -> None:
    _tokens("embed", tokens, "N")
    _weight("embed: table", table, ("V", "E"))


def add_positions(x: Tensor, tokens: Tokens, table: Tensor, offset: int) -> None:
    N, C = _tensor("add_positions: x", x, ("N", "C"))
    _tokens("add_positions", tokens, N)
    _weight("add_positions: table", table, ("M", C))
    _true(type(offset) is int and offset >= 0, "add_positions: offset", "an integer of at least 0", offset)


def add_norm(
    x: Tensor,
    partials: Tensor | None,
    partial_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tokens: Tokens | None = None,
    *,
    kind: str,
    eps: float,
) -> None:
    N, C = _tensor("add_norm: x", x, ("N", "C"))
    _tokens("add_norm", tokens, N)
    if partials is not None:
        _tensor("add_norm: partials", partials, ("S", N, C))
    for name, vector in (("partial_bias", partial_bias), ("weight", weight), ("bias", bias)):
        if vector is not None:
            _tensor(f"add_norm: {name}", vector, (C,))
    _true(kind in NORMS, "add_norm: kind", f"one of {', '.join(NORMS)}", kind)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, tokens: Tokens | None = None) -> None:
    N, C = _tensor("linear: x", x, ("N", "C"))
    _tokens("linear", tokens, N)
    M, _ = _weight("linear: weight", weight, ("M", C))
    if bias is not None:
        _tensor("linear: bias", bias, (M,))


def attn_qkv(
    x: Tensor,
    blocks: Weight,
    bias: Tensor | None,
    cos_sin: Tensor | None,
    tokens: Tokens,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Selection = None,
    *,
    hidden: Tensor | None = None,
    kv_len: Tensor | None = None,
    pending: int = 0,
    attn_read: Tensor | None = None,
) -> None:
    N, C = _tensor("attn_qkv: x", x, ("N", "C"))
    G, r, D = _blocks("attn_qkv", blocks, C)
    if bias is not None:
        _tensor("attn_qkv: bias", bias, (G, r + 2, D))
    _tokens("attn_qkv", tokens, N)
    R, S = _caches("attn_qkv", k_cache, v_cache, G, D)
    if cos_sin is not None:
        M, _ = _tensor("attn_qkv: cos_sin", cos_sin, ("M", D))
        _true(M >= S, "attn_qkv: cos_sin", f"a row for each of the cache's {S} positions", f"{M} rows")
        _true(D % 2 == 0, "attn_qkv: head_dim", "even, for rotary positions", D)
    _selection("attn_qkv: heads", heads)
    _true((hidden is None) == (kv_len is None), "attn_qkv: hidden and kv_len", "both or neither", "one of them")
    if hidden is not None:
        _, Q, _ = _tensor("attn_qkv: hidden", hidden, (R, "Q", C))
        _tensor("attn_qkv: kv_len", kv_len, (R, G), torch.int32)
        good = type(pending) is int and 1 <= pending <= Q
        _true(good, "attn_qkv: pending", f"an integer of 1 to the ring's {Q} places", pending)
    if attn_read is not None:
        _tensor("attn_qkv: attn_read", attn_read, (3,), torch.int64)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tokens,
    heads: Selection = None,
    *,
    scale: float,
    window: int | None = None,
) -> None:
    N, H, D = _tensor("attend: q", q, ("N", "H", "D"))
    G = k_cache.shape[1] if k_cache.dim() == 4 else "G"
    _caches("attend", k_cache, v_cache, G, D)
    _true(H % G == 0, "attend: query heads", f"a multiple of the {G} key heads", H)
    _tokens("attend", tokens, N)
    _selection("attend: heads", heads)
    _true(window is None or window > 0, "attend: window", "positive, or None", window)


def attn_out(o: Tensor, blocks: Weight, heads: Selection = None, tokens: Tokens | None = None) -> None:
    N, H, D = _tensor("attn_out: o", o, ("N", "H", "D"))
    G, r, rows = _blocks("attn_out", blocks, "C")
    _true((G * r, rows) == (H, D), "attn_out: blocks", f"of {H} heads of {D} rows", f"{G * r} of {rows}")
    _selection("attn_out: heads", heads)
    _tokens("attn_out", tokens, N)


def mlp(
    x: Tensor,
    rows: Weight,
    bias: Tensor | None,
    neurons: Selection = None,
    tokens: Tokens | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
    activate_up: bool = False,
    skip_zeros: bool = False,
    rows_read: Tensor | None = None,
) -> None:
    N, C = _tensor("mlp: x", x, ("N", "C"))
    _tokens("mlp", tokens, N)
    I, R, _ = _weight("mlp: rows", rows, ("I", "R", C))  # noqa: E741 (the field's letter)
    _true(R in (2, 3), "mlp: rows", "2 or 3 rows a neuron", R)
    if bias is not None:
        _tensor("mlp: bias", bias, (I,) if R == 2 else (I, 2))
    _selection("mlp: neurons", neurons)
    _true(activation in ACTIVATIONS, "mlp: activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    if rows_read is not None:
        _tensor("mlp: rows_read", rows_read, (R,), torch.int64)


def select_threshold(scores: Tensor, threshold: float, capacity: int, tokens: Tokens | None = None) -> None:
    N, _ = _tensor("select_threshold: scores", scores, ("N", "U"))
    _tokens("select_threshold", tokens, N)
    _true(type(capacity) is int and capacity >= 1, "select_threshold: capacity", "a positive integer", capacity)


def select_topk(scores: Tensor, k: int, tokens: Tokens | None = None) -> None:
    N, _ = _tensor("select_topk: scores", scores, ("N", "U"))
    _tokens("select_topk", tokens, N)
    _true(type(k) is int and k >= 1, "select_topk: k", "a positive integer", k)


def _true(good: bool, what: str, expected: str, found: object) -> None:
    if not good:
        raise ConfigError(f"{what}: expected {expected}, found {found}")


def _tensor(
    what: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
) -> torch.Size:
    """The shape; in the one asked for, letters stand for any size above 0."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    fits = tensor.dim() == len(shape) and all(
        size == want if isinstance(want, int) else size > 0 for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        wanted = ", ".join(map(str, shape))
        found = f"({', '.join(map(str, tensor.shape))}) {str(tensor.dtype).removeprefix('torch.')}"
        raise ConfigError(f"{what}: expected ({wanted}) {names}, found {found}")
    return tensor.shape


def _weight(what: str, weight: Weight, shape: tuple[int | str, ...]) -> torch.Size:
    if isinstance(weight, Quantized):
        _tensor(what, torch.empty(weight.shape, device="meta"), shape)
        return weight.shape
    return _tensor(what, weight, shape, _WEIGHTS)


def _blocks(op: str, blocks: Weight, C: int | str) -> tuple[int, int, int]:
    """Groups, query heads of each, and rows of a head."""
    G, parts, D, _ = _weight(f"{op}: blocks", blocks, ("G", "2r+2", "D", C))
    _true(parts % 2 == 0 and parts >= 4, f"{op}: blocks", "2r+2 parts a group, r at least 1", parts)
    return G, (parts - 2) // 2, D


def _caches(op: str, k: Tensor, v: Tensor, G: int | str, D: int) -> tuple[int, int]:
    """Rows, and the tokens that each has room for."""
    R, _, S, _ = _tensor(f"{op}: k_cache", k, ("R", G, "S", D), _WEIGHTS)
    _tensor(f"{op}: v_cache", v, tuple(k.shape), k.dtype)
    return R, S


def _tokens(op: str, tokens: Tokens | None, N: int | str) -> None:
    if tokens is None:
        return
    (N,) = _tensor(f"{op}: ids", tokens.ids, (N,), torch.int32)
    _tensor(f"{op}: rows", tokens.rows, (N,), torch.int32)
    _tensor(f"{op}: positions", tokens.positions, (N,), torch.int32)


def _selection(what: str, selection: Selection) -> None:
    if selection is None:
        return
    idx, count = selection
    _tensor(f"{what}: indices", idx, ("K",), torch.int32)
    _tensor(f"{what}: count", count, (1,), torch.int32)
