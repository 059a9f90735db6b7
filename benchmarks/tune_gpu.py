"""Search for better tiles at batch 1 on this GPU: one size of one op at a time, keeping what is faster.

    python benchmarks/tune_gpu.py opt-30b
    python benchmarks/tune_gpu.py opt-6.7b --op mlp_in --op mlp_out

Prints the entries for kernels/triton/tuning.py with their gain; times are those of kernels_gpu.py. Every candidate is
checked against PyTorch before it is timed.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import monotonic

from kernels_gpu import Row, attention_rows, measure, mlp_rows, other_rows, set_tiles
from triton.runtime.errors import OutOfResources, PTXASError

from dejavu.bench import shapes
from dejavu.errors import DejavuError
from dejavu.kernels import backend
from dejavu.kernels.triton import tuning

# What is timed for an op: a row of kernels_gpu.py, and the first argument of its maker (a density, a context).
TIMED = {
    "mlp_in": ("mlp", 0.1),
    "mlp_out": ("mlp", 0.1),
    "attn_qkv": ("qkv, 1 pending", 0.42),
    "attn_out": ("attn_out", 0.42),
    "attend": ("attend 1024", 1024),
    "add_norm": ("add_norm", None),
    "linear": ("linear", None),
}
VALUES = {
    "BN": (2, 4, 8, 16, 32),
    "BC": (128, 256, 512, 1024, 2048),
    "KC": (32, 64, 128),
    "STAGES": (1, 2, 3, 4, 6),
    "SPLITS": (132, 264, 528, 792),
    "BT": (32, 64, 128),
    "BS": (8, 16, 32),
    "num_warps": (1, 2, 4, 8),
}


def seconds(row: Row) -> float:
    """Median time of a call with the tiles now set; infinite where they don't fit or the result is wrong."""
    try:
        if row.check is not None and not row.check() < 1e-3:
            return float("inf")
        return median(measure(row))
    except (OutOfResources, PTXASError):
        return float("inf")


def search(op: str, row: Row, until: float) -> tuple[float, float]:
    """Improve the table's entry in place; returns the time of a call before and after."""
    before = best = seconds(row)
    improved = True
    while improved and monotonic() < until:
        improved = False
        for name, old in tuning.pick(op, 1).items():
            for value in VALUES.get(name, ()):
                if value == old or monotonic() > until:
                    continue
                set_tiles(f"{op}:{name}={value}")
                # Less than 1 % is noise.
                if (time := seconds(row)) < 0.99 * best:
                    best, old, improved = time, value, True
                else:
                    set_tiles(f"{op}:{name}={old}")
    return before, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--op", action="append", choices=TIMED, help="default: all")
    parser.add_argument("--limit-s", type=float, default=60, help="seconds for each op")
    args = parser.parse_args()
    try:
        ops, c = backend("triton"), shapes.parse(shapes.shape(args.shape))
    except DejavuError as error:
        parser.error(str(error))
    groups = (
        mlp_rows(ops, c.hidden_size, c.intermediate_size),
        attention_rows(ops, c.hidden_size, c.num_attention_heads, c.head_dim),
        other_rows(ops, c.hidden_size, c.num_attention_heads, c.intermediate_size, c.vocab_size),
    )
    for group in groups:
        for label, make in group:
            row = (label, getattr(make, "args", (None,))[0])
            for op in args.op or TIMED:
                if TIMED[op] == row:
                    before, after = search(op, make(), monotonic() + args.limit_s)
                    print(f"{op:10} {before * 1e6:7.1f} -> {after * 1e6:7.1f} us  {tuning.pick(op, 1)}", flush=True)


if __name__ == "__main__":
    main()
