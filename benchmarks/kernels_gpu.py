"""Latency and bandwidth of the GPU kernels over density, beside PyTorch's dense matrices and index-then-matmul.

    python benchmarks/kernels_gpu.py OUT
    python benchmarks/kernels_gpu.py OUT --shape opt-6.7b --tiles mlp_in:BN=8,BC=512

Batch 1, bfloat16, random weights in the shapes of one layer; a kernel's ratio is not a model's speed-up. Every time is
that of one call in a CUDA graph of several, which read different rows, so that the cache does not hold them; results
are checked against PyTorch in float32 first. A row that fails is reported and the others go on. Writes
OUT/kernels_gpu.jsonl, prints a table last, takes three minutes at most.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dejavu.bench import record, shapes
from dejavu.bench.bandwidth import read_bandwidth
from dejavu.bench.timing import percentiles_ms
from dejavu.errors import ConfigError, DejavuError
from dejavu.kernels import backend
from dejavu.kernels.reference import Tokens
from dejavu.kernels.triton import tuning

SHAPES = ("opt-6.7b", "opt-30b", "opt-66b")
MLP_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
HEAD_DENSITIES = (0.1, 0.25, 0.42, 0.6, 1.0)
CONTEXTS = (128, 512, 1024, 2048)
# Calls in a graph, over this many copies of the weights, so that a call finds nothing of its rows in the cache.
CALLS, COPIES = 24, 6
REPLAYS = 15
DTYPE = torch.bfloat16

Named = tuple[str, Callable[[], "Row"]]


class Row(NamedTuple):
    """One measurement: `calls` read `bytes` each, of different data; `check` is the error of one against PyTorch."""

    density: float
    bytes: float
    calls: list[Callable[[], Any]]
    check: Callable[[], float] | None = None


def pick(n: int, density: float) -> tuple[Tensor, Tensor]:
    """A random selection of a share of n units."""
    idx = torch.randperm(n, device="cuda")[: max(1, round(n * density))].sort().values.int()
    return idx, torch.full((1,), idx.numel(), dtype=torch.int32, device="cuda")


def gap(actual: Tensor, expected: Tensor) -> float:
    """Relative error."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def mlp_rows(ops, C: int, inter: int) -> Iterator[Named]:
    """The MLP: dense, exact, selected; PyTorch's dense, and its index-then-matmul."""
    layers = [torch.randn(inter, 2, C, dtype=DTYPE, device="cuda") / C**0.5 for _ in range(COPIES)]
    x, low = (t := torch.randn(1, C, device="cuda")), t.to(DTYPE)
    row_bytes = C * DTYPE.itemsize

    def expected(rows: Tensor) -> Tensor:
        return torch.relu(x @ rows[:, 0].float().T) @ rows[:, 1].float()

    def call(rows: Tensor, neurons, bias=None, exact=False):
        return lambda: ops.mlp(x, rows, bias, neurons, activation="relu", skip_zeros=exact)

    def ours(density: float) -> Row:
        chosen = [None if density == 1 else pick(inter, density) for _ in range(CALLS)]
        first = layers[0] if chosen[0] is None else layers[0][chosen[0][0].long()]
        calls = [call(layers[i % COPIES], s) for i, s in enumerate(chosen)]
        bytes_read = 2 * row_bytes * (inter if chosen[0] is None else chosen[0][0].numel())
        return Row(density, bytes_read, calls, lambda: gap(calls[0]().sum(0), expected(first)))

    def exact(density: float) -> Row:
        bias = torch.full((inter,), -1e4, device="cuda")
        bias[pick(inter, density)[0].long()] = 1e4
        calls = [call(layers[i % COPIES], None, bias, True) for i in range(CALLS)]
        full = call(layers[0], None, bias)
        return Row(density, (1 + density) * inter * row_bytes, calls, lambda: gap(calls[0]().sum(0), full().sum(0)))

    def torch_dense() -> Row:
        pairs = [(rows[:, 0].contiguous(), rows[:, 1].T.contiguous()) for rows in layers]
        calls = [lambda p=pairs[i % COPIES]: linear(torch.relu(linear(low, p[0])), p[1]) for i in range(CALLS)]
        return Row(1.0, 2 * inter * row_bytes, calls)

    def torch_index(density: float) -> Row:
        def gathered(rows: Tensor, idx: Tensor) -> Tensor:
            return torch.relu(low @ rows[idx, 0].T) @ rows[idx, 1]

        chosen = [pick(inter, density)[0].long() for _ in range(CALLS)]
        calls = [lambda r=layers[i % COPIES], c=c: gathered(r, c) for i, c in enumerate(chosen)]
        return Row(density, 2 * row_bytes * chosen[0].numel(), calls)

    yield "torch mlp", torch_dense
    yield from (("mlp", partial(ours, density)) for density in MLP_DENSITIES)
    yield from (("mlp exact", partial(exact, density)) for density in (0.03, 0.1))
    yield from (("torch mlp index", partial(torch_index, density)) for density in (0.05, 0.1, 0.3))


