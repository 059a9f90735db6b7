"""The read bandwidth of this machine: the limit that decoding is held against."""

from __future__ import annotations

from time import perf_counter
from types import ModuleType

import torch

# Far beyond any cache: the largest server parts have about 1 GiB of L3 over all their cores.
BUFFER_BYTES = 2 << 30


def read_bandwidth(ops: ModuleType, num_bytes: int = BUFFER_BYTES, repeats: int = 3) -> float:
    """Bytes per second at which the threads now set can read memory; the best of `repeats` passes.

    Args:
        ops: the kernel backend. One that can measure reads with its own threads; otherwise PyTorch sums floats.
        num_bytes: size of the buffer, which lives during the call only.
    """
    if hasattr(ops, "read_bandwidth"):
        return ops.read_bandwidth(num_bytes, repeats)
    buffer = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(repeats):
        began = perf_counter()
        buffer.sum()
        best = min(best, perf_counter() - began)
    return buffer.nbytes / best
