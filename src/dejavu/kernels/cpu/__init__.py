"""The native CPU backend: the ops of reference.py as nodes of a tape (native/).

Outside `capture()` an op runs at once; inside, it is recorded, and `graph.replay()` runs the whole step in one
native call with the GIL released.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from dejavu.device import check_threads, default_threads
from dejavu.errors import CapacityError, ConfigError, KernelUnavailable

if "DEJAVU_NATIVE" in os.environ:  # a folder with another build of the library, under sanitizers say
    # Not by __path__: the finder of an editable installation comes before it, and knows its own library only.
    found = PathFinder.find_spec(f"{__name__}._native", [os.environ["DEJAVU_NATIVE"]])
    if found is None:
        raise KernelUnavailable(f"DEJAVU_NATIVE: expected the library _native in {os.environ['DEJAVU_NATIVE']}")
    sys.modules[found.name] = module_from_spec(found)
    found.loader.exec_module(sys.modules[found.name])
from dejavu.kernels.cpu import _native
from dejavu.kernels.quantized import Quantized, Weight
from dejavu.kernels.reference import Selection, Tokens

# Slices of a sum over rows: enough for threads to finish together, few enough that adding them up is cheap
# (32 slices of C = 4096 are 512 KB). They depend on the shape alone, so results don't depend on threads.
_SLICE_BYTES, _MIN_SLICES, _MAX_SLICES = 512 << 10, 4, 32


class Graph:
    """A recorded step. Holds on to every tensor it was recorded with."""

    def __init__(self):
        self.tape = _native.Tape()

    def replay(self) -> None:
        """Run the recorded ops, in order, on the tensors' present contents."""
        self.tape.replay()

    def replay_timed(self) -> dict[str, float]:
        """Replay once; returns the seconds that each kind of op took, in the order of their first."""
        seconds: dict[str, float] = {}
        for op, took in self.tape.replay_timed():
            seconds[op] = seconds.get(op, 0.0) + took
        return seconds


class _Capture:
    graph: Graph


_recording: ContextVar[Graph | None] = ContextVar("recording", default=None)


@contextmanager
def capture() -> Iterator[_Capture]:
    """Record the ops called inside; the graph is `.graph` of the value, and nothing runs until it is replayed."""
    holder = _Capture()
    holder.graph = Graph()
    token = _recording.set(holder.graph)
    try:
        yield holder
    finally:
        _recording.reset(token)


def _issue(op: Callable, *args) -> None:
    graph = _recording.get()
    tape = _native.Tape() if graph is None else graph.tape
    with _refusals():
        op(tape, *map(_handed, args))
    if graph is None:
        tape.replay()


def _handed(value: object) -> object:
    """An argument as the native library takes it. It would ask a tensor for its memory through Python code, and a
    Ctrl-C that struck in there would be taken for a failed attempt and forgotten."""
    return to_dlpack(value) if isinstance(value, Tensor) else value