def attention_rows(ops, C: int, H: int, D: int) -> Iterator[Named]:
    """Projections and attention over the selected heads."""
    S, P = 2048, 32
    layers = [torch.randn(H, 4, D, C, dtype=DTYPE, device="cuda") / C**0.5 for _ in range(COPIES)]
    caches = [torch.randn(2, 1, H, S, D, dtype=DTYPE, device="cuda") for _ in range(COPIES)]
    x, hidden = torch.randn(1, C, device="cuda"), torch.randn(1, P, C, device="cuda")
    part_bytes = D * C * DTYPE.itemsize
    token = Tokens.one_a_row(torch.full((1,), S - 1, dtype=torch.int32, device="cuda"))

    def choose(density: float) -> list:
        return [None if density == 1 else pick(H, density) for _ in range(CALLS)]

    def count(heads) -> int:
        return H if heads is None else heads[0].numel()

    def qkv(density: float, pending: int) -> Row:
        """`pending` tokens of each group wait for their keys and values; 0: all are made at once."""
        chosen = choose(density)
        kv_len = torch.empty(1, H, dtype=torch.int32, device="cuda")

        def call(i: int):
            lazy = {"hidden": hidden, "kv_len": kv_len, "pending": P} if pending else {}
            if pending:
                kv_len.fill_(S - pending)  # a launch of its own, inside the time
            return ops.attn_qkv(x, layers[i % COPIES], None, None, token, *caches[i % COPIES], chosen[i], **lazy)

        def check() -> float:
            heads = slice(None) if chosen[0] is None else chosen[0][0].long()
            return gap(call(0)[0, heads], torch.einsum("c,hdc->hd", x[0], layers[0][heads, 0].float()))

        parts = count(chosen[0]) + 2 * (count(chosen[0]) if pending else H)
        return Row(density, parts * part_bytes, [lambda i=i: call(i) for i in range(CALLS)], check)

    def out(density: float) -> Row:
        chosen, o = choose(density), torch.randn(1, H, D, device="cuda")
        calls = [lambda i=i, s=s: ops.attn_out(o, layers[i % COPIES], s) for i, s in enumerate(chosen)]

        def check() -> float:
            heads = slice(None) if chosen[0] is None else chosen[0][0].long()
            rows = layers[0][heads, 3].flatten(0, 1).float()
            return gap(calls[0]().sum(0), o[:, heads].flatten(1) @ rows)

        return Row(density, count(chosen[0]) * part_bytes, calls, check)

    def attend(context: int) -> Row:
        q, chosen = torch.randn(1, H, D, device="cuda"), choose(0.42)
        at = Tokens.one_a_row(torch.full((1,), context - 1, dtype=torch.int32, device="cuda"))
        calls = [lambda i=i, s=s: ops.attend(q, *caches[i % COPIES], at, s, scale=0.1) for i, s in enumerate(chosen)]

        def check() -> float:
            heads = chosen[0][0].long()
            k, v = caches[0][:, 0, heads, :context].float()
            weights = torch.softmax(torch.einsum("hd,hsd->hs", q[0, heads], k) * 0.1, -1)
            return gap(calls[0]()[0, heads], torch.einsum("hs,hsd->hd", weights, v))

        return Row(0.42, 2 * count(chosen[0]) * context * D * DTYPE.itemsize, calls, check)

    yield from (("qkv, 1 pending", partial(qkv, density, 1)) for density in HEAD_DENSITIES)
    yield "qkv, 3 pending", partial(qkv, 0.42, 3)
    yield from (("qkv, full kv", partial(qkv, density, 0)) for density in (0.42, 1.0))
    yield from (("attn_out", partial(out, density)) for density in HEAD_DENSITIES)
    yield from ((f"attend {context}", partial(attend, context)) for context in CONTEXTS)


