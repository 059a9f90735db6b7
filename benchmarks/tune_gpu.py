"""Time sets of tiles at batch 1 on this GPU, the table's own first.

    PYTHONPATH=src python benchmarks/tune_gpu.py opt-30b
    PYTHONPATH=src python benchmarks/tune_gpu.py opt-6.7b --op mlp_in --op mlp_out

Prints each set with its time, those of kernels_gpu.py; the best belongs into kernels/triton/tuning.py with its gain.
All are compiled first, in processes side by side, and checked against PyTorch before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from contextlib import suppress
from statistics import median

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
    "attn_pending": ("qkv, 3 pending", 0.42),
    "attn_out": ("attn_out", 0.42),
    "attend": ("attend 128", 128),
    "add_norm": ("add_norm", None),
}
_SUMS = [
    (8, 512, 264, 4, 4), (8, 512, 528, 3, 4), (16, 256, 264, 6, 4), (16, 256, 396, 4, 4), (16, 256, 528, 4, 4),
    (32, 128, 264, 6, 4), (32, 128, 792, 3, 4), (16, 128, 528, 4, 2), (16, 128, 792, 4, 2), (64, 64, 396, 4, 4),
    (32, 256, 264, 4, 8), (32, 64, 792, 4, 4),
]  # fmt: skip
SETS = {
    "mlp_in": ("BN BC STAGES num_warps", [
        (1, 1024, 4, 1), (1, 2048, 4, 4), (2, 512, 4, 2), (2, 1024, 4, 4), (2, 1024, 3, 2), (4, 512, 4, 4),
        (4, 1024, 2, 8), (4, 2048, 3, 8), (8, 256, 4, 4), (8, 512, 3, 4), (8, 1024, 2, 8), (2, 1024, 4, 2),
        (2, 1024, 5, 1), (4, 512, 6, 2), (2, 512, 6, 1), (4, 256, 8, 1),
    ]),
    "mlp_out": ("BN BC SPLITS STAGES num_warps", _SUMS),
    "attn_out": ("BN BC SPLITS STAGES num_warps", _SUMS),
    "attn_qkv": ("BN BC STAGES num_warps", [
        (16, 256, 4, 4), (8, 512, 3, 4), (8, 256, 4, 2), (8, 512, 4, 2), (4, 512, 4, 2), (8, 256, 6, 2), (8, 128, 8, 1),
    ]),
    "attn_pending": ("BN BC STAGES PROGRAMS num_warps", [
        (8, 128, 4, 528, 2), (8, 128, 4, 1056, 2), (8, 256, 4, 528, 4), (16, 128, 4, 396, 4), (8, 256, 3, 396, 2),
        (16, 64, 4, 528, 2),
    ]),
    "attend": ("BT num_warps", [(32, 4), (32, 1), (64, 8), (128, 4), (128, 8), (64, 2)]),
    "add_norm": ("UNROLL num_warps", [(4, 8), (4, 32), (8, 16), (8, 32), (16, 16), (3, 32)]),
}  # fmt: skip


def seconds(row: Row) -> float:
    """Median time of a call with the tiles now set; infinite where they don't fit or the result is wrong."""
    try:
        if row.check is not None and not row.check() < 1e-3:
            return float("inf")
        return median(measure(row))
    except (OutOfResources, PTXASError):
        return float("inf")


def choices(op: str) -> list[str]:
    """The sets of an op as --tiles takes them; the table's own is the first, empty."""
    names, sets = SETS[op]
    return ["", *(f"{op}:" + ",".join(f"{n}={v}" for n, v in zip(names.split(), s, strict=True)) for s in sets)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--op", action="append", choices=TIMED, help="default: all")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("PART", "OF"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        ops, c = backend("triton"), shapes.parse(shapes.shape(args.shape))
    except DejavuError as error:
        parser.error(str(error))
    if args.compile is None:
        command = [sys.executable, __file__, *sys.argv[1:], "--compile"]
        started = [subprocess.Popen([*command, str(i), "14"], stderr=subprocess.DEVNULL) for i in range(14)]
        for process in started:
            process.wait()
    groups = (
        mlp_rows(ops, c.hidden_size, c.intermediate_size),
        attention_rows(ops, c.hidden_size, c.num_attention_heads, c.head_dim),
        other_rows(ops, c.hidden_size, c.num_attention_heads, c.intermediate_size, c.vocab_size),
    )
    number = itertools.count()
    for group in groups:
        for label, make in group:
            timed = (label, getattr(make, "args", (None,))[0])
            for op in args.op or TIMED:
                if TIMED[op] != timed:
                    continue
                row, entry = make(), dict(tuning.TABLE)
                for choice in choices(op):
                    if args.compile is not None and next(number) % args.compile[1] != args.compile[0]:
                        continue
                    tuning.TABLE.update(entry)
                    if choice:
                        set_tiles(choice)
                    if args.compile is not None:
                        with suppress(OutOfResources, PTXASError):
                            row.calls[0]()
                    else:
                        print(f"{args.shape} {op:9} {seconds(row) * 1e6:7.1f} us  {choice or 'as it is'}", flush=True)
                tuning.TABLE.update(entry)


if __name__ == "__main__":
    main()