@contextmanager
def _refusals() -> Iterator[None]:
    """What kernels.shapes does not look at: layouts in memory, and dtypes that this backend lacks."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


def set_threads(n: int) -> None:
    """Use `n` threads for all later steps, the calling one included.

    Raises: ConfigError for a number that makes no sense (device.check_threads); CapacityError where the system does not
        start so many, and those before stay in use.
    """
    check_threads(n)
    try:
        _native.set_threads(n)
    except RuntimeError as error:
        raise CapacityError(f"the system does not start {n} threads ({error}); use fewer") from error


def num_threads() -> int:
    """Threads that a step runs on."""
    return _native.num_threads()


def isa() -> str:
    """The instruction set in use: avx512, avx2 or portable."""
    return _native.isa()


def isas() -> list[str]:
    """The instruction sets this machine and build can run, best first."""
    return _native.isas()


def set_isa(name: str) -> None:
    """Use one instruction set for all ops recorded from now on.

    Raises: KernelUnavailable where this machine or build lacks it.
    """
    if name not in _native.isas():
        raise KernelUnavailable(f"instruction set {name!r} cannot run here; available: {', '.join(_native.isas())}")
    _native.set_isa(name)


def read_bandwidth(num_bytes: int, repeats: int) -> float:
    """Read bandwidth of this machine with `num_threads()` threads, in bytes per second: best of `repeats` passes."""
    return _native.read_bandwidth(num_bytes, repeats)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, in huge pages where the system gives them; untouched pages take no memory."""
    count = 1
    for size in shape:
        count *= size
    data = torch.from_numpy(_native.allocate(max(count * dtype.itemsize, 1)))
    return data[: count * dtype.itemsize].view(dtype).view(shape)


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _slices(rows: int, row_bytes: int) -> int:
    return max(1, min(_MAX_SLICES, max(_MIN_SLICES, rows * row_bytes // _SLICE_BYTES), rows))


def _pair(selection: Selection) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if selection is None else selection


def _weights(weight: Weight) -> _native.Weights:
    with _refusals():
        if not isinstance(weight, Quantized):
            return _native.Weights(_handed(weight))
        form = weight.format
        return _native.Weights(_handed(weight.data), weight.width, form.bits, form.group, form.zero_point)


def unpack(weight: Quantized, out: Tensor) -> None:
    """Put quantised rows (..., C), which may lie apart from each other, into out (rows, C), float32 or bfloat16."""
    data, step = weight.data, weight.row_bytes
    # Each row by its distance from the first, in rows: all slices of a store of rows begin at whole ones.
    ids = torch.zeros(1, dtype=torch.int32)
    for size, stride in zip(data.shape[:-1], data.stride()[:-1], strict=True):
        ids = (ids[:, None] + torch.arange(size, dtype=torch.int32) * (stride // step)).flatten()
    table = _weights(Quantized(data.as_strided((int(ids[-1]) + 1, step), (step, 1)), weight.width, weight.format))
    _issue(_native.Tape.embed, ids, torch.zeros_like(ids), table, out, 0, False)


def _row_bytes(weight: Weight) -> int:
    return weight.row_bytes if isinstance(weight, Quantized) else weight.shape[-1] * weight.element_size()


def _rows(tokens: Tokens | None) -> Tensor | None:
    return None if tokens is None else tokens.rows


def embed(tokens: Tokens, table: Weight) -> Tensor:
    out = _floats(tokens.ids.shape[0], table.shape[1])
    _issue(_native.Tape.embed, tokens.ids, tokens.rows, _weights(table), out, 0, False)
    return out


def add_positions(x: Tensor, tokens: Tokens, table: Tensor, offset: int) -> None:
    _issue(_native.Tape.embed, tokens.positions, tokens.rows, _weights(table), x, offset, True)


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
) -> Tensor:
    y = torch.empty_like(x)
    _issue(
        _native.Tape.add_norm, x, partials, partial_bias, weight, bias, _rows(tokens), y, _native.NORMS.index(kind), eps
    )
    return y


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, tokens: Tokens | None = None) -> Tensor:
    out = _floats(x.shape[0], weight.shape[0])
    _issue(_native.Tape.linear, x, _weights(weight), bias, _rows(tokens), out)
    return out


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
) -> Tensor:
    G, parts, D, _ = blocks.shape
    r, N = (parts - 2) // 2, x.shape[0]
    q = _floats(N, G * r, D)
    plan = None
    if heads is not None or hidden is not None:
        plan = torch.empty(1 + G * (r + 2) + N * G, dtype=torch.int32)
    _issue(
        _native.Tape.attn_qkv,
        *(x, _weights(blocks), bias, cos_sin, tokens.rows, tokens.positions, k_cache, v_cache, *_pair(heads)),
        *(hidden, kv_len, pending, attn_read, q, plan),
    )
    return q


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: Tokens,
    heads: Selection = None,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    out = torch.empty_like(q)
    _issue(
        _native.Tape.attend,
        *(q, k_cache, v_cache, tokens.rows, tokens.positions, *_pair(heads), out, scale, window or 0),
    )
    return out


def attn_out(o: Tensor, blocks: Weight, heads: Selection = None, tokens: Tokens | None = None) -> Tensor:
    _, H, D = o.shape
    C = blocks.shape[3]
    partials = _floats(_slices(H * D, _row_bytes(blocks)), o.shape[0], C)
    _issue(_native.Tape.attn_out, o, _weights(blocks), *_pair(heads), _rows(tokens), partials)
    return partials


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
) -> Tensor:
    partials = _floats(_slices(rows.shape[0], rows.shape[1] * _row_bytes(rows)), *x.shape)
    _issue(
        _native.Tape.mlp,
        *(x, _weights(rows), bias, *_pair(neurons), _rows(tokens), rows_read, partials),
        *(_native.ACTIVATIONS.index(activation), threshold, activate_up, skip_zeros),
    )
    return partials


def select_threshold(
    scores: Tensor, threshold: float, capacity: int, tokens: Tokens | None = None
) -> tuple[Tensor, Tensor]:
    return _select(scores, capacity, 0, threshold, tokens)


def select_topk(scores: Tensor, k: int, tokens: Tokens | None = None) -> tuple[Tensor, Tensor]:
    N, total = scores.shape
    return _select(scores, min(N * k, total), k, 0.0, tokens)


def _select(scores: Tensor, capacity: int, k: int, threshold: float, tokens: Tokens | None) -> tuple[Tensor, Tensor]:
    idx, count = torch.empty(capacity, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    _issue(_native.Tape.select, scores, _rows(tokens), idx, count, k, threshold)
    return idx, count


if os.environ.get("DEJAVU_ISA"):
    set_isa(os.environ["DEJAVU_ISA"])
set_threads(default_threads())