def other_rows(ops, C: int, H: int, inter: int, vocab: int) -> Iterator[Named]:
    """Norm, LM head and selection."""
    x, low = (t := torch.randn(1, C, device="cuda")), t.to(DTYPE)
    head = torch.randn(vocab, C, dtype=DTYPE, device="cuda") / C**0.5
    partials = torch.randn(max(1, 264 * 512 // C), 1, C, device="cuda")
    ones = torch.ones(C, device="cuda")

    def norm() -> Row:
        stream = x.clone()

        def call() -> Tensor:
            return ops.add_norm(stream, partials, ones, ones, ones, kind="layer", eps=1e-5)

        def check() -> float:
            stream.copy_(x)
            return gap(call(), torch.nn.functional.layer_norm(x + partials.sum(0) + 1, (C,), ones, ones))

        return Row(1.0, partials.nbytes, [call] * CALLS, check)

    def lm_head() -> Row:
        def check() -> float:
            return gap(ops.linear(x, head), x @ head.float().T)

        return Row(1.0, head.nbytes, [lambda: ops.linear(x, head)] * CALLS, check)

    def torch_head() -> Row:
        return Row(1.0, head.nbytes, [lambda: linear(low, head)] * CALLS)

    def selection(n: int, call: Callable[[Tensor], Any]) -> Row:
        scores = torch.randn(1, n, device="cuda")
        return Row(0.1, scores.nbytes, [lambda: call(scores)] * CALLS)

    yield "add_norm", norm
    yield "linear", lm_head
    yield "torch linear", torch_head
    yield "threshold", partial(selection, inter, lambda s: ops.select_threshold(s, 1.28, inter // 4))
    yield "top-k", partial(selection, inter, lambda s: ops.select_topk(s, inter // 10))
    yield "top-k heads", partial(selection, H, lambda s: ops.select_topk(s, round(0.42 * H)))


def measure(row: Row) -> list[float]:
    """Seconds of one call, of every replay of a graph of all calls."""
    for call in row.calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in row.calls:
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 3)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    # The first replays warm up; an event stands before every replay.
    return [a.elapsed_time(b) / 1e3 / len(row.calls) for a, b in pairwise(events[2:])]


def run(make: Callable[[], Row], peak: float) -> dict[str, Any]:
    """Check and time one row; an error becomes its result."""
    try:
        row = make()
        error = row.check() if row.check is not None else None
        if error is not None and not error < 1e-3:
            raise AssertionError(f"relative error {error}")
        times = percentiles_ms(measure(row))
        rate = row.bytes / (times["p50_ms"] / 1e3)
        result = {"density": row.density, "bytes": row.bytes, "relative_error": error, **times}
        return result | {"gb_per_s": rate / 1e9, "share_of_read_bandwidth": rate / peak}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def set_tiles(text: str) -> None:
    """`op:NAME=VALUE,...`: try other sizes for an op at batch 1."""
    op, _, sizes = text.partition(":")
    key = (op, tuning.family()) if (op, tuning.family()) in tuning.TABLE else (op, "any")
    if key not in tuning.TABLE or not sizes:
        ops = ", ".join(sorted({name for name, _ in tuning.TABLE}))
        raise ConfigError(f"--tiles expects OP:NAME=VALUE,... with an op of {ops}; found {text!r}")
    one, more = tuning.TABLE[key]
    changes = {name: int(value) for name, value in (pair.split("=") for pair in sizes.split(","))}
    if unknown := set(changes) - set(one):
        raise ConfigError(f"--tiles {text}: {op} has no {', '.join(unknown)}; it has {', '.join(one)}")
    tuning.TABLE[key] = (one | changes, more)


def print_table(results: list[dict[str, Any]]) -> None:
    dense = {(r["shape"], r["op"]): r["p50_ms"] for r in results if r.get("density") == 1}
    print(f"{'shape':10}{'op':17}{'density':>7}{'us':>9}{'GB/s':>7}{'of read':>8}{'dense/this':>11}")
    for r in results:
        print(f"{r['shape']:10}{r['op']:17}", end="")
        if "error" in r:
            print(f"failed: {r['error'].splitlines()[0][:80]}")
            continue
        print(f"{r['density']:7.2f}{r['p50_ms'] * 1e3:9.1f}{r['gb_per_s']:7.0f}", end="")
        ratio = dense.get((r["shape"], r["op"]))
        print(f"{r['share_of_read_bandwidth']:8.0%}" + (f"{ratio / r['p50_ms']:11.2f}" if ratio else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the records")
    parser.add_argument("--shape", action="append", help=f"default: {', '.join(SHAPES)}")
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--tiles", action="append", default=[], help="OP:NAME=VALUE,... at batch 1")
    parser.add_argument("--limit-s", type=float, default=170, help="start nothing new after so many seconds")
    args = parser.parse_args()
    began = monotonic()
    try:
        ops = backend("triton")
        for text in args.tiles:
            set_tiles(text)
        configs = {name: shapes.parse(shapes.shape(name)) for name in args.shape or SHAPES}
    except DejavuError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    peak = read_bandwidth(ops, 4 << 30, 5)
    print(f"{torch.cuda.get_device_name()}: reads {peak / 1e9:.0f} GB/s")
    results, skipped = [], 0
    for name, c in configs.items():
        for rows in (
            mlp_rows(ops, c.hidden_size, c.intermediate_size),
            attention_rows(ops, c.hidden_size, c.num_attention_heads, c.head_dim),
            other_rows(ops, c.hidden_size, c.num_attention_heads, c.intermediate_size, c.vocab_size),
        ):
            for op, make in rows:
                if args.only not in op:
                    continue
                if monotonic() - began > args.limit_s:
                    skipped += 1
                    continue
                result = {"shape": name, "op": op, **run(make, peak)}
                results.append(result)
                record.append(args.out / "kernels_gpu.jsonl", dtype=str(DTYPE), read_bandwidth=peak, **result)
            torch.cuda.empty_cache()
    print_table(results)
    if skipped:
        print(f"{skipped} rows were not started: out of time (--limit-s)")
    return 1 if skipped or any("error" in r for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
