"""Memory on the GPU, and a decode step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

_DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


@dataclass
class Capture:
    """What capture() yields; `graph.replay()` runs what was captured."""

    graph: torch.cuda.CUDAGraph


@contextmanager
def capture() -> Iterator[Capture]:
    """Record the ops called inside as one CUDA graph, in a memory pool of its own.

    Nothing runs until `.graph.replay()`. Run the same step once before: kernels are compiled at their first call, which
    cannot be captured. Raises: KernelUnavailable, by the first op that would have to be.
    """
    holder = Capture(torch.cuda.CUDAGraph())
    with torch.cuda.graph(holder.graph):
        yield holder


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for weights and caches, on the current GPU."""
    return torch.empty(shape, dtype=dtype, device=_DEVICE)
