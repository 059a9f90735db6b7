"""The read bandwidth of this machine: the limit that decoding is held against."""

from __future__ import annotations

from dejavu.kernels.base import Backend

# Far beyond any cache: the largest server parts have about 1 GiB of L3 over all their cores.
BUFFER_BYTES = 2 << 30


def read_bandwidth(ops: Backend, num_bytes: int = BUFFER_BYTES, repeats: int = 3) -> float:
    """Bytes per second at which the threads now set can read memory; the best of `repeats` passes.

    Args:
        ops: the backend, whose device it is.
        num_bytes: size of the buffer, which lives during the call only.
    """
    return ops.read_bandwidth(num_bytes, repeats)
