"""Sizes of tiles and grids, by op and GPU family: the only place where they stand.

An entry is a pair: a batch of one, and larger batches. `BN` rows by `BC` columns of weights make a tile, `STAGES`
tiles are in flight in a program, `SPLITS` programs share a sum, and at most `PROGRAMS` a list of pending tokens. What
to weigh: a GPU of 3 to 5 TB/s needs some 30 KB of loads in flight on each multiprocessor, in 16-byte accesses, and a
sparse layer has few rows to share out.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl

# Programs of a grid that loops over its rows: enough for 16 on each of 132 multiprocessors.
PROGRAMS = 2112

# Programmatic dependent launch, where the GPU has it: 1 % of a step of OPT-30B on an H200, dense and sparse.
OVERLAP = True

# (op, family) -> (batch 1, larger batches). The family "any" serves GPUs without entries of their own.
TABLE: dict[tuple[str, str], tuple[dict[str, int], dict[str, int]]] = {
    # 8 warps: 5.1 to 4.7 microseconds on an H100, 9 partial sums of C = 7168.
    ("add_norm", "any"): ({"UNROLL": 4, "num_warps": 8}, {"UNROLL": 4, "num_warps": 8}),
    ("linear", "any"): (
        {"BN": 4, "BC": 1024, "SPLIT": 1, "STAGES": 3, "num_warps": 4},
        {"BN": 32, "BC": 32, "SPLIT": 4, "STAGES": 4, "num_warps": 4},
    ),
    ("attn_qkv", "any"): (
        {"BN": 8, "BC": 256, "SPLIT": 4, "STAGES": 5, "num_warps": 2},
        {"BN": 16, "BC": 32, "SPLIT": 4, "STAGES": 4, "num_warps": 4},
    ),
    ("attn_pending", "any"): (
        {"BN": 8, "BC": 128, "SPLIT": 4, "STAGES": 4, "PROGRAMS": 660, "num_warps": 2},
        {"BN": 16, "BC": 128, "SPLIT": 4, "STAGES": 4, "PROGRAMS": 2112, "num_warps": 4},
    ),
    ("attend", "any"): ({"BT": 64, "STAGES": 2, "num_warps": 4}, {"BT": 64, "STAGES": 2, "num_warps": 4}),
    ("attn_out", "any"): (
        {"BN": 16, "BC": 128, "STAGES": 4, "SPLITS": 528, "num_warps": 2},
        {"BN": 32, "BC": 128, "STAGES": 5, "SPLITS": 264, "num_warps": 4},
    ),
    ("mlp_in", "any"): (
        {"BN": 4, "BC": 1024, "SPLIT": 1, "STAGES": 3, "num_warps": 4},
        {"BN": 32, "BC": 32, "SPLIT": 4, "STAGES": 4, "num_warps": 4},
    ),
    ("mlp_out", "any"): (
        {"BN": 16, "BC": 128, "STAGES": 4, "SPLITS": 528, "num_warps": 2},
        {"BN": 32, "BC": 128, "STAGES": 5, "SPLITS": 264, "num_warps": 4},
    ),
    # An H100, C = 12288, against the tiles of bfloat16: rows 115 to 105 microseconds, sums over rows 65 to 60.
    ("linear int8", "any"): (
        {"BN": 4, "BC": 2048, "SPLIT": 1, "STAGES": 3, "num_warps": 4},
        {"BN": 32, "BC": 32, "SPLIT": 4, "STAGES": 4, "num_warps": 4},
    ),
    ("attn_qkv int8", "any"): (
        {"BN": 8, "BC": 512, "SPLIT": 4, "STAGES": 4, "num_warps": 2},
        {"BN": 16, "BC": 32, "SPLIT": 4, "STAGES": 4, "num_warps": 4},
    ),
    ("attn_pending int8", "any"): (
        {"BN": 8, "BC": 256, "SPLIT": 4, "STAGES": 3, "PROGRAMS": 660, "num_warps": 4},
        {"BN": 16, "BC": 128, "SPLIT": 4, "STAGES": 4, "PROGRAMS": 2112, "num_warps": 4},
    ),
    ("attn_out int8", "any"): (
        {"BN": 16, "BC": 256, "STAGES": 4, "SPLITS": 528, "num_warps": 2},
        {"BN": 32, "BC": 128, "STAGES": 5, "SPLITS": 264, "num_warps": 4},
    ),
    ("mlp_in int8", "any"): (
        {"BN": 4, "BC": 2048, "SPLIT": 1, "STAGES": 3, "num_warps": 4},
        {"BN": 32, "BC": 32, "SPLIT": 4, "STAGES": 4, "num_warps": 4},
    ),
    ("mlp_out int8", "any"): (
        {"BN": 16, "BC": 256, "STAGES": 4, "SPLITS": 528, "num_warps": 2},
        {"BN": 32, "BC": 128, "STAGES": 5, "SPLITS": 264, "num_warps": 4},
    ),
    # An H100, C = 12288: rows 75 to 70 microseconds against 8 x 1024; sums over a tenth of the rows 9.3 to 7.5 against
    # 32 x 256 by 4 warps. Four bits: a tile of the same bytes has four times the weights.
    ("linear int4", "any"): (
        {"BN": 16, "BC": 512, "SPLIT": 1, "STAGES": 3, "num_warps": 1},
        {"BN": 32, "BC": 32, "SPLIT": 4, "STAGES": 3, "num_warps": 4},
    ),
    ("attn_qkv int4", "any"): (
        {"BN": 8, "BC": 2048, "SPLIT": 4, "STAGES": 3, "num_warps": 2},
        {"BN": 16, "BC": 32, "SPLIT": 4, "STAGES": 3, "num_warps": 4},
    ),
    ("attn_pending int4", "any"): (
        {"BN": 8, "BC": 512, "SPLIT": 4, "STAGES": 3, "PROGRAMS": 1056, "num_warps": 2},
        {"BN": 16, "BC": 256, "SPLIT": 4, "STAGES": 3, "PROGRAMS": 2112, "num_warps": 4},
    ),
    ("attn_out int4", "any"): (
        {"BN": 16, "BC": 256, "STAGES": 3, "SPLITS": 792, "num_warps": 2},
        {"BN": 32, "BC": 128, "STAGES": 3, "SPLITS": 264, "num_warps": 4},
    ),
    ("mlp_in int4", "any"): (
        {"BN": 16, "BC": 512, "SPLIT": 1, "STAGES": 3, "num_warps": 1},
        {"BN": 32, "BC": 32, "SPLIT": 4, "STAGES": 3, "num_warps": 4},
    ),
    ("mlp_out int4", "any"): (
        {"BN": 16, "BC": 256, "STAGES": 3, "SPLITS": 792, "num_warps": 2},
        {"BN": 32, "BC": 128, "STAGES": 3, "SPLITS": 264, "num_warps": 4},
    ),
}


@cache
def family() -> str:
    """The GPU's family, as "sm90"."""
    return "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "any"


def pick(op: str, batch: int, bits: int = 0) -> dict[str, int]:
    """The sizes for an op on this GPU, at a batch size and bits of quantised weights; a copy."""
    op = f"{op} int{bits}" if (f"{op} int{bits}", "any") in TABLE else op
    return dict(TABLE.get((op, family()), TABLE[op, "any"])[batch > 1])


def overlap() -> dict[str, bool]:
    """Arguments of a launch that may begin while the kernel before it ends (tiles.begin)."""
    able = family() != "any" and int(family()[2:]) >= 90 and hasattr(tl.extra.cuda, "gdc_wait")
    return {"PDL": True, "launch_pdl": True} if OVERLAP and able else {"PDL": False}
